package podnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// A join by eBPF has a program at each of its hooks, made for the NIC: the rules that nftables would have, and at their end
// the other device. Programs are attached without a link of the process's, so they outlive it, as rules of nftables do: a
// namespace whose supervisor was killed stays silent. They end with their device, or by [Detach].

// programPrefix begins the name of every program, by which those of ours are known.
const programPrefix = "vlt_"

// programMaps are those of one program.
type programMaps struct {
	// rules is an array of one value, to which instructions have the address: where frames go to, and then an entry for each
	// rule, in their order. It says in words what the rule is, so that any process can read all from the kernel.
	rules   *ebpf.Map
	scratch *ebpf.Map // see scratchSize
}

func (m programMaps) close() error { return errors.Join(m.rules.Close(), m.scratch.Close()) }

// What the value has first.
const (
	targetIndex = 0 // 4 bytes, the device that frames go to; 0 is none, and the kernel drops them
	targetPeer  = 4 // 4 bytes, 1: to its peer
	targetSize  = 8
)

// An entry: the counters, and its text: action, device to forward to, reason, match, with NULs between.
const (
	entrySize    = 256
	counterBytes = 8 // behind the packets
	entryText    = 16
)

// counterAt is where the value has the counters of a rule.
func counterAt(rule int) uint32 { return uint32(targetSize + rule*entrySize) }

// newMaps makes those for a program of so many entries, still empty. The caller closes them.
func newMaps(entries int) (programMaps, error) {
	rules, err := ebpf.NewMap(&ebpf.MapSpec{Name: programPrefix + "rules", Type: ebpf.Array, KeySize: 4, ValueSize: counterAt(entries), MaxEntries: 1})
	if err != nil {
		return programMaps{}, err
	}
	scratch, err := ebpf.NewMap(&ebpf.MapSpec{Name: programPrefix + "scratch", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: scratchSize, MaxEntries: 1})
	if err != nil {
		rules.Close()
		return programMaps{}, err
	}
	return programMaps{rules, scratch}, nil
}

// ruleValue is the value of the first map.
func ruleValue(entries []Rule, index uint32, peer bool) []byte {
	value := make([]byte, counterAt(len(entries)))
	binary.NativeEndian.PutUint32(value[targetIndex:], index)
	if peer {
		binary.NativeEndian.PutUint32(value[targetPeer:], 1)
	}
	for i, e := range entries {
		text := strings.Join([]string{string(e.Action), e.To, string(e.Reason), e.Match}, "\x00")
		const more = " ..."
		if room := entrySize - entryText; len(text) > room {
			text = text[:room-len(more)] + more
		}
		copy(value[counterAt(i)+entryText:], text)
	}
	return value
}

// entries reads what a map of ours has; one that is not of rules has none.
func entries(m *ebpf.Map) ([]Rule, error) {
	if info, err := m.Info(); err != nil || info.Name != programPrefix+"rules" {
		return nil, err
	}
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, err
	}
	var all []Rule
	for e := range slices.Chunk(value[targetSize:], entrySize) {
		if len(e) < entrySize {
			return nil, fmt.Errorf("the map has %d bytes more", len(e))
		}
		text := strings.SplitN(string(bytes.TrimRight(e[entryText:], "\x00")), "\x00", 4)
		text = append(text, make([]string, 4-len(text))...)
		all = append(all, Rule{
			Action: Action(text[0]), To: text[1], Reason: Reason(text[2]), Match: text[3],
			Counter: Counter{binary.NativeEndian.Uint64(e), binary.NativeEndian.Uint64(e[counterBytes:])},
		})
	}
	return all, nil
}

// place is where tcx has a program, and clsact a filter.
func (h hook) place() (tcx ebpf.AttachType, clsact uint32) {
	if h.egress {
		return ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS
	}
	return ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS
}

// attachTCX puts a program behind others that are there. The calling thread is in the namespace.
func (l *loaded) attachTCX(index int) error {
	at, _ := l.hook.place()
	return link.RawAttachProgram(link.RawAttachProgramOptions{Target: index, Program: l.prog, Attach: at})
}

// addClsact makes a device ready for filters.
func (k *kernel) addClsact(index int) error {
	if err := k.h.QdiscAdd(clsact(index)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add qdisc clsact: %w (needs CONFIG_NET_SCH_INGRESS)", err)
	}
	return nil
}

