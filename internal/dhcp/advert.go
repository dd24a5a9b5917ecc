package dhcp

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
)

// AdvertInterval is the time between advertisements that nobody asked for (MaxRtrAdvInterval, RFC 4861, section 6.2.1).
const AdvertInterval = 10 * time.Minute

// advertLifetime is how long a guest keeps a router, its routes and its resolvers without hearing of them again: the most
// that every guest takes (AdvDefaultLifetime, RFC 4861, section 6.2.1). A supervisor that is stopped for an hour
// harms nobody.
const advertLifetime = 9000 * time.Second

// Options of a router advertisement, and bits in them.
const (
	ndPrefix = 3  // RFC 4861, section 4.6.2
	ndMTU    = 5  // RFC 4861, section 4.6.4
	ndRoute  = 24 // RFC 4191, section 2.3
	ndRDNSS  = 25 // RFC 8106, section 5.1
	ndDNSSL  = 31 // RFC 8106, section 5.2

	raManaged = 0x80 // addresses by DHCPv6 (RFC 4861, section 4.2)
	raOther   = 0x40 // the rest too

	prefixOnLink = 0x80
	prefixAuto   = 0x40
)

// Bounds of an advertisement.
const (
	maxPacket = 1500 // bytes: no message of ours is larger, whatever the link carries
	maxRDNSS  = 32   // servers in one option
	maxDNSSL  = 1024 // bytes of one option
)

// adverts gives the advertisements of every router to all nodes. The first router speaks for the link: the prefixes, the
// MTU and the resolvers are in its messages. What does not fit into one goes into several (RFC 4861, section 6.2.3).
// With end they take the routers and their routes back (section 6.2.5); the rest ends by itself.
func (l *Lease6) adverts(end bool) [][]byte {
	routers, lifetime := l.Routers, advertLifetime
	if len(routers) == 0 {
		routers = []Router6{{Source: l.Server, Gateway: l.Server}}
	}
	if end {
		lifetime = 0
	}
	seconds := uint32(lifetime / time.Second)
	var frames [][]byte
	for i, r := range routers {
		var options [][]byte
		if i == 0 && !end {
			options = l.linkOptions()
		}
		for _, dst := range r.Routes {
			options = append(options, routeOption(dst, seconds))
		}
		head := make([]byte, routerAdvertLen)
		head[0], head[5] = typeRouterAdvert, raManaged|raOther // hop limit, reachable and retransmission time: the guest's own
		if r.Default {
			binary.BigEndian.PutUint16(head[6:], uint16(seconds))
		}
		for _, body := range pack(head, options, l.room()) {
			p := packet6{
				to: groupMAC(allNodes), from: l.serverMAC(), src: r.Source, dst: allNodes, proto: protoICMPv6, hops: ndHopLimit, payload: body,
			}
			frames = append(frames, p.frame())
		}
	}
	return frames
}

// room is what an IPv6 packet of ours may carry, in bytes.
func (l *Lease6) room() int { return min(l.MTU, maxPacket) - ip6HeaderLen }

// pack puts options behind copies of head, as many as fit behind each.
func pack(head []byte, options [][]byte, room int) [][]byte {
	out := [][]byte{slices.Clone(head)}
	for _, o := range options {
		last := &out[len(out)-1]
		if len(*last)+len(o) > room {
			out = append(out, slices.Clone(head))
			last = &out[len(out)-1]
		}
		*last = append(*last, o...)
	}
	return out
}

// linkOptions gives what concerns the link and not one router. There is no source link-layer address: for a router that
// stands for another it would be a lie as soon as that one's MAC changes, so the guest has to ask.
func (l *Lease6) linkOptions() [][]byte {
	be, seconds := binary.BigEndian, seconds(l.Duration, 1, 1)
	mtu := be.AppendUint32([]byte{ndMTU, 1, 0, 0}, uint32(l.MTU))
	options := [][]byte{mtu}
	for _, p := range l.Prefixes {
		flags := byte(prefixOnLink)
		if p.Auto {
			flags |= prefixAuto
		}
		o := []byte{ndPrefix, 4, byte(p.Prefix.Bits()), flags}
		o = be.AppendUint32(be.AppendUint32(o, seconds), seconds) // valid and preferred lifetime
		o = append(append(o, 0, 0, 0, 0), p.Prefix.Masked().Addr().AsSlice()...)
		options = append(options, o)
	}
	life := uint32(advertLifetime / time.Second)
	for servers := range slices.Chunk(l.DNS.Servers, maxRDNSS) {
		o := be.AppendUint32([]byte{ndRDNSS, byte(1 + 2*len(servers)), 0, 0}, life)
		for _, s := range servers {
			o = append(o, s.AsSlice()...)
		}
		options = append(options, o)
	}
	return append(options, searchOptions(l.search(), life)...)
}

// searchOptions gives the search list in as many options as it needs; a guest takes them together (RFC 8106, 5.3.1).
func searchOptions(names []string, life uint32) (options [][]byte) {
	for len(names) > 0 {
		o := binary.BigEndian.AppendUint32([]byte{ndDNSSL, 0, 0, 0}, life)
		for len(names) > 0 && len(o)+len(names[0])+2 <= maxDNSSL { // the text, a length byte before and a zero after it
			o = appendName(o, names[0])
			names = names[1:]
		}
		for len(o)%ndUnit != 0 {
			o = append(o, 0)
		}
		o[1] = byte(len(o) / ndUnit)
		options = append(options, o)
	}
	return options
}

// routeOption carries one route, with as much of its prefix as it has (RFC 4191, section 2.3); its preference is medium.
func routeOption(dst netip.Prefix, life uint32) []byte {
	prefix := dst.Masked().Addr().AsSlice()[:(dst.Bits()+63)/64*8]
	o := binary.BigEndian.AppendUint32([]byte{ndRoute, byte(1 + len(prefix)/ndUnit), byte(dst.Bits()), 0}, life)
	return append(o, prefix...)
}

// solicited says where the answer to a router solicitation goes: to the asker, or to all nodes where it has no address
// yet (RFC 4861, section 6.2.6).
func (l *Lease6) solicited(p *packet6) (to nic.MAC, dst netip.Addr, why silence) {
	if !p.ndValid(routerSolicitLen) {
		return to, dst, badND
	}
	_, says := p.linkOption(routerSolicitLen, ndSourceLink)
	switch {
	case p.src.IsUnspecified() && says: // whose would it be?
		return to, dst, badND
	case p.from != l.MAC:
		return to, dst, otherMAC
	case p.src.IsUnspecified():
		return groupMAC(allNodes), allNodes, ""
	case !l.guestAddr(p.src):
		return to, dst, otherSource
	}
	return l.MAC, p.src, ""
}

// readdress gives the frame of an ICMPv6 message with another receiver.
func readdress(frame []byte, to nic.MAC, dst netip.Addr) []byte {
	p, _ := parse6(frame)
	p.to, p.dst, p.payload = to, dst, slices.Clone(p.payload)
	clear(p.payload[offICMPSum:][:2])
	return p.frame()
}
