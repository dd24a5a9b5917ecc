package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// world is a node and a pod on it.
type world struct{ node, pod *netns.NS }

// make makes the links of a recording and everything on them.
func (w *world) make(r *nic.Recording) error {
	if err := writeSysctls(w.node, r.Host.Sysctls); err != nil {
		return err
	}
	for _, l := range r.Host.Links {
		if l.PodLink == "" {
			if err := w.bridge(l); err != nil {
				return fmt.Errorf("make %s: %w", l.Name, err)
			}
		}
	}
	if err := writeSysctls(w.pod, r.Snapshot.Sysctls); err != nil {
		return err
	}
	for _, l := range r.Snapshot.Links {
		i := slices.IndexFunc(r.Host.Links, func(h nic.HostLink) bool { return h.PodLink == l.Name })
		if i < 0 || l.Kind != "veth" {
			return fmt.Errorf("make %s: it is a %s, and a veth whose other end is recorded can be replayed", l.Name, l.Kind)
		}
		if err := w.veth(l, r.Host.Links[i], slices.Contains(r.NoTxChecksum, l.Name)); err != nil {
			return fmt.Errorf("make %s: %w", l.Name, err)
		}
	}
	return nil
}

// bridge makes a bridge of the node, if it is not there.
func (w *world) bridge(l nic.HostLink) error {
	if l.Kind != "bridge" {
		return fmt.Errorf("it is a %s, and leads to no link of the pod", l.Kind)
	}
	if _, err := w.node.Netlink().LinkByName(l.Name); err == nil {
		return nil
	}
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.HardwareAddr = l.Name, l.MTU, l.MAC.HardwareAddr()
	if err := w.node.Netlink().LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
		return err
	}
	return settle(w.node, l.Link)
}

// veth makes a pair, and both of its ends what they were.
func (w *world) veth(l nic.Link, host nic.HostLink, noTxChecksum bool) error {
	f, err := os.Open(w.pod.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU, a.HardwareAddr = host.Name, host.MTU, host.MAC.HardwareAddr()
	h := w.node.Netlink()
	err = h.LinkAdd(&netlink.Veth{
		LinkAttrs: a, PeerName: l.Name, PeerMTU: uint32(l.MTU), PeerHardwareAddr: l.MAC.HardwareAddr(), PeerNamespace: netlink.NsFd(f.Fd()),
	})
	if err != nil {
		return err
	}
	port, err := h.LinkByName(host.Name)
	if err != nil {
		return err
	}
	if host.Master != "" {
		master, err := h.LinkByName(host.Master)
		if err != nil {
			return err
		}
		err = errors.Join(h.LinkSetMaster(port, master), h.LinkSetHairpin(port, host.Hairpin), h.LinkSetLearning(port, !host.NoLearning))
		if err != nil {
			return err
		}
	}
	if noTxChecksum {
		if err := w.pod.Do(func() error { return testnet.ChecksumsOff(l.Name) }); err != nil {
			return err
		}
	}
	// Both are up before either has addresses: without its other end a link has no carrier, and the kernel makes no
	// link-local address.
	for ns, name := range map[*netns.NS]string{w.node: host.Name, w.pod: l.Name} {
		end, err := ns.Netlink().LinkByName(name)
		if err == nil {
			err = ns.Netlink().LinkSetUp(end)
		}
		if err != nil {
			return err
		}
	}
	if err := errors.Join(settle(w.node, host.Link), settle(w.pod, l)); err != nil {
		return err
	}
	for _, n := range host.Neighbours {
		entry := &netlink.Neigh{LinkIndex: port.Attrs().Index, IP: n.IP.AsSlice(), State: netlink.NUD_PERMANENT, Family: family(n.IP)}
		if n.Proxy {
			entry.Flags = netlink.NTF_PROXY
		} else {
			entry.HardwareAddr = n.MAC.HardwareAddr()
		}
		if err := h.NeighSet(entry); err != nil {
			return fmt.Errorf("neighbour %s: %w", n.IP, err)
		}
	}
	return nil
}

// settle makes settings, addresses and routes of a link what they were, whatever the kernel thinks of by itself.
func settle(ns *netns.NS, want nic.Link) error {
	h := ns.Netlink()
	link, err := h.LinkByName(want.Name)
	if err != nil {
		return err
	}
	if err := writeSysctls(ns, want.Sysctls); err != nil {
		return err
	}
	if want.Up {
		err = h.LinkSetUp(link)
	} else {
		err = h.LinkSetDown(link)
	}
	if err != nil {
		return err
	}
	is, err := observe(ns, want.Name)
	if err != nil {
		return err
	}
	same := func(a nic.Addr) func(nic.Addr) bool {
		return func(b nic.Addr) bool { return a.Prefix == b.Prefix && a.Peer == b.Peer }
	}
	for _, a := range is.Addrs {
		if !slices.ContainsFunc(want.Addrs, same(a)) {
			if err := h.AddrDel(link, &netlink.Addr{IPNet: testnet.IPNet(a.Prefix)}); err != nil {
				return fmt.Errorf("remove address %s: %w", a.Prefix, err)
			}
		}
	}
	for _, a := range want.Addrs {
		if slices.ContainsFunc(is.Addrs, same(a)) {
			continue
		}
		add := &netlink.Addr{IPNet: testnet.IPNet(a.Prefix), Label: a.Label, Scope: a.Scope, Flags: a.Flags &^ unix.IFA_F_PERMANENT}
		if a.Peer.IsValid() {
			add.Peer = testnet.IPNet(a.Peer)
		}
		switch {
		case a.Broadcast.IsValid():
			add.Broadcast = a.Broadcast.AsSlice()
		case a.Prefix.Addr().Is4():
			add.Broadcast = net.IPv4zero // none; the library would work one out
		}
		// A link that has just come up may have got its link-local address meanwhile.
		if err := h.AddrAdd(link, add); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s: %w", a.Prefix, err)
		}
	}
	if err := tentative(ns, link); err != nil {
		return err
	}
	return routes(ns, want)
}

