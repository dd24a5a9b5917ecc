package cloudinit

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// Version says in which form a seed carries the network configuration.
type Version string

// The versions. V1 is what every cloud-init and every renderer of it understands, and what a ConfigDrive's
// network_data.json is turned into; V2 is netplan's, and can say more; [InUserData] is a program that the guest runs at
// every boot, for images whose cloud-init takes no network configuration.
const (
	V1         Version = "v1"
	V2         Version = "v2"
	InUserData Version = "user-data"
	NoNetwork  Version = "none"
)

// Interface is one NIC as the guest is to configure it: by DHCP where it has a server, by fixed settings otherwise.
type Interface struct {
	NIC   nic.NIC
	DHCP4 bool // the first IPv4 address, the IPv4 routes and the resolvers come by DHCP
	DHCP6 bool // all of IPv6 comes by router advertisements and DHCPv6

	// IgnoreRA keeps fixed IPv6 settings free of what router advertisements say. The advertisements of our own responder
	// say the same; those of a network that a VF is on are the network's, which the pod would have heard as well.
	IgnoreRA bool
}

// Network is the network configuration of a seed, made by [NewNetwork]. The zero Network is none.
type Network struct {
	version Version
	links   []link
}

// ErrOnLink says that a route of a NIC needs what version 1 has no words for: that an address outside the NIC's own
// networks is on the link. Calico's gateway is such an address.
var ErrOnLink = errors.New("version 1 of cloud-init's network configuration has no on-link routes")

// link is an Interface with only what is fit to be written. Everything in it is a number, an address, or a name of
// harmless letters: cloud-init's renderers put names unquoted into files that shells read (ifcfg-eth0, interfaces).
type link struct {
	name         string
	mac          nic.MAC
	mtu          int
	dhcp4, dhcp6 bool
	ignoreRA     bool
	metric       int            // of the default route that comes by DHCP; 0: the guest's choice
	addrs        []netip.Prefix // fixed ones, as the rest
	routes       []nic.Route
	servers      []netip.Addr
	search       []string
}

// NewNetwork plans the network configuration of a guest. Notes are sentences for the user about what of it the guest is
// not told.
func NewNetwork(version Version, interfaces []Interface) (n Network, notes []string, err error) {
	if !slices.Contains([]Version{V1, V2, InUserData}, version) {
		return Network{}, nil, fmt.Errorf("network configuration %q: use %s, %s or %s", version, V1, V2, InUserData)
	}
	n.version = version
	names := guestNames(interfaces)
	var errs []error
	for i, in := range interfaces {
		note := func(format string, a ...any) { notes = append(notes, in.NIC.Name+": "+fmt.Sprintf(format, a...)) }
		l := in.link(names[i], note)
		if version == V1 {
			errs = append(errs, l.fitV1(note))
		}
		n.links = append(n.links, l)
	}
	return n, notes, errors.Join(errs...)
}

