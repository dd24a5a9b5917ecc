package podnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// match is a condition on a frame: parts of it that all have to compare as wanted, and the same as `nft` would have it
// written. Both engines are given it: nftables as expressions ([match.exprs]), eBPF as instructions ([program.match]).
type match struct {
	text  string
	tests []test
}

// test compares one part of a frame.
type test struct {
	part part
	op   operator
	mask []byte // what counts of the part; nil: all
	with []byte
	to   []byte // the end of a range; with is its begin
}

// operator is how a part compares.
type operator int

const (
	equal operator = iota
	unequal
	greater
	inside  // a range, its ends among it
	outside // of one
)

// all holds where every part holds.
func all(parts ...match) (m match) {
	for _, p := range parts {
		if m.text != "" && p.text != "" {
			m.text += " "
		}
		m.text, m.tests = m.text+p.text, append(m.tests, p.tests...)
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
	name   string
	from   region
	offset uint32 // in bytes, behind the begin of the region
	size   uint32 // in bytes
	load   attrs  // of nftables: made once, as it is much of the making of a rule
}

func at(name string, from region, offset, size uint32) part {
	p := part{name: name, from: from, offset: offset, size: size}
	p.load = p.expression()
	return p
}

// region is where a part is found.
type region int

const (
	frame      region = iota // the Ethernet header
	network                  // the header behind it, which is behind the outer tag, too
	layer4                   // the transport header; later fragments have none
	tagged                   // the Ethernet header with its outer tag
	fragHeader               // the first IPv6 fragment header
	hasFrag                  // whether there is one: a byte, 0 or 1
	etherKind                // the EtherType, of a frame with a tag that below it
	transport                // the transport protocol, a byte; none where the headers before it are broken
	skbMark                  // what the kernel knows a frame by
)

// The parts that rules look at. Those of a header stand behind a match of its protocol. Where a frame ends too early there
// is nothing to load, and the rule does not match. Of later fragments the kernel takes data for a transport header.
var (
	// The EtherType; of a frame with a tag the one below, as the kernel has taken the outer tag off by then.
	protocol = at("meta protocol", etherKind, 0, 2)
	// The transport protocol, behind all IPv6 extension headers; none where the kernel finds the headers broken.
	l4proto = at("meta l4proto", transport, 0, 1)

	mark = at("meta mark", skbMark, 0, 4)

	etherTo   = at("ether daddr", frame, 0, 6)
	etherFrom = at("ether saddr", frame, 6, 6)
	// The control information of the outer tag, whose lower twelve bits are the VLAN (IEEE 802.1Q, clause 9.6).
	tag = at("@ll,112,16", tagged, 14, 2)
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
	fragNext  = at("frag nexthdr", fragHeader, 0, 1)
	ip6Frag   = at("frag frag-off", fragHeader, 2, 2)
	// Whether there is a fragment header, the first fragment's included (RFC 8200, section 4.5).
	fragment = at("exthdr frag", hasFrag, 0, 1)

	tcpFlags  = at("tcp flags", layer4, 13, 1)
	udpTo     = at("udp dport", layer4, 2, 2)
	icmp6Type = at("icmpv6 type", layer4, 0, 1)
	// Of neighbour solicitations and advertisements (RFC 4861, sections 4.3 and 4.4).
	ndTarget    = at("icmpv6 taddr", layer4, 8, 16)
	ndOption    = at("@th,192,8", layer4, 24, 1)
	ndOptionMAC = at("@th,208,48", layer4, 26, 6)
)

func (p part) compare(op operator, sign string, v value) match {
	return match{p.name + " " + sign + v.of(p), []test{{part: p, op: op, with: v.data}}}
}

func (p part) is(v value) match    { return p.compare(equal, "", v) }
func (p part) isNot(v value) match { return p.compare(unequal, "!= ", v) }
func (p part) above(v value) match { return p.compare(greater, "> ", v) }

func (p part) span(op operator, sign string, from, to value) match {
	return match{p.name + " " + sign + from.of(p) + "-" + to.of(p), []test{{part: p, op: op, with: from.data, to: to.data}}}
}

func (p part) within(from, to value) match  { return p.span(inside, "", from, to) }
func (p part) outside(from, to value) match { return p.span(outside, "!= ", from, to) }

// isNone holds where the part is none of the values. A comparison for each costs less to lay than a set, and a NIC has
// few addresses.
func (p part) isNone(values ...value) (m match) {
	for _, v := range values {
		m = all(m, p.isNot(v))
	}
	return m
}

// masked compares a part of two bytes, but for the bits that are not in the mask, with zero.
func (p part) masked(bits uint16, op operator, sign string) match {
	only := binary.BigEndian.AppendUint16(nil, bits)
	return match{p.name + fmt.Sprintf(" & 0x%x %s 0", bits, sign), []test{{part: p, op: op, mask: only, with: []byte{0, 0}}}}
}

func (p part) without(bits uint16) match { return p.masked(bits, equal, "==") }
func (p part) with(bits uint16) match    { return p.masked(bits, unequal, "!=") }

// notSYN holds for TCP but for the first segment of a connection (RFC 9293, section 3.1).
var notSYN = match{"tcp flags & (syn | ack) != syn", []test{{part: tcpFlags, op: unequal, mask: []byte{0x12}, with: []byte{0x02}}}}
