package dhcp

import (
	"net/netip"
	"slices"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
)

// Neighbour discovery: types of ICMPv6 messages, and where in them things are, in bytes (RFC 4861, section 4).
const (
	typeRouterSolicit   = 133
	typeRouterAdvert    = 134
	typeNeighborSolicit = 135
	typeNeighborAdvert  = 136

	icmp6HdrLen      = 4
	routerSolicitLen = 8 // before the options
	routerAdvertLen  = 16
	neighborLen      = 24 // a solicitation and an advertisement alike
	offNDFlags       = 4
	offNDTarget      = 8

	ndRouter    = 0x80 // flags of a neighbour advertisement
	ndSolicited = 0x40
	ndOverride  = 0x20

	ndUnit       = 8 // what the length of an option counts in
	ndSourceLink = 1 // options with a link-layer address: type, length, MAC
	ndTargetLink = 2
	offLinkMAC   = 2
)

// ndValid does what RFC 4861 wants before anything is believed (sections 6.1.1, 7.1.1 and 7.1.2): hop limit, checksum,
// code, length, and options that are whole.
func (p *packet6) ndValid(least int) bool {
	if p.proto != protoICMPv6 || p.hops != ndHopLimit || len(p.payload) < least || p.payload[1] != 0 || p.sum() != sumOfSound {
		return false
	}
	for o := p.payload[least:]; len(o) > 0; o = o[int(o[1])*ndUnit:] {
		if len(o) < ndUnit || o[1] == 0 || len(o) < int(o[1])*ndUnit {
			return false
		}
	}
	return true
}

// linkOption gives the link-layer address in the first option of that kind; the options start at least.
func (p *packet6) linkOption(least int, kind byte) (m nic.MAC, ok bool) {
	for o := p.payload[least:]; len(o) > 0; o = o[int(o[1])*ndUnit:] {
		if o[0] == kind && o[1] == 1 {
			return nic.MAC(o[offLinkMAC:]), true
		}
	}
	return nic.MAC{}, false
}

// group says whether frames for m go to several receivers.
func group(m nic.MAC) bool { return m[0]&1 != 0 }

func (p *packet6) target() netip.Addr { return netip.AddrFrom16([16]byte(p.payload[offNDTarget:])) }

// neighborMessage makes a solicitation or an advertisement.
func neighborMessage(kind, flags byte, target netip.Addr, option byte, m nic.MAC) []byte {
	b := make([]byte, offNDTarget, neighborLen+ndUnit)
	b[0], b[offNDFlags] = kind, flags
	b = append(b, target.AsSlice()...)
	if option != 0 {
		b = append(append(b, option, 1), m[:]...)
	}
	return b
}

// solicitedNode is the group that everybody with such an address is in (RFC 4291, section 2.7.1).
func solicitedNode(a netip.Addr) netip.Addr {
	b, g := a.As16(), [16]byte{0xff, 0x02, 11: 0x01, 12: 0xff}
	copy(g[13:], b[13:])
	return netip.AddrFrom16(g)
}

// asks turns the guest's solicitation for an address that stands for a gateway into one for the gateway, as if the guest
// had asked for that: to the group or, when it probes a neighbour that it knows, to that neighbour. Its answer comes to
// the guest, and [Lease6.answers] makes the guest understand it. Nothing is kept in between.
func (l *Lease6) asks(p *packet6) ([]byte, silence) {
	if !p.ndValid(neighborLen) {
		return nil, badND
	}
	i := slices.IndexFunc(l.Routers, func(r Router6) bool { return r.stands() && r.Source == p.target() })
	switch {
	case p.from != l.MAC:
		return nil, otherMAC
	case i < 0:
		return nil, otherTarget
	case !l.guestAddr(p.src): // also ::, with which a guest looks whether our address is free: it may find that it is
		return nil, otherSource
	}
	gw := l.Routers[i].Gateway
	out := packet6{
		to: p.to, from: l.MAC, src: p.src, dst: gw, proto: protoICMPv6, hops: ndHopLimit,
		payload: neighborMessage(typeNeighborSolicit, 0, gw, ndSourceLink, l.MAC),
	}
	if group(p.to) || p.dst.IsMulticast() {
		out.dst = solicitedNode(gw)
		out.to = groupMAC(out.dst)
	}
	return out.frame(), ""
}

// answers turns a gateway's advertisement, on its way to the guest, into one of the address that stands for it there. A
// gateway that answers a probe need not say its MAC (RFC 4861, section 7.2.4), and then nor do we. It is a router, or
// the pod would not have it as such, whatever its flag says.
func (l *Lease6) answers(p *packet6) ([]byte, silence) {
	if !p.ndValid(neighborLen) || p.dst.IsMulticast() && p.payload[offNDFlags]&ndSolicited != 0 {
		return nil, badND
	}
	i := slices.IndexFunc(l.Routers, func(r Router6) bool { return r.stands() && r.Gateway == p.target() })
	switch {
	case p.from == l.MAC:
		return nil, otherMAC
	case i < 0:
		return nil, otherTarget
	case p.dst != allNodes && !l.guestAddr(p.dst):
		return nil, otherSource
	}
	own, option := l.Routers[i].Source, byte(ndTargetLink)
	m, ok := p.linkOption(neighborLen, ndTargetLink)
	if !ok {
		option = 0
	} else if group(m) || m.IsZero() || m == l.MAC {
		return nil, badND
	}
	out := packet6{
		to: l.MAC, from: l.serverMAC(), src: own, dst: p.dst, proto: protoICMPv6, hops: ndHopLimit,
		payload: neighborMessage(typeNeighborAdvert, p.payload[offNDFlags]&(ndSolicited|ndOverride)|ndRouter, own, option, m),
	}
	if p.dst.IsMulticast() {
		out.to = groupMAC(p.dst)
	}
	return out.frame(), ""
}

// guestAddr says whether the guest may use an address here: one of its lease, or a link-local one, which it makes
// itself in ways of its own, but none that is another's for sure.
func (l *Lease6) guestAddr(a netip.Addr) bool {
	if !a.IsLinkLocalUnicast() {
		return slices.Contains(l.Addrs, a)
	}
	return a != l.Server && !slices.ContainsFunc(l.Routers, func(r Router6) bool { return r.Source == a })
}

// How often a guest's solicitations are passed on. It needs one for each router every half a minute, or one a second
// while a router is silent (RFC 4861, section 10).
const (
	askPeriod = 100 * time.Millisecond
	askBurst  = 2 * maxRouters
)

// bucket bounds a rate: one event each askPeriod, and askBurst at once.
type bucket struct{ full time.Time }

// take says whether there is room for one more.
func (b *bucket) take(now time.Time) bool {
	if empty := now.Add(-askBurst * askPeriod); b.full.Before(empty) {
		b.full = empty
	}
	next := b.full.Add(askPeriod)
	if next.After(now) {
		return false
	}
	b.full = next
	return true
}
