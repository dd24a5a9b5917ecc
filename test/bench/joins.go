package main

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// join is one way from a guest's TAP to the host.
type join struct {
	name  string // in tables
	about string // one line: how it is made, and who does it so
	make  func(r *rig, queues int) error
}

// Names that bars speak of.
const (
	noJoin     = "no join"
	handBridge = "bridge"
)

// joins is every way, the fastest that can be first. A way that the product has not, or the kernel, is left out.
func joins() []join {
	all := []join{
		{noJoin, "the TAP is the host's own device, without pod and veth: the limit", makeNone},
		{"eBPF to the peer", "two instructions at the TAP's ingress: `bpf_redirect_peer` to the veth's other end; `bpf_redirect` back", ebpfJoin(true)},
		{"eBPF", "`bpf_redirect` both ways", ebpfJoin(false)},
		{"u32 + mirred", "tc as Kata's `tcfilter` and tc-redirect-tap set it up: qdisc ingress, u32 that matches all, mirred egress redirect", makeMirred},
		{"KubeVirt's bridge", "its settings: an address, tables that age, learning off on the veth, random MAC on the veth, br_netfilter as it is", makeKubeVirt},
		{"Ignite's bridge", "its settings: tables do not age (every frame is flooded), all else the kernel's defaults", makeIgnite},
		{handBridge, "made by hand with virtlet's settings: no learning, no snooping, no br_netfilter; without its filters", makeBridge},
	}
	for _, w := range ownWays() {
		all = append(all, join{w.name, w.about, makeOwn(w)})
	}
	return all
}

// makeNone gives the host the TAP.
func makeNone(r *rig, queues int) error {
	tap, err := r.addTap(r.host, "tap0", queues)
	if err != nil {
		return err
	}
	if err := r.host.Netlink().LinkSetHardwareAddr(tap, hostMAC.HardwareAddr()); err != nil {
		return err
	}
	return r.hostEnd(tap)
}

// ends makes a veth to the pod and a TAP in it.
func (r *rig) ends(queues int, mac nic.MAC) (eth, tap netlink.Link, err error) {
	if err := r.addVeth(r.pod, podLink, mac); err != nil {
		return nil, nil, err
	}
	if eth, err = r.pod.Netlink().LinkByName(podLink); err != nil {
		return nil, nil, err
	}
	tap, err = r.addTap(r.pod, "tap0", queues)
	return eth, tap, err
}

func ebpfJoin(peer bool) func(*rig, int) error {
	return func(r *rig, queues int) error {
		eth, tap, err := r.ends(queues, guestMAC)
		if err != nil {
			return err
		}
		return r.redirectBetween(eth, tap, peer)
	}
}

// redirectBetween has a program at each end hand frames to the other, until the rig closes.
func (r *rig) redirectBetween(eth, tap netlink.Link, peer bool) error {
	for _, way := range []struct {
		from, to netlink.Link
		peer     bool
	}{{tap, eth, peer}, {eth, tap, false}} {
		prog, err := redirect(way.to.Attrs().Index, way.peer)
		if err != nil {
			return fmt.Errorf("load the redirect: %w", err)
		}
		l, err := attachIngress(r.pod, way.from.Attrs().Index, prog)
		prog.Close() // the link holds it
		if err != nil {
			return err
		}
		r.defers(l.Close)
	}
	return nil
}

func makeMirred(r *rig, queues int) error {
	eth, tap, err := r.ends(queues, guestMAC)
	if err != nil {
		return err
	}
	h := r.pod.Netlink()
	for _, way := range [][2]netlink.Link{{tap, eth}, {eth, tap}} {
		from, to := way[0].Attrs().Index, way[1].Attrs().Index
		if err := h.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: from, Parent: netlink.HANDLE_INGRESS}}); err != nil {
			return fmt.Errorf("add qdisc ingress: %w", err)
		}
		mirred := netlink.NewMirredAction(to) // egress redirect, stolen
		err := h.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: from, Parent: netlink.MakeHandle(0xffff, 0), Protocol: unix.ETH_P_ALL},
			Actions:     []netlink.Action{mirred},
		})
		if err != nil {
			return fmt.Errorf("add filter u32: %w", err)
		}
	}
	return nil
}

// otherMAC is the veth's where the guest has another.
var otherMAC = nic.MAC{0x02, 0, 0x5e, 0x10, 0, 3}

// bridge joins veth and TAP by one, which is still down.
func (r *rig) bridge(queues int, settings func(*netlink.Bridge)) (bridge, eth netlink.Link, err error) {
	eth, tap, err := r.ends(queues, otherMAC)
	if err != nil {
		return nil, nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	br := &netlink.Bridge{LinkAttrs: attrs}
	settings(br)
	h := r.pod.Netlink()
	if err := h.LinkAdd(br); err != nil {
		return nil, nil, fmt.Errorf("add bridge: %w", err)
	}
	for _, port := range []netlink.Link{eth, tap} {
		if err := h.LinkSetMaster(port, br); err != nil {
			return nil, nil, fmt.Errorf("join %s: %w", port.Attrs().Name, err)
		}
	}
	return br, eth, nil
}

func makeKubeVirt(r *rig, queues int) error {
	br, eth, err := r.bridge(queues, func(*netlink.Bridge) {})
	if err != nil {
		return err
	}
	h := r.pod.Netlink()
	err = errors.Join(
		h.LinkSetLearning(eth, false),
		h.AddrAdd(br, &netlink.Addr{IPNet: ipNet(kubeVirtAddr)}),
		h.LinkSetUp(br),
	)
	return err
}

func makeIgnite(r *rig, queues int) error {
	br, _, err := r.bridge(queues, func(b *netlink.Bridge) { b.AgeingTime = new(uint32) })
	if err != nil {
		return err
	}
	return r.pod.Netlink().LinkSetUp(br)
}

func makeBridge(r *rig, queues int) error {
	br, eth, err := r.bridge(queues, func(b *netlink.Bridge) { b.AgeingTime, b.MulticastSnooping = new(uint32), new(bool) })
	if err != nil {
		return err
	}
	err = r.pod.Do(func() error {
		var errs []error
		for _, s := range []string{"iptables", "ip6tables", "arptables"} {
			errs = append(errs, writeSysctl("bridge/bridge-nf-call-"+s, "0"))
		}
		return errors.Join(errs...)
	})
	h := r.pod.Netlink()
	return errors.Join(err, h.LinkSetLearning(eth, false), h.LinkSetUp(br))
}
