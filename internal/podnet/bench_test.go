package podnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// arena is a pod whose network is attached, or made ready for a guest in the shortest way, again and again. Beside it
// is another VM: the machine's first ingress filter makes the kernel patch its code (static keys), 0.4 ms that would
// otherwise be counted each time.
type arena struct {
	pod    *testnet.Namespace
	wish   Wish
	before nic.Snapshot
	nics   []nic.NIC
	rec    Record
}

func newArena(t testing.TB, wish Wish) *arena {
	t.Helper()
	node := testnet.NewNode(t, gw4, gw6)
	other, _ := addPod(t, node, dualStack())
	attach(t, other, Options{Datapath: wish})
	pod, _ := addPod(t, node, dualStack())
	quiet(t, pod)
	a := &arena{pod: pod, wish: wish, before: observe(t, pod)}
	a.nics = plainNICs(a.before)
	return a
}

// attach gives how long Attach takes, and leaves the ports open. It looks first, as everybody who attaches does, and programs
// are loaded by then, as they are beside the writing of a journal.
func (a *arena) attach(t testing.TB) ([]*Port, time.Duration) {
	t.Helper()
	a.before = observe(t, a.pod)
	o := Options{Datapath: a.wish}
	o.Programs = Load(a.before, a.nics, o)
	defer o.Programs.Close()
	if err := o.Programs.Wait(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	ports, err := Attach(context.Background(), a.pod.NS, a.before, a.nics, o, func(r Record) error { a.rec = r; return nil })
	took := time.Since(start)
	if err != nil {
		t.Fatal(err)
	}
	return ports, took
}

// detach gives how long Release takes, with the TAPs open as in a supervisor after QEMU's end, and then does the rest.
func (a *arena) detach(t testing.TB, ports []*Port) time.Duration {
	t.Helper()
	start := time.Now()
	err := Release(a.pod.NS, a.rec)
	took := time.Since(start)
	for _, p := range ports {
		p.Close()
	}
	if err := errors.Join(err, Detach(a.pod.NS, a.rec)); err != nil {
		t.Fatal(err)
	}
	return took
}

// minimal gives how long the least takes that makes the same links: TAP, and a bridge that both are joined by, or a program at
// each that redirects. It undoes that, untimed.
func (a *arena) minimal(t testing.TB) time.Duration {
	t.Helper()
	n := a.nics[0]
	snap := observe(t, a.pod)
	veth := device(snap.Link(n.Name).Index, n.Name)
	var tap *os.File
	do, undo := a.minimalBridge(veth, n)
	if a.wish == WishRedirect {
		do, undo = a.minimalRedirect(t, veth, n)
	}
	start := time.Now()
	err := a.pod.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		tap = os.NewFile(uintptr(fd), "min-tap")
		req, err := unix.NewIfreq("min-tap")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		link, err := a.pod.Link().LinkByName("min-tap")
		if err != nil {
			return err
		}
		return do(link)
	})
	took := time.Since(start)
	tap.Close()
	if err == nil {
		err = undo()
	}
	if err != nil {
		t.Fatal(err)
	}
	return took
}

func (a *arena) minimalBridge(veth netlink.Link, n nic.NIC) (do func(tap netlink.Link) error, undo func() error) {
	h := a.pod.Link()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "min-bridge", TxQLen: -1}}
	do = func(tap netlink.Link) error {
		return run(
			step{"add bridge", func() error { return h.LinkAdd(bridge) }},
			step{"set MTU", func() error { return h.LinkSetMTU(tap, n.MTU) }},
			step{"set MAC", func() error { return h.LinkSetHardwareAddr(veth, ownMAC(n.MAC).HardwareAddr()) }},
			step{"join veth", func() error { return h.LinkSetMasterByIndex(veth, bridge.Index) }},
			step{"join TAP", func() error { return h.LinkSetMasterByIndex(tap, bridge.Index) }},
			step{"set bridge up", func() error { return h.LinkSetUp(bridge) }},
			step{"set TAP up", func() error { return h.LinkSetUp(tap) }},
			step{"set veth up", func() error { return h.LinkSetUp(veth) }},
		)
	}
	return do, func() error {
		return run(
			step{"remove bridge", func() error { return h.LinkDel(bridge) }},
			step{"set MAC", func() error { return h.LinkSetHardwareAddr(veth, n.MAC.HardwareAddr()) }},
		)
	}
}

