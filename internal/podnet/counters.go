package podnet

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// Rule is a rule in force.
type Rule struct {
	Hook   string `json:"hook"`  // where it looks: "ingress vlttap0"
	Match  string `json:"match"` // as nft writes it; "": every frame
	Action Action `json:"action"`
	To     string `json:"to,omitempty"`     // the device that a forward hands frames to
	Reason Reason `json:"reason,omitempty"` // of a drop
	Counter
}

// Action is what becomes of a frame that matches.
type Action string

const (
	Drop    Action = "drop"
	Accept  Action = "accept"  // the rules that follow do not look
	Forward Action = "forward" // likewise, and another device sends it
)

// Counter is what was dropped.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"` // without the Ethernet header
}

// Rules reads the rules of every NIC, by the name of its link and in their order. It works from any process.
func Rules(ns *netns.NS, joins []Join) (map[string][]Rule, error) {
	all := map[string][]Rule{}
	local := len(localAddrs(joins)) > 0
	for _, j := range joins {
		hooks := j.hooks()
		if local {
			hooks = append(j.localHooks(), hooks...)
		}
		for _, h := range hooks {
			found, err := h.inForce(ns, j.engine())
			if err != nil {
				return nil, fmt.Errorf("read the rules of %s: %w", h.device, err)
			}
			for i := range found {
				found[i].Hook = h.String()
				if found[i].Action == Forward && found[i].To == "" {
					found[i].To = h.to
				}
			}
			all[j.Link] = append(all[j.Link], found...)
		}
	}
	return all, nil
}

// inForce reads the rules of a hook, of which there are none where there is no such device.
func (h hook) inForce(ns *netns.NS, by Engine) (found []Rule, err error) {
	if by == Nftables || h.local != "" {
		return inForce(ns.Nftables(), h.chain())
	}
	k := &kernel{h: ns.Netlink()}
	return found, ns.Do(func() error {
		index, err := ioctlLink(h.device)
		if err == nil {
			found, err = k.programRules(h, index)
		}
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	})
}

// inForce reads the rules of a chain, and where it jumps those of the chain there. A chain that is not there has none.
func inForce(conn *nftables.Conn, chain string) ([]Rule, error) {
	found, err := conn.GetRules(table, &nftables.Chain{Name: chain})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	var out []Rule
	for _, r := range found {
		one, to := read(r)
		if to == "" {
			out = append(out, one)
			continue
		}
		more, err := inForce(conn, to)
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	return out, nil
}

// read gives a rule, or the chain that it jumps to.
func read(r *nftables.Rule) (out Rule, to string) {
	out.Match, _ = userdata.GetString(r.UserData, typeMatch)
	out.To, _ = userdata.GetString(r.UserData, typeTo)
	if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok {
		reason, _, _ := strings.Cut(comment, ":")
		out.Reason = Reason(reason)
	}
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter:
			out.Counter = Counter{e.Packets, e.Bytes}
		case *expr.Verdict:
			switch e.Kind {
			case expr.VerdictJump:
				return Rule{}, e.Chain
			case expr.VerdictGoto:
				out.Action = Forward
			case expr.VerdictDrop:
				out.Action = Drop
			default:
				out.Action = Accept
			}
		}
	}
	return out, ""
}

// Dropped sums up rules by reason. A reason that they have is there, if with zeros; one that is missing is not dropped for.
func Dropped(rules []Rule) map[Reason]Counter {
	all := map[Reason]Counter{}
	for _, r := range rules {
		if r.Reason != "" {
			c := all[r.Reason]
			all[r.Reason] = Counter{c.Packets + r.Packets, c.Bytes + r.Bytes}
		}
	}
	return all
}
