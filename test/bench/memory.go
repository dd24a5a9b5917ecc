package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// heap gives the bytes that are in use on Go's heap, when what is not has been collected: files and sockets that have been
// closed, and what pools hold, are free after the second collection only.
func heap() uint64 {
	for range 3 {
		debug.FreeOSMemory()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// resident is the memory of a process in bytes: what it maps, and its part of that where pages are shared with others.
type resident struct{ RSS, PSS uint64 }

// residentOf reads /proc/PID/smaps_rollup; pid may be "self".
func residentOf(pid string) (r resident, err error) {
	err = eachField("/proc/"+pid+"/smaps_rollup", func(key string, bytes uint64) {
		switch key {
		case "Rss":
			r.RSS = bytes
		case "Pss":
			r.PSS = bytes
		}
	})
	return r, err
}

// kernelMemory gives the bytes that the kernel has for itself on the whole machine: objects that it cannot give back at will,
// and what it has for each CPU. What others do meanwhile is in it.
func kernelMemory() (sum uint64, err error) {
	err = eachField("/proc/meminfo", func(key string, bytes uint64) {
		switch key { // proc_meminfo(5)
		case "SUnreclaim", "Percpu", "VmallocUsed", "KernelStack", "PageTables":
			sum += bytes
		}
	})
	return sum, err
}

// eachField tells of every line "KEY: N kB" of a file.
func eachField(path string, tell func(key string, bytes uint64)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		var kB uint64
		if n, _ := fmt.Sscanf(value, "%d kB", &kB); n == 1 {
			tell(key, kB<<10)
		}
	}
	return lines.Err()
}

// programs is what the kernel keeps of eBPF: bytes by id. One that several NICs share is there once.
type programs struct {
	code map[ebpf.ProgramID]uint64 // instructions as they were loaded, and as the CPU runs them
	maps map[ebpf.MapID]uint64
}

func newPrograms() programs {
	return programs{map[ebpf.ProgramID]uint64{}, map[ebpf.MapID]uint64{}}
}

// size gives both sums in bytes.
func (p programs) size() (code, maps uint64) {
	for _, n := range p.code {
		code += n
	}
	for _, n := range p.maps {
		maps += n
	}
	return code, maps
}

// find adds what is at the links of a namespace, by filters or by tcx, and all that these programs lead to.
func (p programs) find(ns *netns.NS) error {
	var ids []ebpf.ProgramID
	links, err := netns.Dump(func() ([]netlink.Link, error) { return ns.Netlink().LinkList() })
	if err != nil {
		return err
	}
	for _, l := range links {
		for parent, at := range map[uint32]ebpf.AttachType{
			netlink.HANDLE_MIN_INGRESS: ebpf.AttachTCXIngress, netlink.HANDLE_MIN_EGRESS: ebpf.AttachTCXEgress,
		} {
			filters, err := netns.Dump(func() ([]netlink.Filter, error) { return ns.Netlink().FilterList(l, parent) })
			if err != nil && !errors.Is(err, unix.EINVAL) { // which is: no such qdisc
				return fmt.Errorf("filters of %s: %w", l.Attrs().Name, err)
			}
			for _, f := range filters {
				if f, ok := f.(*netlink.BpfFilter); ok {
					ids = append(ids, ebpf.ProgramID(f.Id))
				}
			}
			err = ns.Do(func() error {
				found, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at})
				if err != nil {
					return fmt.Errorf("programs of %s: %w", l.Attrs().Name, err)
				}
				for _, f := range found.Programs {
					ids = append(ids, f.ID)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	for _, id := range ids {
		if err := p.addProgram(id); err != nil {
			return err
		}
	}
	return nil
}

// addProgram adds a program and its maps.
func (p programs) addProgram(id ebpf.ProgramID) error {
	if _, known := p.code[id]; known {
		return nil
	}
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Errorf("eBPF program %d: %w", id, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return fmt.Errorf("eBPF program %d: %w", id, err)
	}
	code, _ := info.Memlock()
	if jited, err := info.JitedSize(); err == nil { // else there is none
		code += uint64(jited)
	}
	p.code[id] = code
	ids, _ := info.MapIDs()
	for _, id := range ids {
		if err := p.addMap(id); err != nil {
			return err
		}
	}
	return nil
}

// addMap adds a map, and the programs or maps that it has as values.
func (p programs) addMap(id ebpf.MapID) error {
	if _, known := p.maps[id]; known {
		return nil
	}
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return fmt.Errorf("eBPF map %d: %w", id, err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("eBPF map %d: %w", id, err)
	}
	p.maps[id], _ = info.Memlock()
	var add func(uint32) error
	switch m.Type() {
	case ebpf.ProgramArray:
		add = func(id uint32) error { return p.addProgram(ebpf.ProgramID(id)) }
	case ebpf.ArrayOfMaps, ebpf.HashOfMaps:
		add = func(id uint32) error { return p.addMap(ebpf.MapID(id)) }
	default:
		return nil
	}
	key, value, all := make([]byte, m.KeySize()), uint32(0), m.Iterate()
	for all.Next(&key, &value) {
		if err := add(value); err != nil {
			return err
		}
	}
	return all.Err()
}
