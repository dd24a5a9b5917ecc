package podnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// A join by redirect has no bridge: what the rules at the ingress of each end let pass goes to the other end, and the
// namespace's own stack sees none. So the link keeps the guest's MAC, which a macvlan and an ipvlan need: what they receive is
// chosen by it. The rules are eBPF programs that redirect (ebpf.go), or nftables' whose last one is a forward. See
// docs/decisions/0008-redirect-by-nftables.md and 0015-redirect-by-ebpf.md.

// openRedirect makes the TAP.
func (a *attempt) openRedirect(j *joint) error {
	j.peer = j.Join.engine() == EBPF && a.peerTakes(j)
	return a.openOurs(j)
}

// joinRedirect makes the TAP ready, which stays down, and silences the link.
func (a *attempt) joinRedirect(j *joint) error {
	r := j.Join
	return run(
		step{"set queueing of " + r.Tap, func() error { return a.h.QdiscReplace(noqueue(device(j.tapIndex, r.Tap))) }},
		step{"set MTU of " + r.Tap, func() error { return a.set(j.tapIndex, 0, attr(unix.IFLA_MTU, j.NIC.MTU)) }},
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
func (a *attempt) peerTakes(j *joint) bool {
	if j.link.Kind != "veth" {
		return false
	}
	l, err := a.h.LinkByIndex(j.link.Index)
	if err != nil || l.Attrs().NetNsID < 0 {
		return false
	}
	for _, offload := range []uint32{unix.ETHTOOL_GTXCSUM, unix.ETHTOOL_GTSO} {
		if off, err := offloadOff(j.link.Name, offload); err != nil || off {
			return false
		}
	}
	return true
}

// work is what a program has to do.
type work struct {
	leave []match // to the rules of localhost, which see a frame after it
	rules []rule
}

// work gives that of a hook. local are the addresses that localhost leads to, if it does.
func (h hook) work(n nic.NIC, p Policy, local []netip.Addr) work {
	w := work{rules: h.rules(n, p)}
	switch h.role {
	case "cluster":
		var first []rule
		for _, a := range local {
			for _, r := range strangers(familyOf(a)) {
				first = append(first, r.rule)
			}
		}
		w.rules = append(first, w.rules...)
	case "guest":
		w.leave = localMatches(n.MAC, local)
	}
	return w
}

// load makes the programs of a join by eBPF and gives them to the kernel, all at once: it takes a millisecond or two for each.
func (a *attempt) load(j *joint, local []netip.Addr) error {
	if err := a.lacks(needEBPF); err != nil {
		return &lack{needEBPF, err}
	}
	index := map[string]int{j.Join.Link: j.link.Index, j.Join.Tap: j.tapIndex}
	hooks := j.Join.hooks()
	progs := make([]*loaded, len(hooks))
	var g errgroup.Group
	for i, h := range hooks {
		g.Go(func() (err error) {
			w := h.work(j.NIC, a.o.Policies[j.Join.Link], local)
			progs[i], err = loadHook(h, w, index[h.to], j.peer && h.to == j.Join.Link)
			return err
		})
	}
	err := g.Wait()
	j.progs = slices.DeleteFunc(progs, func(l *loaded) bool { return l == nil })
	if err != nil {
		return &lack{needEBPF, fmt.Errorf("%w (needs CONFIG_BPF_SYSCALL, CAP_BPF and CAP_NET_ADMIN)", err)}
	}
	return nil
}

// place puts the programs in place. By filters of clsact: tcx, which came with Linux 6.6, makes the kernel wait until no packet is
// under way, for each program, when it is put there and when it is taken off (RCU; 20 ms and more). It is for kernels without
// clsact. The calling thread is in the namespace.
func (a *attempt) place(j *joint) error {
	index := map[string]int{j.Join.Link: j.link.Index, j.Join.Tap: j.tapIndex}
	for _, l := range j.progs {
		err := errors.ErrUnsupported
		if !a.o.noClsact {
			err = a.attachClsact(l, index[l.hook.device])
		}
		if err != nil {
			if again := l.attachTCX(index[l.hook.device]); again != nil {
				return &lack{needEBPF, fmt.Errorf("put the program of %s in place: %w", l.hook, errors.Join(err, again))}
			}
		}
	}
	return nil
}
