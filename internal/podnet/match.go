package podnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// match is a condition on a frame: expressions of nftables that must all hold, and the same as `nft` would have it
// written.
type match struct {
	text  string
	exprs attrs
}

// all holds where every part holds. Registers are of no concern: a part loads what it compares.
func all(parts ...match) (m match) {
	for _, p := range parts {
		if m.text != "" && p.text != "" {
			m.text += " "
		}
		m.text, m.exprs = m.text+p.text, append(m.exprs, p.exprs...)
	}
	return m
}

// value is what is compared with a part of a frame.
type value struct {
	text string
	data []byte
}

func addr(a netip.Addr) value  { return value{a.String(), a.AsSlice()} }
func hardware(m nic.MAC) value { return value{m.String(), m[:]} }
func word(n uint16) value      { return value{fmt.Sprint(n), binary.BigEndian.AppendUint16(nil, n)} }

func etherType(name string, n uint16) value {
	return value{name, binary.BigEndian.AppendUint16(nil, n)}
}
func octet(n byte) value                      { return named(fmt.Sprint(n), n) }
func named(name string, octets ...byte) value { return value{name, octets} }

// of gives the value as nft wants it for the part: a part without a name of its own has plain bytes.
func (v value) of(p part) string {
	if strings.HasPrefix(p.name, "@") {
		return fmt.Sprintf("0x%x", v.data)
	}
	return v.text
}

// part is a part of a frame that can be loaded and compared.
type part struct {
	name string
	load attrs
}

func at(name string, header, offset, size uint32) part {
	return part{name, loadPayload(header, offset, size)}
}

// Headers, for at.
const (
	frame   = unix.NFT_PAYLOAD_LL_HEADER
	network = unix.NFT_PAYLOAD_NETWORK_HEADER
	layer4  = unix.NFT_PAYLOAD_TRANSPORT_HEADER
)

// The parts that rules look at. Those of a header stand behind a match of its protocol. Where a frame ends too early there
// is nothing to load, and the rule does not match. Of later fragments the kernel takes data for a transport header.
var (
	// The EtherType; of a frame with a tag the one below, as the kernel has taken the outer tag off by then.
	protocol = part{"meta protocol", loadMeta(unix.NFT_META_PROTOCOL)}
	// The transport protocol, behind all IPv6 extension headers; none where the kernel finds the headers broken.
	l4proto = part{"meta l4proto", loadMeta(unix.NFT_META_L4PROTO)}

	mark = part{"meta mark", loadMeta(unix.NFT_META_MARK)}

	etherFrom = at("ether saddr", frame, 6, 6)
	// The control information of the outer tag, whose lower twelve bits are the VLAN (IEEE 802.1Q, clause 9.6).
	tag = at("@ll,112,16", frame, 14, 2)
	// RFC 1042: LLC and SNAP, with an EtherType to follow.
	snap = at("@nh,0,48", network, 0, 6)

	// RFC 826: the kinds and lengths of the addresses, then these.
	arpFormat    = at("@nh,0,48", network, 0, 6)
	arpRequest   = at("@nh,0,64", network, 0, 8) // and the operation
	arpSenderMAC = at("arp saddr ether", network, 8, 6)
	arpSender    = at("arp saddr ip", network, 14, 4)
	arpTarget    = at("arp daddr ip", network, 24, 4)

	ip4Frag   = at("ip frag-off", network, 6, 2)
	ip4From   = at("ip saddr", network, 12, 4)
	ip4To     = at("ip daddr", network, 16, 4)
	ip6From   = at("ip6 saddr", network, 8, 16)
	ip6To     = at("ip6 daddr", network, 24, 16)
	ip6Length = at("ip6 length", network, 4, 2)
	fragNext  = part{"frag nexthdr", loadExthdr(unix.IPPROTO_FRAGMENT, 0, 1, 0)}
	ip6Frag   = part{"frag frag-off", loadExthdr(unix.IPPROTO_FRAGMENT, 2, 2, 0)}
	// Whether there is a fragment header, the first fragment's included (RFC 8200, section 4.5).
	fragment = part{"exthdr frag", loadExthdr(unix.IPPROTO_FRAGMENT, 0, 1, unix.NFT_EXTHDR_F_PRESENT)}

	tcpFlags  = at("tcp flags", layer4, 13, 1)
	udpTo     = at("udp dport", layer4, 2, 2)
	icmp6Type = at("icmpv6 type", layer4, 0, 1)
	// Of neighbour solicitations and advertisements (RFC 4861, sections 4.3 and 4.4).
	ndTarget    = at("icmpv6 taddr", layer4, 8, 16)
	ndOption    = at("@th,192,8", layer4, 24, 1)
	ndOptionMAC = at("@th,208,48", layer4, 26, 6)
)

func (p part) compare(op uint32, sign string, v value) match {
	return match{p.name + " " + sign + v.of(p), join(p.load, compare(op, v.data))}
}

func (p part) is(v value) match    { return p.compare(unix.NFT_CMP_EQ, "", v) }
func (p part) isNot(v value) match { return p.compare(unix.NFT_CMP_NEQ, "!= ", v) }
func (p part) above(v value) match { return p.compare(unix.NFT_CMP_GT, "> ", v) }

func (p part) span(op uint32, sign string, from, to value) match {
	return match{p.name + " " + sign + from.of(p) + "-" + to.of(p), join(p.load, compareRange(op, from.data, to.data))}
}

func (p part) within(from, to value) match  { return p.span(unix.NFT_RANGE_EQ, "", from, to) }
func (p part) outside(from, to value) match { return p.span(unix.NFT_RANGE_NEQ, "!= ", from, to) }

// isNone holds where the part is none of the values. A comparison for each costs less to lay than a set, and a NIC has
// few addresses.
func (p part) isNone(values ...value) match {
	if len(values) == 0 {
		return match{}
	}
	m := match{exprs: slices.Clone(p.load)}
	for _, v := range values {
		m = all(m, match{p.isNot(v).text, compare(unix.NFT_CMP_NEQ, v.data)})
	}
	return m
}

// masked compares a part of two bytes, but for the bits that are not in the mask, with zero.
func (p part) masked(bits uint16, op uint32, sign string) match {
	with := binary.BigEndian.AppendUint16(nil, bits)
	return match{p.name + fmt.Sprintf(" & 0x%x %s 0", bits, sign), join(p.load, mask(with), compare(op, []byte{0, 0}))}
}

func (p part) without(bits uint16) match { return p.masked(bits, unix.NFT_CMP_EQ, "==") }
func (p part) with(bits uint16) match    { return p.masked(bits, unix.NFT_CMP_NEQ, "!=") }

// notSYN holds for TCP but for the first segment of a connection (RFC 9293, section 3.1).
var notSYN = match{"tcp flags & (syn | ack) != syn", join(tcpFlags.load, mask([]byte{0x12}), compare(unix.NFT_CMP_NEQ, []byte{0x02}))}

func join(parts ...attrs) attrs { return slices.Concat(parts...) }