// nameForm is that of interface names which no renderer and no shell takes for anything else. Linux allows 15 bytes.
var nameForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]{0,14}$`)

// guestNames gives the names of the guest's interfaces: those of the pod's, eth0, eth1 and net1 mostly. A guest has the
// same names then whatever its board, its kernel's naming and the number of its disks are, and keeps them when its disk
// is booted again with other MACs. A name that is not fit is replaced.
func guestNames(interfaces []Interface) []string {
	taken := map[string]bool{"lo": true, "default": true, "all": true} // the last two are what sysctl calls every interface
	names := make([]string, len(interfaces))
	for i, in := range interfaces {
		if n := in.NIC.Name; nameForm.MatchString(n) && !taken[n] {
			names[i], taken[n] = n, true
		}
	}
	next := 0
	for i := range names {
		for ; names[i] == ""; next++ {
			if n := fmt.Sprintf("eth%d", next); !taken[n] {
				names[i], taken[n] = n, true
			}
		}
	}
	return names
}

func (in Interface) link(name string, note func(string, ...any)) link {
	n := in.NIC
	l := link{name: name, mac: n.MAC, mtu: n.MTU, dhcp4: in.DHCP4, dhcp6: in.DHCP6}
	first := true
	for _, a := range n.Addrs {
		is4 := a.Addr().Is4()
		switch {
		case is4 && in.DHCP4 && first:
			first = false // DHCP carries one
		case !is4 && in.DHCP6: // DHCPv6 carries all
		default:
			l.addrs = append(l.addrs, a)
		}
	}
	for _, r := range n.Routes {
		if dst := r.Dst.Addr(); dst.Is6() && r.Metric == kernelMetric6 {
			r.Metric = 0
		}
		switch is4 := r.Dst.Addr().Is4(); {
		case is4 && in.DHCP4 || !is4 && in.DHCP6:
			if r.IsDefault() && l.metric == 0 {
				l.metric = r.Metric
			}
		case l.first(is4) < 0:
			note("the route to %s is left out: the guest has no address of its family", r.Dst)
		case !r.OnLink() || !within(r.Dst, n):
			l.routes = append(l.routes, r)
		}
	}
	l.ignoreRA = in.IgnoreRA && l.first(false) >= 0 && !in.DHCP6
	if len(l.addrs) > 0 && !(in.DHCP4 || in.DHCP6) {
		l.resolver(n.DNS, note)
	}
	return l
}

// kernelMetric6 is the metric that Linux gives an IPv6 route without one: IP6_RT_PRIO_USER.
const kernelMetric6 = 1024

// within says whether an on-link route to dst says nothing new, as the NIC's addresses put dst on the link already and
// no other route takes it away.
func within(dst netip.Prefix, n nic.NIC) bool {
	covers := func(p netip.Prefix) bool { return p.Bits() <= dst.Bits() && p.Contains(dst.Addr()) }
	return slices.ContainsFunc(n.Addrs, covers) &&
		!slices.ContainsFunc(n.Routes, func(r nic.Route) bool { return !r.OnLink() && !r.IsDefault() && covers(r.Dst) })
}

// first gives the index of the first fixed address of a family, or -1.
func (l *link) first(is4 bool) int {
	return slices.IndexFunc(l.addrs, func(a netip.Prefix) bool { return a.Addr().Is4() == is4 })
}

// home gives the index of the fixed address whose network a gateway is in, or else of the first of its family: what the
// route is added after.
func (l *link) home(r nic.Route) int {
	if i := slices.IndexFunc(l.addrs, func(a netip.Prefix) bool { return r.Gw.IsValid() && a.Contains(r.Gw) }); i >= 0 {
		return i
	}
	return l.first(r.Dst.Addr().Is4())
}

// onLink says whether r only works for a guest that is told that its destination or its gateway is on the link.
// Link-local gateways always are.
func (l *link) onLink(r nic.Route) bool {
	return r.OnLink() || !(r.Gw.Is6() && r.Gw.IsLinkLocalUnicast()) &&
		!slices.ContainsFunc(l.addrs, func(a netip.Prefix) bool { return a.Contains(r.Gw) })
}

// fitV1 takes away what version 1 has no words for, and refuses where the rest would not work.
func (l *link) fitV1(note func(string, ...any)) error {
	for i, r := range l.routes {
		if l.onLink(r) {
			what := r.Gw.String()
			if r.OnLink() {
				what = r.Dst.String()
			}
			return fmt.Errorf("%s: the route to %s needs %s on the link: %w", l.name, r.Dst, what, ErrOnLink)
		}
		if r.MTU != 0 || r.Src.IsValid() {
			note("the MTU and the source address of the route to %s are left out: version 1 has no words for them", r.Dst)
			l.routes[i].MTU, l.routes[i].Src = 0, netip.Addr{}
		}
	}
	return nil
}

// resolver takes servers and search domains. Without a search list the domain is one.
func (l *link) resolver(d nic.DNS, note func(string, ...any)) {
	l.servers = d.Servers
	search := d.Search
	if len(search) == 0 && d.Domain != "" {
		search = []string{d.Domain}
	}
	for _, s := range search {
		s = strings.TrimSuffix(s, ".")
		const longest = 253 // RFC 1035, section 2.3.4
		switch {
		case len(s) > longest || !domainForm.MatchString(s):
			note("search domain %s is no valid name, it is left out", quote(s))
		case !slices.Contains(l.search, s):
			l.search = append(l.search, s)
		}
	}
	if len(d.Options) > 0 {
		note("cloud-init carries no resolver options, %q are left out", d.Options)
	}
}

// domainForm is that of host names with underscores, which are common in private zones.
var domainForm = regexp.MustCompile(`^` + domainLabel + `(\.` + domainLabel + `)*$`)

const domainLabel = `[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?`

// strs gives the texts of a list, nil of an empty one.
func strs[T fmt.Stringer](all []T) (texts []string) {
	for _, a := range all {
		texts = append(texts, a.String())
	}
	return texts
}
