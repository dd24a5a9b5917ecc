package podnet

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A join by redirect has no bridge: the last rule at the ingress of each end hands the frame to the other end (nftables'
// fwd), and the namespace's own stack sees none. So the link keeps the guest's MAC, which a macvlan and an ipvlan need:
// what they receive is chosen by it. See docs/decisions/0008-redirect-by-nftables.md.

// openRedirect makes the TAP.
func (a *attempt) openRedirect(j *joint) error { return a.openOurs(j) }

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
	// The link takes the multicast frames of the groups that its own stack has joined, but now it is the guest who joins.
	if err := a.set(j.link.Index, unix.IFF_UP|unix.IFF_ALLMULTI); err != nil {
		return fmt.Errorf("let %s take every multicast group: %w", j.Join.Link, err)
	}
	if err := a.h.LinkSetUp(device(j.tapIndex, j.Join.Tap)); err != nil {
		return fmt.Errorf("set %s up: %w", j.Join.Tap, err)
	}
	return nil
}
