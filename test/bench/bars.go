package main

import "fmt"

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
		bound := 1.5
		if a.Datapath == ownRedirect {
			bound = 1.3
		}
		add(bar{Promise: a.Datapath + ": attach by the fewest calls", Got: a.ByLeast, Bound: bound})
		add(bar{Promise: a.Datapath + ": release by attach", Got: a.ByAttach, Bound: 1})
	}
	if len(r.Scale) > 0 {
		last := r.Scale[len(r.Scale)-1]
		add(bar{
			Promise: fmt.Sprintf("heap for each of %d pods that answer, one process", last.Pods),
			Got:     spread{last.Heap, last.Heap, last.Heap, 1}, Bound: 40, Unit: " KiB",
		})
		first := r.Scale[0]
		v := last.CPU / first.CPU
		add(bar{Promise: fmt.Sprintf("CPU for each of %d pods by that for one", last.Pods), Got: spread{v, v, v, 1}, Bound: 1.5})
	}
}
