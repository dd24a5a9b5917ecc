package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/qemu"
)

// The signals of a supervisor.
const (
	PowerSignal = unix.SIGTERM // press the guest's power button, however often it comes
	KillSignal  = unix.SIGQUIT // end QEMU at once
)

// killGrace is how long a supervisor gets to undo everything after its guest was killed. CNI plugins may need most of it.
const killGrace = undoTimeout

// Stop asks the guest to power down and waits up to grace; a guest that does not obey is killed. killed says which.
// ctx ends the wait alone. Stop returns when everything of the VM is undone.
func (s Store) Stop(ctx context.Context, name string, grace time.Duration) (killed bool, err error) {
	st, err := s.Get(name)
	if err != nil {
		return false, err
	}
	switch {
	case st.Status == Stopped:
		return false, nil
	case st.Config.Pod != "" && st.Status != Dead:
		return false, fmt.Errorf("stop VM %q: it is the pod %s: delete that (kubectl delete pod)", name, st.Config.Pod)
	}
	switch st.Status {
	case Dead:
		return false, fmt.Errorf("stop VM %q: %w: its supervisor was killed; clean up: virtlet gc", name, ErrStopped)
	}
	for end := time.Now().Add(time.Second); st.Supervisor.PID == 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		// It has just claimed the name.
		if st, err = s.Get(name); err != nil {
			return false, err
		}
	}
	supervisor, err := open(st.Supervisor)
	if errors.Is(err, unix.ESRCH) { // it has ended since
		return false, s.ended(name)
	}
	if err != nil {
		return false, fmt.Errorf("stop VM %q: %w", name, err)
	}
	defer unix.Close(supervisor)
	steps := []struct {
		signal unix.Signal
		wait   time.Duration
	}{{PowerSignal, grace}, {KillSignal, killGrace}}
	for _, step := range steps {
		if step.wait <= 0 {
			continue
		}
		killed = step.signal == KillSignal
		if err := unix.PidfdSendSignal(supervisor, step.signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return killed, fmt.Errorf("stop VM %q: signal its supervisor: %w", name, err)
		}
		if gone, err := awaitExit(ctx, supervisor, step.wait); err != nil {
			return killed, err
		} else if gone {
			return killed, s.ended(name)
		}
	}
	return killed, fmt.Errorf("stop VM %q: its supervisor (pid %d) is still cleaning up after %s", name, st.Supervisor.PID, killGrace)
}

// ended says what a VM that has ended has left undone.
func (s Store) ended(name string) error {
	st, err := s.Get(name)
	switch {
	case errors.Is(err, ErrNotFound): // started with --rm, or its start was given up
		return nil
	case err != nil:
		return err
	case st.Status == Dead:
		return fmt.Errorf("stop VM %q: its supervisor ended without cleaning up; virtlet gc does", name)
	case st.Status == Stopped && !s.inOrder(name, st):
		return fmt.Errorf("VM %q has ended, but not everything could be undone (virtlet gc tries again): %s", name, st.Left)
	}
	return nil
}

// open gives a descriptor of a process that is still the one named; ESRCH when there is none.
func open(p Process) (int, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err == nil && qemu.StartTime(p.PID) != p.Start {
		unix.Close(fd)
		err = unix.ESRCH
	}
	if err != nil {
		return -1, fmt.Errorf("find supervisor (pid %d): %w", p.PID, err)
	}
	return fd, nil
}