// addFilter puts a program in front of others, at a device with clsact.
func (k *kernel) addFilter(l *loaded, index int) error {
	_, parent := l.hook.place()
	const priority = 1 // the first; others are asked only where ours has nothing to say
	err := k.h.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd:          l.prog.FD(), Name: programPrefix + l.hook.role, DirectAction: true,
	})
	if err != nil {
		return fmt.Errorf("add filter: %w (needs CONFIG_NET_CLS_BPF)", err)
	}
	return nil
}

func clsact(index int) netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0)},
		QdiscType:  "clsact",
	}
}

// filters gives the filters of clsact of ours there, and how many others there are. The calling thread is in the namespace.
func (k *kernel) filters(dev netlink.Link, parent uint32) (ours []*netlink.BpfFilter, others int, err error) {
	all, err := netns.Dump(func() ([]netlink.Filter, error) { return k.h.FilterList(dev, parent) })
	if err != nil && !errors.Is(err, unix.EINVAL) { // which is: no such qdisc
		return nil, 0, err
	}
	for _, f := range all {
		if f, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(f.Name, programPrefix) {
			ours = append(ours, f)
		} else {
			others++
		}
	}
	return ours, others, nil
}

// byTCX gives the programs of ours that tcx has at a hook; the caller closes them. The calling thread is in the namespace.
func byTCX(h hook, index int) ([]*ebpf.Program, error) {
	at, _ := h.place()
	found, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: at})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) { // those are of a kernel without tcx
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []ebpf.ProgramID
	for _, p := range found.Programs {
		ids = append(ids, p.ID)
	}
	return oursOf(ids)
}

// oursOf gives those of the programs that are of ours; the caller closes them.
func oursOf(ids []ebpf.ProgramID) (all []*ebpf.Program, err error) {
	for _, id := range ids {
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, unix.ENOENT) {
			continue // just gone
		}
		if err != nil {
			return all, err
		}
		info, err := p.Info()
		if err != nil || !strings.HasPrefix(info.Name, programPrefix) {
			p.Close()
			continue
		}
		all = append(all, p)
	}
	return all, nil
}

// programs gives those of ours at a hook of a device; the caller closes them. The calling thread is in the namespace.
func (k *kernel) programs(h hook, index int) ([]*ebpf.Program, error) {
	all, err := byTCX(h, index)
	if err != nil {
		return all, err
	}
	_, parent := h.place()
	filters, _, err := k.filters(device(index, h.device), parent)
	if err != nil {
		return all, err
	}
	var ids []ebpf.ProgramID
	for _, f := range filters {
		ids = append(ids, ebpf.ProgramID(f.Id))
	}
	more, err := oursOf(ids)
	return append(all, more...), err
}

// programRules reads the rules of a hook, as inForce does.
func (k *kernel) programRules(h hook, index int) (all []Rule, err error) {
	progs, err := k.programs(h, index)
	for _, p := range progs {
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			return nil, err
		}
		ids, _ := info.MapIDs()
		for _, id := range ids {
			m, err := ebpf.NewMapFromID(id)
			if err != nil {
				return nil, err
			}
			found, err := entries(m)
			m.Close()
			if err != nil {
				return nil, err
			}
			all = append(all, found...)
		}
	}
	return all, err
}

// removePrograms takes those of ours at hooks of a device off, and with the last filter that anybody has there the clsact. What
// is not there is done. The calling thread is in the namespace.
func (k *kernel) removePrograms(index int, hooks ...hook) error {
	dev := device(index, hooks[0].device)
	var ours []*netlink.BpfFilter
	left, has := 0, map[uint32]bool{}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		found, others, err := k.filters(dev, parent)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(hooks, func(h hook) bool { _, at := h.place(); return at == parent }) {
			ours, has[parent] = append(ours, found...), len(found) > 0
		} else {
			others += len(found)
		}
		left += others
	}
	var errs []error
	gone := func(err error) {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	switch {
	case len(ours) > 0 && left == 0:
		gone(k.h.QdiscDel(clsact(index)))
	default:
		for _, f := range ours {
			gone(k.h.FilterDel(f))
		}
	}
	for _, h := range hooks {
		at, parent := h.place()
		if has[parent] {
			continue
		}
		progs, err := byTCX(h, index)
		gone(err)
		for _, p := range progs {
			gone(link.RawDetachProgram(link.RawDetachProgramOptions{Target: index, Program: p, Attach: at}))
			p.Close()
		}
	}
	return errors.Join(errs...)
}
