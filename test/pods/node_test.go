package pods

import (
	"bufio"
	"context"
	"fmt"
	"io"
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
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
)

// node is a machine with containerd and the shim on it.
type node struct {
	t       testing.TB
	dir     string // shared with the node: logs, images, configuration
	bin     string // containerd's programs; "": it has none
	version string // containerd's
	holder  *exec.Cmd
	stdin   io.WriteCloser
	answer  *bufio.Reader
	cgroup  string // above those of its pods

	runtime cri.RuntimeServiceClient
}

// newNode makes a node where containerd runs with the handler.
func newNode(t testing.TB) *node {
	t.Helper()
	n := newMachine(t)
	n.startContainerd()
	return n
}

// newMachine makes a node where containerd has not been started yet.
func newMachine(t testing.TB) *node {
	t.Helper()
	n := newBare(t)
	n.bin = os.Getenv("VIRTLET_CONTAINERD")
	if n.bin == "" {
		t.Skip("needs containerd: set VIRTLET_CONTAINERD to what hack/containerd.sh prints")
	}
	n.version = containerdVersion(t, n.bin)
	t.Log("containerd ", n.version)
	n.write("config.toml", configuration(n.version, n.dir, testnet.Plugins(t)))
	n.write("net.d/10-pods.conflist", network)
	n.write("two.d/10-pods.conflist", network)
	n.write("two.d/20-second.conflist", secondNetwork)
	n.start()
	return n
}

// newBare prepares a node without anything on it but the shim; start starts it.
func newBare(t testing.TB) *node {
	t.Helper()
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	n := &node{t: t, dir: t.TempDir()}
	if err := os.Chmod(filepath.Dir(n.dir), 0o711); err != nil {
		t.Fatal(err)
	}
	n.cgroup = fmt.Sprintf("/virtlet-test-%d", os.Getpid())
	build := exec.Command("go", "build", "-o", filepath.Dir(n.shim())+"/", "github.com/virtlet/virtlet/cmd/...")
	if given := os.Getenv("VIRTLET_BIN"); given != "" {
		build = exec.Command("install", "-D", "-t", filepath.Dir(n.shim()), given, filepath.Join(filepath.Dir(given), "containerd-shim-virtlet-v2"))
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", build, err, out)
	}
	return n
}

// shim is where the shim is.
func (n *node) shim() string { return filepath.Join(n.dir, "bin/containerd-shim-virtlet-v2") }

// path is where the node's programs are found.
func (n *node) path() string {
	all := []string{filepath.Dir(n.shim()), n.bin, os.Getenv("VIRTLET_RUNC"), os.Getenv("PATH")}
	return strings.Join(slices.DeleteFunc(all, func(dir string) bool { return dir == "" }), ":")
}

// start starts the node, with nothing running on it.
func (n *node) start() {
	n.t.Helper()
	n.holder = exec.Command("/proc/self/exe")
	n.holder.Env = append(os.Environ(), "PATH="+n.path(), "NODE_LOG="+n.dir+"/containerd.log", nodeEnv+"="+n.bin+"/containerd --config "+n.dir+"/config.toml")
	// It ends when its standard input does, and so with this process.
	n.holder.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	n.holder.Stderr = os.Stderr
	var err error
	if n.stdin, err = n.holder.StdinPipe(); err != nil {
		n.t.Fatal(err)
	}
	out, err := n.holder.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	n.answer = bufio.NewReader(out)
	if err := n.holder.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(n.end)
	n.await("ready")
}

// end takes the node away, and shows containerd's log of a test that failed.
func (n *node) end() {
	n.stdin.Close()
	if err := n.holder.Wait(); err != nil {
		n.t.Errorf("the node: %v", err)
	}
	if n.t.Failed() {
		if log, err := os.ReadFile(n.dir + "/containerd.log"); err == nil {
			n.t.Logf("containerd:\n%s", log[max(0, len(log)-12000):])
		}
	}
	for _, dir := range n.cgroups() {
		removeGroups(dir)
	}
}

// removeGroups removes a cgroup and those below it, the lowest first.
func removeGroups(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeGroups(filepath.Join(dir, e.Name()))
		}
	}
	_ = unix.Rmdir(dir)
}

// cgroups gives the node's group in each hierarchy that has it.
func (n *node) cgroups() []string {
	all, _ := filepath.Glob("/sys/fs/cgroup/*" + n.cgroup)
	one, _ := filepath.Glob("/sys/fs/cgroup" + n.cgroup)
	return append(all, one...)
}

