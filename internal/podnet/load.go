package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sync/errgroup"

	"github.com/virtlet/virtlet/internal/nic"
)

// Programs are those that joins by eBPF need, on their way into the kernel. Its verifier takes a millisecond or two for a NIC,
// and needs no link: whoever knows early what is to be attached has it done beside other work. Close them after Attach, which
// needs them no longer than that.
type Programs struct {
	done   chan struct{}
	byLink map[string][]*loaded
	err    error // wraps a lack
}

// Load begins to load what Attach with the same arguments needs, if that is anything, and returns at once.
func Load(snap nic.Snapshot, nics []nic.NIC, o Options) *Programs {
	p := &Programs{done: make(chan struct{}), byLink: map[string][]*loaded{}}
	rec, err := plan(snap, nics, o, nil)
	if err != nil { // as Attach will say
		close(p.done)
		return p
	}
	go func() {
		defer close(p.done)
		p.err = p.load(rec.Joins, taps(nics), o)
	}()
	return p
}

// Wait waits until all are there, or one is not to be had, and gives why. Attach waits by itself.
func (p *Programs) Wait() error {
	<-p.done
	return p.err
}

// Close lets go of the programs; those in place stay there. It waits for those that are under way.
func (p *Programs) Close() error {
	<-p.done
	var errs []error
	for _, of := range p.byLink {
		for _, l := range of {
			errs = append(errs, l.close())
		}
	}
	p.byLink = nil
	return errors.Join(errs...)
}

// load loads those of the joins that are not there, all at once.
func (p *Programs) load(joins []Join, nics []nic.NIC, o Options) error {
	first := slices.IndexFunc(joins, func(j Join) bool { return j.engine() == EBPF })
	if first < 0 {
		return nil
	}
	if err := cmp.Or(o.lacks(needEBPF), preempts()); err != nil {
		return fmt.Errorf("attach %s: %w", joins[first].Link, &lack{needEBPF, err})
	}
	_ = rlimit.RemoveMemlock() // before Linux 5.11 programs count as locked memory; if it stays too low, loading fails and says so
	local := localAddrs(joins)
	var g errgroup.Group
	for i, j := range joins {
		if j.engine() != EBPF || p.byLink[j.Link] != nil {
			continue
		}
		hooks := j.hooks()
		of := make([]*loaded, len(hooks))
		p.byLink[j.Link] = of
		for at, h := range hooks {
			g.Go(func() (err error) {
				if of[at], err = loadHook(h, h.work(nics[i], o.Policies[j.Link], local)); err != nil {
					err = fmt.Errorf("%w (needs CONFIG_BPF_SYSCALL, CAP_BPF and CAP_NET_ADMIN)", err)
					return fmt.Errorf("attach %s: %w", j.Link, &lack{needEBPF, err})
				}
				return nil
			})
		}
	}
	err := g.Wait()
	for link, of := range p.byLink {
		p.byLink[link] = slices.DeleteFunc(of, func(l *loaded) bool { return l == nil })
	}
	return err
}

// of gives the programs of each join, and loads what nobody has foreseen: that the machine lacks what a better datapath needs.
func (p *Programs) of(joins []Join, nics []nic.NIC, o Options) ([][]*loaded, error) {
	<-p.done
	all := make([][]*loaded, len(joins))
	for i, j := range joins {
		if j.engine() != EBPF {
			continue
		}
		if p.err == nil {
			p.err = p.load(joins, nics, o)
		}
		if p.err != nil {
			return nil, p.err
		}
		all[i] = p.byLink[j.Link]
	}
	return all, nil
}

// work is what a program has to do.
type work struct {
	leave []match // to the rules of localhost, which see a frame after it
	rules []rule
}

// work gives that of a hook. local are the addresses that localhost leads to, if it does.
func (h hook) work(n nic.NIC, p Policy, local []netip.Addr) work {
	w := work{rules: h.rules(n, p)}
	switch h.role {
	case "cluster":
		var first []rule
		for _, a := range local {
			for _, r := range strangers(familyOf(a)) {
				first = append(first, r.rule)
			}
		}
		w.rules = append(first, w.rules...)
	case "guest":
		w.leave = localMatches(n.MAC, local)
	}
	return w
}

