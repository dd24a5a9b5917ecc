package dhcp

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
)

// Sizes and numbers of the protocols below DHCP: Ethernet (IEEE 802.3), IPv4 (RFC 791), UDP (RFC 768), ARP (RFC 826).
const (
	etherHdrLen = 14
	ipHeaderLen = 20 // without options
	udpHdrLen   = 8
	arpLen      = 28

	etherTypeIPv4 = 0x0800
	etherTypeARP  = 0x0806

	ipVersionIHL   = 0x45   // version 4, header of five words
	ipMoreOrOffset = 0x3fff // more fragments, and the fragment offset
	ipDontFragment = 0x4000
	ipTTL          = 64
	protoUDP       = 17

	serverPort = 67 // RFC 2131, section 4.1
	clientPort = 68

	arpRequest = 1
	arpReply   = 2
)

// arpStart is how ARP for IPv4 over Ethernet begins: hardware type, protocol type, both lengths.
var arpStart = []byte{0, 1, 0x08, 0x00, 6, 4}

var broadcastMAC = nic.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// serverMAC is the source of the frames that a guest gets: the MAC that package podnet gives to the veth while the guest
// has the pod's. It is not the guest's, every NIC has its own (a guest may bridge two), and what a guest sends to it
// ends at the bridge port that has it, where an unknown address would be flooded to the cluster.
func (l *Lease) serverMAC() nic.MAC {
	m := l.MAC
	m[0] = m[0]&^0x03 | 0x02 ^ 0x40 // group bit off, locally administered bit on (IEEE 802, clause 8)
	if m == l.MAC {
		m[0] ^= 0x80
	}
	return m
}

// message gives the DHCP message in a frame, a part of it, or the reason why there is none.
func message(frame []byte) ([]byte, silence) {
	if len(frame) < etherHdrLen+ipHeaderLen || binary.BigEndian.Uint16(frame[12:]) != etherTypeIPv4 {
		return nil, badFrame
	}
	ip := frame[etherHdrLen:]
	hdr, total := int(ip[0]&0x0f)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || hdr < ipHeaderLen || total < hdr+udpHdrLen || total > len(ip) ||
		binary.BigEndian.Uint16(ip[6:])&ipMoreOrOffset != 0 || ip[9] != protoUDP {
		return nil, badFrame
	}
	udp := ip[hdr:total] // what follows in the frame is padding
	n := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != serverPort || n < udpHdrLen || n > len(udp) {
		return nil, badFrame
	}
	if sum(0, ip[:hdr]) != sumOfSound || !soundUDP(ip, udp[:n]) {
		return nil, badChecksum
	}
	return udp[udpHdrLen:n], ""
}

// sumOfSound is the sum of bytes that contain the right checksum of themselves.
const sumOfSound = 0xffff

// soundUDP says whether a datagram's checksum is one that a sound datagram can have on a TAP: the right one, none (RFC
// 768), or the sum of the pseudo header alone. A guest's virtio NIC leaves the rest to the hardware (VIRTIO 1.3, section
// 5.1.6.2), and a TAP is none: the kernel hands the datagram on unfinished, and says so beside the frame only
// (TP_STATUS_CSUMNOTREADY, linux/if_packet.h).
func soundUDP(ip, udp []byte) bool {
	c := binary.BigEndian.Uint16(udp[6:])
	pseudo := sum(protoUDP+uint64(len(udp)), ip[12:20]) // both addresses, protocol, length
	return c == 0 || c == pseudo || sum(uint64(pseudo), udp) == sumOfSound
}

