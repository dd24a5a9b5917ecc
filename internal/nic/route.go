package nic

import (
	"cmp"
	"math"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
)

// From linux/rtnetlink.h.
const (
	tableMain  = 254 // RT_TABLE_MAIN
	typeNormal = 1   // RTN_UNICAST
	protocolRA = 9   // RTPROT_RA: learnt from a router advertisement
	scopeLink  = 253 // RT_SCOPE_LINK
)

// readRoutes picks from the link's routes those that could concern a guest and cleans them: main table, unicast, masked.
// Routes of every IPv6 host (link-local, multicast) are not worth a word; others that are left out are.
func (p *planner) readRoutes(d *draft) {
	for _, r := range d.link.Routes {
		dst, ok := clean(r.Dst)
		if !ok || everyHosts(dst) {
			continue
		}
		r.Dst, r.Gw, r.Src = dst.Masked(), r.Gw.Unmap().WithZone(""), r.Src.Unmap().WithZone("")
		if r.Protocol != protocolRA {
			p.routedFamily[familyOf(dst.Addr())] = true
		}
		switch {
		case r.Table != 0 && r.Table != tableMain:
			p.note("interface %s: rule-based routing is not carried over: table %d", quote(d.Name), r.Table)
		case r.Type != 0 && r.Type != typeNormal:
			p.note("interface %s: the route to %s is not carried over: it is of type %d, not unicast", quote(d.Name), r.Dst, r.Type)
		case r.Weight > 0 && !p.firstHop(r):
			p.note("interface %s: the route to %s has several next hops: the guest gets the first, not %s", quote(d.Name), r.Dst, r.Gw)
		default:
			d.kernel = append(d.kernel, r)
		}
	}
}

// firstHop says whether r is the first next hop of its route that is met on any link. A guest is given one: neither
// DHCP nor cloud-init can tell it more.
func (p *planner) firstHop(r KernelRoute) bool {
	r.Gw, r.Weight, r.Flags = netip.Addr{}, 0, 0
	if p.multipath[r] {
		return false
	}
	p.multipath[r] = true
	return true
}

// linkRoutes gives the guest the routes of its link. The kernel's connected ones stay out where they follow from the
// guest's own addresses: the guest's kernel makes them.
func (p *planner) linkRoutes(d *draft) {
	for _, px := range d.Addrs {
		p.routed[px.Masked()] = append(p.routed[px.Masked()], netip.Addr{})
	}
	for _, r := range d.kernel {
		if r.Protocol == protocolRA {
			if r.Dst.Bits() == 0 {
				p.note("interface %s: the default route is not carried over: it was learnt from a router advertisement", quote(d.Name))
			}
			continue
		}
		p.noteMSS(d, r.Dst, r.AdvMSS)
		if p.route(d, Route{Dst: r.Dst, Gw: r.Gw, Src: r.Src, Metric: r.Metric, MTU: r.MTU}) {
			p.routed[r.Dst] = append(p.routed[r.Dst], r.Gw)
		}
	}
}

// resultRoutes adds the routes of a result to destinations that no link has a route to. The whole namespace is asked,
// not the network's own links: a meta-plugin takes the default route of a secondary network away and leaves it in the
// result, and the guest must not get it back. A route without a gateway goes by that of its family in ips.
func (p *planner) resultRoutes(c *claim) {
	if c.Result == nil || len(c.nics) == 0 {
		return
	}
	for i, r := range c.Result.Routes {
		if r == nil {
			p.note("network %s: entry %d of routes in the CNI result is empty", quote(c.Network), i)
			continue
		}
		dst, ok := prefixOf(r.Dst)
		if !ok {
			p.note("network %s: entry %d of routes in the CNI result is ignored: it has no valid destination", quote(c.Network), i)
			continue
		}
		if everyHosts(dst) {
			continue
		}
		p.resultRoute(c, r, dst.Masked())
	}
}

func (p *planner) resultRoute(c *claim, r *types.Route, dst netip.Prefix) {
	if r.Table != nil && *r.Table != 0 && *r.Table != tableMain {
		p.note("network %s: rule-based routing is not carried over: the route to %s is for table %d", quote(c.Network), dst, *r.Table)
		return
	}
	gw := addrOf(r.GW)
	if gw.IsUnspecified() {
		gw = netip.Addr{}
	}
	if by, ok := p.routed[dst]; ok {
		if gw.IsValid() && !slices.Contains(by, gw) {
			p.note("network %s: the route of the CNI result to %s by %s is ignored: the namespace reaches it in another way", quote(c.Network), dst, gw)
		}
		return
	}
	d, via := c.outlet(familyOf(dst.Addr()), gw, r.Scope != nil && *r.Scope == scopeLink)
	if d == nil {
		p.note("network %s: the route of the CNI result to %s is ignored: it has no gateway, or no interface of the network has an %s address", quote(c.Network), dst, familyOf(dst.Addr()))
		return
	}
	p.noteMSS(d, dst, r.AdvMSS)
	if p.route(d, Route{Dst: dst, Gw: via, Metric: r.Priority, MTU: r.MTU}) {
		p.routed[dst] = append(p.routed[dst], via)
	}
}

