package podnet

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// NodeLink is a link of the node. Index tells it apart from a later one of the same name.
type NodeLink struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	Kind  string `json:"kind"`
}

// NodeLinks lists the links of the node, which is the namespace that the calling goroutine's thread is in.
func NodeLinks() ([]NodeLink, error) {
	links, err := netns.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list the node's links: %w", err)
	}
	return nodeLinks(links), nil
}

func nodeLinks(links []netlink.Link) []NodeLink {
	all := make([]NodeLink, 0, len(links))
	for _, l := range links {
		all = append(all, NodeLink{l.Attrs().Name, l.Attrs().Index, kind(l)})
	}
	return all
}

// Made gives the links of the node that have come since before was listed and are the pod's own: other ends of its links,
// or in named. A bridge is never a pod's own, as others share it.
func Made(pod *netns.NS, before []NodeLink, named []string) ([]NodeLink, error) {
	n, err := lookAround(pod)
	if err != nil {
		return nil, err
	}
	var made []NodeLink
	for i, l := range nodeLinks(n.links) {
		own := n.podLink(n.links[i]) != "" || slices.Contains(named, l.Name)
		if own && l.Kind != "bridge" && !slices.Contains(before, l) {
			made = append(made, l)
		}
	}
	return made, nil
}

// Left gives those links that are still there.
func Left(links []NodeLink) ([]NodeLink, error) {
	now, err := NodeLinks()
	if err != nil {
		return nil, err
	}
	var left []NodeLink
	for _, l := range links {
		if slices.ContainsFunc(now, func(n NodeLink) bool { return n.Index == l.Index && n.Name == l.Name }) {
			left = append(left, l)
		}
	}
	return left, nil
}

// MendBridge gives a bridge of the node that has no MAC one of its own. A bridge loses it with its last port unless somebody
// has set it (br_stp_recalculate_bridge_id of the kernel); the bridge plugin does so some time after it adds a port, and killed
// in between leaves a bridge on which it fails ever after. A bridge that is not there needs nothing.
func MendBridge(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at bridge %s: %w", name, err)
	}
	if link.Type() != "bridge" || slices.ContainsFunc(link.Attrs().HardwareAddr, func(b byte) bool { return b != 0 }) {
		return nil
	}
	var random nic.MAC
	rand.Read(random[:])
	if err := netlink.LinkSetHardwareAddr(link, ownMAC(random).HardwareAddr()); err != nil {
		return fmt.Errorf("give bridge %s a MAC: %w", name, err)
	}
	return nil
}

// around is the node as seen from a pod.
type around struct {
	links []netlink.Link // of the node
	pod   []netlink.Link
	// podID is the number by which the node's links name the pod's namespace, nodeID the reverse; -1: no link needs one.
	podID, nodeID int
}

// lookAround reads the node's links, which are those of the calling thread's namespace, and the pod's.
func lookAround(pod *netns.NS) (*around, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fail := func(err error) (*around, error) {
		return nil, fmt.Errorf("look at the node's side of %s: %w", pod.Path(), err)
	}
	n := &around{}
	var err error
	if n.links, err = netns.Dump(netlink.LinkList); err != nil {
		return fail(err)
	}
	if n.pod, err = netns.Dump(pod.Netlink().LinkList); err != nil {
		return fail(err)
	}
	// Threads rather than paths: a namespace may be pinned nowhere any more.
	node, inside := unix.Gettid(), 0
	err = pod.Do(func() error {
		inside = unix.Gettid()
		n.nodeID, err = pod.Netlink().GetNetNsIdByPid(node)
		return err
	})
	if err != nil {
		return fail(err)
	}
	if n.podID, err = netlink.GetNetNsIdByPid(inside); err != nil {
		return fail(err)
	}
	return n, nil
}

// podLink gives the name of the pod's link that the node's link is the other end of or under, or "".
func (n *around) podLink(link netlink.Link) string {
	a := link.Attrs()
	for _, l := range n.pod {
		p := l.Attrs()
		// Veths name each other; a macvlan, ipvlan or VLAN names what it is on.
		end := l.Type() == "veth" && link.Type() == "veth" && n.podID >= 0 && a.NetNsID == n.podID && a.ParentIndex == p.Index
		under := l.Type() != "veth" && n.nodeID >= 0 && p.NetNsID == n.nodeID && p.ParentIndex == a.Index
		if end || under {
			return p.Name
		}
	}
	return ""
}

