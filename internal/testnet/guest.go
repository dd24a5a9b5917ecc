package testnet

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// NewGuest makes a "VM": a namespace with a TAP of the NIC's MAC and MTU whose frames are copied to and from the pod's
// TAP, as QEMU would. The guest's kernel stack is real; addresses are up to the caller. The link's name is the NIC's.
func NewGuest(t testing.TB, n nic.NIC, tap *os.File) *Namespace {
	t.Helper()
	g := New(t, "guest")
	g.Plug(n, tap)
	return g
}

// Plug gives a guest a NIC, as NewGuest does.
func (g *Namespace) Plug(n nic.NIC, tap *os.File) {
	t := g.t
	t.Helper()
	var f *os.File
	g.Must(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(n.Name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "guest "+n.Name) // after TUNSETIFF, or Go's poller never wakes
		return nil
	})
	h := g.Link()
	link, err := h.LinkByName(n.Name)
	check(t, err)
	check(t, h.LinkSetHardwareAddr(link, n.MAC.HardwareAddr()))
	check(t, h.LinkSetMTU(link, n.MTU))
	check(t, h.LinkSetUp(link))
	done := make(chan struct{}, 2)
	wire := func(dst, src *os.File) {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 1<<16+64)
		for {
			k, err := src.Read(buf)
			if err != nil {
				return
			}
			// A link that is down (EIO) loses frames, as a wire does.
			if _, err := dst.Write(buf[:k]); errors.Is(err, os.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
				return
			}
		}
	}
	go wire(f, tap)
	go wire(tap, f)
	t.Cleanup(func() {
		f.Close()
		tap.Close()
		<-done
		<-done
	})
}

// Configure gives the guest's link the addresses and routes of the NIC, as its DHCP client would. Of two default routes of one
// metric the guest has both, and that of the NIC which was configured first counts.
func (n *Namespace) Configure(nc nic.NIC) {
	n.t.Helper()
	h := n.Link()
	link, err := h.LinkByName(nc.Name)
	check(n.t, err)
	for _, a := range nc.Addrs {
		check(n.t, h.AddrAdd(link, Address(a)))
	}
	for _, r := range nc.Routes {
		kr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: IPNet(r.Dst), Priority: r.Metric, MTU: r.MTU}
		if r.OnLink() {
			kr.Scope = netlink.SCOPE_LINK
		} else {
			kr.Gw = r.Gw.AsSlice()
		}
		check(n.t, h.RouteAppend(kr))
	}
}

// Addr gives the first address of that family (4 or 6) of the NIC, or ends the test.
func Addr(t testing.TB, n nic.NIC, family int) netip.Addr {
	t.Helper()
	for _, a := range n.Addrs {
		if a.Addr().Is4() == (family == 4) {
			return a.Addr()
		}
	}
	t.Fatalf("%s has no IPv%d address", n.Name, family)
	return netip.Addr{}
}