// minimalRedirect has programs without rules, which are there before.
func (a *arena) minimalRedirect(t testing.TB, veth netlink.Link, n nic.NIC) (do func(tap netlink.Link) error, undo func() error) {
	k := &kernel{h: a.pod.Link()}
	var progs []*loaded
	for _, h := range []hook{{device: "min-tap", role: "min", to: n.Name}, {device: n.Name, role: "min", to: "min-tap"}} {
		l, err := loadHook(h, work{})
		if err != nil {
			t.Fatal(err)
		}
		progs = append(progs, l)
	}
	do = func(tap netlink.Link) error {
		from, to := tap.Attrs().Index, veth.Attrs().Index
		steps := []step{{"set MTU", func() error { return k.h.LinkSetMTU(tap, n.MTU) }}}
		for _, l := range progs {
			steps = append(steps,
				step{"aim", func() error { return l.aim(to, false) }},
				step{"add clsact", func() error { return k.addClsact(from) }},
				step{"add filter", func() error { err := k.addFilter(l, from); from, to = to, from; return err }},
			)
		}
		return run(append(steps, step{"set TAP up", func() error { return k.h.LinkSetUp(tap) }})...)
	}
	return do, func() error {
		for _, l := range progs {
			l.close()
		}
		return k.h.QdiscDel(clsact(veth.Attrs().Index))
	}
}

// quantile gives the q-th part of the values, 0.5 for the median. It sorts them.
func quantile[T cmp.Ordered](values []T, q float64) T {
	slices.Sort(values)
	return values[min(int(q*float64(len(values))), len(values)-1)]
}

// compare runs both ways in turn, so that a busy machine slows them alike, and gives the medians of the times and of
// their ratio.
func (a *arena) compare(t testing.TB, rounds int) (attach, minimal time.Duration, ratio float64) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the garbage is mostly Observe's and the tests'
	var attaches, minima []time.Duration
	var ratios []float64
	for range rounds {
		least := a.minimal(t)
		ports, took := a.attach(t)
		a.detach(t, ports)
		attaches, minima = append(attaches, took), append(minima, least)
		ratios = append(ratios, float64(took)/float64(least))
	}
	return quantile(attaches, 0.5), quantile(minima, 0.5), quantile(ratios, 0.5)
}

// forBoth runs a test of costs for each datapath that a veth may have.
func forBoth(t *testing.T, test func(t *testing.T, a *arena)) {
	if raceEnabled {
		t.Skip("the race detector slows our code, not the kernel: the ratio says nothing")
	}
	for _, wish := range []Wish{WishBridge, WishRedirect} {
		t.Run(string(wish), func(t *testing.T) { test(t, newArena(t, wish)) })
	}
}

// TestAttachCost holds Attach to what the bare links cost: silence and filters must stay cheap. Measured are 1.3 to 1.4 for a
// bridge, and 1.1 to 1.2 for a redirect, on a machine of two CPUs.
func TestAttachCost(t *testing.T) {
	bounds := map[Wish]float64{WishBridge: 1.5, WishRedirect: 1.3}
	const rounds, tries = 25, 30
	forBoth(t, func(t *testing.T, a *arena) {
		var ratio float64
		for range tries { // others use the machine too, and Attach wants both of its CPUs for a moment
			var attach, minimal time.Duration
			attach, minimal, ratio = a.compare(t, rounds)
			t.Logf("Attach %v, minimal %v, ratio %.2f", attach, minimal, ratio)
			if ratio <= bounds[a.wish] {
				return
			}
		}
		t.Errorf("Attach takes %.2f times as long as the bare links, want at most %.1f", ratio, bounds[a.wish])
	})
}

