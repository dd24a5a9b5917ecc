package podnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// kernel holds the two netlink sockets that changes go through.
type kernel struct {
	h   *netlink.Handle // ns owns it
	nft *nftables.Conn
}

func open(ns *netns.NS) (*kernel, error) {
	h, err := ns.Netlink()
	if err != nil {
		return nil, err
	}
	k := &kernel{h: h}
	err = ns.Do(func() (err error) {
		// Opened on the thread inside; a lasting connection keeps its socket, and so the namespace.
		if k.nft, err = nftables.New(nftables.AsLasting()); err != nil {
			return fmt.Errorf("open nftables: %w (needs CONFIG_NF_TABLES)", err)
		}
		return nil
	})
	return k, err
}

func (k *kernel) close() {
	if k.nft != nil {
		_ = k.nft.CloseLasting() // nothing is pending on it
	}
}

// join makes the TAP and the bridge of one NIC, silences the veth and puts veth and TAP on the bridge. It runs inside
// the namespace. A Port that is not nil owns descriptors, also beside an error.
func (k *kernel) join(j Join, n nic.NIC, link *nic.Link, o Options) (*Port, error) {
	taps, err := openTap(j.Tap, o.Queues)
	if err != nil {
		return nil, err
	}
	p := &Port{NIC: n, Join: j, Taps: taps}
	if o.Vhost {
		if p.Vhost, err = openVhost(len(taps)); err != nil {
			return p, err
		}
	}
	tap, err := k.h.LinkByName(j.Tap)
	if err != nil {
		return p, fmt.Errorf("find TAP %s: %w", j.Tap, err)
	}
	p.tapIndex = tap.Attrs().Index
	bridge, err := k.addBridge(j.Bridge, n.MTU)
	if err != nil {
		return p, err
	}
	veth := device(link.Index, link.Name)
	if err := k.silence(veth, link); err != nil {
		return p, err
	}
	return p, run(
		step{"set MTU of " + j.Tap, func() error { return k.h.LinkSetMTU(tap, n.MTU) }},
		step{"silence " + j.Tap, func() error { return writeSysctls(linkSysctls(j.Tap)) }},
		// A queueing discipline that orders by time stamp (fq, a common default) drops redirected and bridged packets
		// that carry one; a TAP has its own ring and needs none.
		step{"set queueing of " + j.Tap, func() error { return k.h.QdiscReplace(noqueue(tap)) }},
		// The veth gives up the guest's MAC: a port's own address is a local entry in the bridge's table, and frames
		// for it would end here.
		step{"set MAC of " + j.Link, func() error { return k.h.LinkSetHardwareAddr(veth, j.Own.HardwareAddr()) }},
		step{"join " + j.Link, func() error { return k.port(veth, bridge) }},
		step{"join " + j.Tap, func() error { return k.port(tap, bridge) }},
		step{"set bridge up", func() error { return k.h.LinkSetUp(bridge) }},
		step{"set TAP up", func() error { return k.h.LinkSetUp(tap) }},
		step{"set veth up", func() error { return k.h.LinkSetUp(veth) }},
	)
}

// addBridge makes a bridge that is no more than a wire: it does not snoop (it would drop neighbour discovery without a
// querier), does not run STP (the kernel's default), and speaks no IP itself.
func (k *kernel) addBridge(name string, mtu int) (netlink.Link, error) {
	snooping := false
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu, TxQLen: -1}, MulticastSnooping: &snooping}
	if err := k.h.LinkAdd(br); err != nil {
		return nil, fmt.Errorf("add bridge %s: %w (needs CONFIG_BRIDGE and CAP_NET_ADMIN)", name, err)
	}
	if err := writeSysctls(linkSysctls(name)); err != nil {
		return nil, fmt.Errorf("silence %s: %w", name, err)
	}
	return br, nil
}

// silence takes the addresses of the veth away, and with them its routes, and keeps the namespace's stack from
// answering on it. IPv6 goes first: switching it off removes its addresses in one step.
func (k *kernel) silence(veth netlink.Link, link *nic.Link) error {
	if err := writeSysctls(linkSysctls(link.Name)); err != nil {
		return fmt.Errorf("silence %s: %w", link.Name, err)
	}
	for _, a := range link.Addrs {
		if !a.Prefix.Addr().Is4() {
			continue
		}
		err := k.h.AddrDel(veth, &netlink.Addr{IPNet: ipNet(a.Prefix), Peer: peer(a)})
		// A secondary address goes with its primary.
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s from %s: %w", a.Prefix, link.Name, err)
		}
	}
	return writeSysctls(nsSysctls)
}

// port puts a link on the bridge with learning off. With two ports there is nothing to learn, and what could be
// learned is wrong: a hairpin port of the plugin's bridge sends the guest's own broadcasts back, which would move the
// guest's MAC to the veth side; and a guest could fill the table.
func (k *kernel) port(link, bridge netlink.Link) error {
	if err := k.h.LinkSetMasterByIndex(link, bridge.Attrs().Index); err != nil {
		return err
	}
	return k.h.LinkSetLearning(link, false)
}

// Listen opens a packet socket on the TAP: it hears what the guest sends, before any filter and before the bridge, and
// what is written to it reaches the guest alone. The filter is the kernel's, applied before the first frame. The
// caller closes it.
func (p *Port) Listen(filter []bpf.RawInstruction) (net.PacketConn, error) {
	var conn *packet.Conn
	err := p.ns.Do(func() (err error) {
		ifi := &net.Interface{Index: p.tapIndex, Name: p.Join.Tap, MTU: p.NIC.MTU, HardwareAddr: p.Join.Own.HardwareAddr()}
		conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: filter})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w (needs CAP_NET_RAW)", p.Join.Tap, err)
	}
	return conn, nil
}

// openTap makes a TAP that ends with its last descriptor, with as many queues as asked for.
func openTap(name string, queues int) ([]*os.File, error) {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	var files []*os.File
	fail := func(err error) ([]*os.File, error) {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	for i := range queues {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fail(fmt.Errorf("open /dev/net/tun: %w (the machine needs the tun driver: modprobe tun)", err))
		}
		req, err := unix.NewIfreq(name)
		if err == nil {
			req.SetUint16(flags)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			unix.Close(fd)
			return fail(fmt.Errorf("add TAP %q, queue %d: %w (needs CAP_NET_ADMIN)", name, i, err))
		}
		// Only now: a descriptor that Go polls before TUNSETIFF would never be woken.
		files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("%s queue %d", name, i)))
	}
	return files, nil
}

// openVhost opens the kernel's virtio-net back end n times, or not at all where the machine has none.
func openVhost(n int) ([]*os.File, error) {
	var files []*os.File
	for range n {
		f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil, nil
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("open vhost-net: %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}

func noqueue(link netlink.Link) netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT},
		QdiscType:  "noqueue",
	}
}

// step is one change and its name in an error.
type step struct {
	what string
	do   func() error
}

func run(steps ...step) error {
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

func device(index int, name string) netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name}}
}

func peer(a nic.Addr) *net.IPNet {
	if a.Peer == (netip.Prefix{}) {
		return nil
	}
	return ipNet(a.Peer)
}

func writeSysctls(values map[string]string) error {
	for path, v := range values {
		if err := writeSysctl(path, v); err != nil {
			return err
		}
	}
	return nil
}
