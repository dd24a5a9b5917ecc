package cni

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// EndOrphans kills the plugins that still run for a container whose runtime was killed, and waits until they are gone. A
// plugin dies with the runtime, but not the plugins that it calls itself, and an IPAM plugin that goes on alone could
// take an address after the DEL that is to free it. Plugins are known by CNI_CONTAINERID in their environment, which
// the specification demands. It must not be called while a verb runs for the container.
func EndOrphans(containerID string) error {
	if containerID == "" {
		return nil
	}
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	want := []byte("CNI_CONTAINERID=" + containerID)
	var errs []error
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		// Opened before the look: from then on the descriptor is that process for ever.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone
		}
		if env, err := os.ReadFile(file); err == nil && has(env, want) {
			errs = append(errs, end(fd, pid))
		}
		unix.Close(fd)
	}
	return errors.Join(errs...)
}

// has says whether one of the entries, each ended by a zero byte, is want.
func has(env, want []byte) bool {
	for entry := range bytes.SplitSeq(env, []byte{0}) {
		if bytes.Equal(entry, want) {
			return true
		}
	}
	return false
}

func end(pidfd, pid int) error {
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("kill plugin (pid %d): %w", pid, err)
	}
	const limit = 5 * time.Second
	for deadline := time.Now().Add(limit); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) && time.Now().Before(deadline) {
			continue
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("it is still there after %s", limit)
		}
		if err != nil {
			return fmt.Errorf("wait for the end of plugin (pid %d): %w", pid, err)
		}
		return nil
	}
}
