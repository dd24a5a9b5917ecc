package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// A join by redirect has no bridge: what the rules at the ingress of each end let pass goes to the other end, and the
// namespace's own stack sees none. So the link keeps the guest's MAC, which a macvlan and an ipvlan need: what they receive is
// chosen by it. The rules are eBPF programs that redirect (ebpf.go), or nftables' whose last one is a forward. See
// docs/decisions/0008-redirect-by-nftables.md and 0015-redirect-by-ebpf.md.

// openRedirect makes the TAP.
func (a *attempt) openRedirect(j *joint) error {
	j.peer = j.Join.engine() == EBPF && peerTakes(j)
	return a.openOurs(j)
}

// joinRedirect makes the TAP ready, which stays down, and silences the link.
func (a *attempt) joinRedirect(j *joint) error {
	r, tap := j.Join, device(j.tapIndex, j.Join.Tap)
	if r.engine() == EBPF {
		if j.noClsact = errors.ErrUnsupported; !a.o.noClsact {
			j.noClsact = cmp.Or(a.addClsact(j.link.Index), a.addClsact(j.tapIndex))
		}
	}
	return run(
		step{"set queueing of " + r.Tap, func() error { return a.h.QdiscReplace(noqueue(tap)) }},
		step{"set MTU of " + r.Tap, func() error {
			const born = 1500 // as every TAP is (ETH_DATA_LEN)
			if j.NIC.MTU == born {
				return nil
			}
			return a.h.LinkSetMTU(tap, j.NIC.MTU)
		}},
		step{"silence " + r.Link, func() error {
			if r.KeepsAddrs {
				return nil // a rule does it
			}
			return a.silence(device(j.link.Index, r.Link), j.link)
		}},
	)
}

// upRedirect lets frames pass: the TAP is what was missing.
func (a *attempt) upRedirect(j *joint) error {
	flags := uint32(unix.IFF_UP)
	if allMulti(j.link.Kind) {
		flags |= unix.IFF_ALLMULTI
	}
	if !j.link.Up || flags != unix.IFF_UP {
		if err := a.set(j.link.Index, flags); err != nil {
			return fmt.Errorf("let %s take every multicast group: %w", j.Join.Link, err)
		}
	}
	if err := a.h.LinkSetUp(device(j.tapIndex, j.Join.Tap)); err != nil {
		return fmt.Errorf("set %s up: %w", j.Join.Tap, err)
	}
	return nil
}

// allMulti says whether a link takes the multicast frames of the groups alone that its own stack has joined. Now it is the
// guest who joins. One end of a pair takes all.
func allMulti(kind string) bool { return kind == "macvlan" || kind == "ipvlan" }

// peerTakes says whether a guest's frames may go to the link's other end at once, as if they had passed the link: it is in
// another namespace (the kernel drops them otherwise), and nothing is left for the link to do. Of a link whose checksums or
// segmentation somebody has switched off, the kernel finishes each frame when it is sent; a netkit runs the programs of its
// maker then. The calling thread is in the namespace.
func peerTakes(j *joint) bool {
	if !j.link.Away {
		return false
	}
	off, err := offloadsOff(j.link.Name, unix.ETHTOOL_GTXCSUM, unix.ETHTOOL_GTSO)
	return err == nil && !slices.Contains(off, true)
}

// place puts the programs in place. The calling thread is in the namespace.
func (a *attempt) place(progs [][]*loaded) error {
	for i, of := range progs {
		for _, l := range of {
			if err := a.joints[i].named(a.placeOne(a.joints[i], l)); err != nil {
				return err
			}
		}
	}
	return nil
}

// placeOne makes a program a filter of clsact. tcx, which came with Linux 6.6, makes the kernel wait until no packet is under way,
// for each program, when it is put there and when it is taken off (RCU; 20 ms and more). It is for kernels without clsact.
func (a *attempt) placeOne(j *joint, l *loaded) error {
	index := map[string]int{j.Join.Link: j.link.Index, j.Join.Tap: j.tapIndex}
	if err := l.aim(index[l.hook.to], j.peer && l.hook.to == j.Join.Link); err != nil {
		return err
	}
	err := j.noClsact
	if err == nil {
		err = a.addFilter(l, index[l.hook.device])
	}
	if err != nil {
		if again := l.attachTCX(index[l.hook.device]); again != nil {
			return &lack{needEBPF, fmt.Errorf("put the program of %s in place: %w", l.hook, errors.Join(err, again))}
		}
	}
	return nil
}
