package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// Observe reads the links of the namespace with their addresses, routes and the settings that Attach would change.
// It changes nothing.
func Observe(ns *netns.NS) (nic.Snapshot, error) {
	links, err := observeLinks(ns)
	if err != nil {
		return nic.Snapshot{}, err
	}
	s, err := observeNetwork(ns, links)
	if err != nil {
		return s, err
	}
	return s, ns.Do(func() error {
		s.Sysctls = readSysctls(nsSysctls)
		maps.Copy(s.Sysctls, readSysctls(bridgeSysctls))
		for i := range s.Links {
			if found := readSysctls(linkSysctls(s.Links[i].Name)); len(found) > 0 {
				s.Links[i].Sysctls = found
			}
		}
		return nil
	})
}

// observeLinks reads the links alone.
func observeLinks(ns *netns.NS) ([]netlink.Link, error) {
	links, err := netns.Dump(ns.Netlink().LinkList)
	if err != nil {
		return nil, fmt.Errorf("observe namespace: list links: %w", err)
	}
	return links, nil
}

// observeNetwork reads the addresses and routes of links, and gives all of a snapshot but the settings.
func observeNetwork(ns *netns.NS, links []netlink.Link) (nic.Snapshot, error) {
	h := ns.Netlink()
	addrs, err := netns.Dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nic.Snapshot{}, fmt.Errorf("observe namespace: list addresses: %w", err)
	}
	var routes []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// Every table: a rule may lead to one, and Detach must bring it back.
		all, err := netns.Dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nic.Snapshot{}, fmt.Errorf("observe namespace: list routes: %w", err)
		}
		routes = append(routes, all...)
	}
	return snapshot(links, addrs, routes), nil
}

func snapshot(links []netlink.Link, addrs []netlink.Addr, routes []netlink.Route) (s nic.Snapshot) {
	slices.SortFunc(links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		link := nic.Link{
			Name: a.Name, Index: a.Index, Kind: kind(l), MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0, Alias: a.Alias,
			AllMulti: a.RawFlags&unix.IFF_ALLMULTI != 0, Master: names[a.MasterIndex], ParentBus: a.ParentDevBus, ParentDev: a.ParentDev,
		}
		if len(a.HardwareAddr) == len(link.MAC) {
			link.MAC = nic.MAC(a.HardwareAddr)
		}
		describe(l, &link)
		for _, ad := range addrs {
			if ad.LinkIndex == a.Index {
				link.Addrs = append(link.Addrs, address(ad))
			}
		}
		for _, r := range routes {
			link.Routes = append(link.Routes, through(r, a.Index)...)
		}
		s.Links = append(s.Links, link)
	}
	return s
}

// describe adds what links of one kind alone have.
func describe(l netlink.Link, out *nic.Link) {
	switch l := l.(type) {
	case *netlink.Veth:
		out.Away = l.NetNsID >= 0
	case *netlink.Macvlan:
		out.Mode = map[netlink.MacvlanMode]string{
			netlink.MACVLAN_MODE_PRIVATE: "private", netlink.MACVLAN_MODE_VEPA: "vepa", netlink.MACVLAN_MODE_BRIDGE: "bridge",
			netlink.MACVLAN_MODE_PASSTHRU: "passthru", netlink.MACVLAN_MODE_SOURCE: "source",
		}[l.Mode]
	case *netlink.IPVlan:
		out.Mode = map[netlink.IPVlanMode]string{netlink.IPVLAN_MODE_L2: "l2", netlink.IPVLAN_MODE_L3: "l3", netlink.IPVLAN_MODE_L3S: "l3s"}[l.Mode]
	case *netlink.Netkit:
		out.Mode = map[netlink.NetkitMode]string{netlink.NETKIT_MODE_L2: "l2", netlink.NETKIT_MODE_L3: "l3"}[l.Mode]
	case *netlink.Tuntap:
		out.Mode = map[netlink.TuntapMode]string{netlink.TUNTAP_MODE_TAP: "tap", netlink.TUNTAP_MODE_TUN: "tun"}[l.Mode]
		out.MultiQueue = l.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
		// The kernel tells the number of queues of a TAP for several alone; another one says so when it is opened.
		out.InUse = l.NonPersist || l.Queues+l.DisabledQueues > 0
	}
}

// passing are address flags that come and go by themselves, and one that tells of the adding alone (Detach sets it).
const passing = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_OPTIMISTIC | unix.IFA_F_NODAD

func address(a netlink.Addr) nic.Addr {
	out := nic.Addr{
		Prefix: prefix(a.IPNet), Label: a.Label, Scope: a.Scope,
		// Secondary (the same bit as temporary, which is IPv6's) follows from the order of adding.
		Flags: a.Flags &^ (passing | unix.IFA_F_SECONDARY),
	}
	if a.Peer != nil {
		if p := prefix(a.Peer); p != out.Prefix {
			out.Peer = p
		}
	}
	if b, ok := netip.AddrFromSlice(a.Broadcast); ok {
		out.Broadcast = b.Unmap()
	}
	const forever = 1<<32 - 1 // INFINITY_LIFE_TIME
	if a.ValidLft != forever {
		out.ValidLft, out.PrefLft = uint32(a.ValidLft), uint32(a.PreferedLft)
	}
	return out
}

// through gives the parts of r that go out by the link of that index; none of routes that the kernel keeps by itself:
// local and broadcast ones and IPv6's multicast ones, all in table local.
func through(r netlink.Route, index int) []nic.KernelRoute {
	if r.Table == unix.RT_TABLE_LOCAL || r.Type != unix.RTN_UNICAST {
		return nil
	}
	base := nic.KernelRoute{
		Table: r.Table, Protocol: int(r.Protocol), Scope: int(r.Scope), Type: r.Type, Metric: r.Priority, MTU: r.MTU, AdvMSS: r.AdvMSS,
	}
	switch {
	case r.Dst != nil:
		base.Dst = prefix(r.Dst)
	case r.Family == netlink.FAMILY_V6:
		base.Dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	default:
		base.Dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	if src, ok := netip.AddrFromSlice(r.Src); ok {
		base.Src = src.Unmap()
	}
	var out []nic.KernelRoute
	hop := func(link int, gw net.IP, via netlink.Destination, flags, weight int) {
		if link != index {
			return
		}
		kr := base
		kr.Flags, kr.Weight = flags&unix.RTNH_F_ONLINK, weight
		if v, ok := via.(*netlink.Via); ok {
			gw = v.Addr
		}
		if a, ok := netip.AddrFromSlice(gw); ok {
			kr.Gw = a.Unmap()
		}
		out = append(out, kr)
	}
	if len(r.MultiPath) == 0 {
		hop(r.LinkIndex, r.Gw, r.Via, r.Flags, 0)
	}
	for _, h := range r.MultiPath {
		hop(h.LinkIndex, h.Gw, h.Via, h.Flags, h.Hops+1) // rtnh_hops is the weight less one
	}
	return out
}

func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	ones, bits := n.Mask.Size()
	if bits == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// kind gives rtnetlink's IFLA_INFO_KIND; a device without one is "device".
func kind(l netlink.Link) string {
	if t := l.Type(); t != "tuntap" { // the library's own word
		return t
	}
	return "tun"
}
