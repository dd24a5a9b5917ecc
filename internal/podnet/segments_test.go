package podnet

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

// udpOffloads are what a guest's driver turns on beside offloads where QEMU (8.2) and the kernel (6.2) have it: datagrams of
// one size that the host cuts (linux/if_tun.h, TUN_F_USO4 and TUN_F_USO6).
const udpOffloads = 0x20 | 0x40

// A guest's large UDP sends cross uncut as its TCP segments do, and arrive as the datagrams that they are, in both directions.
func TestUDPSegmentsCross(t *testing.T) {
	forLinkKinds(t, func(t *testing.T, kind string) {
		node := testnet.NewNode(t, gw4, gw6)
		pod, _ := addPodOf(t, kind, node, dualStack())
		a := attach(t, pod, Options{})
		guest := newBigGuest(t, a.nics[0], a.ports[0])
		for _, f := range []*os.File{guest.taps[0], a.ports[0].Taps[0]} {
			err := setOffloads(f, offloads|udpOffloads)
			if errors.Is(err, unix.EINVAL) {
				t.Skip("needs Linux 6.2: TAPs with UDP segmentation offload")
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		guest.Configure(a.nics[0])
		for _, way := range []struct {
			name     string
			from, to *testnet.Namespace
			addr     netip.Addr
		}{
			{"from the guest, IPv4", guest.Namespace, node.Namespace, gw4.Addr()},
			{"from the guest, IPv6", guest.Namespace, node.Namespace, gw6.Addr()},
			{"to the guest, IPv4", node.Namespace, guest.Namespace, ip4.Addr()},
			{"to the guest, IPv6", node.Namespace, guest.Namespace, ip6.Addr()},
		} {
			guest.longest.Store(0)
			guest.longestRead.Store(0)
			sendSegments(t, way.from, way.to, way.addr)
			long := &guest.longest
			if way.from != guest.Namespace {
				long = &guest.longestRead
			}
			if n := long.Load(); n < 4*1450 {
				t.Errorf("%s: the longest frame had %d bytes: it was cut before the TAP", way.name, n)
			}
		}
	})
}

// sendSegments sends many datagrams by one call, and wants each of them.
func sendSegments(t *testing.T, from, to *testnet.Namespace, addr netip.Addr) {
	t.Helper()
	const size, count = 1200, 20
	var in, out *net.UDPConn
	to.Must(func() (err error) {
		in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	defer in.Close()
	from.Must(func() (err error) {
		out, err = net.DialUDP("udp", nil, in.LocalAddr().(*net.UDPAddr))
		return err
	})
	defer out.Close()
	raw, err := out.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
	if err = errors.Join(err, set); err != nil {
		t.Fatal(err)
	}
	var whole []byte
	for i := range count {
		whole = append(whole, bytes.Repeat([]byte{byte(i + 1)}, size)...)
	}
	// The first datagrams may wait for the neighbour to be found, and be cut for that.
	for try := 0; ; try++ {
		if _, err := out.Write(whole); err != nil {
			t.Fatal(err)
		}
		var got []byte
		b := make([]byte, 2*size)
		in.SetReadDeadline(time.Now().Add(patience / 10))
		for len(got) < len(whole) {
			n, err := in.Read(b)
			if err != nil {
				break
			}
			if n != size {
				t.Fatalf("a datagram of %d bytes, want %d", n, size)
			}
			got = append(got, b[:n]...)
		}
		if bytes.Equal(got, whole) {
			return
		}
		if try == 9 {
			t.Fatalf("%d bytes of %d have arrived, or others", len(got), len(whole))
		}
	}
}

func setOffloads(f *os.File, flags int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) })
	return errors.Join(err, set)
}
