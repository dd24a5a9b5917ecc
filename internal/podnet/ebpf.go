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

// ruleMap is the map of one program: an array of one value, to which its instructions have the address. The value is an entry
// for each rule, in their order. It says in words what the rule is, so that any process can read all from the kernel.
type ruleMap struct{ m *ebpf.Map }

// An entry: the counters, and its text: action, device to forward to, reason, match, with NULs between.
const (
	entrySize    = 256
	counterBytes = 8 // behind the packets
	entryText    = 16
)

func (m *ruleMap) fd() int { return m.m.FD() }

// counter is where the value has the counters of a rule.
func (m *ruleMap) counter(rule int) uint32 { return uint32(rule * entrySize) }

func newRuleMap(entries []Rule) (*ruleMap, error) {
	value := make([]byte, entrySize*len(entries))
	for i, e := range entries {
		text := strings.Join([]string{string(e.Action), e.To, string(e.Reason), e.Match}, "\x00")
		const more = " ..."
		if room := entrySize - entryText; len(text) > room {
			text = text[:room-len(more)] + more
		}
		copy(value[i*entrySize+entryText:], text)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: programPrefix + "rules", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1})
	if err != nil {
		return nil, err
	}
	if err := m.Put(uint32(0), value); err != nil {
		m.Close()
		return nil, err
	}
	return &ruleMap{m}, nil
}

// entries reads what a map of ours has.
func entries(m *ebpf.Map) ([]Rule, error) {
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, err
	}
	var all []Rule
	for e := range slices.Chunk(value, entrySize) {
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

// loaded is the program of a hook.
type loaded struct {
	hook hook
	prog *ebpf.Program
}

func (l *loaded) close() { l.prog.Close() }

// tooMany is for IPv6 packets with more extension headers than are walked. The kernel walks all, and so do hosts.
var tooMany = match{text: fmt.Sprintf("more than %d extension headers", maxExtensions)}

// loadHook makes the program of a hook and gives it to the kernel. index is that of the device that frames go to.
func loadHook(h hook, w work, index int, peer bool) (*loaded, error) {
	rules := w.rules
	hides := slices.IndexFunc(rules, func(r rule) bool { return r.reason == GuestHidden || r.reason == ClusterHidden })
	var words []Rule
	say := func(r rule) {
		e := Rule{Action: Drop, Reason: r.reason, Match: r.whole().text}
		if e.Action == Drop && r.reason == "" {
			e.Action = Accept
			if h.to != "" {
				e.Action, e.To = Forward, h.to
			}
		}
		words = append(words, e)
	}
	for _, r := range rules {
		say(r)
	}
	if hides >= 0 {
		say(rule{rules[hides].reason, nil, tooMany})
	}
	if h.to != "" {
		say(rule{}) // all that is left
	}
	m, err := newRuleMap(words)
	if err != nil {
		return nil, fmt.Errorf("make a map of %d rules: %w", len(words), err)
	}
	defer m.m.Close() // the program holds it
	spec := &ebpf.ProgramSpec{Name: programPrefix + h.role, Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: instructions(w, hides >= 0, h, m, index, peer)}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("load the program of %d instructions for %s: %w", len(spec.Instructions), h, err)
	}
	return &loaded{h, prog}, nil
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

// attachClsact does the same by the queueing discipline clsact and a filter.
func (k *kernel) attachClsact(l *loaded, index int) error {
	if err := k.h.QdiscAdd(clsact(index)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add qdisc clsact: %w (needs CONFIG_NET_SCH_INGRESS)", err)
	}
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

// programs gives those of ours at a hook of a device; the caller closes them. The calling thread is in the namespace.
func (k *kernel) programs(h hook, index int) ([]*ebpf.Program, error) {
	at, parent := h.place()
	var ids []ebpf.ProgramID
	found, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: at})
	switch {
	case err == nil:
		for _, p := range found.Programs {
			ids = append(ids, p.ID)
		}
	case !errors.Is(err, unix.EINVAL) && !errors.Is(err, ebpf.ErrNotSupported): // those are of a kernel without tcx
		return nil, err
	}
	filters, err := netns.Dump(func() ([]netlink.Filter, error) { return k.h.FilterList(device(index, h.device), parent) })
	if err != nil && !errors.Is(err, unix.EINVAL) { // which is: no such qdisc
		return nil, err
	}
	for _, f := range filters {
		if f, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(f.Name, programPrefix) {
			ids = append(ids, ebpf.ProgramID(f.Id))
		}
	}
	var all []*ebpf.Program
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

// removePrograms takes those of ours off a device, and a clsact that nobody else has a filter at. What is not there is done.
func (k *kernel) removePrograms(h hook, index int) error {
	progs, err := k.programs(h, index)
	at, parent := h.place()
	errs := []error{err}
	filters := 0
	for _, p := range progs {
		err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: index, Program: p, Attach: at})
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, ebpf.ErrNotSupported) {
			filters++ // it is no program of tcx, but of a filter
		} else if err != nil {
			errs = append(errs, err)
		}
		p.Close()
	}
	if filters > 0 {
		errs = append(errs, k.removeClsact(device(index, h.device), parent))
	}
	return errors.Join(errs...)
}

// removeClsact removes our filters there, and the queueing discipline with the last that it has.
func (k *kernel) removeClsact(dev netlink.Link, parent uint32) error {
	left := 0
	for _, at := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netns.Dump(func() ([]netlink.Filter, error) { return k.h.FilterList(dev, at) })
		if err != nil {
			return err
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); !ok || at != parent || !strings.HasPrefix(b.Name, programPrefix) {
				left++
			} else if err := k.h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	if left > 0 {
		return nil
	}
	if err := k.h.QdiscDel(clsact(dev.Attrs().Index)); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
