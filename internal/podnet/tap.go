package podnet

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// openOurs makes a TAP of our own.
func (a *attempt) openOurs(j *joint) (err error) {
	name := j.Join.Tap
	if j.Taps, err = openTap(name, a.o.Queues, a.o.Queues > 1); err != nil {
		return fmt.Errorf("add TAP %q: %w (needs CAP_NET_ADMIN)", name, err)
	}
	if j.tapIndex, err = ioctlLink(name); err != nil {
		return fmt.Errorf("find TAP %s: %w", name, err)
	}
	return nil
}

// openTheirs opens a TAP that is there. It is set down before, so that nothing waits in its queue that no filter has seen:
// without a queue it drops all.
func (a *attempt) openTheirs(j *joint) (err error) {
	name, queues := j.link.Name, a.o.Queues
	if !j.link.MultiQueue {
		queues = 1
	}
	_, moved, err := a.filters(device(j.link.Index, name), netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return fmt.Errorf("look for filters of TAP %s: %w", name, err)
	}
	if moved > 0 {
		return fmt.Errorf("TAP %s has a filter of tc at its ingress, which sees the guest's frames before the rules that hold it to its addresses and may move them past these (as those of tc-redirect-tap do): leave that plugin out, as virtlet joins the guest to the link itself, or remove the filter", name)
	}
	if err := a.h.LinkSetDown(device(j.link.Index, name)); err != nil {
		return fmt.Errorf("set TAP %s down: %w", name, err)
	}
	j.Taps, err = openTap(name, queues, j.link.MultiQueue)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("open TAP %s: %w: another program, or another VM, holds it open: stop that first", name, err)
	}
	if err != nil {
		return fmt.Errorf("open TAP %s: %w", name, err)
	}
	// Of a name that is gone, the driver makes a new TAP.
	if j.tapIndex, err = ioctlLink(name); err == nil && j.tapIndex != j.link.Index {
		err = errors.New("it was replaced meanwhile; start again")
	}
	if err != nil {
		return fmt.Errorf("open TAP %s: %w", name, err)
	}
	return nil
}

// joinTheirs silences the TAP. As the port of a bridge it gives up the guest's MAC: see joinBridge.
func (a *attempt) joinTheirs(j *joint) error {
	return run(
		step{"silence " + j.Join.Tap, func() error { return a.silence(device(j.tapIndex, j.Join.Tap), j.link) }},
		step{"set MAC of " + j.Join.Tap, func() error {
			return a.set(j.tapIndex, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, j.Join.Own[:]))
		}},
	)
}

// upTheirs lets frames pass.
func (a *attempt) upTheirs(j *joint) error {
	if err := a.h.LinkSetUp(device(j.tapIndex, j.Join.Tap)); err != nil {
		return fmt.Errorf("set %s up: %w", j.Join.Tap, err)
	}
	return nil
}

// Listen opens a packet socket on the TAP: it hears what the guest sends, before any filter and before the bridge, and
// what is written to it reaches the guest alone. The filter is the kernel's, applied before the first frame. The
// caller closes it.
func (p *Port) Listen(filter []bpf.RawInstruction) (net.PacketConn, error) {
	var conn *packet.Conn
	err := p.ns.Do(func() (err error) {
		ifi := &net.Interface{Index: p.tapIndex, Name: p.Join.Tap, MTU: p.NIC.MTU, HardwareAddr: p.Join.Own.HardwareAddr()}
		conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: filter})
		if err == nil && p.Join.Datapath == AsItIs {
			err = setMark(conn)
		}
		return err
	})
	if err != nil {
		if conn != nil {
			conn.Close()
		}
		return nil, fmt.Errorf("listen on %s: %w (needs CAP_NET_RAW)", p.Join.Tap, err)
	}
	return conn, nil
}

// openTap opens queues of a TAP. One that is not there is made, and ends with its last descriptor. multi has to be what
// the TAP was made with.
func openTap(name string, queues int, multi bool) ([]*os.File, error) {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
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
			return fail(fmt.Errorf("queue %d: %w", i, err))
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

// ourMark is on what we write ourselves to a device whose egress has rules: SO_MARK of the socket, skb->mark in the kernel.
// It does not leave the namespace: the kernel clears it where a frame goes to another one.
const ourMark = 0x766c7474

func setMark(conn *packet.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ourMark) })
	return errors.Join(err, set)
}

// Renew makes the descriptors of p, whose guest has ended, fit for another. The kernel ties a vhost descriptor to the
// process that first used it (VHOST_SET_OWNER), and that of a PCI function to the first IOMMU context
// (VFIO_DEVICE_BIND_IOMMUFD); a queue that the guest did not use stays switched off.
func (p *Port) Renew() error {
	if p.VF != nil {
		return p.VF.Renew()
	}
	for i, f := range p.Taps {
		if len(p.Taps) == 1 {
			break // not a multi-queue TAP: nothing to switch
		}
		req, err := unix.NewIfreq(p.Join.Tap)
		if err == nil {
			req.SetUint16(unix.IFF_ATTACH_QUEUE)
			err = unix.IoctlIfreq(int(f.Fd()), unix.TUNSETQUEUE, req)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is on (tun_set_queue in drivers/net/tun.c)
			return fmt.Errorf("switch on queue %d of %s: %w", i, p.Join.Tap, err)
		}
	}
	if len(p.Vhost) == 0 {
		return nil
	}
	var errs []error
	for _, f := range p.Vhost {
		errs = append(errs, f.Close())
	}
	p.Vhost = openVhost(len(p.Taps))
	return errors.Join(errs...)
}
