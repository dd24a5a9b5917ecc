package main

import (
	"errors"
	"fmt"
	"time"
)

// guestRounds are how often every guest streams, in turn.
const guestRounds = 6

// guestPatience is how long is waited for what a guest does under TCG on a busy machine.
const guestPatience = 90 * time.Second

// guestFigure is a TCP stream between a guest under QEMU and the host. What QEMU's emulation takes is all there is to measure, so
// bytes are counted by the second of CPU that QEMU has used: with a CPU to itself, that is a second.
type guestFigure struct {
	Datapath string `json:"datapath"`
	Offloads bool   `json:"offloads"`
	Out      spread `json:"out"`   // bytes a second from the guest
	In       spread `json:"in"`    // bytes a second to it
	OutBy    spread `json:"outBy"` // by the bridge with offloads, of the same round
	InBy     spread `json:"inBy"`
	Gain     spread `json:"gain"` // with offloads: what is sent from the guest, by what is without them
}

func (g guestFigure) offloads() string {
	if g.Offloads {
		return "on"
	}
	return "off"
}

func (g guestFigure) cell(v, by spread) string { return v.text(1e6) + " (" + digits(by.Median) + ")" }

// measureGuests boots a guest on every datapath, with offloads and without, and has them stream in turn.
func measureGuests(dir string, say func(string, ...any)) (all []guestFigure, err error) {
	var guests []*guestVM
	defer func() {
		for _, g := range guests {
			err = errors.Join(err, g.Close())
		}
	}()
	for _, w := range ownWays() {
		for _, offloads := range []bool{true, false} {
			g := &guestVM{way: w, offloads: offloads}
			if g.rig, err = newRig(join{name: w.name, make: makeOwn(w)}, 1); err != nil {
				return nil, err
			}
			guests = append(guests, g)
			if err := g.boot(dir); err != nil {
				return nil, fmt.Errorf("boot a guest on %s: %w", g.name(), err)
			}
		}
	}
	for _, g := range guests {
		if err := g.ready(); err != nil {
			return nil, fmt.Errorf("guest on %s: %w", g.name(), err)
		}
	}
	var qemus []int
	for _, g := range guests { // each has something to do for some seconds more, and would take the CPU of those that stream
		if err := g.idle(); err != nil {
			return nil, fmt.Errorf("guest on %s: %w", g.name(), err)
		}
		qemus = append(qemus, g.proc.PID())
	}
	say("%d guests booted", len(guests))
	undo, err := apart(qemus)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, undo()) }()
	s := samples{}
	for round := range guestRounds {
		for i := range guests {
			g := guests[(i+round)%len(guests)]
			for _, d := range directions {
				v, err := g.streamTCP(d.outward)
				if err != nil {
					return nil, fmt.Errorf("stream %s on %s: %w", d.name, g.name(), err)
				}
				s.add(g.name(), d.id, v)
			}
		}
	}
	reference := (&guestVM{way: ownWay{name: ownBridge}, offloads: true}).name()
	for _, g := range guests {
		f := guestFigure{
			Datapath: g.way.name, Offloads: g.offloads, Out: s.of(g.name(), "out"), In: s.of(g.name(), "in"),
			OutBy: s.ratio(g.name(), reference, "out"), InBy: s.ratio(g.name(), reference, "in"),
		}
		if g.offloads {
			f.Gain = s.ratio(g.name(), (&guestVM{way: g.way}).name(), "out")
		}
		say("%s: from the guest %.0f MB/s, to it %.0f MB/s", g.name(), f.Out.Median/1e6, f.In.Median/1e6)
		all = append(all, f)
	}
	return all, nil
}
