package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ProcOptions says how QEMU runs.
type ProcOptions struct {
	// UID and GID are QEMU's user and group; they need no name. A caller that is root must give others than its own.
	// QEMU gets no supplementary groups but those of Command.Devices that need one.
	UID, GID uint32
	// Stderr gets what QEMU prints, beside the bounded copy that Exit keeps; nil: nobody. A writer that blocks ends up
	// blocking QEMU.
	Stderr io.Writer
	Dir    string // working directory; "": the caller's
	// MemoryLock is how many bytes of memory QEMU may lock (RLIMIT_MEMLOCK), for [Machine.MemoryLock]; 0: as many as the
	// caller.
	MemoryLock int64
}

// Process is a running QEMU. Its methods may be called by several goroutines, also after its end.
type Process struct {
	cmd   *exec.Cmd
	named func(string) string
	start uint64
	done  chan struct{} // closed when exit is set
	exit  Exit
}

// Exit is the end of a process.
type Exit struct {
	Code   int            // -1 when a signal ended it
	Signal syscall.Signal // 0: none
	Stderr string         // the last few KiB of what QEMU printed
}

// Err is nil when QEMU ended with status 0, otherwise an *Exit.
func (e Exit) Err() error {
	if e.Code == 0 && e.Signal == 0 {
		return nil
	}
	return &e
}

// Error implements error.
func (e *Exit) Error() string { return e.String() }

// String says how QEMU ended, with its own last words.
func (e Exit) String() string {
	s := fmt.Sprintf("QEMU ended with status %d", e.Code)
	if e.Signal != 0 {
		s = fmt.Sprintf("QEMU was ended by signal %d (%v)", int(e.Signal), e.Signal)
	}
	if words := strings.TrimSpace(e.Stderr); words != "" {
		s += ": " + words
	}
	return s
}

const (
	// stderrKept is how much of QEMU's output an Exit holds. A guest can make QEMU print without end.
	stderrKept = 4 << 10
	// stderrGrace bounds the wait for the end of QEMU's output after its end: something else may hold the pipe.
	stderrGrace = 2 * time.Second
)

// Start runs c as a child with nothing of the caller's but c.Files: no environment, no other descriptor (all that the
// caller has are marked close-on-exec for that), /dev/null as standard input. The child is in a process group of its
// own, so that Ctrl-C of a terminal is the caller's affair, and the kernel kills it when the caller's process dies.
//
// The caller must call [Process.Kill] or wait for the end; it keeps its c.Files and may close them when Start returns.
// A QEMU that does not like its arguments starts, and ends at once: see [Process.Wait].
func Start(c Command, o ProcOptions) (*Process, error) {
	cmd := exec.Command(c.Path, c.Args...)
	if cmd.Err != nil {
		return nil, fmt.Errorf("start QEMU: %w (install it, or name another program)", cmd.Err)
	}
	attr, err := attributes(c, o)
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	cmd.SysProcAttr = attr
	cmd.ExtraFiles = c.Files
	cmd.Dir = o.Dir
	cmd.Env = []string{"LC_ALL=C"} // the caller's environment may hold secrets; QEMU needs nothing of it
	last := &tail{limit: stderrKept}
	out := io.Writer(last)
	if o.Stderr != nil {
		out = io.MultiWriter(last, ignoreErrors{o.Stderr})
	}
	cmd.Stdout, cmd.Stderr = out, out // equal: one pipe and one writer for both
	cmd.WaitDelay = stderrGrace
	if err := closeOthersOnExec(); err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	p := &Process{cmd: cmd, named: c.named, done: make(chan struct{})}
	if o.MemoryLock > 0 {
		restore, err := lockMemory(uint64(o.MemoryLock))
		if err != nil {
			return nil, fmt.Errorf("start QEMU: %w", err)
		}
		defer restore()
	}
	started := make(chan error)
	go p.run(started, last)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start QEMU as uid %d: %w", o.UID, err)
	}
	return p, nil
}

// run starts the child and waits for it on one thread: the kernel's parent-death signal (prctl(2),
// PR_SET_PDEATHSIG) comes when the thread that forked ends, not the process, and Go ends idle threads.
func (p *Process) run(started chan<- error, last *tail) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := p.cmd.Start(); err != nil {
		started <- err
		return
	}
	defer close(p.done)
	if s, err := readStat(p.PID()); err == nil { // is there, at least as a zombie, until Wait
		p.start = s.start
	}
	started <- nil
	err := p.cmd.Wait()
	p.exit = Exit{Code: p.cmd.ProcessState.ExitCode(), Stderr: p.named(last.String())}
	if ws, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		p.exit.Signal = ws.Signal()
	}
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		p.exit.Stderr += "\n" + err.Error() // the output was cut short
	}
}