func (n *node) write(name, text string) {
	n.t.Helper()
	path := filepath.Join(n.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// root is the node's file system, seen from here.
func (n *node) root(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", n.holder.Process.Pid, path)
}

func (n *node) store() vm.Store {
	return vm.Store{Run: n.root("/run/virtlet"), Data: n.root("/var/lib/virtlet")}
}

func (n *node) order(line string) {
	n.t.Helper()
	if _, err := fmt.Fprintln(n.stdin, line); err != nil {
		n.t.Fatal(err)
	}
	n.await("done")
}

func (n *node) await(want string) {
	n.t.Helper()
	if line, err := n.answer.ReadString('\n'); strings.TrimSpace(line) != want {
		n.t.Fatalf("the node says %q, %v", line, err)
	}
}

// startContainerd starts it and connects to it.
func (n *node) startContainerd() {
	n.t.Helper()
	n.order("start")
	socket := n.root("/run/containerd/containerd.sock")
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	n.runtime = cri.NewRuntimeServiceClient(conn)
	var said string
	defer func() {
		if n.t.Failed() {
			n.t.Log("containerd said last: ", said)
		}
	}()
	n.eventually("containerd is ready", func() bool {
		st, err := n.runtime.Status(n.t.Context(), &cri.StatusRequest{})
		if said = fmt.Sprint(st, err); err != nil {
			return false
		}
		ready := 0
		for _, c := range st.Status.Conditions {
			if c.Status && (c.Type == "RuntimeReady" || c.Type == "NetworkReady") { // others are warnings
				ready++
			}
		}
		return ready == 2
	})
}

const patience = 3 * time.Minute // without KVM, beside other tests, a guest needs some ten seconds to boot

// eventually waits until ok.
func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// run runs a program in the node's network.
func (n *node) run(args ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"-n", "-t", fmt.Sprint(n.holder.Process.Pid)}, args...)...).CombinedOutput()
	return string(out), err
}

// virtlet runs the command on the node.
func (n *node) virtlet(args ...string) (string, error) {
	out, err := n.enter("/", append([]string{filepath.Join(filepath.Dir(n.shim()), "virtlet")}, args...)...).CombinedOutput()
	return string(out), err
}

// enter prepares a program that runs on the node as any other of its processes, in a directory.
func (n *node) enter(dir string, args ...string) *exec.Cmd {
	args = append([]string{"-m", "-n", "-p", "-i", "-u", "-t", fmt.Sprint(n.holder.Process.Pid), "sh", "-c", `cd "$0" && exec "$@"`, dir}, args...)
	cmd := exec.Command("nsenter", args...)
	cmd.Env = append(os.Environ(), "PATH="+n.path())
	return cmd
}

// load gives containerd an image.
func (n *node) load(image string) {
	n.t.Helper()
	cmd := exec.Command(n.bin+"/ctr", "-a", n.root("/run/containerd/containerd.sock"), "-n", "k8s.io", "images", "import", image)
	if out, err := cmd.CombinedOutput(); err != nil {
		n.t.Fatalf("%s: %v: %s", cmd, err, out)
	}
}

// blockDevice makes a block device of a size, which goes with the test.
func (n *node) blockDevice(size int64) string {
	n.t.Helper()
	path := filepath.Join(n.dir, "volume")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		n.t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		n.t.Fatalf("make a block device: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	n.t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			n.t.Errorf("%v: %s", err, out)
		}
	})
	return device
}

// state is what pods could leave behind, in words.
func (n *node) state() []string {
	n.t.Helper()
	var all []string
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", n.holder.Process.Pid))
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if strings.HasPrefix(f[1], "/run/") || strings.HasPrefix(f[1], "/var/lib/") {
			all = append(all, "mount "+f[1])
		}
	}
	for _, dir := range []string{"/run/virtlet", "/var/lib/virtlet", "/run/netns", "/run/containerd/s", "/var/lib/cni/results"} {
		_ = filepath.WalkDir(n.root(dir), func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				all = append(all, "file "+strings.TrimPrefix(path, n.root("")))
			}
			return nil
		})
	}
	links, err := n.run("ip", "-br", "link")
	if err != nil {
		n.t.Fatalf("%v: %s", err, links)
	}
	for line := range strings.Lines(links) {
		name, _, _ := strings.Cut(strings.Fields(line)[0], "@")
		if name != "lo" && name != "cni0" && name != "cni1" {
			all = append(all, "link "+name)
		}
	}
	for _, dir := range n.cgroups() {
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() && path != dir && filepath.Dir(path) != dir { // the pod's own is the kubelet's
				all = append(all, "cgroup "+path)
			}
			return nil
		})
	}
	for pid, command := range n.processes() {
		if !strings.Contains(command, "/containerd --config") && pid != n.holder.Process.Pid {
			all = append(all, fmt.Sprintf("process %d %s", pid, command))
		}
	}
	slices.Sort(all)
	return all
}

// processes gives the node's processes with their command lines, by our numbers.
func (n *node) processes() map[int]string {
	all := map[int]string{}
	mine, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", n.holder.Process.Pid))
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		ns, _ := os.Readlink(dir + "/ns/pid")
		command, _ := os.ReadFile(dir + "/cmdline")
		var pid int
		if _, err := fmt.Sscanf(dir, "/proc/%d", &pid); err == nil && ns == mine && len(command) > 0 { // a zombie has none
			all[pid] = strings.TrimSpace(strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	return all
}

// process gives the number of the only process whose command line has some text.
func (n *node) process(text string) int {
	n.t.Helper()
	var found []int
	for pid, command := range n.processes() {
		if strings.Contains(command, text) {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		n.t.Fatalf("%d processes %q in %v", len(found), text, n.processes())
	}
	return found[0]
}

// rollup reads a value of a process's memory (/proc/PID/smaps_rollup), in MB; 0 when it has ended.
func (n *node) rollup(pid int, key string) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == key {
			kB, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				n.t.Fatal(err)
			}
			return kB * 1024 / 1e6
		}
	}
	return 0
}

// limit bounds one call of CRI.
func (n *node) limit() context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	n.t.Cleanup(cancel)
	return ctx
}
