package podnet

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/vfio"
)

// Detach undoes what Attach did, wholly or in part, so that the CNI plugin's DEL finds what its ADD left. It works from
// the Record alone, takes what is gone already as done, never stops early, and may be called again. QEMU must have
// ended: a guest still running loses its network. ns may be nil, where the namespace has gone: then the PCI functions
// alone are put back, on the node.
func Detach(ns *netns.NS, rec Record) error {
	errs := []error{Release(ns, rec)}
	if ns != nil {
		k := &kernel{h: ns.Netlink()}
		errs = append(errs, ns.Do(func() error { return k.removeLinks(rec) }))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return nil
}

// Release is Detach but for the links that Attach has made: they stay, joined to nothing, until Detach or the end of the
// namespace takes them away. The kernel waits tens of milliseconds for each (for RCU, in unregister_netdevice), and DEL
// need not.
func Release(ns *netns.NS, rec Record) error {
	errs := []error{giveBack(ns, rec)}
	if ns == nil {
		return errs[0]
	}
	k := &kernel{h: ns.Netlink(), nft: ns.Nftables()}
	if rec.hasTable() {
		errs = append(errs, k.removeFilters())
	}
	errs = append(errs, ns.Do(func() error { return k.removeAllPrograms(rec) }))
	// What is left to put back differs from what was seen at the start.
	links, err := observeLinks(ns)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	now, err := observeNetwork(ns, links)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	changed := false
	for _, name := range rec.links() {
		want, is := rec.Snapshot.Link(name), now.Link(name)
		if !same(want, is) {
			continue // taken away or replaced since: not ours to touch
		}
		err := ns.Do(func() error {
			did, err := k.restore(want, is)
			changed = changed || did
			return err
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("restore %s: %w", name, err))
		}
	}
	if changed { // a second look: addresses bring routes back with them, and switching IPv6 on brings addresses
		if now, err = observeNetwork(ns, links); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	errs = append(errs, ns.Do(func() error {
		var errs []error
		for _, name := range rec.links() {
			want, is := rec.Snapshot.Link(name), now.Link(name)
			if !same(want, is) {
				continue
			}
			if err := k.restoreRoutes(want, is); err != nil {
				errs = append(errs, fmt.Errorf("restore %s: %w", name, err))
			}
		}
		return errors.Join(append(errs, k.restoreMultipath(rec, &now), writeSysctls(rec.Snapshot.Sysctls), writeSysctls(rec.Loopback))...)
	}))
	return errors.Join(errs...)
}

// giveBack returns the PCI functions of a record.
func giveBack(ns *netns.NS, rec Record) error {
	if len(rec.VFs) == 0 {
		return nil
	}
	m, err := vfio.Open(ns)
	if err != nil {
		return err
	}
	defer m.Close()
	var errs []error
	for _, h := range rec.VFs {
		if err := m.GiveBack(h); err != nil {
			errs = append(errs, fmt.Errorf("return %s: %w", h.NIC, err))
		}
	}
	return errors.Join(errs...)
}

// links gives the names of the links that Attach has changed.
func (r *Record) links() []string {
	var all []string
	for _, j := range r.Joins {
		all = append(all, j.Link)
	}
	for _, h := range r.VFs {
		all = append(all, h.NIC)
	}
	return all
}

// same says whether a link is the one that was meant: by its index, or by its PCI function, of which the driver makes a
// new device each time.
func same(want, is *nic.Link) bool {
	if want == nil || is == nil {
		return false
	}
	return is.Index == want.Index || want.ParentDev != "" && want.ParentDev == is.ParentDev && want.ParentBus == is.ParentBus
}

// leavings is the group that links of ours are put into to be deleted together. Nobody else has reason to use the number.
const leavings = 0x766c7474

// removeLinks deletes the bridges and TAPs of Attach, all by one request: the kernel then waits once for all of them. The
// calling thread is in the namespace.
func (k *kernel) removeLinks(rec Record) error {
	var errs []error
	var found []netlink.Link
	for _, j := range rec.Joins {
		for name, kind := range map[string]string{j.Bridge: "bridge", j.Tap: "tuntap"} {
			if name == "" || name == j.Link {
				continue
			}
			link, err := k.h.LinkByName(name)
			if errors.As(err, &netlink.LinkNotFoundError{}) {
				continue
			}
			if err == nil && link.Type() != kind {
				continue // somebody else's
			}
			if err == nil {
				err = k.h.LinkSetGroup(link, leavings)
			}
			if errors.Is(err, unix.ENODEV) {
				continue // just gone
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
				continue
			}
			found = append(found, link)
		}
	}
	if len(found) == 0 {
		return errors.Join(errs...)
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(leavings)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		errs = append(errs, fmt.Errorf("remove our links: %w", err))
	}
	return errors.Join(errs...)
}

// removeAllPrograms takes our programs off the links; those of the TAPs have gone with them. The calling thread is in the
// namespace.
func (k *kernel) removeAllPrograms(rec Record) error {
	var errs []error
	for _, j := range rec.Joins {
		link := rec.Snapshot.Link(j.Link)
		if j.engine() != EBPF || link == nil {
			continue
		}
		if err := k.removePrograms(link.Index, j.hooksAt(j.Link)...); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove the programs of %s: %w", j.Link, err))
		}
	}
	return errors.Join(errs...)
}

// restore makes a link what it was, but for its routes, and says whether that changed anything.
func (k *kernel) restore(want, is *nic.Link) (changed bool, err error) {
	link := device(is.Index, is.Name)
	var errs []error
	try := func(differs bool, what string, do func() error) {
		if !differs {
			return
		}
		changed = true
		if err := do(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	try(is.Master != want.Master && is.Master != "", "leave bridge", func() error { return k.h.LinkSetNoMaster(link) })
	try(is.MAC != want.MAC, "set MAC", func() error { return k.h.LinkSetHardwareAddr(link, want.MAC.HardwareAddr()) })
	try(is.MTU != want.MTU, "set MTU", func() error { return k.h.LinkSetMTU(link, want.MTU) })
	try(is.Alias != want.Alias, "set alias", func() error { return k.h.LinkSetAlias(link, want.Alias) })
	try(is.AllMulti && !want.AllMulti, "leave multicast groups", func() error { return k.h.LinkSetAllmulticastOff(link) })
	try(!maps.Equal(readSysctls(want.Sysctls), want.Sysctls), "set sysctls", func() error { return writeSysctls(want.Sysctls) })
	try(is.Up && !want.Up, "set down", func() error { return k.h.LinkSetDown(link) })
	try(!is.Up && want.Up, "set up", func() error { return k.h.LinkSetUp(link) })
	for _, a := range want.Addrs {
		if slices.Contains(is.Addrs, a) {
			continue
		}
		changed = true
		// EEXIST: IPv6 brought its own link-local back.
		if err := k.h.AddrAdd(link, kernelAddr(a)); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add address %s: %w", a.Prefix, err))
		}
	}
	return changed, errors.Join(errs...)
}

// restoreRoutes removes the addresses and routes that a link did not have, and adds the routes that it lacks: those on
// the link first, as the others' gateways need them.
func (k *kernel) restoreRoutes(want, is *nic.Link) error {
	link := device(is.Index, is.Name)
	var errs []error
	for _, a := range is.Addrs {
		if !slices.ContainsFunc(want.Addrs, func(w nic.Addr) bool { return w.Prefix == a.Prefix }) {
			if err := k.h.AddrDel(link, kernelAddr(a)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("remove address %s: %w", a.Prefix, err))
			}
		}
	}
	for _, r := range is.Routes {
		if r.Weight == 0 && !slices.Contains(want.Routes, r) {
			if err := k.h.RouteDel(kernelRoute(r, is.Index)); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("remove route to %s: %w", r.Dst, err))
			}
		}
	}
	missing := slices.DeleteFunc(slices.Clone(want.Routes), func(r nic.KernelRoute) bool {
		return r.Weight > 0 || slices.Contains(is.Routes, r)
	})
	slices.SortStableFunc(missing, func(a, b nic.KernelRoute) int { return hops(a) - hops(b) })
	for _, r := range missing {
		if err := k.h.RouteAdd(kernelRoute(r, is.Index)); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add route to %s: %w", r.Dst, err))
		}
	}
	return errors.Join(errs...)
}

