package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// sizes are how many pods of one process are given to guests.
var sizes = []int{1, 10, 100, 500}

// cost is what that many pods took.
type cost struct {
	Pods    int     `json:"pods"`
	Attach  tail    `json:"attach"`  // from the look at the namespace until the guest's TAP is joined
	Answer  tail    `json:"answer"`  // from the same beginning until the guest has a DHCPOFFER
	Release tail    `json:"release"` // after the guest's end, until CNI DEL may be called
	Rest    float64 `json:"rest"`    // milliseconds until the TAPs and bridges have gone, divided by the pods; nobody waits for that
	Each    float64 `json:"each"`    // milliseconds from the first to the last answer, divided by the pods
	CPU     float64 `json:"cpu"`     // milliseconds of this process for the start of each, the kernel's work among them
	Heap    float64 `json:"heap"`    // KiB of Go's heap for each, with responders that answer
	Waits   float64 `json:"waits"`   // of the time that its goroutines have run, how much they have waited for each other's locks
}

// tail is a time in milliseconds.
type tail struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

func newTail(times []time.Duration) tail {
	var ms []float64
	for _, t := range times {
		ms = append(ms, t.Seconds()*1e3)
	}
	slices.Sort(ms)
	return tail{quantile(ms, 0.5), quantile(ms, 0.99)}
}

// village is many pods on one host, each with a link that is configured, as plugins leave them.
type village struct {
	rig  // of the host
	pods []*guestPod
}

// guestPod is one of them.
type guestPod struct {
	path string // of its namespace
	nic  nic.NIC
	vm   vm // while it has a guest
}

// vm is what a supervisor holds of its VM's network.
type vm struct {
	ns     *netns.NS
	port   *podnet.Port
	rec    podnet.Record
	server *dhcp.Server
	stop   context.CancelFunc
	ended  chan error
}

func newVillage(pods int) (v *village, err error) {
	v = &village{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make %d pods: %w", pods, err), v.Close())
		}
	}()
	if v.host, err = v.namespace("village"); err != nil {
		return v, err
	}
	for i := range pods {
		p, err := v.addPod(i)
		if err != nil {
			return v, err
		}
		v.pods = append(v.pods, p)
	}
	return v, nil
}

// addPod makes the i-th. Nobody keeps its namespace open, as a supervisor does that.
func (v *village) addPod(i int) (*guestPod, error) {
	name := fmt.Sprintf("pod-%d", i)
	ns, err := netns.Create(name)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	v.defers(func() error { return netns.Remove(ns.Path()) })
	addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte((i + 2) >> 8), byte(i + 2)}), 16) // RFC 1918: more than a documentation range has
	p := &guestPod{path: ns.Path(), nic: nic.NIC{
		Name: podLink, MAC: nic.MAC{0x02, 0, 0x5e, 0x20, byte(i >> 8), byte(i)}, MTU: mtu, Addrs: prefixes(addr),
		Routes: []nic.Route{{Dst: anywhere, Gw: netip.AddrFrom4([4]byte{10, 0, 0, 1})}},
	}}
	f, err := os.Open(ns.Path())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = fmt.Sprintf("veth%d", i), mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: podLink, PeerNamespace: netlink.NsFd(f.Fd()), PeerMTU: mtu, PeerHardwareAddr: p.nic.MAC.HardwareAddr()}
	if err := v.host.Netlink().LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth: %w", err)
	}
	eth, err := ns.Netlink().LinkByName(podLink)
	if err != nil {
		return nil, err
	}
	err = errors.Join(ns.Netlink().AddrAdd(eth, &netlink.Addr{IPNet: ipNet(addr)}), v.host.Netlink().LinkSetUp(veth), ns.Netlink().LinkSetUp(eth))
	if err != nil {
		return nil, err
	}
	return p, ns.Netlink().RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: p.nic.Routes[0].Gw.AsSlice()})
}

// begin is what a supervisor does between the plugins and QEMU, and gives when the TAP was joined and when a guest that
// asks at once has its offer.
func (p *guestPod) begin() (joined, answered time.Duration, err error) {
	v := &p.vm
	if v.ns, err = netns.Open(p.path); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	snap, err := podnet.Observe(v.ns)
	if err != nil {
		return 0, 0, err
	}
	ports, err := podnet.Attach(context.Background(), v.ns, snap, []nic.NIC{p.nic}, podnet.Options{}, func(r podnet.Record) error { v.rec = r; return nil })
	if err != nil {
		return 0, 0, err
	}
	v.port, joined = ports[0], time.Since(start)
	lease, _, _ := dhcp.NewLease(p.nic, "bench")
	conn, err := v.port.Listen(dhcp.Filter())
	if err != nil {
		return 0, 0, err
	}
	v.server = &dhcp.Server{Lease: lease, Conn: conn}
	ctx, stop := context.WithCancel(context.Background())
	v.stop, v.ended = stop, make(chan error, 1)
	go func() { v.ended <- v.server.Run(ctx) }()
	err = p.discover()
	return joined, time.Since(start), err
}

