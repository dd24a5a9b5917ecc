package lab

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/test/guest"
)

// bootTime is how long a guest may take to report. Without KVM, beside other tests, it needs some ten seconds.
const bootTime = 3 * time.Minute

// machine is a node with the command virtlet: beside its network, /run and /var/lib are its own, so that the command and
// plugins find all where it is by default. Both are empty at the start, and have to be at the end.
type machine struct {
	node   *node
	holder *exec.Cmd
	bin    string
	flags  []string // of run: plugins and networks
}

// settle runs in the new mount namespace: $1 is bound to $2, and so on.
const settle = `set -e
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=0755 tmpfs /var/lib
mkdir /run/netns
while [ $# -gt 0 ]; do
	mkdir -p "$2"
	mount --bind "$1" "$2"
	shift 2
done
echo ready
exec cat`

// machine makes one of a node, with the networks of a directory. binds are directories of the test that are seen elsewhere,
// by the place where they are seen. It goes with the test, and its VMs do.
func (n *node) machine(t *testing.T, confDir string, binds map[string]string) *machine {
	t.Helper()
	m := &machine{node: n, bin: testnet.Virtlet(t, t.TempDir()), flags: []string{"--cni-conf-dir", confDir}}
	for _, dir := range n.cni.BinDirs {
		m.flags = append(m.flags, "--cni-bin-dir", dir)
	}
	args := []string{"-c", settle, "machine"}
	for place, dir := range binds {
		args = append(args, dir, place)
	}
	m.holder = exec.Command("/bin/sh", args...)
	m.holder.Stderr = os.Stderr
	m.holder.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	stdin, err := m.holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := m.holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Do(m.holder.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.end(t)
		stdin.Close()
		m.holder.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("prepare a machine: %q, %v", line, err)
	}
	return m
}

// end removes the VMs and reports what is left.
func (m *machine) end(t *testing.T) {
	if names := strings.Fields(m.virtlet(t, "ps", "-q")); len(names) > 0 {
		for _, name := range names {
			if t.Failed() {
				t.Logf("console of %s:\n%s", name, m.virtlet(t, "logs", name))
			}
		}
		m.virtlet(t, append([]string{"rm", "-f"}, names...)...)
	}
	root := fmt.Sprintf("/proc/%d/root", m.holder.Process.Pid)
	for _, dir := range []string{"/run", "/var/lib"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() && !keptByPlugins(e.Name()) {
				t.Errorf("%s: left behind: %s", m.node.Name, strings.TrimPrefix(path, root))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// keptByPlugins says whether a file is no VM's: host-local's memory of the last address, its lock or that of iptables, or
// flanneld's.
func keptByPlugins(name string) bool {
	return strings.HasPrefix(name, "last_reserved_ip") || slices.Contains([]string{"lock", "xtables.lock", "subnet.env"}, name)
}

// command is the command virtlet on the machine.
func (m *machine) command(args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(m.holder.Process.Pid), "--net", "--mount", "--", m.bin}
	return exec.Command("nsenter", append(enter, args...)...)
}

// virtlet runs the command and gives its standard output; it must succeed.
func (m *machine) virtlet(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := m.command(args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("virtlet %q: %v\n%s", args, err, stderr.String())
	}
	return string(out)
}

// start is the command that starts a VM, detached.
func (m *machine) start(name string, args ...string) *exec.Cmd {
	return m.command(append(append([]string{"run", "-d", "--name", name}, m.flags...), args...)...)
}

// run starts the test guest on networks whose veths are to be joined by datapath d, and checks that they are.
func (m *machine) run(t *testing.T, name string, d podnet.Datapath, flags ...string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	kernel, initrd, cmdline := guest.Artifacts(t)
	boot := []string{"--memory", "192M", "--kernel", kernel, "--initrd", initrd, "--append", cmdline, "--datapath", string(wishes[d])}
	if out, err := m.start(name, append(boot, flags...)...).CombinedOutput(); err != nil {
		t.Fatalf("start %s: %v\n%s", name, err, out)
	}
	var st struct{ Ports []podnet.Join }
	var had nic.Recording
	for flag, into := range map[string]any{"--json": &st, "--snapshot": &had} {
		if err := json.Unmarshal([]byte(m.virtlet(t, "inspect", flag, name)), into); err != nil {
			t.Fatal(err)
		}
	}
	joined(t, d, had.Snapshot, st.Ports)
	words := map[podnet.Datapath]string{podnet.Bridged: "bridge vltbr0 (the default of a veth)", podnet.Redirected: "redirect to and from eth0 by ebpf (asked for)"}
	if out := m.virtlet(t, "inspect", name); !strings.Contains(out, words[d]) {
		t.Fatalf("inspect does not say %q:\n%s", words[d], out)
	}
}

// report waits for what the guest of that name says of itself.
func (m *machine) report(t *testing.T, name string) guest.Report {
	t.Helper()
	for end := time.Now().Add(bootTime); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if r, ok := guest.ParseReport([]byte(m.virtlet(t, "logs", name))); ok {
			return r
		}
	}
	t.Fatalf("%s did not report within %s", name, bootTime)
	return guest.Report{}
}

// type_ types a line at a guest's console and gives what the console says until it is done.
func (m *machine) type_(t *testing.T, name, line string) string {
	t.Helper()
	return guest.Type(t, m.command("console", name), line)
}