// restoreMultipath puts back the routes with several next hops, which may lead out by several links, each as a whole.
func (k *kernel) restoreMultipath(rec Record, now *nic.Snapshot) error {
	type group struct {
		hops    []*netlink.NexthopInfo
		missing bool
	}
	groups := map[nic.KernelRoute]*group{}
	for i := range rec.Snapshot.Links {
		want := &rec.Snapshot.Links[i]
		is := now.Link(want.Name)
		if !same(want, is) {
			continue
		}
		for _, r := range want.Routes {
			if r.Weight == 0 {
				continue
			}
			key := r
			key.Gw, key.Weight, key.Flags = netip.Addr{}, 0, 0
			if groups[key] == nil {
				groups[key] = &group{}
			}
			g, hop := groups[key], &netlink.NexthopInfo{LinkIndex: is.Index, Hops: r.Weight - 1, Flags: r.Flags}
			hop.Gw, hop.Via = nextHop(r)
			g.hops = append(g.hops, hop)
			g.missing = g.missing || !slices.Contains(is.Routes, r)
		}
	}
	var errs []error
	for key, g := range groups {
		if !g.missing {
			continue
		}
		route := kernelRoute(key, 0)
		route.MultiPath = g.hops
		if err := k.h.RouteReplace(route); err != nil {
			errs = append(errs, fmt.Errorf("add route to %s by %d next hops: %w", key.Dst, len(g.hops), err))
		}
	}
	return errors.Join(errs...)
}