// awaitExit waits until the process of a pidfd has ended, d has passed or ctx has ended, and says whether it is gone.
func awaitExit(ctx context.Context, pidfd int, d time.Duration) (bool, error) {
	const look = 200 * time.Millisecond // for ctx
	for end := time.Now().Add(d); ; {
		left := time.Until(end)
		if left <= 0 {
			return false, nil
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(min(left, look).Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
	}
}

// Remove removes a VM that has ended, with its logs. force stops a running one first, without asking its guest, and
// cleans up after a killed supervisor.
func (s Store) Remove(ctx context.Context, name string, force bool) error {
	if err := CheckName(name); err != nil {
		return err
	}
	st, err := s.Get(name)
	if err != nil && (!force || errors.Is(err, ErrNotFound)) {
		return err // with force, a state that cannot be read keeps nobody from removing it
	}
	if !force && st.Status == Dead {
		return fmt.Errorf("remove VM %q: its supervisor was killed; virtlet gc or virtlet rm -f cleans up", name)
	}
	if !force && st.Status != Stopped {
		return fmt.Errorf("remove VM %q: %w: stop it first, or use -f", name, ErrRunning)
	}
	if st.Status == Running || st.Status == Starting || st.Status == Idle {
		if _, err := s.Stop(ctx, name, 0); err != nil && !errors.Is(err, ErrStopped) && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	// One that has written its last state still holds the lock for a moment.
	const moment = 5 * time.Second
	if _, err := s.await(ctx, name, moment); err != nil {
		return err
	}
	err = s.clean(ctx, name, force, false)
	if errors.Is(err, ErrNotFound) {
		return nil // a failed start erases itself
	}
	return err
}

// clean undoes and erases one VM that no process cares for. With force, plugins that fail are an error but no obstacle.
// With onlyDead a VM that has ended in order is not found, as the name may have changed hands since somebody looked, and
// one that has ended with something undone keeps its logs.
func (s Store) clean(ctx context.Context, name string, force, onlyDead bool) error {
	l, err := s.lock(name)
	if err != nil {
		return err
	}
	defer l.release()
	st, unread := s.read(name, false)
	if onlyDead && unread == nil && s.inOrder(name, st) {
		return fmt.Errorf("VM %q: %w", name, ErrNotFound)
	}
	left, err := s.undo(ctx, name, force)
	err = errors.Join(err, sentences(left))
	if _, still := os.Stat(s.data(name, "journal.json")); still == nil {
		return err
	}
	if onlyDead && unread == nil && st.Status == Stopped {
		st.Left = ""
		return errors.Join(err, s.writeLast(st))
	}
	return errors.Join(err, s.erase(name))
}

// sentences is an error of what nobody undoes any more; nil if there is nothing.
func sentences(left []string) error {
	if len(left) == 0 {
		return nil
	}
	return errors.New(strings.Join(left, "\n"))
}

// inOrder says whether a VM has ended with everything undone.
func (s Store) inOrder(name string, st State) bool {
	_, err := os.Stat(s.data(name, "journal.json"))
	return st.Status == Stopped && errors.Is(err, fs.ErrNotExist)
}

// Leftover is something that a dead run left behind.
type Leftover struct {
	VM   string `json:"vm"`
	What string `json:"what"`
}

// CleanOptions says how [Store.Clean] cleans.
type CleanOptions struct {
	Plugins Plugins // where the CNI plugins of attachments may be that are in nobody's journal
	DryRun  bool    // only find
	Force   bool    // a plugin that fails is an error, but its attachment is forgotten
}

// Clean finds what dead runs left and removes it: VMs whose supervisor was killed, with their QEMU, namespace, CNI
// attachments and files, and attachments in libcni's cache that belong to no VM. Living VMs and those that stopped in
// order stay.
func (s Store) Clean(ctx context.Context, o CleanOptions) (found []Leftover, err error) {
	// First the cache, then the VMs: an attachment is in its VM's journal before it is in the cache, so one that is cached
	// now and in no journal afterwards is nobody's.
	r := cni.Runtime{CacheDir: s.cniCache(), Timeout: undoTimeout}
	var errs []error
	cached, err := r.Cached()
	if err != nil {
		errs = append(errs, err) // one bad file does not hide the others
	}
	names, err := s.names()
	if err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	var living []string // container IDs
	if !o.DryRun {
		errs = append(errs, s.sweep())
	}
	for _, name := range names {
		var j Journal
		_ = readJSON(s.data(name, "journal.json"), &j) // one that cannot be read is an error when it is to be undone
		for _, a := range j.Attachments {
			living = append(living, a.ContainerID) // or named, and undone, with its dead VM
		}
		st, err := s.Get(name)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil { // of a state that cannot be read; the lock still says who lives
			st = State{Status: Dead}
		}
		if s.alive(name) || st.Status == Starting || st.Status == Running || s.inOrder(name, st) {
			continue
		}
		left := leftovers(name, st, j)
		if !o.DryRun {
			err := s.clean(ctx, name, o.Force, true)
			if errors.Is(err, ErrRunning) || errors.Is(err, ErrNotFound) {
				continue // somebody else was faster
			}
			if o.Force {
				for _, a := range j.Attachments {
					err = errors.Join(err, r.Forget(a))
				}
			}
			errs = append(errs, err)
		}
		found = append(found, left...)
	}
	// What libcni's cache knows and no VM does. The cache outlives a reboot, as do the addresses that an IPAM plugin
	// keeps on disk.
	now, _ := r.Cached() // what has gone since has been ended in order; its error is told above
	for _, a := range cached {
		still := slices.ContainsFunc(now, func(n cni.Attachment) bool { return n.ContainerID == a.ContainerID && n.IfName == a.IfName })
		if !still || slices.Contains(living, a.ContainerID) {
			continue
		}
		found = append(found, Leftover{What: fmt.Sprintf("CNI attachment %s of container %s to network %s", a.IfName, a.ContainerID, a.Name)})
		if !o.DryRun {
			r.BinDirs = o.Plugins.For(a.Name)
			err := r.Del(ctx, a)
			if err != nil && o.Force {
				err = errors.Join(fmt.Errorf("forgot CNI attachment %s of container %s to network %s, but a CNI plugin may have left something: %w", a.IfName, a.ContainerID, a.Name, err), r.Forget(a))
			}
			errs = append(errs, err)
		}
	}
	return found, errors.Join(errs...)
}

func leftovers(name string, st State, j Journal) []Leftover {
	var all []Leftover
	add := func(format string, a ...any) { all = append(all, Leftover{name, fmt.Sprintf(format, a...)}) }
	if j.QEMU != nil && qemu.StartTime(j.QEMU.PID) == j.QEMU.Start {
		add("process %d (QEMU)", j.QEMU.PID)
	}
	if j.Network != nil {
		add("TAPs and bridges in %s", j.NetNS)
		for _, h := range j.Network.VFs {
			add("PCI function %s, interface %s", h.BDF, h.NIC)
		}
	}
	for _, a := range j.Attachments {
		add("CNI attachment %s to network %s", a.IfName, a.Name)
	}
	if j.OwnNetNS {
		add("network namespace %s", j.NetNS)
	}
	if st.Status == Dead {
		add("files of a VM whose supervisor was killed")
	}
	return all
}
