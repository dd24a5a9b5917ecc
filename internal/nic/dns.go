package nic

import (
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of a resolver configuration. resolv.conf has room for three servers and, in old libraries, six search
// domains; the rest is more than any real network gives.
const (
	maxDNS    = 32  // entries of each list
	maxOption = 255 // bytes of one option
)

// resolver gives what a result says of DNS to the network's first interface. All of it is text from outside that ends in
// configuration files of the guest, so what is not what it should be is dropped.
func (p *planner) resolver(c *claim) {
	if c.Result == nil || len(c.nics) == 0 {
		return
	}
	from, to := c.Result.DNS, &c.nics[0].DNS
	drop := func(what, s, why string) {
		p.note("network %s: the DNS %s %s of the CNI result is dropped: %s", quote(c.Network), what, quote(s), why)
	}
	for _, s := range p.few(c, "servers", from.Nameservers) {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		a = a.Unmap()
		switch {
		case err != nil:
			drop("server", s, "it is no IP address")
		case a.Zone() != "":
			drop("server", s, "its zone means nothing to the guest")
		case a.IsLoopback():
			drop("server", s, "the guest's loopback is another than the pod's")
		case unfit(a) != "":
			drop("server", s, "it is "+unfit(a))
		default:
			to.Servers = add(to.Servers, a)
		}
	}
	if name, ok := domain(from.Domain); ok && to.Domain == "" {
		to.Domain = name
	} else if from.Domain != "" && !ok {
		drop("domain", from.Domain, "it is no domain name")
	}
	for _, s := range p.few(c, "search domains", from.Search) {
		if name, ok := domain(s); ok {
			to.Search = add(to.Search, name)
		} else {
			drop("search domain", s, "it is no domain name")
		}
	}
	for _, s := range p.few(c, "options", from.Options) {
		switch {
		case s == "" || len(s) > maxOption:
			drop("option", s, "it is empty or too long")
		case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
			drop("option", s, "it has control characters")
		default:
			to.Options = add(to.Options, s)
		}
	}
}

// few bounds one list.
func (p *planner) few(c *claim, what string, all []string) []string {
	if len(all) <= maxDNS {
		return all
	}
	p.note("network %s: the CNI result has %d DNS %s: the first %d are taken", quote(c.Network), len(all), what, maxDNS)
	return all[:maxDNS]
}

func add[T comparable](all []T, v T) []T {
	if slices.Contains(all, v) {
		return all
	}
	return append(all, v)
}

// domain gives the name without the final dot, and false where it is none: RFC 1035, 2.3.4, allows labels of 63 bytes
// and names of 255 in wire form, which is 253 as text. Underscores are common in private zones.
func domain(s string) (string, bool) {
	const maxLabel, maxName = 63, 253
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > maxName {
		return "", false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxLabel {
			return "", false
		}
		for _, b := range []byte(label) {
			switch {
			case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '-', b == '_':
			default:
				return "", false
			}
		}
	}
	return s, true
}
