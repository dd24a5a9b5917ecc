package main

import (
	"cmp"
	"fmt"
	"math"
	"runtime/metrics"
	"slices"
)

// spread is a median with the quarters around it.
type spread struct {
	Median float64 `json:"median"`
	Q1     float64 `json:"q1"`
	Q3     float64 `json:"q3"`
	N      int     `json:"n"` // how many values it is of
}

// newSpread is of values in any order; of none, all is NaN.
func newSpread(values []float64) spread {
	v := slices.Clone(values)
	slices.Sort(v)
	return spread{quantile(v, 0.5), quantile(v, 0.25), quantile(v, 0.75), len(v)}
}

// quantile gives the q-th part of sorted values, between two of them by their distance.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// ratios divides values of the same rounds.
func ratios(of, by []float64) []float64 {
	var all []float64
	for i := range min(len(of), len(by)) {
		all = append(all, of[i]/by[i])
	}
	return all
}

// text writes the median with half of the distance between its quarters, divided by unit.
func (s spread) text(unit float64) string {
	if s.N == 0 {
		return "-"
	}
	return fmt.Sprintf("%s ± %s", digits(s.Median/unit), digits((s.Q3-s.Q1)/2/unit))
}

// digits gives three that count, or less where there is no more to say.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// bar is what the project promises of its figures.
type bar struct {
	Promise string  `json:"promise"`
	Got     spread  `json:"got"`
	Bound   float64 `json:"bound"`
	AtLeast bool    `json:"atLeast"` // or at most
	Unit    string  `json:"unit,omitempty"`
	Skip    string  `json:"skip,omitempty"` // why it was not measured
}

// verdict is for people; the median decides.
func (b bar) verdict() string {
	order := cmp.Compare(b.Got.Median, b.Bound)
	switch {
	case b.Skip != "":
		return "not measured: " + b.Skip
	case b.AtLeast && order >= 0, !b.AtLeast && order <= 0:
		return "holds"
	}
	return "missed"
}

func (b bar) want() string {
	sign := "≤"
	if b.AtLeast {
		sign = "≥"
	}
	return fmt.Sprintf("%s %v%s", sign, b.Bound, b.Unit)
}

// lockWaits gives the seconds that goroutines of this process have waited for locks that others had.
func lockWaits() float64 {
	s := []metrics.Sample{{Name: "/sync/mutex/wait/total:seconds"}}
	metrics.Read(s)
	return s[0].Value.Float64()
}
