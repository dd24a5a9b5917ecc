package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// plot is bars beside names, with the middle half of their values as a line.
type plot struct {
	title, unit string
	bars        []plotBar
}

type plotBar struct {
	name  string
	value spread // of what unit says
	own   bool   // it is the product's
}

// plots gives every plot by the name of its file.
func (r *report) plots() map[string]plot {
	of := func(title, unit, metric string, scale float64) plot {
		p := plot{title: title, unit: unit}
		for _, j := range r.Joins {
			f := j.Figures[metric]
			f.Median, f.Q1, f.Q3 = f.Median/scale, f.Q1/scale, f.Q3/scale
			p.bars = append(p.bars, plotBar{j.Name, f, strings.HasPrefix(j.Name, "virtlet")})
		}
		return p
	}
	attach := plot{title: "One NIC attached and released (the smaller part is better)", unit: "ms"}
	for _, a := range r.Attach {
		attach.bars = append(attach.bars, plotBar{a.Datapath + ": attach", a.Attach, true}, plotBar{a.Datapath + ": the least", a.Least, false},
			plotBar{a.Datapath + ": release", a.Release, true})
	}
	scale := plot{title: "Time for each of so many pods: where bars are as long as each other, growth is linear", unit: "ms"}
	for _, c := range r.Scale {
		scale.bars = append(scale.bars, plotBar{fmt.Sprintf("%s, %d pods", c.Datapath, c.Pods), spread{c.Each, c.Each, c.Each, 1}, true})
	}
	return map[string]plot{
		"performance-packets.svg":    of("Packets of 64 bytes from the guest, one queue", "thousands/s", "packets-out-64-q1", 1e3),
		"performance-packets-in.svg": of("Packets of 64 bytes to the guest, one queue", "thousands/s", "packets-in-64-q1", 1e3),
		"performance-bits.svg":       of("TCP segments of 60 kB from the guest, one queue", "Gb/s", "bits-out-q1", 1e9),
		"performance-latency.svg":    of("TCP_RR, median (less is better)", "µs", "rr-p50", 1e3),
		"performance-attach.svg":     attach,
		"performance-scale.svg":      scale,
	}
}

// Sizes in pixels.
const (
	plotWidth  = 760
	plotLeft   = 190 // where bars begin
	plotRight  = 110 // behind the longest bar, for its number
	plotTop    = 44
	plotBottom = 34
	barHeight  = 18
	barPitch   = 26
)

// svg draws it. Colours are fit for a light and a dark page.
func (p plot) svg() string {
	most := 0.0
	for _, b := range p.bars {
		most = max(most, b.value.Q3, b.value.Median)
	}
	step := tick(most)
	top := math.Ceil(most/step) * step
	x := func(v float64) float64 { return plotLeft + v/top*(plotWidth-plotLeft-plotRight) }
	height := plotTop + len(p.bars)*barPitch + plotBottom
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12" fill="#555">`+"\n", plotWidth, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n"+`<text x="%d" y="20" font-size="14" font-weight="bold" fill="#222">%s</text>`+"\n", 12, html.EscapeString(p.title))
	for v := 0.0; most > 0 && v <= top+step/2; v += step {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%[1]f" y1="%d" y2="%d" stroke="#ddd"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n",
			x(v), plotTop-8, height-plotBottom+4, x(v), height-plotBottom+18, trim(v))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", plotWidth-8, height-plotBottom+18, html.EscapeString(p.unit))
	for i, bar := range p.bars {
		if math.IsNaN(bar.value.Median) || most == 0 {
			continue
		}
		colour, y := "#9aa7b4", plotTop+i*barPitch
		if bar.own {
			colour = "#2a78c2"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end" fill="#222">%s</text>`, plotLeft-8, y+13, html.EscapeString(bar.name))
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, plotLeft, y, x(bar.value.Median)-plotLeft, barHeight, colour)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%[3]d" stroke="#222" stroke-width="2"/>`, x(bar.value.Q1), x(bar.value.Q3), y+barHeight/2)
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" fill="#222">%s</text>`+"\n", x(max(bar.value.Q3, bar.value.Median))+6, y+13, digits(bar.value.Median))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// tick gives a distance of grid lines, so that there are four to ten: 1, 2 or 5 and zeros.
func tick(most float64) float64 {
	if most <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(most)))
	steps := []float64{power / 5, power / 2, power, 2 * power}
	i := slices.IndexFunc(steps, func(s float64) bool { return most/s <= 8 })
	return steps[max(i, 0)]
}

func trim(v float64) string { return fmt.Sprintf("%g", math.Round(v*1e6)/1e6) }
