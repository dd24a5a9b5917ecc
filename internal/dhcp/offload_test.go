package dhcp

import (
	"encoding/binary"
	"net"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// A virtio NIC that leaves the UDP checksum to the hardware is answered, although the frame reaches a packet socket on
// the TAP with the sum of the pseudo header in place of it; a checksum that nobody left to do and is wrong is not.
func TestChecksumOffload(t *testing.T) {
	l := serve(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")}, "")
	var fd int
	l.pod.Must(func() error {
		ifi, err := net.InterfaceByName(l.port.Join.Tap)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index})
	})
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		t.Fatal(err)
	}
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}

	frame := broadcast(t, request(dhcpv4.MessageTypeDiscover))
	udp := frame[etherHdrLen+ipHeaderLen:]
	binary.BigEndian.PutUint16(udp[6:], sum(protoUDP+uint64(len(udp)), frame[26:34]))
	// struct virtio_net_hdr (linux/virtio_net.h): flags, kind and size of segments, where to sum from, where to put it.
	hdr := [10]byte{0: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM}
	binary.NativeEndian.PutUint16(hdr[6:], etherHdrLen+ipHeaderLen)
	binary.NativeEndian.PutUint16(hdr[8:], 6)
	send := func(hdr [10]byte, frame []byte) {
		t.Helper()
		if _, err := l.port.Taps[0].Write(append(hdr[:], frame...)); err != nil {
			t.Fatal(err)
		}
	}
	send(hdr, frame)
	got, oob := make([]byte, 2048), make([]byte, 256)
	var n, oobn int
	var err error
	for err == nil && !slices.Equal(got[:n], frame) { // the node may have said something before
		if n, oobn, _, _, err = unix.Recvmsg(fd, got, oob, 0); err != nil {
			t.Fatalf("the packet socket has % x, %v; want % x", got[:n], err, frame)
		}
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(cmsgs) != 1 {
		t.Fatalf("control messages %v, %v", cmsgs, err)
	}
	if aux := (*unix.TpacketAuxdata)(unsafe.Pointer(&cmsgs[0].Data[0])); aux.Status&unix.TP_STATUS_CSUMNOTREADY == 0 {
		t.Errorf("the kernel does not say that the checksum is to be done: status %#x", aux.Status)
	}
	l.await(t, "answer to an unfinished checksum", func(s Stats) bool { return s.Offers == 1 })

	binary.BigEndian.PutUint16(udp[6:], 0xbeef)
	send([10]byte{}, frame)
	l.await(t, "wrong checksum", func(s Stats) bool { return s.BadChecksum == 1 })
	if s := l.server.Stats(); s != (Stats{Discovers: 1, Offers: 1, BadChecksum: 1}) {
		t.Errorf("%+v", s)
	}
}
