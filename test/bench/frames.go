package main

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

const (
	vnetHdrLen = 10 // struct virtio_net_hdr, what a TAP has in front of a frame unless told otherwise
	etherLen   = 14
	ipLen      = 20
	udpLen     = 8
	tcpLen     = 20
	headLen    = etherLen + ipLen + tcpLen

	segment = 60_000 // bytes of payload of the long frames
	mss     = mtu - ipLen - tcpLen
)

// Of struct virtio_net_hdr (linux/virtio_net.h).
const (
	needsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoTCP4       = 1 // VIRTIO_NET_HDR_GSO_TCPV4
)

// TCP's flags.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// way is who sends to whom.
type way struct {
	srcMAC, dstMAC nic.MAC
	src, dst       [4]byte
}

var (
	out = way{guestMAC, hostMAC, guestAddr.Addr().As4(), hostAddr.Addr().As4()} // from the guest
	in  = way{hostMAC, guestMAC, hostAddr.Addr().As4(), guestAddr.Addr().As4()} // to it
)

// header begins a frame: room for the virtio-net header, Ethernet, IPv4 with its checksum.
func (w way) header(length int, proto byte) []byte {
	b := make([]byte, vnetHdrLen+length)
	e := b[vnetHdrLen:]
	copy(e, w.dstMAC[:])
	copy(e[6:], w.srcMAC[:])
	binary.BigEndian.PutUint16(e[12:], unix.ETH_P_IP)
	ip := e[etherLen:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], uint16(length-etherLen))
	ip[6] = 0x40 // do not fragment
	ip[8], ip[9] = 64, proto
	copy(ip[12:], w.src[:])
	copy(ip[16:], w.dst[:])
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip[:ipLen]))
	return b
}

// udp gives a datagram for [discard] in a frame of size bytes on the wire, the checksum of Ethernet counted.
func (w way) udp(size int, from uint16) []byte {
	const fcs = 4
	return w.datagram(from, discard, make([]byte, size-fcs-etherLen-ipLen-udpLen))
}

// datagram gives a UDP datagram without checksum, as IPv4 allows.
func (w way) datagram(from, to uint16, payload []byte) []byte {
	b := w.header(etherLen+ipLen+udpLen+len(payload), unix.IPPROTO_UDP)
	u := b[vnetHdrLen+etherLen+ipLen:]
	binary.BigEndian.PutUint16(u, from)
	binary.BigEndian.PutUint16(u[2:], to)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	copy(u[udpLen:], payload)
	return b
}

// tcp gives a segment whose checksum is left to whoever needs it, as virtio-net drivers do.
func (w way) tcp(from, to uint16, seq, acked uint32, flags byte, payload int) []byte {
	b := w.header(headLen+payload, unix.IPPROTO_TCP)
	t := b[vnetHdrLen+etherLen+ipLen:]
	binary.BigEndian.PutUint16(t, from)
	binary.BigEndian.PutUint16(t[2:], to)
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], acked)
	t[12], t[13] = tcpLen/4<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	// With VIRTIO_NET_HDR_F_NEEDS_CSUM there is the sum of the pseudo header.
	pseudo := uint32(unix.IPPROTO_TCP + len(t))
	binary.BigEndian.PutUint16(t[16:], sum(pseudo, w.src[:], w.dst[:]))
	b[0] = needsChecksum
	binary.NativeEndian.PutUint16(b[6:], etherLen+ipLen) // csum_start
	binary.NativeEndian.PutUint16(b[8:], 16)             // csum_offset
	return b
}

// long gives a segment that the card would cut into many.
func (w way) long(from uint16) []byte {
	b := w.tcp(from, discard, 1, 1, ack, segment)
	b[1] = gsoTCP4
	binary.NativeEndian.PutUint16(b[2:], headLen)
	binary.NativeEndian.PutUint16(b[4:], mss)
	return b
}

// sum is the Internet's (RFC 1071), not inverted.
func sum(s uint32, parts ...[]byte) uint16 {
	for _, p := range parts {
		for ; len(p) > 1; p = p[2:] {
			s += uint32(binary.BigEndian.Uint16(p))
		}
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
