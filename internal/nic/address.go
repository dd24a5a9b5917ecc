package nic

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
)

// family indexes what is kept for each address family.
type family int

const (
	ipv4 family = iota
	ipv6
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

// version is 4 or 6.
func (f family) version() int { return [...]int{4, 6}[f] }

func (f family) String() string { return [...]string{"IPv4", "IPv6"}[f] }

// linkAddresses gives the guest the addresses of its link, in the kernel's order. IPv6 link-local ones stay out: the
// guest makes its own from its MAC. IPv4 ones (169.254.0.0/16) are there because a plugin set them.
func (p *planner) linkAddresses(d *draft) {
	for _, a := range d.link.Addrs {
		px, ok := clean(a.Prefix)
		if !ok || linkLocal6(px.Addr()) {
			continue
		}
		if fault := unfit(px.Addr()); fault != "" {
			p.note("interface %s: the address %s is left out: it is %s", quote(d.Name), px, fault)
			continue
		}
		d.given[familyOf(px.Addr())] = true
		d.address(p.guestPrefix(d, a, px))
	}
}

// guestPrefix gives the prefix that makes the guest reach what the namespace reaches. An operating system takes it that
// all of an address's prefix is on the link. Where the namespace had that undone (the ptp plugin deletes the connected
// route and leads the prefix through its gateway; IFA_F_NOPREFIXROUTE; a peer address of another network) the guest
// would look for its neighbours in vain, so it gets the address alone, /32 or /128 as with Calico, and the namespace's
// routes beside it. No connected route alone is no sign of that: policy routing may have moved it to another table.
func (p *planner) guestPrefix(d *draft, a Addr, px netip.Prefix) netip.Prefix {
	const noPrefixRoute = 0x200 // IFA_F_NOPREFIXROUTE, linux/if_addr.h
	alone := host(px.Addr())
	if px == alone {
		return px
	}
	off := a.Flags&noPrefixRoute != 0
	if peer, ok := clean(a.Peer); ok && peer.Masked() != px.Masked() {
		off = true
	}
	for _, r := range d.kernel {
		if r.Dst != px.Masked() {
			continue
		}
		if !r.Gw.IsValid() {
			return px
		}
		off = true
	}
	if !off {
		return px
	}
	p.note("interface %s: the guest gets %s as %s: the namespace does not have %s on the link", quote(d.Name), px, alone, px.Masked())
	return alone
}

// resultAddresses adds the addresses of a family that the plugin left to us: the link has none of it.
func (p *planner) resultAddresses(c *claim) {
	if c.Result == nil || len(c.nics) == 0 {
		return
	}
	for i, ip := range c.Result.IPs {
		if ip == nil {
			p.note("network %s: entry %d of ips in the CNI result is empty", quote(c.Network), i)
			continue
		}
		px, ok := prefixOf(ip.Address)
		switch fault := unfit(px.Addr()); {
		case !ok:
			p.note("network %s: entry %d of ips in the CNI result is ignored: it has no valid address", quote(c.Network), i)
			continue
		case fault != "":
			p.note("network %s: the address %s of the CNI result is ignored: it is %s", quote(c.Network), px, fault)
			continue
		case px.Bits() == 0:
			p.note("network %s: the address %s of the CNI result is ignored: its prefix is every network", quote(c.Network), px)
			continue
		}
		d := p.owner(c, ip.Interface, px.Addr())
		if d == nil {
			p.note("network %s: the address %s of the CNI result is ignored: nothing says which of its interfaces it is for", quote(c.Network), px)
			continue
		}
		p.resultGateway(c, d, px.Addr(), ip.Gateway)
		p.resultAddress(c, d, px)
	}
}

func (p *planner) resultAddress(c *claim, d *draft, px netip.Prefix) {
	f := familyOf(px.Addr())
	switch {
	case carries(d.link, px.Addr()):
		if !slices.ContainsFunc(d.link.Addrs, func(a Addr) bool { q, _ := clean(a.Prefix); return q == px }) {
			p.note("network %s: the CNI result gives interface %s the address %s, the link has it with another prefix length: the link's is taken", quote(c.Network), quote(d.Name), px)
		}
	case linkLocal6(px.Addr()):
		p.note("network %s: the link-local address %s of the CNI result is left out: the guest makes its own", quote(c.Network), px)
	case d.given[f]:
		p.note("network %s: the address %s of the CNI result is ignored: interface %s has other %s addresses in the namespace, which are taken", quote(c.Network), px, quote(d.Name), f)
	default:
		d.address(px)
	}
}

// resultGateway keeps the gateway that a result gives beside an address, for routes without one.
func (p *planner) resultGateway(c *claim, d *draft, addr netip.Addr, ip net.IP) {
	gw := addrOf(ip)
	switch f := familyOf(addr); {
	case !gw.IsValid() || gw.IsUnspecified():
	case familyOf(gw) != f || unfit(gw) != "" || gw == addr:
		p.note("network %s: the gateway %s of the CNI result is ignored: it cannot be the gateway of %s", quote(c.Network), gw, addr)
	case !d.gws[f].IsValid():
		d.gws[f] = gw
	}
}

// owner gives the interface that an address of a result belongs to. The index is a hint that plugins get wrong: missing,
// null, -1, out of range, of a host interface, or in another order than the interfaces. What the links carry decides;
// then the index; then the only interface of the network; then the one that the plugin was asked to make.
func (p *planner) owner(c *claim, index *int, addr netip.Addr) *draft {
	var named *draft
	if index != nil && *index >= 0 && *index < len(c.ifaces) {
		named = c.ifaces[*index]
	}
	if named != nil && carries(named.link, addr) {
		return named
	}
	if i := slices.IndexFunc(c.nics, func(d *draft) bool { return carries(d.link, addr) }); i >= 0 {
		if named != nil {
			p.note("network %s: the CNI result gives %s to interface %s, but %s has it: so has the guest", quote(c.Network), addr, quote(named.Name), quote(c.nics[i].Name))
		}
		return c.nics[i]
	}
	if named != nil || len(c.nics) == 1 {
		return cmp.Or(named, c.nics[0])
	}
	if i := slices.IndexFunc(c.nics, func(d *draft) bool { return d.Name == c.IfName }); i >= 0 {
		return c.nics[i]
	}
	return nil
}

// address gives d an address, once.
func (d *draft) address(px netip.Prefix) {
	if !slices.Contains(d.Addrs, px) {
		d.Addrs = append(d.Addrs, px)
	}
}

// first gives d's first address of the family, or the zero Addr.
func (d *draft) first(f family) netip.Addr {
	for _, a := range d.Addrs {
		if familyOf(a.Addr()) == f {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

func (d *draft) has(f family) bool { return d.first(f).IsValid() }

// owns says whether a is an address of the guest on d.
func (d *draft) owns(a netip.Addr) bool {
	return slices.ContainsFunc(d.Addrs, func(px netip.Prefix) bool { return px.Addr() == a })
}

// connected says whether dst is a network of d's own addresses, which a guest routes without being told.
func (d *draft) connected(dst netip.Prefix) bool {
	return slices.ContainsFunc(d.Addrs, func(px netip.Prefix) bool { return px.Masked() == dst })
}

func carries(l *Link, addr netip.Addr) bool {
	return addr.IsValid() && slices.ContainsFunc(l.Addrs, func(a Addr) bool {
		px, ok := clean(a.Prefix)
		return ok && px.Addr() == addr
	})
}

// unfit says why a cannot be an address of a guest or a gateway, or nothing.
func unfit(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "not an address"
	case a.IsUnspecified():
		return "unspecified"
	case a.IsMulticast():
		return "a multicast address"
	case a.IsLoopback():
		return "a loopback address"
	}
	return ""
}

// linkLocal6 says whether a is in fe80::/10, which every IPv6 host has on every link by itself (RFC 4291, 2.5.6).
func linkLocal6(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// clean gives px with an IPv4 address as such, and false where it is no prefix.
func clean(px netip.Prefix) (netip.Prefix, bool) {
	if px.IsValid() && px.Addr().Is4In6() {
		const mapped = 96 // ::ffff:0:0/96, RFC 4291, 2.5.5.2
		px = netip.PrefixFrom(px.Addr().Unmap(), px.Bits()-mapped)
	}
	return px, px.IsValid()
}

// prefixOf turns the CNI library's form into ours, and gives false for a missing address or a mask with holes.
func prefixOf(n net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	if bits == 32 { // a 16-byte form of IPv4, but its mask is of 4
		a = a.Unmap()
	}
	if bits != a.BitLen() {
		return netip.Prefix{}, false
	}
	return clean(netip.PrefixFrom(a, ones))
}

// addrOf turns the standard library's older form into ours; the zero Addr for none.
func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
