package podnet

import (
	"errors"
	"fmt"
	"slices"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/vfio"
)

// Check says what is not any more as Attach left it: links that are gone, down, not joined, or have another MAC or an
// address again, and filters that somebody removed. It changes nothing. nil: all is as it was.
func Check(ns *netns.NS, rec Record) error {
	now, err := Observe(ns)
	if err != nil {
		return err
	}
	rules, err := Rules(ns, rec.Joins)
	if err != nil {
		return err
	}
	var errs []error
	for _, j := range rec.Joins {
		bad := func(is bool, format string, a ...any) {
			if is {
				errs = append(errs, fmt.Errorf("%s is not joined to the guest as it was: %w", j.Link, fmt.Errorf(format, a...)))
			}
		}
		was, link := rec.Snapshot.Link(j.Link), now.Link(j.Link)
		if was == nil || link == nil || link.Index != was.Index {
			bad(true, "the link is gone, or another has its name")
			continue
		}
		master, mac := j.Bridge, j.Own
		if j.datapath() == AsItIs {
			master = was.Master
		}
		if mac.IsZero() {
			mac = was.MAC
		}
		for _, name := range []string{j.Link, j.Bridge, j.Tap} {
			l := now.Link(name)
			switch {
			case name == "":
			case l == nil:
				bad(true, "%s is gone", name)
			default:
				bad(!l.Up, "%s is down", name)
				bad(name != j.Bridge && l.Master != master, "%s is a port of %q, not of %q", name, l.Master, master)
			}
		}
		bad(link.MAC != mac, "its MAC is %s, not %s", link.MAC, mac)
		bad(len(link.Addrs) > 0 && !j.KeepsAddrs, "it has addresses again, which are the guest's")
		bad(j.datapath() == Redirected && allMulti(was.Kind) && !link.AllMulti, "it does not take every multicast group")
		for _, h := range j.hooks() {
			there := slices.ContainsFunc(rules[j.Link], func(r Rule) bool { return r.Hook == h.String() })
			bad((h.to != "" || h.role == "stack") && !there, "its filters at the %s are gone", h)
		}
		bad(len(rules[j.Link]) == 0, "its filters are gone")
	}
	return errors.Join(append(errs, checkLocalhost(ns, rec.Joins), checkVFs(rec))...)
}

func checkVFs(rec Record) error {
	if len(rec.VFs) == 0 {
		return nil
	}
	m, err := vfio.Open(nil)
	if err != nil {
		return err
	}
	defer m.Close()
	var errs []error
	for _, h := range rec.VFs {
		errs = append(errs, m.Check(h))
	}
	return errors.Join(errs...)
}