// needHeaders says whether there is more to look at than the mark, so that headers have to be found.
func (w work) needHeaders() bool {
	if len(w.leave) > 0 {
		return true
	}
	for _, r := range w.rules {
		for _, t := range r.whole().tests {
			if t.part.from != skbMark {
				return true
			}
		}
	}
	return false
}

// loaded is the program of a hook, and what its map is to have. Until [loaded.aim] it redirects to nowhere.
type loaded struct {
	hook  hook
	prog  *ebpf.Program
	maps  programMaps
	words []Rule
}

func (l *loaded) close() error { return errors.Join(l.prog.Close(), l.maps.close()) } // what is in place is held by its filter

// aim says where frames go to.
func (l *loaded) aim(index int, peer bool) error {
	if err := l.maps.rules.Put(uint32(0), ruleValue(l.words, uint32(index), peer)); err != nil {
		return fmt.Errorf("write the map of %s: %w", l.hook, err)
	}
	return nil
}

// tooMany is for IPv6 packets with more extension headers than are walked. The kernel walks all, and so do hosts.
var tooMany = match{text: fmt.Sprintf("more than %d extension headers", maxExtensions)}

// loadHook makes the program of a hook and gives it to the kernel. It needs no device.
func loadHook(h hook, w work) (*loaded, error) {
	rules := w.rules
	hides := slices.IndexFunc(rules, func(r rule) bool { return r.reason == GuestHidden || r.reason == ClusterHidden })
	var words []Rule
	say := func(r rule) {
		e := Rule{Action: Drop, Reason: r.reason, Match: r.whole().text}
		switch {
		case r.reason != "":
		case h.to != "":
			e.Action, e.To = Forward, h.to
		default:
			e.Action = Accept
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
	m, err := newMaps(len(words))
	if err != nil {
		return nil, fmt.Errorf("make the maps of %s: %w", h, err)
	}
	spec := &ebpf.ProgramSpec{Name: programPrefix + h.role, Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: instructions(w, hides >= 0, h, m)}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		m.close()
		return nil, fmt.Errorf("load the program of %d instructions for %s: %w", len(spec.Instructions), h, err)
	}
	return &loaded{h, prog, m, words}, nil
}

// preempts is the error that this kernel may stop a program for a frame amid its work and run another one on the same CPU
// (PREEMPT_RT), so that they would write over each other's scratch.
func preempts() error {
	// The file is there, with a 1, on such kernels alone.
	if is, err := os.ReadFile("/sys/kernel/realtime"); err == nil && strings.TrimSpace(string(is)) == "1" {
		return errors.New("eBPF on a realtime kernel (PREEMPT_RT) is not supported")
	}
	return nil
}

// instructions is the whole program of a hook. hides: the entry behind those of the rules counts what hides behind too many
// headers.
func instructions(w work, hides bool, h hook, m programMaps) asm.Instructions {
	p := &program{maps: m}
	p.emit(asm.Mov.Reg(asm.R6, asm.R1))
	pass, hidden := p.newLabel(), ""
	if w.needHeaders() {
		if hides {
			hidden = p.newLabel()
		}
		p.headers(hidden)
	}
	for _, leave := range w.leave {
		no := p.newLabel()
		p.match(leave, no)
		p.next()
		p.place(no)
	}
	p.rules(w.rules, pass, hidden)
	p.place(pass)
	if h.to == "" {
		p.next()
	} else {
		p.redirect(h.marks, h.role == "guest")
	}
	return reached(p.ins)
}

// reached leaves out what no path leads to, which the kernel refuses: behind a rule that every frame matches, or where there is
// no rule.
func reached(ins asm.Instructions) (out asm.Instructions) {
	at := map[string]int{}
	for i, in := range ins {
		at[in.Symbol()] = i
	}
	seen := make([]bool, len(ins))
	for paths := []int{0}; len(paths) > 0; {
		i := paths[len(paths)-1]
		paths = paths[:len(paths)-1]
		if seen[i] {
			continue
		}
		seen[i] = true
		op := ins[i].OpCode.JumpOp()
		if to := ins[i].Reference(); op != asm.InvalidJumpOp && op != asm.Call && op != asm.Exit && to != "" {
			paths = append(paths, at[to])
		}
		if op != asm.Ja && op != asm.Exit {
			paths = append(paths, i+1)
		}
	}
	for i, in := range ins {
		if seen[i] {
			out = append(out, in)
		}
	}
	return out
}