// routes makes the routes of a link what they were.
func routes(ns *netns.NS, want nic.Link) error {
	is, err := observe(ns, want.Name)
	if err != nil {
		return err
	}
	h := ns.Netlink()
	for _, r := range is.Routes {
		if !slices.Contains(want.Routes, r) {
			if err := h.RouteDel(kernelRoute(r, is.Index)); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route to %s: %w", r.Dst, err)
			}
		}
	}
	for _, onLink := range []bool{true, false} { // gateways need the way to them
		for _, r := range want.Routes {
			if r.Weight > 0 {
				return fmt.Errorf("route to %s: routes with several next hops are not replayed", r.Dst)
			}
			if r.Gw.IsValid() == onLink || slices.Contains(is.Routes, r) {
				continue
			}
			// Appended rather than added: two routes of IPv4 to one destination are told apart by nothing.
			if err := h.RouteAppend(kernelRoute(r, is.Index)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add route to %s: %w", r.Dst, err)
			}
		}
	}
	return nil
}

func kernelRoute(r nic.KernelRoute, index int) *netlink.Route {
	out := &netlink.Route{
		LinkIndex: index, Dst: testnet.IPNet(r.Dst), Table: r.Table, Protocol: netlink.RouteProtocol(r.Protocol), Scope: netlink.Scope(r.Scope),
		Type: r.Type, Flags: r.Flags, Priority: r.Metric, MTU: r.MTU, AdvMSS: r.AdvMSS,
	}
	if r.Gw.IsValid() {
		out.Gw = r.Gw.AsSlice()
	}
	if r.Src.IsValid() {
		out.Src = r.Src.AsSlice()
	}
	return out
}

func observe(ns *netns.NS, name string) (*nic.Link, error) {
	s, err := podnet.Observe(ns)
	if err != nil {
		return nil, err
	}
	l := s.Link(name)
	if l == nil {
		return nil, fmt.Errorf("%s is gone", name)
	}
	return l, nil
}

// tentative waits until addresses of a link can be used.
func tentative(ns *netns.NS, link netlink.Link) error {
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		addrs, err := netns.Dump(func() ([]netlink.Addr, error) { return ns.Netlink().AddrList(link, netlink.FAMILY_V6) })
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 }) {
			return nil
		}
		// A bridge without ports has no carrier, and checks no address.
		if now, err := ns.Netlink().LinkByIndex(link.Attrs().Index); err != nil || now.Attrs().OperState == netlink.OperDown {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("addresses of %s stay tentative", link.Attrs().Name)
		}
	}
}

// remove removes what make made, but for bridges and the links of the pod that stay.
func remove(r *nic.Recording, pod string, stay []string) error {
	for _, l := range r.Host.Links {
		if l.PodLink == "" || slices.Contains(stay, l.PodLink) && netns.Exists(pod) {
			continue
		}
		link, err := netlink.LinkByName(l.Name)
		if err == nil {
			err = netlink.LinkDel(link) // the other end goes with it
		}
		if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
			return fmt.Errorf("remove %s: %w", l.Name, err)
		}
	}
	return nil
}

func writeSysctls(ns *netns.NS, settings map[string]string) error {
	return ns.Do(func() error {
		for _, path := range slices.Sorted(maps.Keys(settings)) {
			file := "/proc/sys/net/" + path
			if b, err := os.ReadFile(file); err == nil && string(b) == settings[path]+"\n" {
				continue // some may not be written at all
			}
			if err := os.WriteFile(file, []byte(settings[path]), 0); err != nil {
				return err
			}
		}
		return nil
	})
}

func family(ip netip.Addr) int {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
