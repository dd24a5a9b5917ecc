// Package node makes a machine a node for pods that are VMs, and takes that back: the programs in a directory, and the
// handler in the configuration of containerd or CRI-O.
//
// [Node.Install] and [Node.Uninstall] look at the node without touching it, plan ([plan], pure), and then touch. What will
// be touched is written to a record before ([recordPath]), so that a run that was killed is finished by the next Install
// and undone by the next Uninstall; either may be called again at any time. A file of the operator gets one block at its
// end, and is byte for byte what it was when the block has gone. What is not understood is refused, with the text to
// add by hand.
//
// Everything happens below [Node.Root], also where links lead elsewhere: the node's root may be mounted in a container.
package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// Handler is what a RuntimeClass names, and the name in the configurations.
const Handler = "virtlet"

// The programs of a node.
const (
	Shim    = "containerd-shim-virtlet-v2"
	Command = "virtlet"
)

// Manager is a kind of container manager.
type Manager string

// The managers that are known. Auto is whichever is there.
const (
	Auto       Manager = "auto"
	Containerd Manager = "containerd"
	CRIO       Manager = "crio"
)

// Node is a machine, and what is wanted of it. Paths are absolute and below Root, but for From.
type Node struct {
	Root    string  // the node's root directory: "/", or where it is mounted
	BinDir  string  // where the programs go
	Config  string  // the manager's configuration; "": where it is by convention
	Manager Manager // "" is Auto

	From    string // the directory on this side that has the programs
	Version string // of the programs
	Owner   string // who installs: another owner takes over, and the one before no longer uninstalls; "": whoever
	DryRun  bool   // look and plan only
	Force   bool   // uninstall although VMs of pods run
	Restart bool   // restart the manager when its configuration has changed

	// step is for tests: it is called before each effect.
	step func(effect string)
}

// DefaultBinDir is in containerd's PATH and in that of people, and is where `make install` puts the programs.
const DefaultBinDir = "/usr/local/bin"

// Report says what was done, or with DryRun what would be.
type Report struct {
	Manager   Manager  `json:"manager,omitempty"`
	Config    string   `json:"config,omitempty"`  // the file with the handler
	Changes   []Change `json:"changes"`           // in order
	Restart   string   `json:"restart,omitempty"` // what has to be restarted before the handler is as configured; "": nothing
	Restarted bool     `json:"restarted,omitempty"`
	Notes     []string `json:"notes,omitempty"`
}

// Change is one file that was written or removed.
type Change struct {
	Do   string `json:"do"` // "write" or "remove"
	Path string `json:"path"`
	Diff string `json:"diff,omitempty"` // of text
	Size int    `json:"size,omitempty"` // of a program, in bytes
}

// Install makes the node one for VMs.
func (n Node) Install(ctx context.Context) (Report, error) {
	t, err := n.open()
	if err != nil {
		return Report{}, fmt.Errorf("install on the node: %w", err)
	}
	defer t.close()
	rep, err := t.install(ctx)
	if err != nil {
		err = fmt.Errorf("install on the node: %w", err)
	}
	return rep, err
}

func (t *tree) install(ctx context.Context) (Report, error) {
	old, err := t.record()
	if err != nil {
		return Report{}, err
	}
	f, err := t.find()
	if err != nil {
		return Report{}, err
	}
	want, err := t.wanted(f)
	if err != nil {
		return Report{}, err
	}
	p, err := plan(old, want, t.read)
	if err != nil {
		return Report{}, err
	}
	p.next.Version, p.next.Owner, p.next.Manager, p.next.Config, p.next.Unit = t.Version, t.Owner, f.manager, want.config, f.unit
	rep := Report{Manager: f.manager, Config: want.config, Changes: p.changes(), Notes: append(want.notes, p.notes...)}
	if p.restart() || old.Restart && !t.inUse(ctx, f) {
		p.next.Restart, rep.Restart = true, f.unit
	}
	if t.DryRun {
		return rep, nil
	}
	if note, err := t.tryOut(ctx, f, p); err != nil {
		return Report{}, err
	} else if note != "" {
		rep.Notes = append(rep.Notes, note)
	}
	if err := t.apply(old, p); err != nil {
		return rep, err
	}
	return t.restart(ctx, rep, p.next)
}

// inUse says whether the manager has been restarted by somebody since its configuration was changed.
func (t *tree) inUse(ctx context.Context, f found) bool {
	s, err := t.ask(ctx, f.socket)
	return err == nil && s.has(path.Join(t.BinDir, Shim))
}

// Uninstall takes back what Install did, as far as it is still there. The directories of VMs stay.
func (n Node) Uninstall(ctx context.Context) (Report, error) {
	t, err := n.open()
	if err != nil {
		return Report{}, fmt.Errorf("uninstall on the node: %w", err)
	}
	defer t.close()
	rep, err := t.uninstall(ctx)
	if err != nil {
		err = fmt.Errorf("uninstall on the node: %w", err)
	}
	return rep, err
}

