package podnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// kernel is what changes go through. Both handles are the namespace's own.
type kernel struct {
	h   *netlink.Handle
	nft *nftables.Conn
}

// attempt is one Attach.
type attempt struct {
	kernel
	rec  Record
	nics []nic.NIC
	o    Options

	bridges  []netlink.Link   // as many as ports
	rtnl     *nl.SocketHandle // for set
	nfnl     chan int         // gets one value: a socket for filter once all links are there, or noSocket
	filtered chan error       // gets one value: how laying the filters ended
}

const noSocket = -1

func newAttempt(ns *netns.NS, rec Record, nics []nic.NIC, o Options) *attempt {
	return &attempt{
		kernel: kernel{h: ns.Netlink(), nft: ns.Nftables()}, rec: rec, nics: nics, o: o,
		nfnl: make(chan int, 1), filtered: make(chan error, 1),
	}
}

// filter lays the filters while attach goes on with the links that it has made. (While it makes them would be no gain:
// the kernel lets a new link wait for a batch.) It ends before attach does.
func (a *attempt) filter() {
	b := filters(a.rec.Joins, a.nics, a.o.Policies)
	fd := <-a.nfnl
	if fd == noSocket {
		a.filtered <- nil
		return
	}
	err := b.send(fd)
	unix.Close(fd)
	if err != nil {
		err = fmt.Errorf("add filters: %w (needs CONFIG_NF_TABLES_NETDEV and CONFIG_NETFILTER_INGRESS)", err)
	}
	a.filtered <- err
}

// attach makes the ports inside the namespace. All filters are there before the bridges are up and the first frame can
// pass. The ports own descriptors, also beside an error.
func (a *attempt) attach(ctx context.Context) ([]*Port, error) {
	ports, err := a.open()
	nfnl := noSocket
	if err == nil {
		nfnl, err = openNetfilter()
	}
	a.nfnl <- nfnl
	for i, p := range ports {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = a.join(p, a.bridges[i], a.rec.Snapshot.Link(p.Join.Link))
		}
	}
	if a.rtnl != nil {
		a.rtnl.Socket.Close()
	}
	if err = errors.Join(err, <-a.filtered); err != nil {
		return ports, err
	}
	for i, p := range ports {
		if err := a.up(p, a.bridges[i], a.rec.Snapshot.Link(p.Join.Link)); err != nil {
			return ports, fmt.Errorf("attach %s: %w", p.Join.Link, err)
		}
	}
	return ports, nil
}

// openNetfilter gives a socket that takes batches of any size.
func openNetfilter() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return noSocket, fmt.Errorf("open nfnetlink: %w (needs CONFIG_NF_TABLES)", err)
	}
	// A batch is one message, which has to fit. What is asked for is no more than a limit.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20); err != nil {
		unix.Close(fd)
		return noSocket, fmt.Errorf("make room for filters: %w (needs CAP_NET_ADMIN)", err)
	}
	return fd, nil
}

// open makes the namespace silent, and then the TAPs and bridges.
func (a *attempt) open() ([]*Port, error) {
	if err := writeSysctls(nsSysctls); err != nil {
		return nil, err
	}
	rtnl, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	a.rtnl = &nl.SocketHandle{Socket: rtnl}
	ports := make([]*Port, 0, len(a.nics))
	for i, n := range a.nics {
		j := a.rec.Joins[i]
		p, err := openPort(j, n, a.o)
		if p != nil {
			ports = append(ports, p)
		}
		if err != nil {
			return ports, fmt.Errorf("attach %s: %w", n.Name, err)
		}
		index, err := ioctlLink(j.Bridge, unix.SIOCBRADDBR)
		if err != nil {
			return ports, fmt.Errorf("attach %s: add bridge %s: %w (needs CONFIG_BRIDGE and CAP_NET_ADMIN)", n.Name, j.Bridge, err)
		}
		a.bridges = append(a.bridges, device(index, j.Bridge))
	}
	return ports, nil
}

// openPort makes the TAP of one NIC. A Port that is not nil owns descriptors, also beside an error.
func openPort(j Join, n nic.NIC, o Options) (*Port, error) {
	taps, err := openTap(j.Tap, o.Queues)
	if err != nil {
		return nil, err
	}
	p := &Port{NIC: n, Join: j, Taps: taps}
	if o.Vhost {
		p.Vhost = openVhost(len(taps))
	}
	if p.tapIndex, err = ioctlLink(j.Tap); err != nil {
		return p, fmt.Errorf("find TAP %s: %w", j.Tap, err)
	}
	return p, nil
}

