// Package vm is one VM from configuration to exit: the order of the steps, their undoing, and the wait for the end. It
// is the only package that the front ends call.
//
// [Start] makes a VM whose supervisor is the calling process: that process holds the VM's lock, is QEMU's parent and
// answers its DHCP. [VM.Wait] blocks until the guest has ended and everything is undone. Whatever a VM does to the
// machine is in its [Journal] first, so a supervisor that is killed leaves nothing that [Store.Clean] cannot remove.
//
// A front end that learns of the guest later, and may have to start it again, takes the two halves of Start:
// [Prepare], which ends with a network that is served, and [VM.Boot]. It calls [VM.Close] at the end.
package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/virtlet/virtlet/internal/agent"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
)

// Progress is told of every step of a start: once when it begins, and once, with its result in a few words and the
// time it took, when it is done. Two steps may run at once; calls do not overlap.
type Progress func(step, result string, took time.Duration, done bool)

// VM is a VM whose supervisor is this process: what of it outlives its guest, and the guest of now.
type VM struct {
	store   Store
	cfg     Config
	lock    lock
	state   State
	journal Journal
	id      string // of this run, for CNI and cloud-init: random, never reused

	before  []podnet.NodeLink // what the node had before the plugins ran
	ns      *netns.NS
	ports   []*podnet.Port
	servers []server // of each port
	used    bool     // the ports have had a guest

	*Guest // never nil

	serve errgroup.Group     // the servers
	quiet context.CancelFunc // ends them

	closing errgroup.Group // closePorts, beside what others wait for

	progress Progress
	done     chan struct{} // closed when all is undone
	exit     Exit
	err      error
}

// Guest is one run of QEMU.
type Guest struct {
	media   *media
	proc    *qemu.Process
	qmp     net.Conn // until monitor owns it
	monitor *qemu.Monitor
	console *console
	agent   *agent.Client
	execs   *execServer
	memory  int64       // MiB that it was booted with
	fixed   bool        // and has until its end
	killed  atomic.Bool // by Kill

	asked     sync.Once
	powerdown chan struct{} // closed when the power button has been pressed

	ended chan struct{} // closed when its own things are undone; of a guest that Boot started
	end   Exit
	left  error
}

func newGuest() *Guest { return &Guest{powerdown: make(chan struct{}), ended: make(chan struct{})} }

// Start starts a VM and returns when QEMU runs it. On an error, or when ctx ends first, nothing of it is left, and the
// name is free again. After Start ctx has no meaning. progress may be nil. The caller calls Wait.
func Start(ctx context.Context, s Store, cfg Config, progress Progress) (*VM, error) {
	v, err := newVM(s, cfg, true, progress)
	if err != nil {
		return nil, err
	}
	err = v.start(ctx)
	if err == nil {
		err = ctx.Err() // a last step that did not look
	}
	if err != nil {
		return nil, errors.Join(err, v.abandon(ctx))
	}
	go v.supervise()
	return v, nil
}

func newVM(s Store, cfg Config, boots bool, progress Progress) (*VM, error) {
	cfg = cfg.clone()
	if err := cfg.check(boots); err != nil {
		return nil, err
	}
	return &VM{store: s, cfg: cfg, Guest: newGuest(), done: make(chan struct{}), quiet: func() {}, progress: serial(progress)}, nil
}

// start is the way of one VM; each line is a step that a reader can follow into its package.
func (v *VM) start(ctx context.Context) (err error) {
	if err := v.step("image", v.openMedia); err != nil { // first: it changes nothing, and most mistakes are here
		return err
	}
	if err := v.step("state", v.claim); err != nil {
		return err
	}
	// The disks and the network have nothing to do with each other; both wait for other programs.
	both, bctx := errgroup.WithContext(ctx)
	both.Go(func() error { return v.step("disk", func() (string, error) { return v.makeDisk(bctx) }) })
	both.Go(func() error { return v.connect(bctx) })
	if err := both.Wait(); err != nil {
		return err
	}
	if err := v.step("seed", v.makeSeed); err != nil { // it says what the networks have given
		return err
	}
	if err := v.step("dhcp", v.answer); err != nil { // before QEMU: the first question must not be lost
		return err
	}
	if err := v.step("qemu", v.startQEMU); err != nil {
		return err
	}
	return v.step("guest", func() (string, error) { return v.awaitQEMU(ctx) })
}

// claim takes the name: from here on the VM is seen by others.
func (v *VM) claim() (string, error) {
	l, err := v.store.create(v.cfg.Name)
	if err != nil {
		return "", err
	}
	v.lock = l
	var b [8]byte
	rand.Read(b[:])
	v.id = hex.EncodeToString(b[:])
	self := os.Getpid()
	v.state = State{
		Config: v.cfg, Status: Starting, Created: time.Now(), NetNS: v.cfg.NetNS, NICs: []nic.NIC{},
		Supervisor: Process{PID: self, Start: qemu.StartTime(self)},
	}
	if err := v.save(); err != nil {
		return "", err
	}
	// Now that others can see ours, nobody's ports are overlooked.
	return v.store.run(v.cfg.Name), v.store.portsFree(v.cfg)
}

