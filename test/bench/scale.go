package main

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"
)

// sizes are how many pods of one process are given to guests, and leastSamples how many starts are timed at each.
var sizes = []int{1, 10, 100, 500}

const leastSamples = 60

// cost is what that many pods took by one of the product's datapaths.
type cost struct {
	Datapath string  `json:"datapath"`
	Pods     int     `json:"pods"`
	Attach   tail    `json:"attach"`  // from the look at the namespace until the guest's TAP is joined
	Answer   tail    `json:"answer"`  // from the same beginning until the guest has a DHCPOFFER
	Release  tail    `json:"release"` // after the guest's end, until CNI DEL may be called
	Rest     float64 `json:"rest"`    // milliseconds until the TAPs and bridges have gone, divided by the pods; nobody waits for that
	Each     float64 `json:"each"`    // milliseconds from the first to the last answer, divided by the pods
	CPU      float64 `json:"cpu"`     // milliseconds of this process for the start of each, the kernel's work among them
	Used     float64 `json:"used"`    // how much of the CPUs' time that is, of 1; what is left waits, for the kernel's locks and RCU mostly
	Waits    float64 `json:"waits"`   // how much of the CPUs' time goroutines have waited for each other's locks, of 1
	Heap     float64 `json:"heap"`    // KiB of Go's heap for each, with responders that answer
	RSS      float64 `json:"rss"`     // KiB of this process's resident memory for each, then
	Code     float64 `json:"code"`    // KiB of the kernel's for eBPF programs, for each
	Maps     float64 `json:"maps"`    // and for their maps
	Kernel   float64 `json:"kernel"`  // KiB of the kernel's in all, for each; others' too, while the machine is not quiet
}

// tail is a time in milliseconds.
type tail struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

func newTail(times []time.Duration) tail {
	var ms []float64
	for _, t := range times {
		ms = append(ms, t.Seconds()*1e3)
	}
	slices.Sort(ms)
	return tail{quantile(ms, 0.5), quantile(ms, 0.99)}
}

// measureScale gives guests to ever more pods, as many at a time as there are CPUs, by every datapath in turn.
//
// At each size samples starts are timed at least: few pods take several turns.
func measureScale(ways []ownWay, sizes []int, samples int, say func(string, ...any)) (all []cost, err error) {
	begin := time.Now()
	v, err := newVillage(slices.Max(sizes))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	say("%d pods made in %.1fs", len(v.pods), time.Since(begin).Seconds())
	for _, w := range ways { // the machine's first filter, and what Go does once
		p := v.pods[0]
		if _, _, err = p.begin(w); err == nil {
			_, err = p.end()
			err = errors.Join(err, p.rest())
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	// Once for all: what Go has for threads (netns has one for each namespace) is free only when there are others again.
	if v.before, err = newHoldings(nil); err != nil {
		return nil, err
	}
	for _, n := range sizes {
		for _, w := range ways {
			c, err := v.measure(w, n, max(1, samples/n))
			if err != nil {
				return all, fmt.Errorf("%d pods, %s: %w", n, w.name, err)
			}
			say("%d pods, %s: attach %.2f ms, answer %.2f ms, release %.2f ms, heap %.1f KiB each", n, w.name, c.Attach.P50, c.Answer.P50, c.Release.P50, c.Heap)
			all = append(all, c)
		}
	}
	slices.SortStableFunc(all, func(a, b cost) int { return byWay(ways, a.Datapath) - byWay(ways, b.Datapath) })
	return all, nil
}

func byWay(ways []ownWay, name string) int {
	return slices.IndexFunc(ways, func(w ownWay) bool { return w.name == name })
}

// measure gives guests to the first n pods, and takes them away again, some turns.
func (v *village) measure(w ownWay, n, turns int) (cost, error) {
	var joined, answered, released []time.Duration
	c := cost{Datapath: w.name, Pods: n}
	var spent, used, gone time.Duration
	pods := v.pods[:n]
	for turn := range turns {
		var mu sync.Mutex
		kernel, err := kernelMemory()
		if err != nil {
			return c, err
		}
		waits, cpu, begin := lockWaits(), cpuTime(), time.Now()
		err = inParallel(pods, func(p *guestPod) error {
			j, a, err := p.begin(w)
			mu.Lock()
			defer mu.Unlock()
			joined, answered = append(joined, j), append(answered, a)
			return err
		})
		spent, used = spent+time.Since(begin), used+cpuTime()-cpu
		c.Waits += lockWaits() - waits
		if err == nil && turn == 0 {
			var after holdings
			if after, err = newHoldings(pods); err == nil {
				c.hold(v.before, after)
				c.Kernel = float64(int64(after.kernel-kernel)) / float64(n) / 1024
			}
		}
		err2 := inParallel(pods, func(p *guestPod) error {
			if p.vm.stop == nil {
				return nil
			}
			r, err := p.end()
			mu.Lock()
			defer mu.Unlock()
			released = append(released, r)
			return err
		})
		begin = time.Now()
		err3 := inParallel(pods, func(p *guestPod) error {
			if p.vm.stop == nil {
				return nil
			}
			return p.rest()
		})
		gone += time.Since(begin)
		if err := errors.Join(err, err2, err3); err != nil {
			return c, err
		}
	}
	c.Attach, c.Answer, c.Release = newTail(joined), newTail(answered), newTail(released)
	starts := float64(n * turns)
	c.Each, c.CPU, c.Rest = spent.Seconds()*1e3/starts, used.Seconds()*1e3/starts, gone.Seconds()*1e3/starts
	cpus := spent.Seconds() * float64(runtime.NumCPU())
	c.Used, c.Waits = used.Seconds()/cpus, c.Waits/cpus
	return c, nil
}

// holdings is memory in bytes, of this process and of the kernel.
type holdings struct {
	heap, rss, kernel, code, maps uint64
}

// newHoldings is of now; of programs, those of the pods given, which have guests.
func newHoldings(pods []*guestPod) (h holdings, err error) {
	h.heap = heap() // first: what is not used is given back
	r, err := residentOf("self")
	if err != nil {
		return h, err
	}
	h.rss = r.RSS
	if h.kernel, err = kernelMemory(); err != nil {
		return h, err
	}
	p := newPrograms()
	for _, pod := range pods {
		if err := p.find(pod.vm.ns); err != nil {
			return h, err
		}
	}
	h.code, h.maps = p.size()
	return h, nil
}

// hold notes what has been added for each pod.
func (c *cost) hold(before, after holdings) {
	each := func(a, b uint64) float64 { return (float64(b) - float64(a)) / float64(c.Pods) / 1024 }
	c.Heap, c.RSS = each(before.heap, after.heap), each(before.rss, after.rss)
	c.Code, c.Maps = each(before.code, after.code), each(before.maps, after.maps)
}
