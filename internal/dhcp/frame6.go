package dhcp

import (
	"encoding/binary"
	"net/netip"

	"github.com/virtlet/virtlet/internal/nic"
)

// Sizes and numbers of IPv6 (RFC 8200), ICMPv6 (RFC 4443) and neighbour discovery (RFC 4861).
const (
	etherTypeIPv6 = 0x86dd
	ip6HeaderLen  = 40 // without extension headers
	protoICMPv6   = 58
	ndHopLimit    = 255 // nobody off the link can make it so (RFC 4861, section 3.1)
	serverPort6   = 547 // RFC 8415, section 7.2
	clientPort6   = 546
)

var (
	allNodes   = netip.MustParseAddr("ff02::1")   // RFC 4291, section 2.7.1
	allServers = netip.MustParseAddr("ff02::1:2") // All_DHCP_Relay_Agents_and_Servers (RFC 8415, section 7.1)
)

// packet6 is an IPv6 packet in an Ethernet frame, taken apart.
type packet6 struct {
	to, from nic.MAC
	src, dst netip.Addr
	proto    byte // UDP or ICMPv6: packets with extension headers are none of ours
	hops     byte
	payload  []byte // from the header of UDP or ICMPv6 on; part of the frame
}

// parse6 takes a frame apart, and says whether it holds a whole packet.
func parse6(frame []byte) (p packet6, ok bool) {
	if len(frame) < etherHdrLen+ip6HeaderLen || binary.BigEndian.Uint16(frame[offEtherType:]) != etherTypeIPv6 {
		return packet6{}, false
	}
	ip := frame[etherHdrLen:]
	n := int(binary.BigEndian.Uint16(ip[4:]))
	if ip[0]>>4 != 6 || n > len(ip)-ip6HeaderLen { // what follows the packet is padding
		return packet6{}, false
	}
	p = packet6{
		to: nic.MAC(frame), from: nic.MAC(frame[6:]), src: netip.AddrFrom16([16]byte(ip[8:])), dst: netip.AddrFrom16([16]byte(ip[24:])),
		proto: ip[6], hops: ip[7], payload: ip[ip6HeaderLen : ip6HeaderLen+n],
	}
	return p, p.proto == protoUDP && n >= udpHdrLen || p.proto == protoICMPv6 && n >= icmp6HdrLen
}

// frame puts the packet into a frame of its own, with all checksums. The payload's checksum is 0 so far.
func (p *packet6) frame() []byte {
	b := make([]byte, 0, etherHdrLen+ip6HeaderLen+len(p.payload))
	b = append(append(b, p.to[:]...), p.from[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv6)
	b = append(b, 6<<4, 0, 0, 0) // version; no traffic class, no flow
	b = binary.BigEndian.AppendUint16(b, uint16(len(p.payload)))
	b = append(b, p.proto, p.hops)
	b = append(append(b, p.src.AsSlice()...), p.dst.AsSlice()...)
	b = append(b, p.payload...)
	at := offICMPSum
	if p.proto == protoUDP {
		at = offUDPSum
	}
	c := ^p.sum()
	if c == 0 && p.proto == protoUDP {
		c = 0xffff // 0 stands for none, which IPv6 does not allow
	}
	binary.BigEndian.PutUint16(b[etherHdrLen+ip6HeaderLen+at:], c)
	return b
}

// Where the checksum is in UDP and in ICMPv6.
const (
	offUDPSum  = 6
	offICMPSum = 2
)

// sum is the sum over the payload and the pseudo header (RFC 8200, section 8.1): all ones where the checksum is right.
func (p *packet6) sum() uint16 { return sum(uint64(p.pseudo()), p.payload) }

// pseudo is the sum over the pseudo header alone.
func (p *packet6) pseudo() uint16 {
	src, dst := p.src.As16(), p.dst.As16()
	return sum(uint64(p.proto)+uint64(len(p.payload))+uint64(sum(0, src[:])), dst[:])
}

// datagram6 gives the frame of a DHCPv6 message to the guest.
func (l *Lease6) datagram6(to netip.Addr, msg []byte) []byte {
	udp := make([]byte, udpHdrLen, udpHdrLen+len(msg))
	binary.BigEndian.PutUint16(udp[0:], serverPort6)
	binary.BigEndian.PutUint16(udp[2:], clientPort6)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpHdrLen+len(msg)))
	p := packet6{
		to: l.MAC, from: l.serverMAC(), src: l.Server, dst: to, proto: protoUDP, hops: ipTTL, payload: append(udp, msg...),
	}
	return p.frame()
}

// message6 gives the DHCPv6 message in a packet, and false where there is none. The checksum may be the right one, or the
// sum of the pseudo header alone, which a guest's virtio NIC leaves (see soundUDP).
func (p *packet6) message6() ([]byte, bool) {
	if p.proto != protoUDP || binary.BigEndian.Uint16(p.payload[2:]) != serverPort6 {
		return nil, false
	}
	n := int(binary.BigEndian.Uint16(p.payload[4:]))
	if n < udpHdrLen || n != len(p.payload) || p.sum() != sumOfSound && binary.BigEndian.Uint16(p.payload[offUDPSum:]) != p.pseudo() {
		return nil, false
	}
	return p.payload[udpHdrLen:n], true
}

// groupMAC is where frames for a multicast address go (RFC 2464, section 7).
func groupMAC(a netip.Addr) nic.MAC {
	b := a.As16()
	return nic.MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}
}
