package main

import (
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/podnet"
)

// attachRounds are how often one NIC is attached in each way.
const attachRounds = 60

// attachCost is what one datapath of the product takes for one NIC, beside the fewest calls that make the same links.
type attachCost struct {
	Datapath string `json:"datapath"`
	Attach   spread `json:"attach"`   // milliseconds
	Least    spread `json:"least"`    // milliseconds
	Load     spread `json:"load"`     // milliseconds, of the programs, before it
	Release  spread `json:"release"`  // milliseconds
	ByLeast  spread `json:"byLeast"`  // attach by the least of the same round
	ByAttach spread `json:"byAttach"` // release by attach
}

// measureAttach attaches one NIC again and again, by every datapath in turn.
func measureAttach(ways []ownWay, say func(string, ...any)) (all []attachCost, err error) {
	// Beside another VM: the machine's first filter makes the kernel patch its code, which the others do not pay for.
	beside, err := newRig(join{name: "another VM", make: makeOwn(ways[0])}, 1)
	if err != nil {
		return nil, err
	}
	r := &rig{}
	defer func() { err = errors.Join(err, r.Close(), beside.Close()) }()
	if r.host, err = r.namespace("host"); err == nil {
		r.pod, err = r.namespace("pod")
	}
	if err == nil {
		err = r.addVeth(r.pod, podLink, guestMAC)
	}
	if err != nil {
		return nil, err
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	s := samples{}
	for range attachRounds {
		for _, w := range ways {
			least, err := r.timeLeast(w.least)
			if err != nil {
				return nil, fmt.Errorf("the least for %s: %w", w.name, err)
			}
			own, err := r.timeOwn(w)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			s.add(w.name, "least", least)
			s.add(w.name, "attach", own.attach)
			s.add(w.name, "load", own.load)
			s.add(w.name, "release", own.release)
		}
	}
	for _, w := range ways {
		c := attachCost{
			Datapath: w.name, Attach: s.of(w.name, "attach"), Least: s.of(w.name, "least"), Load: s.of(w.name, "load"), Release: s.of(w.name, "release"),
			ByLeast:  newSpread(ratios(s[w.name]["attach"], s[w.name]["least"])),
			ByAttach: newSpread(ratios(s[w.name]["release"], s[w.name]["attach"])),
		}
		say("%s: attach %s ms, %s times the least; release %s ms", w.name, digits(c.Attach.Median), digits(c.ByLeast.Median), digits(c.Release.Median))
		all = append(all, c)
	}
	return all, nil
}

// ownTimes are milliseconds.
type ownTimes struct{ load, attach, release float64 }

// timeOwn times what the product does for one NIC, and does what is left to do.
func (r *rig) timeOwn(w ownWay) (t ownTimes, err error) {
	a := &attached{ns: r.pod}
	if err := r.giveAddress(); err != nil {
		return t, err
	}
	snap, err := podnet.Observe(r.pod)
	if err != nil {
		return t, err
	}
	o := w.options(1)
	begin := time.Now()
	o.Programs = podnet.Load(snap, guestNICs(), o)
	err = o.Programs.Wait()
	t.load = ms(begin)
	defer o.Programs.Close()
	if err != nil {
		return t, err
	}
	begin = time.Now()
	err = a.join(snap, w, o)
	t.attach = ms(begin)
	if err != nil {
		return t, err
	}
	begin = time.Now()
	err = podnet.Release(r.pod, a.rec)
	t.release = ms(begin)
	return t, errors.Join(err, a.detach())
}

func ms(since time.Time) float64 { return time.Since(since).Seconds() * 1e3 }

// leastWay prepares what needs no link of ours, and gives the fewest calls that make a join of a link of the pod's.
type leastWay func(r *rig, eth netlink.Link) (func() error, error)

// timeLeast gives how many milliseconds the fewest calls take that make a join, and undoes them.
func (r *rig) timeLeast(least leastWay) (float64, error) {
	eth, err := r.pod.Netlink().LinkByName(podLink)
	if err != nil {
		return 0, err
	}
	undo := len(r.undo)
	make, err := least(r, eth)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	err = make()
	took := ms(begin)
	errs := []error{err}
	for len(r.undo) > undo {
		errs = append(errs, r.undo[len(r.undo)-1]())
		r.undo = r.undo[:len(r.undo)-1]
	}
	r.taps = nil
	return took, errors.Join(errs...)
}

// leastTap makes a TAP in one visit to the namespace, still down.
func (r *rig) leastTap() (netlink.Link, error) {
	const name = "least"
	err := r.pod.Do(func() error { return r.openQueue(name, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR) })
	if err != nil {
		return nil, err
	}
	h := r.pod.Netlink()
	tap, err := h.LinkByName(name)
	if err != nil {
		return nil, err
	}
	return tap, h.LinkSetMTU(tap, mtu)
}

// leastBridge is what a join by bridge cannot do without.
func leastBridge(r *rig, eth netlink.Link) (func() error, error) {
	return func() error { return r.bridgeLeast(eth) }, nil
}

func (r *rig) bridgeLeast(eth netlink.Link) error {
	tap, err := r.leastTap()
	if err != nil {
		return err
	}
	h := r.pod.Netlink()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "least-bridge", TxQLen: -1}}
	if err := h.LinkAdd(br); err != nil {
		return err
	}
	r.defers(func() error {
		return errors.Join(h.LinkDel(br), h.LinkSetHardwareAddr(eth, guestMAC.HardwareAddr()))
	})
	return first(
		func() error { return h.LinkSetHardwareAddr(eth, otherMAC.HardwareAddr()) },
		func() error { return h.LinkSetMasterByIndex(eth, br.Index) },
		func() error { return h.LinkSetMasterByIndex(tap, br.Index) },
		func() error { return h.LinkSetUp(br) },
		func() error { return h.LinkSetUp(tap) },
		func() error { return h.LinkSetUp(eth) },
	)
}

// leastRedirect is what a join by eBPF cannot do without. Its programs are there, as the product's are.
func leastRedirect(r *rig, eth netlink.Link) (func() error, error) {
	var progs [2]*aimed
	for i := range progs {
		p, err := newAimed(i == 0)
		if err != nil {
			return nil, err
		}
		r.defers(p.Close) // filters hold them
		progs[i] = p
	}
	return func() error {
		tap, err := r.leastTap()
		if err != nil {
			return err
		}
		h := r.pod.Netlink()
		r.defers(func() error { return h.QdiscDel(clsact(eth.Attrs().Index)) })
		from, to := tap, eth
		for _, p := range progs {
			if err := p.aim(to.Attrs().Index); err != nil {
				return err
			}
			if err := addFilter(h, from.Attrs().Index, p.Program); err != nil {
				return err
			}
			from, to = to, from
		}
		return h.LinkSetUp(tap)
	}, nil
}

// first does one after another until one fails.
func first(steps ...func() error) error {
	for _, do := range steps {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// giveAddress gives the pod's link the guest's address, as a plugin does. It may have it.
func (r *rig) giveAddress() error { return giveAddress(r.pod) }

func giveAddress(pod *netns.NS) error {
	eth, err := pod.Netlink().LinkByName(podLink)
	if err == nil {
		err = pod.Netlink().AddrReplace(eth, &netlink.Addr{IPNet: ipNet(guestAddr)})
	}
	if err != nil {
		return fmt.Errorf("add the pod's address: %w", err)
	}
	return nil
}