// join silences the veth of one NIC and puts veth and TAP on the bridge, which stays down.
func (a *attempt) join(p *Port, bridge netlink.Link, link *nic.Link) error {
	j, mtu := p.Join, p.NIC.MTU
	veth, tap := device(link.Index, link.Name), device(p.tapIndex, j.Tap)
	err := run(
		step{"set up bridge " + j.Bridge, func() error { return a.setBridge(bridge, mtu) }},
		// A queueing discipline that orders by time stamp (fq, a common default) drops redirected and bridged
		// packets that carry one; a TAP has its own ring and needs none. Before it is up: then there is none to wait for.
		step{"set queueing of " + j.Tap, func() error { return a.h.QdiscReplace(noqueue(tap)) }},
		step{"set MTU of " + j.Tap + " and join it", func() error {
			return a.set(p.tapIndex, unix.IFF_UP, attr(unix.IFLA_MTU, mtu), attr(unix.IFLA_MASTER, bridge.Attrs().Index))
		}},
		step{"silence " + j.Link, func() error { return a.silence(veth, link) }},
		// The veth gives up the guest's MAC: a port's own address is a local entry in the bridge's table, and
		// frames for it would end here.
		step{"set MAC of " + j.Link + " and join it", func() error {
			return a.set(link.Index, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, j.Own[:]), attr(unix.IFLA_MASTER, bridge.Attrs().Index))
		}},
		step{"switch learning off on " + j.Link, func() error { return a.h.LinkSetLearning(veth, false) }},
	)
	if err != nil {
		return fmt.Errorf("attach %s: %w", j.Link, err)
	}
	return nil
}

// up lets frames pass: the bridge is what was missing.
func (a *attempt) up(p *Port, bridge netlink.Link, link *nic.Link) error {
	if !link.Up {
		if err := a.h.LinkSetUp(device(link.Index, link.Name)); err != nil {
			return fmt.Errorf("set %s up: %w", link.Name, err)
		}
	}
	if err := a.h.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("set %s up: %w", p.Join.Bridge, err)
	}
	return nil
}

// setBridge makes a bridge no more than a wire: it does not snoop (it would drop neighbour discovery without a
// querier), does not run STP (the kernel's default), and learns nothing (an ageing time of 0). With two ports there is
// nothing to learn, and what could be learned is wrong: a hairpin port of the plugin's bridge sends the guest's own
// broadcasts back, which would move the guest's MAC to the veth side; and a guest could fill the table.
func (k *kernel) setBridge(bridge netlink.Link, mtu int) error {
	snooping, ageing := false, uint32(0)
	return k.h.LinkModify(&netlink.Bridge{
		LinkAttrs:         netlink.LinkAttrs{Index: bridge.Attrs().Index, Name: bridge.Attrs().Name, MTU: mtu, TxQLen: -1},
		MulticastSnooping: &snooping, AgeingTime: &ageing,
	})
}

// silence takes the addresses of the veth away, and with them its routes, and keeps the namespace's stack from
// answering on it. IPv6 goes first: switching it off removes its addresses in one step.
func (k *kernel) silence(veth netlink.Link, link *nic.Link) error {
	if err := writeSysctls(linkSysctls(link.Name)); err != nil {
		return err
	}
	for _, a := range link.Addrs {
		if !a.Prefix.Addr().Is4() {
			continue
		}
		err := k.h.AddrDel(veth, &netlink.Addr{IPNet: ipNet(a.Prefix), Peer: peer(a)})
		// A secondary address goes with its primary.
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s away: %w", a.Prefix, err)
		}
	}
	return nil
}

// set changes several things of a link in one message, which the library has no call for. flags are those to be set.
func (a *attempt) set(index int, flags uint32, attrs ...*nl.RtAttr) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: a.rtnl}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, flags
	req.AddData(msg)
	for _, at := range attrs {
		req.AddData(at)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func attr(kind, value int) *nl.RtAttr { return nl.NewRtAttr(kind, nl.Uint32Attr(uint32(value))) }

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

// ioctlLink does the operations that take no more than a link's name (netdevice(7)), and gives the index of the link.
// By ioctl: rtnetlink's answer would carry all that there is to say about it, and the library waits for that.
func ioctlLink(name string, before ...uint) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	for _, op := range append(before, unix.SIOCGIFINDEX) {
		if err == nil {
			err = unix.IoctlIfreq(fd, op, req)
		}
	}
	if err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

// openVhost opens the kernel's virtio-net back end n times, or not at all: it makes a guest faster, and none fails
// without it.
func openVhost(n int) []*os.File {
	var files []*os.File
	for range n {
		f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		if err != nil { // absent, or not for us, as in a container
			for _, f := range files {
				f.Close()
			}
			return nil
		}
		files = append(files, f)
	}
	return files
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

// device stands for a link of which no more than this is known.
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
