package podnet

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// Probe tries on this machine all that Attach needs - namespace, veth, bridge, TAP, filters - in a namespace of its own
// that is gone when Probe returns. Its error is the one that a VM would meet. lacks says why the wish is not what it gets.
func Probe(wish Wish) (lacks string, err error) {
	ns, err := netns.Create(fmt.Sprintf("virtlet-probe-%d", os.Getpid()))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, ns.Close(), netns.Remove(ns.Path())) }()
	h := ns.Netlink()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		return "", fmt.Errorf("add a veth: %w (needs CONFIG_VETH)", err)
	}
	snap, err := Observe(ns)
	if err != nil {
		return "", err
	}
	link := snap.Link("eth0")
	nics := []nic.NIC{{Name: link.Name, MAC: link.MAC, MTU: link.MTU}}
	ports, err := Attach(context.Background(), ns, snap, nics, Options{Datapath: wish}, func(Record) error { return nil })
	for _, p := range ports {
		lacks = p.Join.Lacks
		err = errors.Join(err, p.Close())
	}
	return lacks, err
}