func hops(r nic.KernelRoute) int {
	if r.Gw.IsValid() {
		return 1
	}
	return 0
}

func kernelAddr(a nic.Addr) *netlink.Addr {
	out := &netlink.Addr{
		IPNet: ipNet(a.Prefix), Peer: peer(a), Label: a.Label, Scope: a.Scope, Flags: a.Flags,
		ValidLft: int(a.ValidLft), PreferedLft: int(a.PrefLft),
	}
	switch {
	case a.Prefix.Addr().Is6():
		// It was nobody else's a moment ago. While the kernel looks, no route can have it as its source.
		out.Flags |= unix.IFA_F_NODAD
	case a.Broadcast.IsValid():
		out.Broadcast = a.Broadcast.AsSlice()
	case a.Prefix.Addr().Is4():
		out.Broadcast = net.IPv4zero // stands for none; the library would work one out
	}
	return out
}

func kernelRoute(r nic.KernelRoute, index int) *netlink.Route {
	out := &netlink.Route{
		LinkIndex: index, Dst: ipNet(r.Dst), Table: r.Table, Protocol: netlink.RouteProtocol(r.Protocol),
		Scope: netlink.Scope(r.Scope), Type: r.Type, Flags: r.Flags, Priority: r.Metric, MTU: r.MTU, AdvMSS: r.AdvMSS,
	}
	out.Gw, out.Via = nextHop(r)
	if r.Src.IsValid() {
		out.Src = r.Src.AsSlice()
	}
	return out
}

// nextHop gives the gateway as the kernel wants it: RTA_GATEWAY, or RTA_VIA where its family is another.
func nextHop(r nic.KernelRoute) (net.IP, netlink.Destination) {
	switch {
	case !r.Gw.IsValid():
		return nil, nil
	case r.Dst.Addr().Is4() && r.Gw.Is6():
		return nil, &netlink.Via{AddrFamily: unix.AF_INET6, Addr: r.Gw.AsSlice()}
	}
	return r.Gw.AsSlice(), nil
}
