package podnet

import (
	"errors"
	"fmt"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// Wish is which datapath the user wants. It is about links that more than one can serve.
type Wish string

const (
	WishAuto     Wish = "auto" // what the kind of a link is best served by: a bridge for a veth
	WishBridge   Wish = "bridge"
	WishRedirect Wish = "redirect" // by eBPF, else by nftables, else a bridge
)

// Wishes are all of them.
func Wishes() []Wish { return []Wish{WishAuto, WishBridge, WishRedirect} }

// Engine is who looks at frames.
type Engine string

const (
	Nftables Engine = "nftables"
	EBPF     Engine = "ebpf"
)

// need is what a machine has or lacks, for a join.
type need string

const (
	needNftables = need(Nftables)
	needEBPF     = need(EBPF)
	needBridge   = need(Bridged)

	// needForward is what nftables has to have beside what a bridge needs of it: fwd, and the hook at the egress (Linux 5.16).
	needForward need = "nftables fwd and egress"
)

// lack is the error that a machine does not have what one way to join needs. Another may serve.
type lack struct {
	of  need
	err error
}

func (l *lack) Error() string { return l.err.Error() }
func (l *lack) Unwrap() error { return l.err }

// lacking is what is known to be lacking, and from what error.
type lacking map[need]*lack

// choice is a way to join a link.
type choice struct {
	datapath Datapath
	engine   Engine
	why      string
	lacks    string // why no better one
}

func (c choice) needs() []need {
	switch {
	case c.datapath == Bridged:
		return []need{needBridge, need(c.engine)}
	case c.datapath == Redirected && c.engine == Nftables:
		return []need{needNftables, needForward}
	}
	return []need{need(c.engine)}
}

// choices are the ways to join a link, the best first.
func choices(link *nic.Link, wish Wish) ([]choice, error) {
	bridge := choice{datapath: Bridged, engine: Nftables}
	redirect := []choice{{datapath: Redirected, engine: EBPF}, {datapath: Redirected, engine: Nftables}}
	because := func(why string, all ...choice) ([]choice, error) {
		for i := range all {
			all[i].why = why
		}
		return all, nil
	}
	switch kind := link.Kind; {
	case kind == "tun":
		return because("the link is a TAP", choice{datapath: AsItIs, engine: Nftables})
	case kind != "veth" && wish == WishBridge:
		return nil, fmt.Errorf("a bridge cannot serve a %s, which is known by its MAC: ask for datapath %s or %s", kind, WishAuto, WishRedirect)
	case kind != "veth":
		return because("a bridge cannot serve a "+kind, redirect...)
	case wish == WishBridge:
		return because("asked for", bridge)
	case wish == WishRedirect:
		return because("asked for", append(redirect, bridge)...)
	}
	return because("the default of a veth", append([]choice{bridge}, redirect...)...)
}

// choose gives the best way to join a link of which nothing is lacking.
func choose(link *nic.Link, wish Wish, lacks lacking) (choice, error) {
	all, err := choices(link, wish)
	if err != nil {
		return choice{}, err
	}
	var errs []error
	var words []string
	for _, c := range all {
		var l *lack
		for _, n := range c.needs() {
			if l == nil {
				l = lacks[n]
			}
		}
		if l == nil {
			c.lacks = strings.Join(words, "; ")
			return c, nil
		}
		errs = append(errs, l.err)
		words = append(words, fmt.Sprintf("no %s by %s: %v", c.datapath, c.engine, l.err))
	}
	return choice{}, errors.Join(errs...)
}
