// Package pods holds tests of pods: a real containerd on a node of its own, the shim as it runs it, and a real guest. The
// client speaks CRI, as the kubelet does.
//
// A node is a set of namespaces (mount, network, process, IPC, host name) whose first process is this test's program: it
// makes the node's file systems, starts and kills containerd when it is told to, and takes everything along when it ends.
package pods

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nodeEnv makes this program the first process of a node; its value is the command that starts containerd.
const nodeEnv = "VIRTLET_TEST_NODE"

func TestMain(m *testing.M) {
	if command := os.Getenv(nodeEnv); command != "" {
		if err := runNode(strings.Fields(command)); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runNode is the node: it answers each line of its standard input by one of its output.
func runNode(containerd []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Namespaces that others pin: a copy of their mounts would keep them.
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, "/run/") {
			_ = unix.Unmount(at, unix.MNT_DETACH) // one below another has gone with it
		}
	}
	for dir, kind := range map[string]string{"/proc": "proc", "/run": "tmpfs", "/var/lib": "tmpfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	log, err := os.OpenFile(os.Getenv("NODE_LOG"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	var pid int
	go reap()
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "start":
			// Not by os/exec: this process reaps whatever ends.
			p, err := os.StartProcess(containerd[0], containerd, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{nil, log, log}})
			if err != nil {
				return err
			}
			pid = p.Pid
		case "kill":
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				return err
			}
			for unix.Kill(pid, 0) == nil {
				time.Sleep(10 * time.Millisecond)
			}
		}
		fmt.Println("done")
	}
	return nil
}

// reap takes leave of processes whose parent has ended: that is the first process's task.
func reap() {
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); err != nil {
			time.Sleep(50 * time.Millisecond) // none at the moment
		}
	}
}
