package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	// overlayTimeout bounds one run of qemu-img: it writes four clusters, whatever the size of the disk.
	overlayTimeout = 30 * time.Second
	// killDelay is how long a killed qemu-img may still hold its output open.
	killDelay = time.Second
	// maxOutput is how much of what qemu-img says is kept, in bytes.
	maxOutput = 2048
)

// CreateOverlay makes an empty qcow2 image at path for a disk of size bytes, usually that of the base image, and opens
// it for reading and writing. Its header names no backing file: QEMU gets the base as an open node. There must be no
// file at path. The caller closes the file, and removes it with the VM; a failure leaves none.
//
// qemuImg is the qemu-img program, looked up in PATH unless it has a slash. It works on the opened file and never sees
// path, which it could take for a network address; it is killed with its children when ctx ends, when it takes longer
// than 30 seconds, or when this process dies.
func CreateOverlay(ctx context.Context, qemuImg, path string, size int64) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("create overlay %q: %w", path, err)
	}
	if size <= 0 || size%sector != 0 {
		return fail(fmt.Errorf("bad size %d: use a positive multiple of %d", size, sector))
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail(cause(err))
	}
	if err = format(ctx, qemuImg, f, size); err == nil {
		err = verify(f, size)
	}
	if err != nil {
		return fail(errors.Join(err, f.Close(), os.Remove(path)))
	}
	return f, nil
}

// format lets qemu-img write an empty qcow2 image into f.
func format(ctx context.Context, qemuImg string, f *os.File, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, overlayTimeout)
	defer cancel()
	const fd = "/proc/self/fd/3" // the first of ExtraFiles
	cmd := exec.CommandContext(ctx, qemuImg, "create", "-q", "-f", string(QCOW2), fd, strconv.FormatInt(size, 10))
	out := &firstBytes{left: maxOutput}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = killDelay
	cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }

	// Pdeathsig comes when the thread that started the child ends (prctl(2)), so this one has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: install qemu-img (Debian: qemu-utils), or give its path", err)
	case ctx.Err() != nil:
		return fmt.Errorf("%s did not end: %w%s", qemuImg, ctx.Err(), out)
	case errors.Is(err, exec.ErrWaitDelay):
		// It left children behind that hold its output open.
		return errors.Join(fmt.Errorf("%s: %w%s", qemuImg, err, out), killGroup(cmd.Process.Pid))
	}
	return fmt.Errorf("%s: %w%s", qemuImg, err, out)
}

// killGroup kills a process group; one that is gone already is no error.
func killGroup(pid int) error {
	if err := unix.Kill(-pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process group %d: %w", pid, err)
	}
	return nil
}

// verify looks at what qemu-img has made, as at any other image.
func verify(f *os.File, size int64) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	_, virtual, err := check(f, st.Size(), QCOW2)
	if err != nil {
		return fmt.Errorf("verify what qemu-img made: %w", err)
	}
	if virtual != size {
		return fmt.Errorf("verify what qemu-img made: a disk of %d bytes instead of %d", virtual, size)
	}
	return nil
}

// cause gives the bare error of an operation on a path which the message names already.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// firstBytes keeps the first bytes that are written to it and takes the rest without keeping it.
type firstBytes struct {
	b    []byte
	left int
}

func (w *firstBytes) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.b, w.left = append(w.b, p[:n]...), w.left-n
	return len(p), nil
}

// String gives the bytes as the end of an error: in one line, and nothing that a terminal would obey.
func (w *firstBytes) String() string {
	s := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.TrimSpace(string(w.b)))
	if s == "" {
		return ""
	}
	return ": " + s
}
