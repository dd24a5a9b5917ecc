package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// report is all that a run has found.
type report struct {
	Machine machine      `json:"machine"`
	Rounds  int          `json:"rounds"`
	Joins   []joinReport `json:"joins"`
	Attach  []attachCost `json:"attach,omitempty"`
	Scale   []cost       `json:"scale,omitempty"`
	Bars    []bar        `json:"bars"`

	Supervisor   []supervised  `json:"supervisor,omitempty"`
	NoSupervisor string        `json:"noSupervisor,omitempty"` // why there are no figures of supervisors
	Guest        []guestFigure `json:"guest,omitempty"`
	NoGuest      string        `json:"noGuest,omitempty"` // why there are none of a guest
}

// joinReport is one join's figures by metric.
type joinReport struct {
	Name    string            `json:"name"`
	About   string            `json:"about"`
	Figures map[string]spread `json:"figures"`
	Ratios  map[string]spread `json:"ratios"` // to the bridge made by hand, of the same rounds
}

func (r *report) addJoins(all []join, s samples) {
	for _, j := range all {
		out := joinReport{j.name, j.about, map[string]spread{}, map[string]spread{}}
		for id := range s[j.name] {
			out.Figures[id], out.Ratios[id] = s.of(j.name, id), s.ratio(j.name, handBridge, id)
		}
		r.Joins = append(r.Joins, out)
	}
}

// table is what a part of the report says, for people.
type table struct {
	id    string // of its place in the documentation
	title string
	head  []string
	rows  [][]string
}

// tables gives every table.
func (r *report) tables() []table {
	metrics := map[string]metric{}
	for _, w := range workloads() {
		for _, m := range w.metrics {
			metrics[m.ID] = m
		}
	}
	columns := func(prefix, suffix string) (all []metric) {
		for _, q := range []string{"-q1", "-q2"} {
			for _, d := range directions {
				all = append(all, metrics[prefix+d.id+suffix+q])
			}
		}
		return all
	}
	all := []table{r.barTable(), {id: "joins", title: "The joins", head: []string{"join", "how"}}}
	for _, j := range r.Joins {
		all[1].rows = append(all[1].rows, []string{j.Name, j.About})
	}
	for _, t := range []struct {
		id, title string
		of        []metric
	}{
		{"packets-64", "Thousands of packets a second, 64 bytes", columns("packets-", "-64")},
		{"packets-1400", "Thousands of packets a second, 1400 bytes", columns("packets-", "-1400")},
		{"cpu-64", "CPU for each packet, 64 bytes, in microseconds", columns("cpu-", "-64")},
		{"cpu-1400", "CPU for each packet, 1400 bytes, in microseconds", columns("cpu-", "-1400")},
		{"bits", "Gb/s with TCP segments of 60 kB", columns("bits-", "")},
		{"latency", "TCP_RR: one byte there and one back, in microseconds", []metric{metrics["rr-p50"], metrics["rr-p99"]}},
	} {
		all = append(all, r.figures(t.id, t.title, t.of))
	}
	return append(all, r.attachTable(), r.scaleTable(), r.memoryTable(), r.supervisorTable(), r.guestTable())
}

// figures is a table of joins; in brackets is what they have by the hand-made bridge.
func (r *report) figures(id, title string, of []metric) table {
	t := table{id: id, title: title, head: []string{"join"}}
	for _, m := range of {
		t.head = append(t.head, m.Title)
	}
	for _, j := range r.Joins {
		row := []string{j.Name}
		for _, m := range of {
			row = append(row, fmt.Sprintf("%s (%s)", j.Figures[m.ID].text(m.Unit), digits(j.Ratios[m.ID].Median)))
		}
		t.rows = append(t.rows, row)
	}
	return t
}

func (r *report) barTable() table {
	t := table{id: "bars", title: "What is promised", head: []string{"promise", "bound", "this run", ""}}
	for _, b := range r.Bars {
		t.rows = append(t.rows, []string{b.Promise, b.want(), b.Got.text(1) + b.Unit, b.verdict()})
	}
	return t
}

func (r *report) attachTable() table {
	t := table{id: "attach", title: "One NIC, in milliseconds", head: []string{"datapath", "attach", "the least", "attach by the least", "programs before", "release", "release by attach"}}
	for _, a := range r.Attach {
		t.rows = append(t.rows, []string{a.Datapath, a.Attach.text(1), a.Least.text(1), a.ByLeast.text(1), a.Load.text(1), a.Release.text(1), a.ByAttach.text(1)})
	}
	return t
}