func (v *VM) save() error {
	v.state.Config = v.cfg
	return writeJSON(v.store.run(v.cfg.Name, "state.json"), &v.state, false)
}

// record writes the journal with one more entry, before the effect of that entry.
func (v *VM) record(add func(*Journal)) error {
	add(&v.journal)
	return v.store.writeJournal(v.cfg.Name, &v.journal)
}

// connect gives the VM its namespace, configured by CNI plugins or by somebody else, and takes it over.
func (v *VM) connect(ctx context.Context) error {
	if err := v.step("namespace", v.enter); err != nil {
		return err
	}
	for i := range v.cfg.Networks {
		name := fmt.Sprintf("cni %s", v.cfg.Networks[i].Name)
		if err := v.step(name, func() (string, error) { return v.add(ctx, &v.cfg.Networks[i]) }); err != nil {
			return err
		}
	}
	return v.step("attach", func() (string, error) { return v.attach(ctx) })
}

// abandon undoes a failed start, wholly.
func (v *VM) abandon(ctx context.Context) error {
	if v.lock.f == nil { // not even claimed
		return v.media.Close()
	}
	err := v.stopServing()
	left, uerr := v.store.undo(ctx, v.cfg.Name, false)
	err = errors.Join(err, uerr)
	if !v.cfg.NetNSEnds {
		err = errors.Join(err, v.closing.Wait())
	}
	if err != nil {
		// The journal stays, and with it the name, for gc.
		return errors.Join(err, v.lock.release())
	}
	return errors.Join(sentences(left), v.store.erase(v.cfg.Name), v.lock.release())
}

// closePorts ends the TAPs, which takes the kernel tens of milliseconds. An open one keeps a namespace alive.
func (v *VM) closePorts() error {
	var errs []error
	for _, p := range v.ports {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// stopServing ends QEMU and everything that this process does for it; closing may take a moment longer.
func (v *VM) stopServing() error {
	errs := []error{v.Guest.close()}
	v.quiet()
	errs = append(errs, v.serve.Wait())
	if slices.ContainsFunc(v.ports, func(p *podnet.Port) bool { return p.VF != nil }) {
		// The driver of a PCI function changes only when nobody has it, and a vhost descriptor keeps QEMU's memory, into
		// which the function is mapped, after QEMU's end (vhost_dev_set_owner of the kernel).
		errs = append(errs, v.closePorts())
	}
	// While the kernel removes a TAP nobody on the machine changes a link: so it does that after our own changes, and
	// before the end of the namespace is waited for.
	defer v.closing.Go(v.closePorts)
	if v.ns == nil {
		return errors.Join(errs...)
	}
	// Through the namespace that is open: a path that somebody removed meanwhile does not keep us from putting it back.
	if v.journal.Network != nil {
		undo := podnet.Detach
		if v.journal.OwnNetNS || v.cfg.NetNSEnds { // with which all goes that DEL does not look at
			undo = podnet.Release
		}
		err := undo(v.ns, *v.journal.Network)
		if err == nil {
			err = v.record(func(j *Journal) { j.Network = nil })
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, v.ns.Close())...)
}

// close ends QEMU, and whatever serves it alone.
func (g *Guest) close() error {
	var errs []error
	if g.proc != nil {
		errs = append(errs, g.proc.Kill())
		g.proc.Wait()
	}
	if g.monitor != nil {
		g.monitor.Close()
	} else if g.qmp != nil {
		g.qmp.Close()
	}
	if g.agent != nil {
		errs = append(errs, g.agent.Close())
	}
	if g.execs != nil {
		errs = append(errs, g.execs.Close())
	}
	errs = append(errs, g.media.Close())
	if g.console != nil {
		errs = append(errs, g.console.Close())
	}
	return errors.Join(errs...)
}

// step runs one step of the start, tells of it, and names it in an error.
func (v *VM) step(name string, do func() (string, error)) error {
	begin := time.Now()
	v.progress(name, "", 0, false)
	result, err := do()
	if err != nil {
		return err
	}
	v.progress(name, result, time.Since(begin), true)
	return nil
}

// serial makes calls of p one at a time.
func serial(p Progress) Progress {
	if p == nil {
		return func(string, string, time.Duration, bool) {}
	}
	turn := make(chan struct{}, 1)
	return func(step, result string, took time.Duration, done bool) {
		turn <- struct{}{}
		defer func() { <-turn }()
		p(step, result, took, done)
	}
}

// Name gives the VM's name.
func (v *VM) Name() string { return v.cfg.Name }

// Notes gives sentences that the user should read: what of the network was corrected or could not be carried over.
func (v *VM) Notes() []string { return v.state.Notes }

// NewName makes a name for a VM that was given none.
func NewName() string {
	var b [4]byte
	rand.Read(b[:])
	return "vm-" + hex.EncodeToString(b[:])
}

// note keeps sentences for the user, once each.
func (v *VM) note(notes ...string) {
	for _, n := range notes {
		if !slices.Contains(v.state.Notes, n) {
			v.state.Notes = append(v.state.Notes, n)
		}
	}
}
