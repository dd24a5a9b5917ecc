package podnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// offloads are what a Linux guest's virtio-net driver turns on by QEMU: frames without checksums, segments of TCP far
// longer than the MTU (linux/if_tun.h).
const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6

// bigGuest is a guest with offloads and as many queues as the port has.
type bigGuest struct {
	*testnet.Namespace
	taps        []*os.File     // its own ends
	read        []atomic.Int64 // frames by the pod's queue, toward the guest
	longest     atomic.Int64   // bytes of the longest frame from the guest, with its virtio-net header
	longestRead atomic.Int64   // the same toward the guest
}

// newBigGuest is testnet.NewGuest with all that QEMU can do.
func newBigGuest(t testing.TB, n nic.NIC, p *Port) *bigGuest {
	t.Helper()
	g := &bigGuest{Namespace: testnet.New(t, "guest"), read: make([]atomic.Int64, len(p.Taps))}
	var mine []*os.File
	g.Must(func() (err error) { mine, err = openTap(n.Name, len(p.Taps), len(p.Taps) > 1); return err })
	g.taps = mine
	for _, f := range []*os.File{mine[0], p.Taps[0]} {
		if err := setOffloads(f, offloads); err != nil {
			t.Fatal(err)
		}
	}
	g.MustRun("ip", "link", "set", n.Name, "address", n.MAC.String(), "mtu", fmt.Sprint(n.MTU), "up")
	var wires sync.WaitGroup
	wire := func(dst, src *os.File, seen func(int)) {
		wires.Go(func() {
			buf := make([]byte, 1<<16+64)
			for {
				k, err := src.Read(buf)
				if err != nil {
					return
				}
				seen(k)
				if _, err := dst.Write(buf[:k]); errors.Is(err, os.ErrClosed) {
					return
				}
			}
		})
	}
	most := func(of *atomic.Int64, k int) {
		for old := of.Load(); int64(k) > old && !of.CompareAndSwap(old, int64(k)); old = of.Load() {
		}
	}
	for i, tap := range p.Taps {
		wire(mine[i], tap, func(k int) { g.read[i].Add(1); most(&g.longestRead, k) })
		wire(tap, mine[i], func(k int) { most(&g.longest, k) })
	}
	t.Cleanup(func() {
		for _, f := range append(mine, p.Taps...) {
			f.Close()
		}
		wires.Wait()
	})
	return g
}

func TestMTUs(t *testing.T) {
	for _, mtu := range []int{1450, 9000, 65521} { // 65521: a TAP's largest, 65535 less an Ethernet header
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				node := testnet.NewNode(t, gw4, gw6)
				spec := dualStack()
				spec.MTU = mtu
				pod, _ := addPodOf(t, kind, node, spec)
				a := attach(t, pod, Options{})
				guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
				guest.Configure(a.nics[0])
				const icmp4, icmp6 = 20 + 8, 40 + 8 // headers
				for to, head := range map[netip.Addr]int{gw4.Addr(): icmp4, gw6.Addr(): icmp6} {
					if !guest.Ping(to, "-M", "do", "-s", fmt.Sprint(mtu-head)) {
						t.Errorf("a ping of %s with exactly the MTU is lost", to)
					}
				}
			})
		})
	}
}

func TestTCPArrivesWhole(t *testing.T) {
	for name, shape := range map[string]struct {
		queues int
		txOff  bool // on the veth: the kernel then finishes what the guest leaves to the card
	}{
		"one queue": {queues: 1}, "four queues": {queues: 4}, "checksums off on the veth": {queues: 1, txOff: true},
	} {
		t.Run(name, func(t *testing.T) {
			forEveryJoin(t, func(t *testing.T, kind string) {
				if shape.txOff && !isVeth(kind) {
					t.Skip("only of a veth is it switched off")
				}
				node := testnet.NewNode(t, gw4, gw6)
				pod, _ := addPodOf(t, kind, node, dualStack())
				if shape.txOff {
					pod.Must(func() error { return testnet.ChecksumsOff("eth0") })
				}
				a := attach(t, pod, Options{Queues: shape.queues})
				guest := newBigGuest(t, a.nics[0], a.ports[0])
				guest.Configure(a.nics[0])
				const size = 50e6
				testnet.Transfer(t, guest.Namespace, node.Namespace, gw4.Addr(), size)
				if !guest.Ping(gw6.Addr()) {
					t.Error("IPv6 is lost")
				}
				testnet.Transfer(t, guest.Namespace, node.Namespace, gw6.Addr(), size/5)
				testnet.Transfer(t, node.Namespace, guest.Namespace, ip4.Addr(), size)
				testnet.Transfer(t, node.Namespace, guest.Namespace, ip6.Addr(), size/5)
				if n := guest.longest.Load(); n < 4*1450 {
					t.Errorf("the guest's longest frame had %d bytes: segmentation was not left to the host, which was the point", n)
				}
				busy := func() (n int) {
					for i := range guest.read {
						if guest.read[i].Load() > 0 {
							n++
						}
					}
					return n
				}
				// The kernel spreads connections by a hash of their ports: a few may meet in one queue, many do not.
				for tries := 0; shape.queues > 1 && busy() < 2; tries++ {
					if tries == 32 {
						t.Fatalf("one of %d queues carried everything", shape.queues)
					}
					testnet.Transfer(t, node.Namespace, guest.Namespace, ip4.Addr(), 1e3)
				}
			})
		})
	}
}

func TestDetachUnderTraffic(t *testing.T) { forLinkKinds(t, testDetachUnderTraffic) }

func testDetachUnderTraffic(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPodOf(t, kind, node, dualStack())
	quiet(t, pod)
	a := attach(t, pod, Options{})
	guest := newBigGuest(t, a.nics[0], a.ports[0])
	guest.Configure(a.nics[0])
	ctx, cancel := context.WithCancel(context.Background())
	var talk sync.WaitGroup
	var sent atomic.Int64
	for _, way := range []struct {
		from *testnet.Namespace
		to   netip.Addr
	}{{guest.Namespace, gw4.Addr()}, {node.Namespace, ip4.Addr()}, {node.Namespace, ip6.Addr()}} {
		var c *net.UDPConn
		way.from.Must(func() (err error) {
			c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(way.to, 9)))
			return err
		})
		talk.Go(func() {
			defer c.Close()
			for b := make([]byte, 1000); ctx.Err() == nil; {
				if _, err := c.Write(b); err == nil { // refused, unreachable: of no interest
					sent.Add(1)
				}
			}
		})
	}
	for sent.Load() < 1000 {
		time.Sleep(time.Millisecond)
	}
	err := Detach(pod.NS, a.rec)
	cancel()
	talk.Wait()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range a.ports {
		p.Close()
	}
	quiet(t, pod)
	if d := changed(t, pod, a.before); d != "" {
		t.Errorf("-before +after:\n%s", d)
	}
	if kind == "tap" {
		return // whose addresses are nobody's while no guest is there
	}
	for _, to := range []netip.Addr{ip4.Addr(), ip6.Addr()} {
		if !node.Ping(to) {
			t.Errorf("the pod's own %s does not answer again", to)
		}
	}
}
