package dhcp

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
)

// Bounds of a Lease6. A message and a socket filter have to hold them all.
const (
	maxAddrs6  = 16 // 448 bytes of a DHCPv6 message
	maxRouters = 16
	minMTU6    = 1280 // bytes: what every IPv6 link has (RFC 8200, section 5)
)

// Lease6 is all that one guest NIC is told of IPv6. Pure data; JSON-able.
type Lease6 struct {
	MAC      nic.MAC       `json:"mac"`
	Addrs    []netip.Addr  `json:"addrs"`              // the guest's, by DHCPv6
	Prefixes []Prefix6     `json:"prefixes,omitempty"` // what is on the link
	Routers  []Router6     `json:"routers,omitempty"`  // the default router first
	Server   netip.Addr    `json:"server"`             // link-local: DHCPv6's source, and that of advertisements where there is no router
	MTU      int           `json:"mtu"`                // bytes, as `ip link` counts
	DNS      nic.DNS       `json:"dns,omitzero"`       // IPv6 servers and well-formed names only
	Hostname string        `json:"hostname,omitempty"`
	Duration time.Duration `json:"duration"` // nanoseconds; 136 years or more stand for ever
}

// Prefix6 is a prefix whose addresses the guest reaches without a router.
type Prefix6 struct {
	Prefix netip.Prefix `json:"prefix"`
	Auto   bool         `json:"auto,omitempty"` // the guest makes its address itself (RFC 4862), and it is the pod's
}

// Router6 is a next hop of the pod's routes, as the guest gets it: an advertisement names a router by its own source
// address, which has to be link-local (RFC 4861, section 6.1.2).
type Router6 struct {
	Gateway netip.Addr     `json:"gateway"` // the pod's next hop
	Source  netip.Addr     `json:"source"`  // the guest's: Gateway where that is link-local, else one of ours that stands for it
	Default bool           `json:"default,omitempty"`
	Routes  []netip.Prefix `json:"routes,omitempty"` // others that lead through it (RFC 4191)
}

// stands says whether Source stands for another address.
func (r Router6) stands() bool { return r.Source != r.Gateway }

// NewLease6 gives the IPv6 lease of a NIC, and false where there is nothing to say: the NIC has no IPv6 address, or an
// MTU that IPv6 cannot live with, or is a VF, whose frames do not pass through the host. Notes are sentences for the user
// about what the guest is not told; those that NewLease has too are the same, word by word.
func NewLease6(n nic.NIC, hostname string) (l Lease6, notes []string, ok bool) {
	if n.VF != nil {
		return Lease6{}, nil, false
	}
	note := func(format string, args ...any) { notes = append(notes, n.Name+": "+fmt.Sprintf(format, args...)) }
	l = Lease6{MAC: n.MAC, MTU: n.MTU, Server: linkLocal(n.MAC[:]), Duration: LeaseTime}
	for _, a := range n.Addrs {
		l.address(a, note)
	}
	switch {
	case len(l.Addrs) == 0:
		return Lease6{}, notes, false
	case n.MTU < minMTU6:
		note("its MTU of %d is less than IPv6 needs (%d), so the guest gets no IPv6", n.MTU, minMTU6)
		return Lease6{}, notes, false
	}
	l.route(n.Routes, note)
	l.DNS = resolver(n.DNS, netip.Addr.Is6, note)
	l.Hostname = hostName(hostname, note)
	return l, notes, true
}

// address adds an address and the prefix that it puts on the link.
func (l *Lease6) address(a netip.Prefix, note func(string, ...any)) {
	switch addr := a.Addr(); {
	case !a.IsValid() || !addr.Is6() || addr.Is4In6() || !addr.IsGlobalUnicast() || addr.Zone() != "":
		return // link-local ones the guest makes itself
	case slices.Contains(l.Addrs, addr):
	case len(l.Addrs) == maxAddrs6:
		note("DHCPv6 carries %d addresses, %s is left out", maxAddrs6, a)
		return
	default:
		l.Addrs = append(l.Addrs, addr)
	}
	l.onLink(Prefix6{Prefix: a.Masked(), Auto: a.Bits() == 64 && a.Addr() == eui64(a, l.MAC)})
}

// onLink adds a prefix, but not the address of a single host of ours: that one is no network.
func (l *Lease6) onLink(p Prefix6) {
	if p.Prefix.IsSingleIP() && slices.Contains(l.Addrs, p.Prefix.Addr()) {
		return
	}
	if i := slices.IndexFunc(l.Prefixes, func(o Prefix6) bool { return o.Prefix == p.Prefix }); i >= 0 {
		l.Prefixes[i].Auto = l.Prefixes[i].Auto || p.Auto
		return
	}
	l.Prefixes = append(l.Prefixes, p)
}