// outlet gives the interface and the gateway that a route of a result goes by; gw is the one that it names, if any, and
// onLink says that it needs none.
func (c *claim) outlet(f family, gw netip.Addr, onLink bool) (*draft, netip.Addr) {
	var first *draft
	for _, d := range c.nics {
		if !d.has(f) {
			continue
		}
		first = cmp.Or(first, d)
		switch {
		case gw.IsValid() && (gw == d.gws[f] || d.reaches(gw)):
			return d, gw
		case !gw.IsValid() && !onLink:
			if via := cmp.Or(d.gws[f], d.Gateway(f.version())); via.IsValid() {
				return d, via
			}
		}
	}
	if gw.IsValid() || onLink {
		return first, gw
	}
	return nil, gw
}

// gatewayRoutes is the last resort for results that are no more than addresses and gateways. A gateway beside an address
// is not a route: the pod of an isolated network has one, and a secondary network's must never catch the guest's
// traffic. It becomes the default route only for the first attachment, when its result has no route at all, and when
// the namespace has not one route of the family on any link in any table, not even a connected one: the plugin left
// all of that family to us.
func (p *planner) gatewayRoutes() {
	// An attachment without an interface is the loopback's, which some runtimes attach first.
	i := slices.IndexFunc(p.claims, func(c claim) bool { return len(c.nics) > 0 })
	if i < 0 || p.claims[i].Result == nil || len(p.claims[i].Result.Routes) > 0 {
		return
	}
	for f, dst := range []netip.Prefix{
		ipv4: netip.PrefixFrom(netip.IPv4Unspecified(), 0),
		ipv6: netip.PrefixFrom(netip.IPv6Unspecified(), 0),
	} {
		if p.routedFamily[f] || len(p.routed[dst]) > 0 {
			continue
		}
		for _, d := range p.claims[i].nics {
			if d.gws[f].IsValid() && d.has(family(f)) {
				p.route(d, Route{Dst: dst, Gw: d.gws[f]})
				break
			}
		}
	}
}

// route gives d the route, once, and says whether the guest has it then. It corrects what a guest would stumble over.
func (p *planner) route(d *draft, r Route) bool {
	if r.Gw.IsValid() {
		if familyOf(r.Gw) != familyOf(r.Dst.Addr()) || unfit(r.Gw) != "" || d.owns(r.Gw) {
			p.note("interface %s: the route to %s is left out: %s cannot be its gateway", quote(d.Name), r.Dst, r.Gw)
			return false
		}
		if r.Dst == host(r.Gw) {
			r.Gw = netip.Addr{} // a gateway is not reached by itself
		}
	}
	if r.OnLink() && d.connected(r.Dst) {
		return true
	}
	if r.Src == d.first(familyOf(r.Dst.Addr())) {
		r.Src = netip.Addr{} // what the guest would choose
	} else if r.Src.IsValid() && !slices.ContainsFunc(p.order, func(o *draft) bool { return o.owns(r.Src) }) {
		p.note("interface %s: the source address %s of the route to %s is left out: the guest does not have it", quote(d.Name), r.Src, r.Dst)
		r.Src = netip.Addr{}
	}
	if r.Metric < 0 || int64(r.Metric) > math.MaxUint32 {
		p.note("interface %s: the metric %d of the route to %s is left out: metrics have 32 bits", quote(d.Name), r.Metric, r.Dst)
		r.Metric = 0
	}
	if r.MTU < minMTU || r.MTU >= d.MTU {
		r.MTU = 0 // the interface's
	}
	if !d.seen[r] {
		d.seen[r] = true
		d.Routes = append(d.Routes, r)
	}
	return true
}

func (p *planner) noteMSS(d *draft, dst netip.Prefix, mss int) {
	if mss != 0 {
		p.note("interface %s: the advertised MSS of %d of the route to %s is not carried over", quote(d.Name), mss, dst)
	}
}

// finishRoutes puts the routes in an order that a guest can add them in: on-link ones, those by a gateway, defaults. A
// gateway that nothing puts on the link (the kernel's "onlink" next hop; a result with a /32 address) gets a route of
// its own first.
func (d *draft) finishRoutes() {
	for _, r := range d.Routes {
		if r.Gw.IsValid() && !d.reaches(r.Gw) {
			d.Routes = append(d.Routes, Route{Dst: host(r.Gw), Metric: r.Metric})
		}
	}
	rank := func(r Route) int {
		switch {
		case r.IsDefault() && r.OnLink():
			return 2
		case r.IsDefault():
			return 3
		case r.OnLink():
			return 0
		}
		return 1
	}
	slices.SortStableFunc(d.Routes, func(a, b Route) int { return cmp.Compare(rank(a), rank(b)) })
}

// reaches says whether gw is on the link for a guest that has d's addresses and on-link routes.
func (d *draft) reaches(gw netip.Addr) bool {
	return linkLocal6(gw) ||
		slices.ContainsFunc(d.Addrs, func(px netip.Prefix) bool { return px.Contains(gw) }) ||
		// An on-link default route comes too late in the order.
		slices.ContainsFunc(d.Routes, func(r Route) bool { return r.OnLink() && !r.IsDefault() && r.Dst.Contains(gw) })
}

// everyHosts says whether dst is one that a host routes without being told: IPv6 link-local, multicast.
func everyHosts(dst netip.Prefix) bool {
	return dst.Bits() > 0 && (linkLocal6(dst.Addr()) || dst.Addr().IsMulticast())
}
