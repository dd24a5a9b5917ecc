package dhcp

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/virtlet/virtlet/internal/testnet"
)

// machine is a guest's user space: processes, mounts and a host name of its own in the guest's network namespace, with
// /etc, /run and /var/lib in a directory. No systemd and no D-Bus runs in it.
type machine struct {
	t   testing.TB
	dir string
	pid string // of its first process, outside
	out said

	ended chan struct{} // closed when the program that start started has ended
}

// said is what the programs in a machine said.
type said struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

// boot is the first process. /sys is read-only, by which systemd's programs know that no udev is to be waited for
// (https://systemd.io/CONTAINER_INTERFACE). The machine ends with its standard input: also when the test is killed.
const boot = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs -o ro sysfs /sys
for d in etc run var/lib; do mount --bind "$0/$d" "/$d"; done
hostname localhost
echo ready
read -r _
`

// newMachine boots a machine whose /etc has copies of some of ours, and the given files.
func newMachine(t testing.TB, guest *testnet.Namespace, files map[string]string) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir()}
	for _, d := range []string{"etc", "run", "var/lib/dhcp", "var/lib/dhcpcd"} {
		m.mkdir(d)
	}
	args := []string{"-a"}
	for _, f := range []string{"passwd", "group", "nsswitch.conf", "services", "protocols", "fstab", "dhcp"} {
		if f = filepath.Join("/etc", f); exists(f) {
			args = append(args, f)
		}
	}
	if out, err := exec.Command("cp", append(args, filepath.Join(m.dir, "etc"))...).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	for path, text := range files {
		path = m.mkdir(filepath.Dir(path)) + "/" + filepath.Base(path)
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	init := exec.Command("sh", "-c", boot, m.dir)
	init.Stderr = &m.out
	init.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWPID}
	ready, err := init.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := init.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	guest.Must(init.Start)
	m.pid = strconv.Itoa(init.Process.Pid)
	t.Cleanup(func() {
		stdin.Close() // the kernel kills all that the first process leaves behind
		_ = init.Wait()
		if t.Failed() {
			t.Log(m.out.text.String())
		}
	})
	if line, err := bufio.NewReader(ready).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the machine does not boot: %q, %v", line, err)
	}
	return m
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func (m *machine) mkdir(path string) string {
	m.t.Helper()
	path = filepath.Join(m.dir, path)
	if err := os.MkdirAll(path, 0o755); err != nil {
		m.t.Fatal(err)
	}
	return path
}

// readAll gives the text of the files that a pattern fits, of none as well.
func (m *machine) readAll(pattern string) (text string) {
	files, _ := filepath.Glob(filepath.Join(m.dir, pattern))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		text += string(b)
	}
	return text
}

func (m *machine) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", m.pid, "-m", "-u", "-n", "-p", "--"}, args...)...)
}

// run executes a program to its end and gives what it printed.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.command(args...).CombinedOutput()
	if err != nil {
		m.t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// start executes a program that stays. It ends with the machine at the latest.
func (m *machine) start(args ...string) {
	m.t.Helper()
	cmd := m.command(args...)
	cmd.Stdout, cmd.Stderr = &m.out, &m.out
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	fmt.Fprintf(&m.out, "--- %s\n", strings.Join(args, " "))
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	m.ended = ended
	m.t.Cleanup(func() { // runs before the machine's end
		m.signal("KILL")
		<-ended
	})
}

// signal sends a signal to every process but the first.
func (m *machine) signal(name string) {
	_ = m.command("sh", "-c", "kill -"+name+" -1").Run()
}

// cut kills every process but the first and forgets /run, as a power cut does.
func (m *machine) cut() {
	m.t.Helper()
	m.signal("KILL")
	<-m.ended
	m.run("sh", "-c", "rm -rf /run/*")
}
