package testnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// isolated marks the process that Isolate started.
const isolated = "VIRTLET_TEST_ISOLATED"

// Isolate is for a TestMain: it runs the tests in a process whose network namespace stands for the node, with nothing
// but a loopback in it, and with a directory of named namespaces of its own. What such tests start - plugins, QEMU, the
// real binary - can neither reach nor change the machine's network. Without root the tests run as they are, to skip.
// It ends the process, after the functions that get the exit code and give another.
func Isolate(m *testing.M, after ...func(code int) int) {
	run := func() {
		code := m.Run()
		for _, f := range after {
			code = f(code)
		}
		if scratch != "" {
			os.RemoveAll(scratch)
		}
		os.Exit(code)
	}
	if os.Geteuid() != 0 {
		run()
	}
	if os.Getenv(isolated) == "" {
		os.Exit(again())
	}
	if err := settle(); err != nil {
		fmt.Fprintln(os.Stderr, "isolate the tests:", err)
		os.Exit(1)
	}
	run()
}

// again runs this program with the same arguments in namespaces of its own, and gives its exit code.
func again() int {
	runtime.LockOSThread() // the death signal is that of the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "isolate the tests:", err)
		return 1
	}
	return 0
}

// settle makes the new namespaces fit to live in.
func settle() error {
	if err := os.MkdirAll(netns.Dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", netns.Dir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount on %s: %w", netns.Dir, err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
