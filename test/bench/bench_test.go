package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 {
		if done, code, err := isolate(); done {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

// Every join carries a TCP connection and both directions of every kind of traffic, by one queue and by two. How fast is of no
// interest here.
func TestJoins(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	const moment = 5 * time.Millisecond
	for _, j := range joins() {
		for _, queues := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/%d", j.name, queues), func(t *testing.T) {
				r, err := newRig(j, queues)
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range directions {
					for kind, frame := range map[string]func(way, uint16) []byte{
						"short": func(w way, port uint16) []byte { return w.udp(64, port) }, "long": way.long,
					} {
						seen, err := r.stream(d.outward, frame, moment)
						for try := 1; errors.Is(err, errNothing) && try < tries; try++ {
							seen, err = r.stream(d.outward, frame, 10*moment)
						}
						if err != nil {
							t.Errorf("%s frames %s: %v", kind, d.name, err)
							continue
						}
						length := seen.bits / 8 / seen.packets
						if want := float64(len(frame(out, 0)) - vnetHdrLen); math.Abs(length-want) > want/10 {
							t.Errorf("%s frames %s have %.0f bytes at their end, want %.0f", kind, d.name, length, want)
						}
					}
				}
				if l, err := r.roundTrips(moment); err != nil || l.p50 <= 0 || l.p99 < l.p50 {
					t.Errorf("round trips: %+v, %v", l, err)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   spread
	}{
		{[]float64{7}, spread{7, 7, 7, 1}},
		{[]float64{4, 1, 3, 2, 5}, spread{3, 2, 4, 5}},
		{[]float64{1, 2}, spread{1.5, 1.25, 1.75, 2}},
	} {
		if got := newSpread(tt.values); got != tt.want {
			t.Errorf("%v: %+v, want %+v", tt.values, got, tt.want)
		}
	}
	if got := newSpread(nil); got.N != 0 || got.text(1) != "-" {
		t.Errorf("of nothing: %+v, %q", got, got.text(1))
	}
	s := samples{}
	for _, v := range []float64{2, 9} {
		s.add("a", "m", v)
		s.add("b", "m", v/2)
	}
	if got := s.ratio("a", "b", "m"); got.Median != 2 || got.Q1 != 2 {
		t.Errorf("ratio %+v, want 2 in each round", got)
	}
}

func TestBars(t *testing.T) {
	is := func(v float64) spread { return spread{v, v, v, 3} }
	for _, tt := range []struct {
		bar  bar
		want string
	}{
		{bar{Got: is(1.3), Bound: 1.25, AtLeast: true}, "holds"},
		{bar{Got: is(1.2), Bound: 1.25, AtLeast: true}, "missed"},
		{bar{Got: is(1.2), Bound: 1.25}, "holds"},
		{bar{Got: is(1.3), Bound: 1.25}, "missed"},
		{bar{Got: is(math.NaN()), Bound: 1.25, AtLeast: true}, "missed"},
		{bar{Skip: "so", Bound: 1}, "not measured: so"},
	} {
		if got := tt.bar.verdict(); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.bar, got, tt.want)
		}
	}
	// A run without the product's redirect says so, and no more.
	r := &report{}
	r.addBars(samples{ownBridge: {"packets-out-64-q1": {2}}, handBridge: {"packets-out-64-q1": {1}}})
	var seen []string
	for _, b := range r.Bars {
		seen = append(seen, b.Promise+": "+b.verdict())
	}
	text := strings.Join(seen, "\n")
	for _, want := range []string{"redirect by no join, TCP_RR p50: not measured", "the bridge by one without filters, packets/s from the guest: holds"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// sample is a report as of a run of no time.
func sample() *report {
	s := samples{}
	for i, j := range joins() {
		for _, w := range workloads() {
			for _, m := range w.metrics {
				s.add(j.name, m.ID, float64(i+1)*1e4)
			}
		}
	}
	r := &report{Machine: thisMachine(), Rounds: 1, Scale: []cost{
		{Datapath: ownRedirect, Pods: 1, CPU: 1, Each: 1}, {Datapath: ownRedirect, Pods: 500, CPU: 1, Each: 1, Heap: 20, Code: 5, Maps: 6},
	}, Supervisor: []supervised{{Datapath: ownRedirect, RSS: newSpread([]float64{1e7}), Largest: 1e7}}}
	r.addJoins(joins(), s)
	r.Attach = []attachCost{{Datapath: ownBridge, Attach: newSpread([]float64{1}), Least: newSpread([]float64{1}), ByLeast: newSpread([]float64{1}), Release: newSpread([]float64{1}), ByAttach: newSpread([]float64{1})}}
	r.Guest = []guestFigure{{Datapath: ownBridge, Offloads: true, Gain: newSpread([]float64{2})}}
	r.addBars(s)
	return r
}

// The documentation has a place for every table, and the plots that it shows.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	doc, err := os.ReadFile("../../docs/" + document)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, document)
	if err := os.WriteFile(path, doc, 0o644); err != nil {
		t.Fatal(err)
	}
	r := sample()
	var first string
	for range 2 {
		if err := r.write(dir); err != nil {
			t.Fatal(err)
		}
		now, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first != "" && string(now) != first {
			t.Error("a second run adds to what the first has written")
		}
		first = string(now)
	}
	for name, p := range r.plots() {
		if !strings.Contains(first, "("+name+")") {
			t.Errorf("%s does not show %s", document, name)
		}
		for d := xml.NewDecoder(strings.NewReader(p.svg())); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
		}
		if len(p.bars) == 0 || strings.Count(p.svg(), "<rect") != len(p.bars)+1 {
			t.Errorf("%s does not have %d bars:\n%s", name, len(p.bars), p.svg())
		}
	}
	if err := r.writeJSON(filepath.Join(dir, "x.json")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte("# nothing\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.write(dir); err == nil || !strings.Contains(err.Error(), "no place for") {
		t.Errorf("a document without places: %v", err)
	}
}