func (t *tree) uninstall(ctx context.Context) (Report, error) {
	old, err := t.record()
	if err != nil {
		return Report{}, err
	}
	if t.Owner != "" && old.Owner != t.Owner && len(old.Files) > 0 {
		return Report{Notes: []string{fmt.Sprintf("nothing was done: another installer has taken over (%q)", old.Owner)}}, nil
	}
	if pods, err := t.pods(); err != nil {
		return Report{}, err
	} else if len(pods) > 0 && !t.Force && len(old.Files) > 0 {
		return Report{}, fmt.Errorf("VMs of pods run here: %s: delete those pods first, or use --force (they go on, and what they leave at their end is yours to clean up)",
			strings.Join(pods, ", "))
	}
	p, err := plan(old, wanted{}, t.read)
	if err != nil {
		return Report{}, err
	}
	rep := Report{Manager: old.Manager, Config: old.Config, Changes: p.changes(), Notes: p.notes}
	if p.restart() || old.Restart {
		p.next.Restart, rep.Restart = true, old.Unit
		p.next.Unit, p.next.Manager, p.next.Config = old.Unit, old.Manager, old.Config
	}
	switch {
	case t.DryRun:
		return rep, nil
	case len(old.Files) == 0 && !old.Restart:
		return rep, t.forget() // of an install that was killed before it had a record
	}
	if err := t.apply(old, p); err != nil {
		return rep, err
	}
	return t.restart(ctx, rep, p.next)
}

// restart restarts the manager if that is wanted and needed, and then forgets the need. What is left of the record of an
// uninstalled node goes with it.
func (t *tree) restart(ctx context.Context, rep Report, r record) (Report, error) {
	if rep.Restart == "" || !t.Restart {
		if len(r.Files) == 0 {
			return rep, t.forget() // the operator restarts
		}
		return rep, nil
	}
	t.effect("restart " + rep.Restart)
	if err := restartUnit(ctx, t.Root, rep.Restart); err != nil {
		return rep, fmt.Errorf("all files are in place, but not read yet: %w", err)
	}
	if err := t.awaitHandler(ctx, rep.Manager, len(r.Files) > 0); err != nil {
		return rep, err
	}
	rep.Restarted, rep.Restart = true, ""
	if len(r.Files) == 0 {
		return rep, t.forget()
	}
	r.Restart = false
	return rep, t.save(r)
}

// pods gives the VMs of pods that run on the node.
func (t *tree) pods() ([]string, error) {
	all, err := vm.Store{Run: t.host("/run/virtlet"), Data: t.host("/var/lib/virtlet")}.List()
	var names []string
	for _, st := range all {
		if st.Config.Pod != "" && (st.Status == vm.Running || st.Status == vm.Starting) {
			names = append(names, st.Config.Pod)
		}
	}
	return names, err
}

// tree is an open node. It is locked: one process at a time installs or uninstalls.
type tree struct {
	Node
	root *os.Root
	lock *os.File
}

// stateDir has the record, and nothing else that lasts.
const (
	stateDir   = "/var/lib/virtlet-node"
	recordPath = stateDir + "/installed.json"
	lockPath   = "/run/virtlet-node.lock" // not in stateDir, which goes
)

func (n Node) open() (*tree, error) {
	if !filepath.IsAbs(n.BinDir) || n.Config != "" && !filepath.IsAbs(n.Config) {
		return nil, fmt.Errorf("the directory of programs (%q) and the configuration (%q) have to be absolute paths", n.BinDir, n.Config)
	}
	root, err := os.OpenRoot(n.Root)
	if err != nil {
		return nil, err
	}
	t := &tree{Node: n, root: root}
	if n.DryRun {
		return t, nil
	}
	if os.Geteuid() != 0 {
		return nil, errors.Join(errors.New("root is needed: it changes the configuration of the container manager (--dry-run only shows)"), root.Close())
	}
	err = t.mkdirAll(filepath.Dir(lockPath))
	if err == nil {
		t.lock, err = root.OpenFile(rel(lockPath), os.O_CREATE|os.O_RDWR, 0o600)
	}
	if err == nil {
		err = unix.Flock(int(t.lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.close()
		return nil, fmt.Errorf("lock the node: %w", err)
	}
	return t, nil
}

func (t *tree) close() {
	t.root.Close()
	if t.lock != nil {
		t.lock.Close()
	}
}

// host gives a path of the node as this process sees it.
func (t *tree) host(path string) string { return filepath.Join(t.Root, path) }

// rel gives a path of the node for an [os.Root].
func rel(path string) string { return filepath.Clean("." + filepath.Clean("/"+path)) }

func (t *tree) effect(what string) {
	if t.step != nil {
		t.step(what)
	}
}
