package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Store is where VMs are kept on disk. Nothing but these files is shared between the processes of virtlet.
//
//	<Run>/NAME/   state.json, console.sock, counters.sock: gone after its end or a reboot, as is the VM
//	<Data>/NAME/  lock, journal.json, console.log, supervisor.log, disk.qcow2, seed.iso, known_hosts; state.json of one
//	              that has ended
//	<Run>/ipam/   leases of the embedded network
//	<Data>/cni/   libcni's cached results
//
// A VM lives as long as its supervisor holds the lock. The lock is beside the journal: whoever can undo a VM also sees
// that it lives.
type Store struct {
	Run  string // /run/virtlet
	Data string // /var/lib/virtlet

	recorded func() // for tests: called when an effect is in the journal and has not happened yet
}

// Errors of a Store.
var (
	ErrExists   = errors.New("the name is taken")
	ErrNotFound = errors.New("no such VM")
	ErrRunning  = errors.New("VM is running")
	ErrStopped  = errors.New("VM is not running")
)

// nameForm keeps a name usable as file name, host name label and part of a namespace's name.
var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// reserved are names that the Store needs for itself.
var reserved = []string{"cni", "ipam"}

// CheckName says what is wrong with a VM's name.
func CheckName(name string) error {
	if !nameForm.MatchString(name) || slices.Contains(reserved, name) {
		return fmt.Errorf("bad VM name %q: use at most 63 lower-case letters, digits and inner dashes (not %q)", name, reserved)
	}
	return nil
}

func (s Store) run(name string, file ...string) string {
	return filepath.Join(append([]string{s.Run, name}, file...)...)
}

func (s Store) data(name string, file ...string) string {
	return filepath.Join(append([]string{s.Data, name}, file...)...)
}

// Where libcni keeps its results, and the embedded network its leases.
func (s Store) cniCache() string { return s.data("cni") }
func (s Store) ipam() string     { return s.run("ipam") }

// names gives every VM that has left a trace, in order.
func (s Store) names() ([]string, error) {
	var all []string
	entries, err := os.ReadDir(s.Data) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			all = append(all, e.Name())
		}
	}
	return all, nil
}

// lock is the sign that a process cares for a VM; closing the file gives it up, as does the process's end.
type lock struct{ f *os.File }

func (l lock) release() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}

const (
	lockFile = "lock"
	passing  = ".tmp-" // begins a directory that comes or goes; no VM has such a name
)

// create makes the directories of a new VM and takes its lock. The data directory appears with the lock held, so nobody
// can take the VM for one that nobody cares for.
func (s Store) create(name string) (lock, error) {
	fail := func(err error) (lock, error) { return lock{}, fmt.Errorf("create VM %s: %w", name, err) }
	if filepath.Clean(s.Run) == filepath.Clean(s.Data) {
		return lock{}, wrong("--run-dir and --data-dir are both %s: use two directories", s.Run)
	}
	for _, dir := range []string{s.Run, s.Data} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fail(fmt.Errorf("%w (virtlet needs root)", err))
		}
	}
	tmp, err := os.MkdirTemp(s.Data, passing+name+"-*")
	if err != nil {
		return fail(err)
	}
	l, err := takeLock(filepath.Join(tmp, lockFile))
	if err == nil {
		// A directory is replaced by rename(2) only if it is empty, and that of a VM never is.
		err = os.Rename(tmp, s.data(name))
	}
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
		return lock{}, errors.Join(s.taken(name), os.RemoveAll(tmp), l.release())
	}
	if err != nil {
		return fail(errors.Join(err, os.RemoveAll(tmp), l.release()))
	}
	if err := os.Mkdir(s.run(name), 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%s is there already: a VM of another data directory uses it, or its files were removed by hand (then remove it too)", s.run(name))
		}
		return fail(errors.Join(err, os.RemoveAll(s.data(name)), l.release()))
	}
	return l, nil
}

// sweep removes what a killed create or erase left behind. A living one takes milliseconds.
func (s Store) sweep() error {
	left, err := filepath.Glob(filepath.Join(s.Data, passing+"*"))
	for _, dir := range left {
		if fi, serr := os.Stat(dir); serr == nil && time.Since(fi.ModTime()) > time.Minute {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}
	return err
}

// taken words the refusal of a name that is in use.
func (s Store) taken(name string) error {
	do := "it is in use: choose another --name"
	switch st, err := s.Get(name); {
	case err != nil:
	case st.Status == Stopped:
		do = fmt.Sprintf("it has stopped; remove it: virtlet rm %s", name)
	case st.Status == Dead:
		do = "its supervisor was killed; clean up: virtlet gc"
	}
	return fmt.Errorf("create VM %q: %w: %s", name, ErrExists, do)
}

// lock takes the lock of a VM that is there; [ErrRunning] when a living process has it.
func (s Store) lock(name string) (lock, error) {
	l, err := takeLock(s.data(name, lockFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return lock{}, fmt.Errorf("VM %q: %w", name, ErrNotFound)
	case errors.Is(err, unix.EAGAIN):
		return lock{}, fmt.Errorf("VM %q: %w", name, ErrRunning)
	case err != nil:
		return lock{}, fmt.Errorf("lock VM %s: %w", name, err)
	}
	// The file may have been removed between open and lock: then the lock is worth nothing.
	if !sameFileAt(l.f, s.data(name, lockFile)) {
		l.release()
		return lock{}, fmt.Errorf("VM %q: %w", name, ErrNotFound)
	}
	return l, nil
}

// takeLock makes the file if need be and locks it: by an open-file-description lock, which ends with the process, and
// can be asked after without being taken. EAGAIN: somebody else has it.
func takeLock(path string) (lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return lock{}, err
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		f.Close()
		return lock{}, err
	}
	return lock{f}, nil
}

// alive says whether a process holds the VM's lock.
func (s Store) alive(name string) bool {
	for {
		f, err := os.Open(s.data(name, lockFile))
		if err != nil {
			return false
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		held := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
		same := sameFileAt(f, s.data(name, lockFile))
		f.Close()
		if held || same {
			return held
		}
		// That was the lock of a VM which has gone; another of that name may have come.
	}
}

// sameFileAt says whether the path still leads to f.
func sameFileAt(f *os.File, path string) bool {
	fi, err := f.Stat()
	at, aerr := os.Stat(path)
	return err == nil && aerr == nil && os.SameFile(fi, at)
}

// await blocks until no process holds the VM's lock, or d has passed, and says whether it is free.
func (s Store) await(ctx context.Context, name string, d time.Duration) (bool, error) {
	limit := time.After(d)
	tick := time.NewTicker(20 * time.Millisecond) // a file lock has no blocking form with a time limit
	defer tick.Stop()
	for s.alive(name) {
		select {
		case <-tick.C:
		case <-limit:
			return false, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	return true, nil
}

// erase removes all files of a VM; its lock is held. The data directory goes at once, lock and all, so nobody sees a VM
// without a lock. Killed in between, it can be done again.
func (s Store) erase(name string) error {
	if err := os.RemoveAll(s.run(name)); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.Data, passing+name+"-*")
	if err != nil {
		return err
	}
	if err := os.Rename(s.data(name), filepath.Join(tmp, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.RemoveAll(tmp)
}

// writeJSON replaces a file in one step: a reader, and a process after a crash, sees the old or the new content. With
// durable it waits for the disk, so that the same is true after a power cut.
func writeJSON(path string, v any, durable bool) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil && durable {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
