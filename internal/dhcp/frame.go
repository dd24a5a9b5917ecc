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

// message gives the DHCP message in a frame, a part of it, and false where there is none. The UDP checksum is not
// looked at: a guest's virtio NIC leaves it to the hardware, which a TAP does not have.
func message(frame []byte) ([]byte, bool) {
	if len(frame) < etherHdrLen+ipHeaderLen || binary.BigEndian.Uint16(frame[12:]) != etherTypeIPv4 {
		return nil, false
	}
	ip := frame[etherHdrLen:]
	hdr, total := int(ip[0]&0x0f)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || hdr < ipHeaderLen || total < hdr+udpHdrLen || total > len(ip) ||
		binary.BigEndian.Uint16(ip[6:])&ipMoreOrOffset != 0 || ip[9] != protoUDP {
		return nil, false
	}
	udp := ip[hdr:total] // what follows in the frame is padding
	n := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != serverPort || n < udpHdrLen || n > len(udp) {
		return nil, false
	}
	return udp[udpHdrLen:n], true
}

// appendFrame encodes a reply as a frame to the guest; list is the client's parameter request list.
func (l *Lease) appendFrame(b []byte, resp *dhcpv4.DHCPv4, list []byte) []byte {
	dst, ip := l.MAC, addr(resp.ClientIPAddr)
	if ip.IsUnspecified() {
		ip = addr(resp.YourIPAddr)
	}
	// RFC 2131, section 4.1: to ciaddr, else by the broadcast flag, else to yiaddr, which the guest does not answer ARP
	// for yet. A NAK is always broadcast, as the guest may not have the address that it used.
	broadcast := addr(resp.ClientIPAddr).IsUnspecified() && resp.IsBroadcast()
	if broadcast || ip.IsUnspecified() || resp.MessageType() == dhcpv4.MessageTypeNak {
		dst, ip = broadcastMAC, netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	own := l.serverMAC()
	b = append(append(b, dst[:]...), own[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv4)
	start := len(b)
	b = append(b, make([]byte, ipUDPLen)...)
	b = appendMessage(b, resp, list)
	l.putHeaders(b[start:], ip)
	return b
}

// putHeaders fills in the IPv4 and UDP headers in front of a message.
func (l *Lease) putHeaders(p []byte, to netip.Addr) {
	ip, udp := p[:ipHeaderLen], p[ipHeaderLen:]
	src, dst := l.Server.As4(), to.As4()
	ip[0], ip[8], ip[9] = ipVersionIHL, ipTTL, protoUDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(ip[6:], ipDontFragment) // so that it needs no identification (RFC 6864)
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip))

	binary.BigEndian.PutUint16(udp[0:], serverPort)
	binary.BigEndian.PutUint16(udp[2:], clientPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	c := ^sum(protoUDP+uint32(len(udp))+uint32(sum(0, ip[12:20])), udp) // pseudo header: both addresses, protocol, length
	if c == 0 {
		c = 0xffff // 0 stands for none
	}
	binary.BigEndian.PutUint16(udp[6:], c)
}

// sum is the ones' complement sum of 16-bit words, continued from n (RFC 1071).
func sum(n uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		n += uint32(b[0]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// appendMessage encodes a DHCP message, padded to the least size of BOOTP.
func appendMessage(b []byte, m *dhcpv4.DHCPv4, list []byte) []byte {
	start := len(b)
	b = append(b, byte(m.OpCode), byte(m.HWType), byte(len(m.ClientHWAddr)), m.HopCount)
	b = append(b, m.TransactionID[:]...)
	b = binary.BigEndian.AppendUint16(b, m.NumSeconds)
	b = binary.BigEndian.AppendUint16(b, m.Flags)
	b = appendAddrs(b, addr(m.ClientIPAddr), addr(m.YourIPAddr), addr(m.ServerIPAddr), addr(m.GatewayIPAddr))
	b = append(b, m.ClientHWAddr...)
	b = append(b, make([]byte, start+headerLen-len(b))...) // the rest of chaddr, no server name, no boot file
	b = append(b, 99, 130, 83, 99)                         // the cookie
	b = appendOptions(b, m.Options, list)
	if short := start + minBOOTP - len(b); short > 0 {
		b = append(b, make([]byte, short)...)
	}
	return b
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