// TestReleaseCost holds what CNI DEL waits for to what Attach takes: no wait of the kernel's for RCU, of which one link's removal
// has several. Measured are 0.6 for a bridge and 0.7 for a redirect.
func TestReleaseCost(t *testing.T) {
	const bound, rounds, tries = 1, 25, 30
	forBoth(t, func(t *testing.T, a *arena) {
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
		var ratio float64
		for range tries {
			var ratios []float64
			for range rounds {
				ports, attach := a.attach(t)
				ratios = append(ratios, float64(a.detach(t, ports))/float64(attach))
			}
			ratio = quantile(ratios, 0.5)
			t.Logf("Release takes %.2f times as long as Attach", ratio)
			if ratio <= bound {
				return
			}
		}
		t.Errorf("Release takes %.2f times as long as Attach, want at most as long", ratio)
	})
}

func BenchmarkAttach(b *testing.B) {
	for _, wish := range []Wish{WishBridge, WishRedirect} {
		b.Run(string(wish), func(b *testing.B) {
			a := newArena(b, wish)
			b.ResetTimer()
			attach, minimal, ratio := a.compare(b, b.N)
			b.ReportMetric(0, "ns/op") // the loop's own time is mostly the undoing
			b.ReportMetric(float64(attach.Microseconds()), "attach-us")
			b.ReportMetric(float64(minimal.Microseconds()), "minimal-us")
			b.ReportMetric(ratio, "attach/minimal")
		})
	}
}

// BenchmarkLoad is what the kernel's verifier takes for the programs of one NIC.
func BenchmarkLoad(b *testing.B) {
	a := newArena(b, WishRedirect)
	for b.Loop() {
		p := Load(a.before, a.nics, Options{Datapath: WishRedirect})
		if err := errors.Join(p.Wait(), p.Close()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDetach(b *testing.B) {
	a := newArena(b, WishAuto)
	var times []time.Duration
	b.ResetTimer()
	for range b.N {
		ports, _ := a.attach(b)
		times = append(times, a.detach(b, ports))
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(quantile(times, 0.5).Microseconds()), "p50-us")
	b.ReportMetric(float64(quantile(times, 0.99).Microseconds()), "p99-us")
}

// BenchmarkAttachDetach50 starts and ends 50 pods at a time, as a node does after a reboot.
func BenchmarkAttachDetach50(b *testing.B) {
	const pods = 50
	arenas := make([]*arena, pods)
	node := testnet.NewNode(b, gw4, gw6)
	for i := range arenas {
		spec := dualStack()
		spec.MAC[5] = byte(i)
		spec.Addrs = []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("198.51.100.%d/24", 2+i)), netip.MustParsePrefix(fmt.Sprintf("2001:db8:100::%x/64", 2+i)),
		}
		pod, _ := addPod(b, node, spec)
		arenas[i] = &arena{pod: pod}
	}
	for _, a := range arenas {
		quiet(b, a.pod)
		a.before = observe(b, a.pod)
		a.nics = plainNICs(a.before)
	}
	var mu sync.Mutex
	var attaches, detaches []time.Duration
	b.ResetTimer()
	for range b.N {
		var wg sync.WaitGroup
		for _, a := range arenas {
			wg.Go(func() {
				start := time.Now()
				ports, err := Attach(context.Background(), a.pod.NS, a.before, a.nics, Options{}, func(r Record) error { a.rec = r; return nil })
				attached := time.Since(start)
				for _, p := range ports {
					p.Close()
				}
				start = time.Now()
				if err == nil {
					err = Detach(a.pod.NS, a.rec)
				}
				detached := time.Since(start)
				if err != nil {
					b.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				attaches, detaches = append(attaches, attached), append(detaches, detached)
			})
		}
		wg.Wait()
	}
	b.ReportMetric(float64(quantile(attaches, 0.5).Microseconds()), "attach-p50-us")
	b.ReportMetric(float64(quantile(attaches, 0.99).Microseconds()), "attach-p99-us")
	b.ReportMetric(float64(quantile(detaches, 0.5).Microseconds()), "detach-p50-us")
	b.ReportMetric(float64(quantile(detaches, 0.99).Microseconds()), "detach-p99-us")
}
