package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// village is many pods on one host, each with a link that is configured, as plugins leave them.
type village struct {
	rig    // of the host
	pods   []*guestPod
	before holdings // while no pod has a guest
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

// begin is what a supervisor does between the plugins and QEMU, on one of the product's datapaths, and gives when the TAP was
// joined and when a guest that asks at once has its offer.
func (p *guestPod) begin(w ownWay) (joined, answered time.Duration, err error) {
	v := &p.vm
	if v.ns, err = netns.Open(p.path); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	snap, err := podnet.Observe(v.ns)
	if err != nil {
		return 0, 0, err
	}
	ports, err := podnet.Attach(context.Background(), v.ns, snap, []nic.NIC{p.nic}, w.options(1), func(r podnet.Record) error { v.rec = r; return nil })
	if err != nil {
		return 0, 0, err
	}
	v.port, joined = ports[0], time.Since(start)
	if err := w.served(v.port.Join); err != nil {
		return 0, 0, err
	}
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
