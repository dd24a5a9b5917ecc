package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// Names that bars speak of.
const (
	ownBridge   = "virtlet bridge"
	ownRedirect = "virtlet redirect"
	ownMacvlan  = "virtlet on macvlan"
)

// ownWay is a datapath of the product, made by [podnet.Attach] as for any guest: filters and spoof check included.
type ownWay struct {
	name, about string
	macvlan     bool        // what the pod's link is: a veth otherwise
	wish        podnet.Wish // which datapath is asked for
	least       leastWay    // nil: it is not attached for its cost
}

func (w ownWay) options(queues int) podnet.Options {
	return podnet.Options{Queues: queues, Datapath: w.wish}
}

// served says whether a join is what was asked for: figures of what stands in for it would have the wrong name.
func (w ownWay) served(j podnet.Join) error {
	if w.wish == podnet.WishRedirect && (j.Datapath != podnet.Redirected || j.Engine != podnet.EBPF) || w.wish == podnet.WishBridge && j.Datapath != podnet.Bridged {
		return fmt.Errorf("the machine cannot do it: %s is joined by %s (%s), for it lacks: %s", j.Link, j.Datapath, j.Engine, j.Lacks)
	}
	return nil
}

// ownWays is every datapath that the product has.
func ownWays() []ownWay {
	return []ownWay{
		{
			name: ownRedirect, about: "by `podnet.Attach`: filters, spoof check and redirect, to the peer where it can be, by eBPF",
			wish: podnet.WishRedirect, least: leastRedirect,
		},
		{
			name: ownBridge, about: "by `podnet.Attach`: a bridge, with filters and spoof check by nftables",
			wish: podnet.WishBridge, least: leastBridge,
		},
		{
			name: ownMacvlan, about: "by `podnet.Attach` on a macvlan: as virtlet redirect, but with one device more, and no peer",
			macvlan: true, wish: podnet.WishRedirect,
		},
	}
}

// timedWays are those whose attaching is compared with the least.
func timedWays() (all []ownWay) {
	for _, w := range ownWays() {
		if w.least != nil {
			all = append(all, w)
		}
	}
	return all
}

// makeOwn has the product make a join.
func makeOwn(w ownWay) func(*rig, int) error {
	return func(r *rig, queues int) error {
		add := func() error { return r.addVeth(r.pod, podLink, guestMAC) }
		if w.macvlan {
			add = r.addMacvlan
		}
		if err := errors.Join(add(), giveAddress(r.pod)); err != nil {
			return err
		}
		snap, err := podnet.Observe(r.pod)
		if err != nil {
			return err
		}
		a := &attached{ns: r.pod}
		if err := a.join(snap, w, w.options(queues)); err != nil {
			return err
		}
		r.defers(a.detach)
		r.taps = a.port.Taps
		return nil
	}
}

// addMacvlan gives the pod one, whose parent is the veth's end in a namespace of its own.
func (r *rig) addMacvlan() error {
	parent, err := r.namespace("parent")
	if err != nil {
		return err
	}
	if err := r.addVeth(parent, "up0", otherMAC); err != nil {
		return err
	}
	up, err := parent.Netlink().LinkByName("up0")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.HardwareAddr = podLink, up.Attrs().Index, guestMAC.HardwareAddr()
	mv := &netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}
	if err := parent.Netlink().LinkAdd(mv); err != nil {
		return fmt.Errorf("add macvlan: %w", err)
	}
	return errors.Join(moveTo(parent, r.pod, mv), upIn(r.pod, podLink))
}

// attached is a pod's link joined by the product.
type attached struct {
	ns   *netns.NS
	port *podnet.Port
	rec  podnet.Record
}

// join gives the pod's link to the guest, by one of the product's datapaths, with its options.
func (a *attached) join(snap nic.Snapshot, w ownWay, o podnet.Options) error {
	ports, err := podnet.Attach(context.Background(), a.ns, snap, guestNICs(), o, func(r podnet.Record) error { a.rec = r; return nil })
	if err != nil {
		return err
	}
	a.port = ports[0]
	return w.served(a.port.Join)
}

func (a *attached) detach() error { return errors.Join(a.port.Close(), podnet.Detach(a.ns, a.rec)) }

func guestNICs() []nic.NIC {
	return []nic.NIC{{Name: podLink, MAC: guestMAC, MTU: mtu, Addrs: prefixes(guestAddr), Routes: []nic.Route{{Dst: anywhere, Gw: hostAddr.Addr()}}}}
}