func (r *report) scaleTable() table {
	t := table{id: "scale", title: "Many pods in one process, in milliseconds", head: []string{
		"datapath", "pods", "attach p50 / p99", "DHCPOFFER p50 / p99", "release p50 / p99", "each", "CPU each", "links gone, each", "CPUs used", "waits for locks",
	}}
	pair := func(v tail) string { return digits(v.P50) + " / " + digits(v.P99) }
	for _, c := range r.Scale {
		t.rows = append(t.rows, []string{
			c.Datapath, fmt.Sprint(c.Pods), pair(c.Attach), pair(c.Answer), pair(c.Release), digits(c.Each), digits(c.CPU), digits(c.Rest),
			fmt.Sprintf("%.0f %%", 100*c.Used), fmt.Sprintf("%.2f %%", 100*c.Waits),
		})
	}
	return t
}

// With fewer pods most of the memory of a process, and of the machine, is what there is once.
const fewPods = 100

func (r *report) memoryTable() table {
	t := table{id: "memory", title: "Memory for each of many pods, in KiB", head: []string{
		"datapath", "pods", "Go's heap", "process, resident", "kernel memory for programs", "of their maps", "kernel memory in all",
	}}
	for _, c := range r.Scale {
		row := []string{c.Datapath, fmt.Sprint(c.Pods), "-", "-", digits(c.Code), digits(c.Maps), "-"}
		if c.Pods >= fewPods {
			row[2], row[3], row[6] = digits(c.Heap), digits(c.RSS), digits(c.Kernel)
		}
		t.rows = append(t.rows, row)
	}
	return t
}

func (r *report) supervisorTable() table {
	t := table{id: "supervisor", title: "Memory of a process for each VM, in MB", head: []string{
		"datapath", "supervisor, resident", "the largest", "in proportion", "its QEMU, resident",
	}}
	for _, c := range r.Supervisor {
		t.rows = append(t.rows, []string{c.Datapath, c.RSS.text(1e6), digits(c.Largest / 1e6), c.PSS.text(1e6), c.QEMU.text(1e6)})
	}
	if r.NoSupervisor != "" {
		t.rows = append(t.rows, []string{"not measured: " + r.NoSupervisor, "", "", "", ""})
	}
	return t
}

func (r *report) guestTable() table {
	t := table{id: "guest", title: "A TCP stream of a guest under QEMU, by the second of its CPU", head: []string{"datapath", "offloads", "from the guest, MB/s", "to the guest, MB/s"}}
	for _, g := range r.Guest {
		t.rows = append(t.rows, []string{g.Datapath, g.offloads(), g.cell(g.Out, g.OutBy), g.cell(g.In, g.InBy)})
	}
	if r.NoGuest != "" {
		t.rows = append(t.rows, []string{"not measured: " + r.NoGuest, "", "", ""})
	}
	return t
}

// text is everything for a terminal.
func (r *report) text() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\n%d rounds; median ± half of the middle half; in brackets by the hand-made bridge\n", r.Machine.text(), r.Rounds)
	for _, t := range r.tables() {
		if len(t.rows) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n%s\n", t.title)
		w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		for _, row := range append([][]string{t.head}, t.rows...) {
			fmt.Fprintln(w, "  "+strings.Join(row, "\t"))
		}
		w.Flush()
	}
	return b.String()
}

// markdown is one table.
func (t table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(t.head, " | "), strings.Repeat("---|", len(t.head)))
	for _, row := range t.rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
	}
	return b.String()
}

// Places in the documentation: what is between is written by the run.
const (
	placeBegin = "<!-- bench: %s -->\n"
	placeEnd   = "<!-- end -->\n"
)

// fill replaces what is in every place of a document. Each has one, and nothing else.
func (r *report) fill(doc string) (string, error) {
	parts := map[string]string{"machine": r.Machine.text() + fmt.Sprintf(" %d rounds.\n", r.Rounds)}
	for _, t := range r.tables() {
		parts[t.id] = t.markdown()
	}
	for id, now := range parts {
		begin := fmt.Sprintf(placeBegin, id)
		before, rest, ok := strings.Cut(doc, begin)
		_, after, ok2 := strings.Cut(rest, placeEnd)
		if !ok || !ok2 {
			return "", fmt.Errorf("no place for %q: between %q and %q", id, begin, placeEnd)
		}
		doc = before + begin + now + placeEnd + after
	}
	return doc, nil
}

// document is the file in the documentation, below its directory.
const document = "performance.md"

// write brings the documentation and its plots up to this run.
func (r *report) write(dir string) error {
	path := filepath.Join(dir, document)
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	now, err := r.fill(string(old))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := os.WriteFile(path, []byte(now), 0o644); err != nil {
		return err
	}
	for name, p := range r.plots() {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(p.svg()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (r *report) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
