package podnet

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// openBridge makes the TAP and the bridge that are to be joined.
func (a *attempt) openBridge(j *joint) error {
	if err := a.openOurs(j); err != nil {
		return err
	}
	name := j.Join.Bridge
	if err := a.o.lacks(needBridge); err != nil {
		return err
	}
	index, err := ioctlLink(name, unix.SIOCBRADDBR)
	if err != nil {
		err = fmt.Errorf("add bridge %s: %w (needs CONFIG_BRIDGE and CAP_NET_ADMIN)", name, err)
		if errors.Is(err, unix.ENOPKG) { // the kernel's word for a missing module (sock_ioctl)
			err = &lack{needBridge, err}
		}
		return err
	}
	j.bridge = device(index, name)
	return nil
}

// joinBridge silences the veth and puts veth and TAP on the bridge, which stays down.
func (a *attempt) joinBridge(j *joint) error {
	r, mtu, bridge := j.Join, j.NIC.MTU, j.bridge
	veth, tap := device(j.link.Index, j.link.Name), device(j.tapIndex, r.Tap)
	return run(
		step{"set up bridge " + r.Bridge, func() error { return a.setBridge(bridge, mtu) }},
		// A queueing discipline that orders by time stamp (fq, a common default) drops redirected and bridged
		// packets that carry one; a TAP has its own ring and needs none. Before it is up: then there is none to wait for.
		step{"set queueing of " + r.Tap, func() error { return a.h.QdiscReplace(noqueue(tap)) }},
		step{"set MTU of " + r.Tap + " and join it", func() error {
			return a.set(j.tapIndex, unix.IFF_UP, attr(unix.IFLA_MTU, mtu), attr(unix.IFLA_MASTER, bridge.Attrs().Index))
		}},
		step{"silence " + r.Link, func() error { return a.silence(veth, j.link) }},
		// The veth gives up the guest's MAC: a port's own address is a local entry in the bridge's table, and
		// frames for it would end here.
		step{"set MAC of " + r.Link + " and join it", func() error {
			return a.set(j.link.Index, 0, nl.NewRtAttr(unix.IFLA_ADDRESS, r.Own[:]), attr(unix.IFLA_MASTER, bridge.Attrs().Index))
		}},
		step{"switch learning off on " + r.Link, func() error { return a.h.LinkSetLearning(veth, false) }},
	)
}

// upBridge lets frames pass: the bridge is what was missing.
func (a *attempt) upBridge(j *joint) error {
	if !j.link.Up {
		if err := a.h.LinkSetUp(device(j.link.Index, j.link.Name)); err != nil {
			return fmt.Errorf("set %s up: %w", j.link.Name, err)
		}
	}
	if err := a.h.LinkSetUp(j.bridge); err != nil {
		return fmt.Errorf("set %s up: %w", j.Join.Bridge, err)
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
