package main

import (
	"fmt"
	"slices"
)

// addBars compares the run with what is promised: medians of ratios of the same rounds.
func (r *report) addBars(s samples) {
	const lacking = "the product has no such datapath here"
	add := func(b bar) {
		if b.Skip == "" && b.Got.N == 0 {
			b.Skip, b.Got = lacking, spread{}
		}
		r.Bars = append(r.Bars, b)
	}
	packets, rr := "packets-out-64-q1", "rr-p50"
	add(bar{Promise: "redirect by the bridge, packets/s from the guest", Got: s.ratio(ownRedirect, ownBridge, packets), Bound: 1.25, AtLeast: true})
	add(bar{Promise: "redirect by no join, TCP_RR p50", Got: s.ratio(ownRedirect, noJoin, rr), Bound: 1.15})
	for _, by := range []string{"KubeVirt's bridge", "Ignite's bridge"} {
		add(bar{Promise: fmt.Sprintf("the bridge by %s, packets/s from the guest", by), Got: s.ratio(ownBridge, by, packets), Bound: 1, AtLeast: true})
	}
	// That has no filters: what ours cost is in the difference, and is not to grow.
	add(bar{Promise: "the bridge by one without filters, packets/s from the guest", Got: s.ratio(ownBridge, handBridge, packets), Bound: 0.8, AtLeast: true})
	for _, a := range r.Attach {
		bound := 2.0 // our own, for filters are laid too
		if a.Datapath == ownRedirect {
			bound = 1.3
		}
		add(bar{Promise: a.Datapath + ": attach by the fewest calls", Got: a.ByLeast, Bound: bound})
		add(bar{Promise: a.Datapath + ": release by attach", Got: a.ByAttach, Bound: 1})
	}
	for _, w := range timedWays() {
		r.addScaleBars(w.name, add)
	}
	for _, c := range r.Supervisor {
		largest := c.Largest / 1e6
		add(bar{
			Promise: fmt.Sprintf("%s: resident memory of the largest of %d supervisors at rest", c.Datapath, c.RSS.N),
			Got:     spread{largest, largest, largest, 1}, Bound: 15, Unit: " MB",
		})
	}
	for _, g := range r.Guest {
		if g.Offloads {
			add(bar{Promise: g.Datapath + ": a stream from a real guest with offloads by one without", Got: g.Gain, Bound: 1.5, AtLeast: true})
		}
	}
}

// addScaleBars says what many pods of one datapath have to keep.
func (r *report) addScaleBars(datapath string, add func(bar)) {
	bySize := map[int]cost{}
	var sizes []int
	for _, c := range r.Scale {
		if c.Datapath == datapath {
			bySize[c.Pods], sizes = c, append(sizes, c.Pods)
		}
	}
	if len(sizes) < 2 {
		return
	}
	slices.Sort(sizes)
	most := bySize[sizes[len(sizes)-1]]
	say := func(promise string, got, bound float64, unit string) {
		add(bar{Promise: fmt.Sprintf("%s: %s", datapath, promise), Got: spread{got, got, got, 1}, Bound: bound, Unit: unit})
	}
	one, some := bySize[sizes[0]], bySize[sizes[1]] // a single pod leaves CPUs unused, so time is compared with that of some
	say(fmt.Sprintf("CPU for each of %d pods by that for %d", most.Pods, one.Pods), most.CPU/one.CPU, 1.5, "")
	say(fmt.Sprintf("time for each of %d pods by that for each of %d", most.Pods, some.Pods), most.Each/some.Each, 1.5, "")
	say(fmt.Sprintf("waits for each other's locks, %d pods, of the CPUs' time", most.Pods), 100*most.Waits, 2, " %")
	say(fmt.Sprintf("heap for each of %d pods that answer, one process", most.Pods), most.Heap, 40, " KiB")
}
