package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCreateOverlay(t *testing.T) {
	qemuImg(t, "", "--version")
	// A name that qemu-img would take for a protocol, options and a network address.
	path := filepath.Join(t.TempDir(), "nbd:localhost,port=1 %s.qcow2")
	f, err := CreateOverlay(t.Context(), "qemu-img", path, 10<<30)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o600 {
		t.Errorf("mode %v, want 0600", st.Mode())
	}
	if _, err := f.WriteAt([]byte{0}, st.Size()); err != nil {
		t.Errorf("the overlay is not open for writing: %v", err)
	}
	again, info, err := Open(path, true, QCOW2)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if info.VirtualSize != 10<<30 {
		t.Errorf("got %+v", info)
	}
	if _, err := CreateOverlay(t.Context(), "qemu-img", path, 1<<30); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	if _, _, err := Open(path, false, QCOW2); err != nil {
		t.Errorf("the refused CreateOverlay touched the file that was there: %v", err)
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qemu-img")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCreateOverlayFails(t *testing.T) {
	empty := t.TempDir()
	tests := []struct {
		name, program string
		size          int64
		text          string
	}{
		{"not in PATH", "qemu-img-of-nobody", 1 << 30, "install qemu-img"},
		{"no such path", filepath.Join(empty, "qemu-img"), 1 << 30, "install qemu-img"},
		{"not executable", empty, 1 << 30, "permission denied"},
		{"fails", script(t, `printf 'no\033[31m luck\n' >&2; exit 3`), 1 << 30, "exit status 3: no [31m luck"},
		{"says too much", script(t, `yes x | head -c 1000000 >&2; exit 1`), 1 << 30, "exit status 1: x x"},
		{"does nothing", script(t, `exit 0`), 1 << 30, "empty"},
		{"writes something else", script(t, `head -c 4096 /dev/zero >/proc/self/fd/3`), 1 << 30, "no qcow2 header"},
		{"leaves a child with its output", script(t, `sleep 300 &`), 1 << 30, "WaitDelay"},
		{"another size", script(t, `exec qemu-img "$1" "$2" "$3" "$4" "$5" 1M`), 1 << 30, "1048576 bytes instead of 1073741824"},
		{"size too large for the format", "qemu-img", 1 << 62, "qemu-img: "},
		{"no size", "qemu-img", 0, "bad size 0"},
		{"odd size", "qemu-img", 513, "bad size 513"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "overlay")
			f, err := CreateOverlay(t.Context(), tt.program, path, tt.size)
			if err == nil {
				f.Close()
				t.Fatal("it worked")
			}
			if !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v\nwant %q", err, tt.text)
			}
			if n := len(err.Error()); n > maxOutput+500 {
				t.Errorf("an error of %d bytes", n)
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the failure left a file: %v", err)
			}
		})
	}
	if _, err := CreateOverlay(t.Context(), "qemu-img", filepath.Join(empty, "no", "overlay"), 1<<30); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in no directory: %v", err)
	}
}

func TestCreateOverlayKillsAHangingProgram(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// It hangs, and so does a child that holds its output open.
	program := script(t, `sleep 300 & echo $$ $! >`+fifo+`; wait`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pids := make(chan string, 1)
	go func() {
		b, err := os.ReadFile(fifo) // waits for the writer
		if err != nil {
			t.Error(err)
		}
		pids <- string(b)
		cancel()
	}()
	path := filepath.Join(dir, "overlay")
	begin := time.Now()
	if _, err := CreateOverlay(ctx, program, path, 1<<30); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want %v", err, context.Canceled)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the failure left a file: %v", err)
	}
	for _, s := range strings.Fields(<-pids) {
		pid, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		awaitEnd(t, pid)
	}
}

// awaitEnd waits until a process is gone, or dead and waiting for its parent.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
	if n != 1 || err != nil {
		unix.Kill(pid, unix.SIGKILL)
		t.Errorf("process %d lives on (%d, %v)", pid, n, err)
	}
}

func TestCreateOverlayOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("needs qemu-img")
	}
	dir := t.TempDir()
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread gets a mount namespace of its own, which ends with it: it is never unlocked.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Errorf("make mounts private: %v", err)
			return
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Errorf("mount tmpfs: %v", err)
			return
		}
		path := filepath.Join(dir, "overlay")
		_, err := CreateOverlay(t.Context(), "qemu-img", path, 1<<30)
		if err == nil || !strings.Contains(err.Error(), "No space left on device") {
			t.Errorf("got %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the failure left a file: %v", err)
		}
	}()
	<-done
}
