package main

import (
	"errors"
	"fmt"
	"runtime/debug"
	"time"
)

// windowTime is how long each join is looked at in each round. Short ones, often and in turn, so that what else the machine
// does meets all of them alike.
const windowTime = 80 * time.Millisecond

// leastRounds are the fewest rounds that say something.
const leastRounds = 3

// tries are how often a window is looked at in which nothing happens: another program has all the CPUs.
const tries = 5

// metric is one figure of one workload.
type metric struct {
	ID     string  // stable: of JSON and bars
	Title  string  // of a column
	Unit   float64 // what values are divided by for people
	Better string  // "more" or "less"
}

// workload is one way to use a join, which yields one or two metrics.
type workload struct {
	queues  int
	metrics []metric
	run     func(*rig) ([]float64, error)
}

// workloads is what every join goes through in a round.
func workloads() []workload {
	var all []workload
	for _, queues := range []int{1, 2} {
		suffix, of := fmt.Sprintf("-q%d", queues), fmt.Sprintf(", %d queue", queues)
		if queues > 1 {
			of += "s"
		}
		for _, size := range []int{64, 1400} {
			for _, d := range directions {
				id := fmt.Sprintf("%s-%d%s", d.id, size, suffix)
				all = append(all, workload{
					queues,
					[]metric{{"packets-" + id, d.name + of, 1e3, "more"}, {"cpu-" + id, d.name + of, 1e3, "less"}},
					func(r *rig) ([]float64, error) {
						seen, err := r.stream(d.outward, func(w way, port uint16) []byte { return w.udp(size, port) }, windowTime)
						return []float64{seen.packets, seen.cpu}, err
					},
				})
			}
		}
		for _, d := range directions {
			all = append(all, workload{
				queues,
				[]metric{{"bits-" + d.id + suffix, d.name + of, 1e9, "more"}},
				func(r *rig) ([]float64, error) {
					seen, err := r.stream(d.outward, way.long, windowTime)
					return []float64{seen.bits}, err
				},
			})
		}
	}
	return append(all, workload{
		1,
		[]metric{{"rr-p50", "p50", 1e3, "less"}, {"rr-p99", "p99", 1e3, "less"}},
		func(r *rig) ([]float64, error) {
			l, err := r.roundTrips(2 * windowTime) // a tail needs some
			return []float64{float64(l.p50), float64(l.p99)}, err
		},
	})
}

var directions = []struct {
	id, name string
	outward  bool
}{{"out", "from the guest", true}, {"in", "to the guest", false}}

// samples are values by join and metric, one for each round.
type samples map[string]map[string][]float64

func (s samples) add(join, metric string, v float64) {
	if s[join] == nil {
		s[join] = map[string][]float64{}
	}
	s[join][metric] = append(s[join][metric], v)
}

// of gives a metric of a join with its spread.
func (s samples) of(join, metric string) spread { return newSpread(s[join][metric]) }

// ratio gives a metric of a join by that of another, of the same rounds.
func (s samples) ratio(join, by, metric string) spread {
	return newSpread(ratios(s[join][metric], s[by][metric]))
}

// measureDatapaths runs every workload over every join in turn, in rounds, until the time is over.
func measureDatapaths(all []join, limit time.Duration, say func(string, ...any)) (s samples, rounds int, err error) {
	rigs := map[string]map[int]*rig{}
	defer func() {
		for _, byQueues := range rigs {
			for _, r := range byQueues {
				err = errors.Join(err, r.Close())
			}
		}
	}()
	for _, j := range all {
		rigs[j.name] = map[int]*rig{}
		for _, queues := range []int{1, 2} {
			if rigs[j.name][queues], err = newRig(j, queues); err != nil {
				return nil, 0, err
			}
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // collected between rounds
	s = samples{}
	load := workloads()
	for end := time.Now().Add(limit); rounds < leastRounds || time.Now().Before(end); rounds++ {
		begin := time.Now()
		for _, w := range load {
			for i := range all {
				// Each round begins with another one: what comes after whom is no advantage.
				j := all[(i+rounds)%len(all)]
				values, err := w.run(rigs[j.name][w.queues])
				for try := 1; errors.Is(err, errNothing) && try < tries; try++ {
					values, err = w.run(rigs[j.name][w.queues])
				}
				if err != nil {
					return nil, rounds, fmt.Errorf("%s, %s: %w", j.name, w.metrics[0].ID, err)
				}
				for k, m := range w.metrics {
					s.add(j.name, m.ID, values[k])
				}
			}
		}
		debug.FreeOSMemory()
		say("round %d in %.1fs", rounds+1, time.Since(begin).Seconds())
	}
	return s, rounds, nil
}