// ObserveHost reads the node's side of the pod's links: what the links of snap lead to, and the bridges that those are ports
// of. The node is the namespace that the calling goroutine's thread is in. noTxChecksum are the pod's links that leave no
// checksum to the hardware. Attach does not change any of this.
func ObserveHost(pod *netns.NS, snap nic.Snapshot) (host *nic.Host, noTxChecksum []string, err error) {
	n, err := lookAround(pod)
	if err != nil {
		return nil, nil, err
	}
	err = pod.Do(func() error {
		for _, l := range snap.Links {
			if off, err := offloadsOff(l.Name, unix.ETHTOOL_GTXCSUM); err == nil && off[0] { // a link without the setting has no hardware
				noTxChecksum = append(noTxChecksum, l.Name)
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	node, err := netns.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		return nil, nil, err
	}
	defer node.Close()
	all, err := Observe(node)
	if err != nil {
		return nil, nil, fmt.Errorf("the node's side: %w", err)
	}
	host = &nic.Host{Sysctls: readSysctls(hostSysctls)}
	masters := map[string]bool{}
	for _, l := range n.links {
		if name := n.podLink(l); name != "" && snap.Link(name) != nil {
			h, err := hostLink(node, all.Link(l.Attrs().Name))
			if err != nil {
				return nil, nil, err
			}
			h.PodLink = name
			host.Links = append(host.Links, h)
			masters[h.Master] = true
		}
	}
	for i := range all.Links {
		if masters[all.Links[i].Name] {
			h, err := hostLink(node, &all.Links[i])
			if err != nil {
				return nil, nil, err
			}
			host.Links = append(host.Links, h)
		}
	}
	return host, noTxChecksum, nil
}

// hostSysctls are settings of a node that its pods' traffic depends on. The values mean nothing here.
var hostSysctls = map[string]string{"ipv4/ip_forward": "", "ipv6/conf/all/forwarding": ""}

// hostLinkSysctls are those of a node's link.
func hostLinkSysctls(link string) map[string]string {
	all := map[string]string{"ipv4/neigh/" + link + "/proxy_delay": ""}
	for _, s := range []string{"ipv4/conf/%s/proxy_arp", "ipv4/conf/%s/route_localnet", "ipv4/conf/%s/forwarding", "ipv4/conf/%s/rp_filter", "ipv6/conf/%s/disable_ipv6", "ipv6/conf/%s/forwarding", "ipv6/conf/%s/proxy_ndp"} {
		all[fmt.Sprintf(s, link)] = ""
	}
	return all
}

// hostLink completes what Observe saw of a link of the node.
func hostLink(node *netns.NS, l *nic.Link) (nic.HostLink, error) {
	if l == nil {
		return nic.HostLink{}, errors.New("the node's links change while they are looked at; try again")
	}
	h := nic.HostLink{Link: *l}
	fail := func(err error) (nic.HostLink, error) {
		return h, fmt.Errorf("look at the node's link %s: %w", l.Name, err)
	}
	if err := node.Do(func() error { h.Sysctls = readSysctls(hostLinkSysctls(l.Name)); return nil }); err != nil {
		return fail(err)
	}
	if h.Master != "" {
		port, err := netns.Dump(func() ([]netlink.Protinfo, error) {
			p, err := node.Netlink().LinkGetProtinfo(device(l.Index, l.Name))
			return []netlink.Protinfo{p}, err
		})
		if err != nil {
			return fail(err)
		}
		h.Hairpin, h.NoLearning = port[0].Hairpin, !port[0].Learning
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		known, err := netns.Dump(func() ([]netlink.Neigh, error) { return node.Netlink().NeighList(l.Index, family) })
		if err != nil {
			return fail(err)
		}
		proxies, err := netns.Dump(func() ([]netlink.Neigh, error) { return node.Netlink().NeighProxyList(l.Index, family) })
		if err != nil {
			return fail(err)
		}
		for _, e := range append(known, proxies...) {
			entry := nic.Neighbour{Proxy: e.Flags&unix.NTF_PROXY != 0}
			ip, ok := netip.AddrFromSlice(e.IP)
			if !ok || !entry.Proxy && e.State&unix.NUD_PERMANENT == 0 {
				continue
			}
			entry.IP = ip.Unmap()
			if len(e.HardwareAddr) == len(entry.MAC) {
				entry.MAC = nic.MAC(e.HardwareAddr)
			}
			h.Neighbours = append(h.Neighbours, entry)
		}
	}
	return h, nil
}

// offloadsOff says, of each of the settings that ioctls of ethtool ask for, whether a link of the calling thread's namespace does
// not leave that to the hardware: computing checksums (ETHTOOL_GTXCSUM), cutting segments (ETHTOOL_GTSO).
func offloadsOff(link string, asks ...uint32) ([]bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var off []bool
	for _, ask := range asks {
		value := struct{ cmd, data uint32 }{cmd: ask} // struct ethtool_value
		req := struct {                               // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(req.name[:unix.IFNAMSIZ-1], link)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return nil, errno
		}
		off = append(off, value.data == 0)
	}
	return off, nil
}
