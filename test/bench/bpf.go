package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// What a program at tc's ingress answers (linux/pkt_cls.h).
const (
	tcNext = -1 // TC_ACT_UNSPEC: whatever comes after
	tcShot = 2  // TC_ACT_SHOT
)

// discard is RFC 863's port: frames to it are counted and dropped where they arrive.
const discard = 9

// redirect gives a program that hands every frame to the device of that index: to its egress, or, by peer, right to the
// ingress of a veth's other end, past the backlog queue between the two.
func redirect(index int, peer bool) (*ebpf.Program, error) {
	helper := asm.FnRedirect
	if peer {
		helper = asm.FnRedirectPeer
	}
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bench_redirect", Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(index)),
			asm.Mov.Imm(asm.R2, 0),
			helper.Call(),
			asm.Return(),
		},
	})
}

// aimed is a program as [redirect] gives them, that is told its device when it is there.
type aimed struct {
	*ebpf.Program
	index *ebpf.Map
}

func newAimed(peer bool) (*aimed, error) {
	index, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_index", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("make a map for a device: %w", err)
	}
	helper := asm.FnRedirect
	if peer {
		helper = asm.FnRedirectPeer
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bench_aimed", Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMapValue(asm.R1, index.FD(), 0),
			asm.LoadMem(asm.R1, asm.R1, 0, asm.Word),
			asm.Mov.Imm(asm.R2, 0),
			helper.Call(),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load a program: %w", err), index.Close())
	}
	return &aimed{prog, index}, nil
}

func (a *aimed) aim(index int) error { return a.index.Put(uint32(0), uint32(index)) }

func (a *aimed) Close() error { return errors.Join(a.Program.Close(), a.index.Close()) }

// tally is what a sink has counted.
type tally struct{ Packets, Bytes uint64 }

// sink counts and drops what comes in by a device for [discard].
type sink struct {
	counters *ebpf.Map
	links    []link.Link
}

// newSink puts a sink at the ingress of a device.
func newSink(ns *netns.NS, index int) (*sink, error) {
	counters, err := ebpf.NewMap(&ebpf.MapSpec{Name: "bench_sink", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("make a counter: %w", err)
	}
	s := &sink{counters: counters}
	const destinationPort = 14 + 20 + 2 // behind the headers of Ethernet and IPv4
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bench_sink", Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1), // where LoadAbs looks for the frame
			asm.LoadAbs(destinationPort, asm.Half),
			asm.JNE.Imm(asm.R0, discard, "pass"),
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, counters.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "drop"),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
			asm.Add.Imm(asm.R1, 1),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
			asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), // __sk_buff.len
			asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord),
			asm.Add.Reg(asm.R1, asm.R2),
			asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, tcShot).WithSymbol("drop"),
			asm.Return(),
			asm.Mov.Imm(asm.R0, tcNext).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load the sink: %w", err), s.Close())
	}
	defer prog.Close()
	l, err := attachIngress(ns, index, prog)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.links = append(s.links, l)
	return s, nil
}

// read gives what was counted so far.
func (s *sink) read() (sum tally, err error) {
	var each []tally
	if err := s.counters.Lookup(uint32(0), &each); err != nil {
		return sum, fmt.Errorf("read a counter: %w", err)
	}
	for _, t := range each {
		sum.Packets += t.Packets
		sum.Bytes += t.Bytes
	}
	return sum, nil
}

func (s *sink) Close() error {
	errs := []error{s.counters.Close()}
	for _, l := range s.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// attachIngress puts a program at a device's ingress. It ends with the link, which the caller closes.
func attachIngress(ns *netns.NS, index int, prog *ebpf.Program) (l link.Link, err error) {
	err = ns.Do(func() error {
		l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attach a program (needs Linux 6.6): %w", err)
	}
	return l, nil
}

// addFilter puts a program at a device's ingress by clsact, which takes a hundredth of the time: for tcx the kernel waits until
// no packet is under way.
func addFilter(h *netlink.Handle, index int, prog *ebpf.Program) error {
	if err := h.QdiscAdd(clsact(index)); err != nil {
		return fmt.Errorf("add qdisc clsact: %w", err)
	}
	err := h.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          prog.FD(), Name: "bench", DirectAction: true,
	})
	if err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

func clsact(index int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0)}}
}