// discover asks for an address, as the guest, and reads the offer.
func (p *guestPod) discover() error {
	tap, err := descriptor(p.vm.port.Taps[0])
	if err != nil {
		return err
	}
	question, err := dhcpv4.NewDiscovery(p.nic.MAC.HardwareAddr())
	if err != nil {
		return err
	}
	w := way{p.nic.MAC, nic.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, [4]byte{}, [4]byte{255, 255, 255, 255}}
	if _, err := unix.Write(tap, w.datagram(68, 67, question.ToBytes())); err != nil {
		return fmt.Errorf("ask for an address: %w", err)
	}
	buf := make([]byte, 2048)
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		n, err := unix.Read(tap, buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(tap), Events: unix.POLLIN}}, 1000); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		const payload = vnetHdrLen + etherLen + ipLen + udpLen
		if n < payload {
			continue
		}
		answer, err := dhcpv4.FromBytes(buf[payload:n])
		if err == nil && answer.TransactionID == question.TransactionID && answer.MessageType() == dhcpv4.MessageTypeOffer {
			return nil
		}
	}
	return errors.New("no DHCPOFFER for 30 s")
}

// end is what a supervisor does after QEMU's end and before DEL, and gives how long that takes beside the responder's end.
func (p *guestPod) end() (time.Duration, error) {
	p.vm.stop()
	err := <-p.vm.ended
	start := time.Now()
	err = errors.Join(err, podnet.Release(p.vm.ns, p.vm.rec))
	return time.Since(start), err
}

// rest is what it does after DEL.
func (p *guestPod) rest() error {
	v := &p.vm
	err := errors.Join(podnet.Detach(v.ns, v.rec), v.port.Close(), v.ns.Close())
	p.vm = vm{}
	return err
}

// measureScale gives guests to ever more pods, as many at a time as there are CPUs.
func measureScale(say func(string, ...any)) (all []cost, err error) {
	begin := time.Now()
	v, err := newVillage(sizes[len(sizes)-1])
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	say("%d pods made in %.1fs", len(v.pods), time.Since(begin).Seconds())
	for i := range v.pods[:10] { // the machine's first filter, and what Go does once
		if _, _, err = v.pods[i].begin(); err == nil {
			_, err = v.pods[i].end()
			err = errors.Join(err, v.pods[i].rest())
		}
		if err != nil {
			return nil, err
		}
	}
	for _, n := range sizes {
		c, err := v.measure(n)
		if err != nil {
			return all, fmt.Errorf("%d pods: %w", n, err)
		}
		say("%d pods: attach %.2f ms, answer %.2f ms, release %.2f ms, heap %.1f KiB each", n, c.Attach.P50, c.Answer.P50, c.Release.P50, c.Heap)
		all = append(all, c)
	}
	return all, nil
}

// leastSamples is how many starts are timed at each size: few pods take several turns.
const leastSamples = 60

func (v *village) measure(n int) (cost, error) {
	var joined, answered, released []time.Duration
	c := cost{Pods: n}
	var spent, used, gone time.Duration
	turns := max(1, leastSamples/n)
	pods := v.pods[:n]
	for turn := range turns {
		var mu sync.Mutex
		before := heap()
		waits, cpu, begin := lockWaits(), cpuTime(), time.Now()
		err := inParallel(pods, func(p *guestPod) error {
			j, a, err := p.begin()
			mu.Lock()
			defer mu.Unlock()
			joined, answered = append(joined, j), append(answered, a)
			return err
		})
		spent, used = spent+time.Since(begin), used+cpuTime()-cpu
		c.Waits += lockWaits() - waits
		if turn == 0 {
			c.Heap = float64(int64(heap())-int64(before)) / float64(n) / 1024
		}
		err2 := inParallel(pods, func(p *guestPod) error {
			if p.vm.stop == nil {
				return nil
			}
			r, err := p.end()
			mu.Lock()
			defer mu.Unlock()
			released = append(released, r)
			return err
		})
		begin = time.Now()
		err3 := inParallel(pods, func(p *guestPod) error {
			if p.vm.stop == nil {
				return nil
			}
			return p.rest()
		})
		gone += time.Since(begin)
		if err := errors.Join(err, err2, err3); err != nil {
			return c, err
		}
	}
	c.Attach, c.Answer, c.Release = newTail(joined), newTail(answered), newTail(released)
	starts := float64(n * turns)
	c.Each, c.CPU, c.Rest = spent.Seconds()*1e3/starts, used.Seconds()*1e3/starts, gone.Seconds()*1e3/starts
	c.Waits /= spent.Seconds() * float64(runtime.NumCPU())
	return c, nil
}

// inParallel does one thing for every pod, by as many goroutines as there are CPUs.
func inParallel(pods []*guestPod, do func(*guestPod) error) error {
	next := make(chan *guestPod)
	errs := make(chan error, runtime.NumCPU())
	for range runtime.NumCPU() {
		go func() {
			var all []error
			for p := range next {
				all = append(all, do(p))
			}
			errs <- errors.Join(all...)
		}()
	}
	for _, p := range pods {
		next <- p
	}
	close(next)
	var all []error
	for range runtime.NumCPU() {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// heap gives the bytes that are in use on Go's heap, when what is not has been collected.
func heap() uint64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