// route sorts the routes by their next hops. The kernel takes the least metric.
func (l *Lease6) route(routes []nic.Route, note func(string, ...any)) {
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(a, b nic.Route) int { return cmp.Compare(a.Metric, b.Metric) })
	seen := map[netip.Prefix]bool{}
	for _, r := range routes {
		dst, gw := r.Dst.Masked(), r.Gw.WithZone("")
		if !dst.IsValid() || !dst.Addr().Is6() || dst.Addr().Is4In6() || gw.IsValid() && (!gw.Is6() || gw.Is4In6()) ||
			!r.IsDefault() && (dst.Addr().IsLinkLocalUnicast() || dst.Addr().IsMulticast()) { // every host has these
			continue
		}
		if gw.IsUnspecified() {
			gw = netip.Addr{} // how the kernel says that there is none
		}
		connected := !gw.IsValid() && slices.ContainsFunc(l.Prefixes, func(p Prefix6) bool { return p.Prefix == dst })
		switch {
		case connected:
		case seen[dst]:
			note("a router advertisement carries one route to %s, the one with metric %d is left out", dst, r.Metric)
			continue
		case slices.Contains(l.Addrs, gw) || gw.IsMulticast():
			note("the route to %s is left out of router advertisements: %s cannot be its router", dst, gw)
			continue
		case r.MTU != 0 && r.MTU < l.MTU:
			note("router advertisements carry no MTU of a route, the %d of the one to %s is left out", r.MTU, dst)
		}
		seen[dst] = true
		if !gw.IsValid() {
			l.onLink(Prefix6{Prefix: dst})
		} else if !l.via(gw, dst) {
			note("%d routers are advertised, the route to %s by %s is left out", maxRouters, dst, gw)
		}
	}
	slices.SortStableFunc(l.Routers, func(a, b Router6) int {
		switch {
		case a.Default == b.Default:
			return 0
		case a.Default:
			return -1
		}
		return 1
	})
}

// via adds a route through a router, and says whether there was room for it.
func (l *Lease6) via(gw netip.Addr, dst netip.Prefix) bool {
	i := slices.IndexFunc(l.Routers, func(r Router6) bool { return r.Gateway == gw })
	if i < 0 {
		if i = len(l.Routers); i == maxRouters {
			return false
		}
		r := Router6{Gateway: gw, Source: gw}
		if !gw.IsLinkLocalUnicast() {
			r.Source = linkLocal(gw.AsSlice())
		}
		l.Routers = append(l.Routers, r)
	}
	if dst.Bits() == 0 {
		l.Routers[i].Default = true
	} else {
		l.Routers[i].Routes = append(l.Routers[i].Routes, dst)
	}
	return true
}

// Own gives the link-local addresses that exist between this package and the guest only: whatever is from them or for
// them has to stay away from the cluster, and what comes from there with one of them, from the guest. A guest's
// packet for one of them is for us if it is a neighbour solicitation, or DHCPv6; nobody wants any other.
func (l *Lease6) Own() []netip.Addr {
	own := []netip.Addr{l.Server}
	for _, r := range l.Routers {
		if r.stands() {
			own = append(own, r.Source)
		}
	}
	return own
}

// linkLocal gives the link-local address that stands for a gateway or serves a MAC. It is the same in every life of
// every VM, so a guest that is suspended, or whose supervisor is another one, keeps its router. Its interface identifier
// is 63 bits of a hash: on a link of a thousand hosts it is taken with a chance of 1 to 10^16. The bit that is missing is 0,
// which says that it is not made of a universal MAC (RFC 4291, section 2.5.1).
func linkLocal(of []byte) netip.Addr {
	const universal = 0x02
	h := sha256.Sum256(append([]byte("virtlet link-local\x00"), of...))
	a := [16]byte{0xfe, 0x80}
	copy(a[8:], h[:8])
	a[8] &^= universal
	return netip.AddrFrom16(a)
}

// eui64 gives the address that a host with that MAC makes itself in a /64 (RFC 4291, appendix A).
func eui64(p netip.Prefix, m nic.MAC) netip.Addr {
	a := p.Addr().As16()
	copy(a[8:], []byte{m[0] ^ 0x02, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
	return netip.AddrFrom16(a)
}

// serverMAC is the source of the frames that the guest gets, as in IPv4.
func (l *Lease6) serverMAC() nic.MAC { return (&Lease{MAC: l.MAC}).serverMAC() }

// search gives the search list; a domain alone is a list of one.
func (l *Lease6) search() []string {
	if len(l.DNS.Search) == 0 && l.DNS.Domain != "" {
		return []string{l.DNS.Domain}
	}
	return l.DNS.Search
}

// check says what makes a lease unfit to be served.
func (l *Lease6) check() error {
	bad := func(a netip.Addr) bool { return !a.Is6() || a.Is4In6() }
	linkLocal := func(a netip.Addr) bool { return !bad(a) && a.IsLinkLocalUnicast() }
	switch {
	case l.MAC.IsZero():
		return fmt.Errorf("lease of %v has no MAC", l.Addrs)
	case len(l.Addrs) == 0 || len(l.Addrs) > maxAddrs6 || slices.ContainsFunc(l.Addrs, bad):
		return fmt.Errorf("lease of %s has not 1 to %d IPv6 addresses but %v", l.MAC, maxAddrs6, l.Addrs)
	case !linkLocal(l.Server):
		return fmt.Errorf("lease of %s has no link-local server address but %q", l.MAC, l.Server)
	case l.MTU < minMTU6:
		return fmt.Errorf("lease of %s has an MTU of %d, IPv6 needs %d", l.MAC, l.MTU, minMTU6)
	case l.Duration < time.Second:
		return fmt.Errorf("lease of %s lasts %s, less than a second", l.MAC, l.Duration)
	case len(l.Routers) > maxRouters:
		return fmt.Errorf("lease of %s has %d routers, more than %d", l.MAC, len(l.Routers), maxRouters)
	}
	for _, r := range l.Routers {
		if bad(r.Gateway) || !linkLocal(r.Source) {
			return fmt.Errorf("lease of %s has router %q, to be known as %q: want IPv6, and link-local", l.MAC, r.Gateway, r.Source)
		}
	}
	for _, p := range l.Prefixes {
		if !p.Prefix.IsValid() || bad(p.Prefix.Addr()) {
			return fmt.Errorf("lease of %s has prefix %q: want an IPv6 one", l.MAC, p.Prefix)
		}
	}
	return nil
}
