package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// isolatedEnv marks the process that isolate has started.
const isolatedEnv = "VIRTLET_BENCH_ISOLATED"

// isolate runs this program again in namespaces of its own - an empty network, a directory of named namespaces that ends with
// it - and says that it has, with the exit code. Whatever way the program ends, nothing of it is left on the machine.
func isolate() (done bool, code int, err error) {
	if os.Geteuid() != 0 {
		return true, 1, errors.New("needs root: it makes network namespaces")
	}
	if os.Getenv(isolatedEnv) == "" {
		runtime.LockOSThread() // the death signal is that of the thread
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), isolatedEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return true, max(exit.ExitCode(), 1), nil
		}
		return true, 0, err
	}
	if err := os.MkdirAll(netns.Dir, 0o755); err != nil {
		return true, 1, err
	}
	if err := unix.Mount("tmpfs", netns.Dir, "tmpfs", 0, "mode=0755"); err != nil {
		return true, 1, fmt.Errorf("mount on %s: %w", netns.Dir, err)
	}
	return false, 0, nil
}
