package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout is how long KillPID waits: the kernel frees gigabytes of guest memory and its TAPs in that time.
const killTimeout = 5 * time.Second

// StartTime gives when the process of that id started, in clock ticks since boot (field 22 of /proc/PID/stat): it tells
// a reused id apart. 0: there is no such process, or it has ended and only waits for its parent.
func StartTime(pid int) uint64 {
	s, err := readStat(pid)
	if err != nil || s.ended() {
		return 0
	}
	return s.start
}

// KillPID ends a process that another, by now dead process had started, and waits until it is gone, up to 5 s. A
// process that is not there, or whose id belongs to another process by now, is no error.
func KillPID(pid int, start uint64) error {
	if pid <= 1 {
		return fmt.Errorf("kill process %d: no QEMU has that id", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w (needs Linux 5.3)", pid, err)
	}
	defer unix.Close(fd)
	// From here on fd is one process for ever, whatever becomes of the number.
	// One whose first thread has ended (a zombie already) may have others that still hold its files and memory; the pidfd
	// tells when the last has ended.
	if s, err := readStat(pid); err != nil || s.start != start {
		return nil
	}
	_ = unix.Kill(-pid, unix.SIGKILL) // what a wrapper script started; Start made the group
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	gone, err := awaitPidfd(fd, killTimeout)
	if err != nil {
		return fmt.Errorf("wait for the end of process %d: %w", pid, err)
	}
	if !gone {
		return fmt.Errorf("process %d is still there %v after SIGKILL: the kernel holds it, perhaps for an I/O that does not end", pid, killTimeout)
	}
	return nil
}

// awaitPidfd waits until the process has ended (its pidfd is readable then) and says whether it has.
func awaitPidfd(fd int, d time.Duration) (bool, error) {
	for end := time.Now().Add(d); ; {
		left := max(0, time.Until(end))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0, err
	}
}

// stat is what is read of /proc/PID/stat.
type stat struct {
	state byte
	start uint64
}

// ended says whether the process is a zombie or on its way to vanish, proc_pid_stat(5).
func (s stat) ended() bool { return s.state == 'Z' || s.state == 'X' }

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads what follows the program's name: that is in parentheses, and may hold some itself.
func parseStat(b []byte) (stat, error) {
	const state, start = 0, 22 - 3 // fields 3 and 22, counted from 1
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) <= start {
		return stat{}, fmt.Errorf("read process state: %d fields after the name, want more than %d", len(fields), start)
	}
	n, err := strconv.ParseUint(string(fields[start]), 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("read process state: start time: %w", err)
	}
	return stat{state: fields[state][0], start: n}, nil
}

var versionRE = regexp.MustCompile(`\bversion ([0-9]+(?:\.[0-9]+)+)`)

// Version asks a program of QEMU (an emulator or qemu-img; a name or a path) for its version, such as "7.2.22".
func Version(ctx context.Context, binary string) (string, error) {
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Env = []string{"LC_ALL=C"}
	cmd.WaitDelay = stderrGrace
	out := &tail{limit: stderrKept}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	m := versionRE.FindStringSubmatch(out.String())
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it is not QEMU's: it said %q", binary, out.String())
	}
	return m[1], nil
}

// vfioFD is how QEMU's help names the property that takes a descriptor.
var vfioFD = regexp.MustCompile(`(?m)^\s*fd=`)

// TakesVFIODescriptors asks a QEMU whether it takes PCI functions as descriptors: from version 9.0 on, unless it was built
// without iommufd.
func TakesVFIODescriptors(ctx context.Context, binary string) (bool, error) {
	cmd := exec.CommandContext(ctx, binary, "-machine", "none", "-device", "vfio-pci,help")
	cmd.Env = []string{"LC_ALL=C"}
	cmd.WaitDelay = stderrGrace
	out, err := cmd.CombinedOutput()
	if err != nil {
		return false, fmt.Errorf("ask %s whether it has vfio-pci: %w: %s", binary, err, bytes.TrimSpace(out))
	}
	return vfioFD.Match(out), nil
}
