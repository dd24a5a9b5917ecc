package main

import (
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Guests of both datapaths get their offers, and each datapath's programs are found. How long that takes is of no interest here.
func TestScale(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	all, err := measureScale(timedWays(), []int{1, 3}, 3, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, c := range all {
		seen = append(seen, c.Datapath)
		if c.Each <= 0 || c.CPU <= 0 || c.Attach.P50 <= 0 || c.Answer.P50 <= c.Attach.P50 || c.Release.P50 <= 0 || c.Used <= 0 || c.Used > 1 || c.Heap <= 0 {
			t.Errorf("%+v", c)
		}
		if programs := c.Datapath == ownRedirect; programs != (c.Code > 0 && c.Maps > 0) {
			t.Errorf("%s: %.1f KiB of programs, %.1f of maps", c.Datapath, c.Code, c.Maps)
		}
	}
	if got, want := strings.Join(seen, ","), strings.Join([]string{ownRedirect, ownRedirect, ownBridge, ownBridge}, ","); got != want {
		t.Errorf("figures of %s, want %s", got, want)
	}
	r := &report{Scale: all}
	r.addBars(nil)
	bars := map[string]bar{}
	for _, b := range r.Bars {
		bars[b.Promise] = b
	}
	for _, w := range timedWays() {
		for _, promise := range []string{
			"CPU for each of 3 pods by that for 1", "time for each of 3 pods by that for each of 3", "waits for each other's locks, 3 pods, of the CPUs' time",
			"heap for each of 3 pods that answer, one process",
		} {
			if b, ok := bars[w.name+": "+promise]; !ok || b.Skip != "" {
				t.Errorf("%s: %s: %t, %+v", w.name, promise, ok, b)
			}
		}
	}
}

// What several programs share is counted once, and so is what a program leads to by a map.
func TestProgramsShare(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	r, err := newRig(join{name: "eBPF", make: ebpfJoin(false)}, 1) // the same sink for each, and two programs
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := newPrograms()
	for range 2 {
		if err := p.find(r.pod); err != nil {
			t.Fatal(err)
		}
		if code, maps := p.size(); len(p.code) != 2 || code == 0 || len(p.maps) != 0 || maps != 0 {
			t.Errorf("the pod has %+v", p)
		}
	}
	if err := p.find(r.host); err != nil {
		t.Fatal(err)
	}
	if _, maps := p.size(); len(p.code) != 3 || len(p.maps) != 1 || maps == 0 {
		t.Errorf("with the sink, by tcx: %+v", p)
	}
	// A program that calls another by a map of programs.
	called, err := redirect(1, false)
	if err != nil {
		t.Fatal(err)
	}
	defer called.Close()
	table, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if err := table.Put(uint32(1), uint32(called.FD())); err != nil {
		t.Fatal(err)
	}
	caller, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R2, table.FD()), asm.Mov.Imm(asm.R3, 1), asm.FnTailCall.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	info, err := caller.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	p = newPrograms()
	for range 2 {
		if err := p.addProgram(id); err != nil {
			t.Fatal(err)
		}
		if len(p.code) != 2 || len(p.maps) != 1 {
			t.Errorf("the caller has %+v", p)
		}
	}
}
