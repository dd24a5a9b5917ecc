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
	t      *testing.T
	dir    string // shared with the node: logs, images, configuration
	bin    string // containerd's programs
	holder *exec.Cmd
	stdin  io.WriteCloser
	answer *bufio.Reader
	cgroup string // above those of its pods

	runtime cri.RuntimeServiceClient
}

const configuration = `version = 2
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "PLUGINS"
conf_dir = "DIR/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "virtlet"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.virtlet]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
container_annotations = ["virtlet.cloud/*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.virtlet-two]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
cni_conf_dir = "DIR/two.d"
cni_max_conf_num = 2
`

const network = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1430,
"ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "198.51.100.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]}`

// secondNetwork is of the handler virtlet-two, beside the first. Its name comes before that of the first.
const secondNetwork = `{"cniVersion": "1.0.0", "name": "data", "plugins": [{"type": "bridge", "bridge": "cni1", "mtu": 1400,
"ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "203.0.113.0/24"}]]}}]}`

// newNode makes a machine where containerd runs with the handler.
func newNode(t *testing.T) *node {
	t.Helper()
	n := newMachine(t)
	n.startContainerd()
	return n
}

// newMachine makes a machine where containerd has not been started yet.
func newMachine(t *testing.T) *node {
	t.Helper()
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	bin := os.Getenv("VIRTLET_CONTAINERD")
	if bin == "" {
		t.Skip("needs containerd: set VIRTLET_CONTAINERD to what hack/containerd.sh prints")
	}
	n := &node{t: t, dir: t.TempDir(), bin: bin}
	if err := os.Chmod(filepath.Dir(n.dir), 0o711); err != nil {
		t.Fatal(err)
	}
	n.cgroup = fmt.Sprintf("/virtlet-test-%d", os.Getpid())
	n.write("config.toml", strings.NewReplacer("PLUGINS", testnet.Plugins(t), "DIR", n.dir).Replace(configuration))
	n.write("net.d/10-pods.conflist", network)
	n.write("two.d/10-pods.conflist", network)
	n.write("two.d/20-second.conflist", secondNetwork)
	shim := filepath.Join(n.dir, "bin")
	build := exec.Command("go", "build", "-o", shim+"/", "github.com/virtlet/virtlet/cmd/...")
	if given := os.Getenv("VIRTLET_BIN"); given != "" {
		build = exec.Command("install", "-D", "-t", shim, given, filepath.Join(filepath.Dir(given), "containerd-shim-virtlet-v2"))
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", build, err, out)
	}
	n.holder = exec.Command("/proc/self/exe")
	n.holder.Env = append(os.Environ(), "PATH="+shim+":"+os.Getenv("PATH"), "NODE_LOG="+n.dir+"/containerd.log",
		nodeEnv+"="+bin+"/containerd --config "+n.dir+"/config.toml")
	// It ends when its standard input does, and so with this process.
	n.holder.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	n.holder.Stderr = os.Stderr
	var err error
	if n.stdin, err = n.holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := n.holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	n.answer = bufio.NewReader(out)
	if err := n.holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.end)
	n.await("ready")
	return n
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
	n.eventually("containerd is ready", func() bool {
		st, err := n.runtime.Status(n.t.Context(), &cri.StatusRequest{})
		if err != nil {
			return false
		}
		for _, c := range st.Status.Conditions {
			if !c.Status {
				return false
			}
		}
		return true
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
	at := []string{"-m", "-n", "-p", "-t", fmt.Sprint(n.holder.Process.Pid), filepath.Join(n.dir, "bin", "virtlet")}
	out, err := exec.Command("nsenter", append(at, args...)...).CombinedOutput()
	return string(out), err
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

// limit bounds one call of CRI.
func (n *node) limit() context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	n.t.Cleanup(cancel)
	return ctx
}