// PID gives the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// StartTime gives when the process started, in clock ticks since boot, as [StartTime].
func (p *Process) StartTime() uint64 { return p.start }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait blocks until the process has ended.
func (p *Process) Wait() Exit {
	<-p.done
	return p.exit
}

// Kill ends the process at once (SIGKILL), and with it its process group: a wrapper script may have QEMU as a child. It
// does not wait, and is no error after the end.
func (p *Process) Kill() error {
	select {
	case <-p.done: // its number, and that of its group, may be another's by now
		return nil
	default:
		_ = unix.Kill(-p.PID(), unix.SIGKILL) // without a group there is still the process
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill QEMU (pid %d): %w", p.PID(), err)
	}
	return nil
}

func attributes(c Command, o ProcOptions) (*syscall.SysProcAttr, error) {
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	if uid != 0 && o.UID == uid && o.GID == gid {
		return attr, nil // an unprivileged caller has nothing to drop, and no right to
	}
	if o.UID == 0 || o.GID == 0 {
		return nil, errors.New("refused to run as root: a guest that breaks out of QEMU would be root too; give an unprivileged uid and gid")
	}
	groups, err := deviceGroups(c.Devices, o.UID, o.GID)
	if err != nil {
		return nil, err
	}
	attr.Credential = &syscall.Credential{Uid: o.UID, Gid: o.GID, Groups: groups}
	return attr, nil
}

var limits sync.Mutex // of this process, while a child is born with others

// lockMemory raises the limit that a child inherits, and restore puts ours back. (Raised in the child after its start, it
// would come too late: QEMU locks memory before it speaks.)
func lockMemory(bytes uint64) (restore func(), err error) {
	limits.Lock()
	var was unix.Rlimit
	err = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &was)
	if err == nil {
		want := unix.Rlimit{Cur: bytes, Max: max(bytes, was.Max)}
		err = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &want)
	}
	if err != nil {
		limits.Unlock()
		return nil, fmt.Errorf("let it lock %d MiB of memory: %w (needs CAP_SYS_RESOURCE)", bytes>>20, err)
	}
	return func() {
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &was) // lowering it is always allowed
		limits.Unlock()
	}, nil
}

// deviceGroups gives the groups that a process of this uid and gid must be in to open the devices.
func deviceGroups(devices []string, uid, gid uint32) ([]uint32, error) {
	const rw = 0o6
	var groups []uint32
	for _, path := range devices {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("find device %s: %w", path, err)
		}
		// The first class that fits decides, as in the kernel's acl_permission_check.
		class := st.Mode & rw
		switch {
		case st.Uid == uid:
			class = st.Mode >> 6 & rw
		case st.Gid == gid:
			class = st.Mode >> 3 & rw
		case class != rw && st.Mode>>3&rw == rw && st.Gid != 0: // group root would open more than this device
			class = rw
			if !slices.Contains(groups, st.Gid) {
				groups = append(groups, st.Gid)
			}
		}
		if class != rw {
			return nil, fmt.Errorf("open device %s as uid %d: its mode %#o and owner %d:%d do not let it (give it a group of its own, as udev does: chgrp kvm, chmod 660)",
				path, uid, st.Mode&0o777, st.Uid, st.Gid)
		}
	}
	return groups, nil
}

// closeOthersOnExec marks every descriptor of this process close-on-exec. Go opens its own that way; those that the
// process inherited are not.
func closeOthersOnExec() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open descriptors: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd >= firstFD {
			unix.CloseOnExec(fd) // one that is closed by now is not inherited either
		}
	}
	return nil
}

// tail keeps the last bytes written to it.
type tail struct {
	limit int

	mu  sync.Mutex
	buf []byte
	cut bool
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b[max(0, len(b)-t.limit):]...)
	if over := len(t.buf) - t.limit; over > 0 || len(b) > t.limit {
		t.buf = slices.Delete(t.buf, 0, max(0, over))
		t.cut = true
	}
	return len(b), nil
}

// String gives whole lines where it can, without the control characters that a guest may have put there.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.buf
	if _, rest, ok := bytes.Cut(b, []byte("\n")); ok && t.cut {
		b = rest
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= ' ' && r != 0x7f {
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(b), "?"))
}

// ignoreErrors keeps a writer's error from ending the copy of QEMU's output, which would end QEMU by SIGPIPE.
type ignoreErrors struct{ io.Writer }

func (w ignoreErrors) Write(b []byte) (int, error) {
	w.Writer.Write(b)
	return len(b), nil
}