// frameStart is a reply's frame up to its options, for the guest's MAC and without what differs between replies.
func (l *Lease) frameStart() []byte {
	own := l.serverMAC()
	b := append(l.MAC.HardwareAddr(), own[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv4)
	ip := append(b, make([]byte, ipUDPLen+headerLen)...)[len(b):]
	src := l.Server.As4()
	ip[0], ip[8], ip[9] = ipVersionIHL, ipTTL, protoUDP
	binary.BigEndian.PutUint16(ip[6:], ipDontFragment) // so that it needs no identification (RFC 6864)
	copy(ip[12:], src[:])
	udp := ip[ipHeaderLen:]
	binary.BigEndian.PutUint16(udp[0:], serverPort)
	binary.BigEndian.PutUint16(udp[2:], clientPort)
	msg := udp[udpHdrLen:] // no next server (siaddr), no server name, no boot file
	msg[offOp], msg[offHType], msg[offHLen] = opReply, htypeEthernet, byte(len(l.MAC))
	copy(msg[offChaddr:], l.MAC[:])
	return append(append(b, ip...), cookie[:]...)
}

// appendFrame appends the frame of a reply, its message padded to the least size of BOOTP.
func (r *responder) appendFrame(b []byte, q *query, v verdict, set *optionSet) []byte {
	start := len(b)
	b = append(b, r.start...)
	b = r.appendOptions(b, q, v, set)
	const least = etherHdrLen + ipUDPLen + minBOOTP
	for len(b)-start < least {
		b = append(b, optPad)
	}
	frame := b[start:]
	msg := frame[etherHdrLen+ipUDPLen:]
	copy(msg[offXID:], q.header[offXID:][:4])
	copy(msg[offFlags:], q.header[offFlags:][:2])
	ciaddr, yiaddr := v.ciaddr.As4(), v.yiaddr.As4()
	copy(msg[offCiaddr:], ciaddr[:])
	copy(msg[offYiaddr:], yiaddr[:])

	// RFC 2131, section 4.1: to ciaddr, else by the broadcast flag, else to yiaddr, which the guest does not answer ARP
	// for yet. A NAK is always broadcast, as the guest may not have the address that it used.
	to := v.ciaddr
	if to.IsUnspecified() {
		to = v.yiaddr
		if q.broadcast() {
			to = netip.IPv4Unspecified()
		}
	}
	if to.IsUnspecified() || v.kind == dhcpv4.MessageTypeNak {
		copy(frame, broadcastMAC[:])
		to = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	finish(frame[etherHdrLen:], to)
	return b
}

// finish sets the receiver, the lengths and the checksums of an IPv4 datagram of UDP.
func finish(ip []byte, to netip.Addr) {
	dst, udp := to.As4(), ip[ipHeaderLen:]
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip[:ipHeaderLen]))
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	c := ^sum(protoUDP+uint64(len(udp))+uint64(sum(0, ip[12:20])), udp) // pseudo header: both addresses, protocol, length
	if c == 0 {
		c = 0xffff // 0 stands for none
	}
	binary.BigEndian.PutUint16(udp[6:], c)
}

// sum is the ones' complement sum of 16-bit words, continued from n (RFC 1071). It takes two words at once.
func sum(n uint64, b []byte) uint16 {
	for ; len(b) > 3; b = b[4:] {
		n += uint64(binary.BigEndian.Uint32(b))
	}
	if len(b) > 1 {
		n += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		n += uint64(b[0]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// answerARP gives the answer to the guest's ARP request for the server identifier, where that is no gateway's, and
// false for any other frame.
func (l *Lease) answerARP(b, frame []byte) ([]byte, bool) {
	if l.Server != linkLocalServer || len(frame) < etherHdrLen+arpLen || binary.BigEndian.Uint16(frame[12:]) != etherTypeARP {
		return nil, false
	}
	arp := frame[etherHdrLen:]
	server, own := l.Server.As4(), l.serverMAC()
	if !bytes.Equal(arp[:6], arpStart) || binary.BigEndian.Uint16(arp[6:]) != arpRequest ||
		!bytes.Equal(arp[8:14], l.MAC[:]) || !bytes.Equal(arp[24:28], server[:]) {
		return nil, false
	}
	b = append(append(b, l.MAC[:]...), own[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeARP)
	b = append(b, arpStart...)
	b = binary.BigEndian.AppendUint16(b, arpReply)
	b = append(append(b, own[:]...), server[:]...)
	return append(b, arp[8:18]...), true // the asker's MAC and address
}
