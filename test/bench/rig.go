package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

var (
	hostAddr  = netip.MustParsePrefix("198.51.100.1/24") // RFC 5737
	guestAddr = netip.MustParsePrefix("198.51.100.2/24")
	anywhere  = netip.MustParsePrefix("0.0.0.0/0")
	// kubeVirtAddr is what KubeVirt gives its bridge, for its DHCP server.
	kubeVirtAddr = netip.MustParsePrefix("169.254.75.10/32")

	hostMAC  = nic.MAC{0x02, 0, 0x5e, 0x10, 0, 1}
	guestMAC = nic.MAC{0x02, 0, 0x5e, 0x10, 0, 2}
)

const (
	mtu      = 1500
	podLink  = "eth0"
	hostLink = "veth0"
)

// rig is one join, ready for traffic: a namespace that stands for the host, one of a pod, and a TAP whose queues the
// program itself serves as a guest would.
type rig struct {
	host, pod *netns.NS
	hostIndex int // of the device where the guest's frames arrive on the host
	taps      []*os.File
	sink      *sink
	undo      []func() error // last first
}

func (r *rig) defers(undo func() error) { r.undo = append(r.undo, undo) }

// Close takes the rig apart.
func (r *rig) Close() error {
	var errs []error
	for i := len(r.undo) - 1; i >= 0; i-- {
		errs = append(errs, r.undo[i]())
	}
	r.undo = nil
	return errors.Join(errs...)
}

// namespaces numbers them: names are the process's own, as its directory of namespaces is (see isolate).
var namespaces int

// namespace makes one in which IPv6 is off, as its chatter would be measured too. It goes with the rig.
func (r *rig) namespace(label string) (*netns.NS, error) {
	namespaces++
	ns, err := netns.Create(fmt.Sprintf("%s-%d", label, namespaces))
	if err != nil {
		return nil, err
	}
	r.defers(func() error { return errors.Join(ns.Close(), netns.Remove(ns.Path())) })
	return ns, ns.Do(func() error { return writeSysctl("ipv6/conf/default/disable_ipv6", "1") })
}

func writeSysctl(path, value string) error {
	err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0o644)
	if errors.Is(err, os.ErrNotExist) { // not in this kernel: nothing to switch
		return nil
	}
	return err
}

// newRig makes a join with that many queues and tries it.
func newRig(j join, queues int) (r *rig, err error) {
	r = &rig{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s, %d queues: %w", j.name, queues, err), r.Close())
		}
	}()
	if r.host, err = r.namespace("host"); err != nil {
		return r, err
	}
	if r.pod, err = r.namespace("pod"); err != nil {
		return r, err
	}
	if err := j.make(r, queues); err != nil {
		return r, err
	}
	if r.sink, err = newSink(r.host, r.hostIndex); err != nil {
		return r, err
	}
	r.defers(r.sink.Close)
	for _, f := range r.taps {
		// As QEMU does for a guest with virtio-net: frames without checksum, segments longer than the MTU.
		if err := tapIoctl(f, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
			return r, fmt.Errorf("switch offloads on: %w", err)
		}
	}
	_, err = r.roundTrips(0)
	return r, err
}

// addVeth joins host and another namespace by a veth, whose end there gets a name and a MAC.
func (r *rig) addVeth(other *netns.NS, name string, mac nic.MAC) error {
	f, err := os.Open(other.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = hostLink, mtu, hostMAC.HardwareAddr()
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(f.Fd()), PeerMTU: mtu, PeerHardwareAddr: mac.HardwareAddr()}
	h := r.host.Netlink()
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	end, err := other.Netlink().LinkByName(name)
	if err == nil {
		err = other.Netlink().LinkSetUp(end)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return r.hostEnd(veth)
}

// hostEnd makes a device the host's end: address, the guest as a neighbour that is known, up.
func (r *rig) hostEnd(dev netlink.Link) error {
	h := r.host.Netlink()
	if err := h.LinkSetUp(dev); err != nil {
		return fmt.Errorf("set the host's end up: %w", err)
	}
	if err := h.AddrAdd(dev, &netlink.Addr{IPNet: ipNet(hostAddr)}); err != nil {
		return fmt.Errorf("add the host's address: %w", err)
	}
	r.hostIndex = dev.Attrs().Index
	err := h.NeighSet(&netlink.Neigh{
		LinkIndex: r.hostIndex, State: netlink.NUD_PERMANENT, IP: guestAddr.Addr().AsSlice(), HardwareAddr: guestMAC.HardwareAddr(),
	})
	if err != nil {
		return fmt.Errorf("make the guest known: %w", err)
	}
	return nil
}

// addTap makes a TAP with that many queues, up and without a queueing discipline.
func (r *rig) addTap(ns *netns.NS, name string, queues int) (netlink.Link, error) {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	err := ns.Do(func() error {
		for range queues {
			if err := r.openQueue(name, flags); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("add TAP: %w", err)
	}
	h := ns.Netlink()
	tap, err := h.LinkByName(name)
	if err != nil {
		return nil, err
	}
	noqueue := &netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: tap.Attrs().Index, Parent: netlink.HANDLE_ROOT}, QdiscType: "noqueue"}
	if err := h.QdiscReplace(noqueue); err != nil {
		return nil, fmt.Errorf("set queueing of the TAP: %w", err)
	}
	if err := h.LinkSetUp(tap); err != nil {
		return nil, fmt.Errorf("set the TAP up: %w", err)
	}
	return tap, nil
}

// openQueue opens one more queue of a TAP in the calling thread's namespace; the first makes it.
func (r *rig) openQueue(name string, flags uint16) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	r.taps = append(r.taps, f)
	r.defers(f.Close)
	return nil
}

// tapIoctl keeps the descriptor as it is: [os.File.Fd] would make it block.
func tapIoctl(f *os.File, req uint, value int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.IoctlSetInt(int(fd), req, value) })
	return errors.Join(err, set)
}

// descriptor gives a file's number. It stays the file's, which must outlive its use.
func descriptor(f *os.File) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixes(p ...netip.Prefix) []netip.Prefix { return p }

func moveTo(from, to *netns.NS, dev netlink.Link) error {
	f, err := os.Open(to.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	if err := from.Netlink().LinkSetNsFd(dev, int(f.Fd())); err != nil {
		return fmt.Errorf("move %s: %w", dev.Attrs().Name, err)
	}
	return nil
}

func upIn(ns *netns.NS, name string) error {
	dev, err := ns.Netlink().LinkByName(name)
	if err == nil {
		err = ns.Netlink().LinkSetUp(dev)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func addrPort(p netip.Prefix, port uint16) netip.AddrPort { return netip.AddrPortFrom(p.Addr(), port) }
