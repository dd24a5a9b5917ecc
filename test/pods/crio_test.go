package pods

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
	"github.com/virtlet/virtlet/test/guest"
)

// crio stands for CRI-O 1.37 with runtime_type "vm": it runs the shim and speaks to it as that was seen to do. Other than
// containerd it mounts the images itself, serves no events, waits for nothing of a bundle but what it wrote, runs
// `start` for each container, never runs `delete`, and ends a sandbox by the signal that ends a container.
type crio struct {
	*node
	pod string // the sandbox's id
}

// container is what CRI-O has of one container.
type container struct {
	*crio
	id, bundle string
	task.TTRPCTaskService
	mu     sync.Mutex
	output bytes.Buffer
	read   sync.WaitGroup
}

// create makes a container as CRI-O does: bundle, FIFOs, `start`, Create.
func (c *crio) create(id, kind, netns string, files ...file) *container {
	c.t.Helper()
	k := &container{crio: c, id: id, bundle: "/run/containers/storage/" + id + "/userdata"}
	for _, f := range append(files, file{"config.json", k.config(kind, netns)}) {
		path := c.root(filepath.Join(k.bundle, f.name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			c.t.Fatal(err)
		}
		if err := os.WriteFile(path, f.data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := os.MkdirAll(c.root(k.bundle+"/rootfs"), 0o755); err != nil {
		c.t.Fatal(err)
	}
	stdout := k.fifo("stdout")
	k.listen(stdout)
	log, err := os.OpenFile(c.root(k.fifo("log")), os.O_RDONLY|unix.O_NONBLOCK, 0) // which waits for no writer
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { log.Close() })
	k.startShim()
	r, err := k.Create(c.limit(), &task.CreateTaskRequest{ID: id, Bundle: k.bundle, Stdout: stdout})
	if err != nil || r.Pid == 0 {
		c.t.Fatalf("create the %s: %v, %v", kind, r, err)
	}
	return k
}

// config is the container's config.json.
func (k *container) config(kind, netns string) []byte {
	bind := func(from, to string) map[string]any {
		return map[string]any{"type": "bind", "source": from, "destination": to, "options": []string{"bind", "rw"}}
	}
	b, err := json.Marshal(map[string]any{
		"ociVersion": "1.2.1", "hostname": "web",
		"process": map[string]any{"args": []string{"vm"}, "cwd": "/"},
		"root":    map[string]any{"path": k.bundle + "/rootfs"},
		"mounts": []any{
			bind(k.bundle+"/resolv.conf", "/etc/resolv.conf"), bind(k.bundle+"/shm", "/dev/shm"),
			bind(k.bundle+"/hostname", "/etc/hostname"), bind(k.bundle+"/.containerenv", "/run/.containerenv"),
		},
		"annotations": map[string]string{
			"io.kubernetes.cri-o.SandboxID": k.pod, "io.kubernetes.cri-o.ContainerType": kind,
			"io.kubernetes.cri-o.KubeName": "web", "io.kubernetes.cri-o.Namespace": "default",
			"io.container.manager": "cri-o", "virtlet.cloud/memory": "192Mi",
		},
		"linux": map[string]any{
			"cgroupsPath": k.cgroup + "/web/crio-" + k.id,
			"namespaces":  []any{map[string]any{"type": "ipc"}, map[string]any{"type": "network", "path": netns}},
		},
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return b
}

// fifo makes a FIFO.
func (k *container) fifo(name string) string {
	k.t.Helper()
	path := filepath.Join(k.bundle, name)
	if err := unix.Mkfifo(k.root(path), 0o700); err != nil {
		k.t.Fatal(err)
	}
	return path
}

// listen keeps what is written to a FIFO, until all who write to it are gone.
func (k *container) listen(path string) {
	k.read.Go(func() {
		f, err := os.Open(k.root(path)) // once there is who writes
		if err != nil {
			k.t.Error(err)
			return
		}
		defer f.Close()
		_, _ = io.Copy(k, f)
	})
}

func (k *container) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.output.Write(b)
}

func (k *container) said() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.output.String()
}

// startShim runs `start` as CRI-O does, and connects to what it names.
func (k *container) startShim() {
	k.t.Helper()
	cmd := k.enter(k.bundle, k.shim(), "-namespace", "default", "-address", "", "-publish-binary", "/usr/bin/crio", "-id", k.id, "start")
	cmd.Env = append(cmd.Env, "TTRPC_ADDRESS=", "GRPC_ADDRESS=", "NAMESPACE=default", "MAX_SHIM_VERSION=2", "GOMAXPROCS=2")
	out, err := cmd.CombinedOutput()
	var answer struct {
		Version           int
		Address, Protocol string
	}
	if err != nil || json.Unmarshal(out, &answer) != nil || answer.Version > 2 || answer.Protocol != "ttrpc" {
		k.t.Fatalf("start: %v: %s", err, out)
	}
	kept, err := os.ReadFile(k.root(k.bundle + "/address")) // by which a CRI-O that restarts finds it
	if err != nil || string(kept) != answer.Address {
		k.t.Errorf("the file address: %q, %v, and start said %q", kept, err, answer.Address)
	}
	conn, err := net.Dial("unix", k.root(strings.TrimPrefix(answer.Address, "unix://")))
	if err != nil {
		k.t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	k.t.Cleanup(func() { client.Close() })
	k.TTRPCTaskService = task.NewTTRPCTaskClient(client)
}

// run starts a container and waits for its end in the background, as CRI-O does.
func (k *container) run() (exit <-chan *task.WaitResponse) {
	k.t.Helper()
	if r, err := k.Start(k.limit(), &task.StartRequest{ID: k.id}); err != nil || r.Pid == 0 {
		k.t.Fatalf("start: %v, %v", r, err)
	}
	ended := make(chan *task.WaitResponse, 1)
	go func() {
		r, err := k.Wait(context.Background(), &task.WaitRequest{ID: k.id})
		if err != nil {
			k.t.Errorf("wait: %v", err)
		}
		ended <- r
	}()
	k.is(tasktypes.Status_RUNNING)
	return ended
}

func (k *container) is(want tasktypes.Status) {
	k.t.Helper()
	if r, err := k.State(k.limit(), &task.StateRequest{ID: k.id}); err != nil || r.Status != want || r.Bundle != k.bundle {
		k.t.Errorf("state %v, %v, want %v", r, err, want)
	}
}

// stop is CRI-O's StopContainer.
func (k *container) stop(ended <-chan *task.WaitResponse, code uint32) {
	k.t.Helper()
	if _, err := k.Kill(k.limit(), &task.KillRequest{ID: k.id, Signal: uint32(unix.SIGTERM)}); err != nil {
		k.t.Error(err)
	}
	select {
	case r := <-ended:
		if r.GetExitStatus() != code || r.GetExitedAt() == nil {
			k.t.Errorf("the end: %v, want code %d", r, code)
		}
	case <-k.limit().Done():
		k.t.Fatalf("no end; it has said:\n%s", k.said())
	}
	k.is(tasktypes.Status_STOPPED)
}

// remove is CRI-O's DeleteContainer: it waits for the end of the streams first.
func (k *container) remove() {
	k.t.Helper()
	k.read.Wait()
	if r, err := k.Delete(k.limit(), &task.DeleteRequest{ID: k.id}); err != nil || r.ExitedAt == nil {
		k.t.Errorf("delete: %v, %v", r, err)
	}
	if _, err := k.Shutdown(k.limit(), &task.ShutdownRequest{ID: k.id}); err != nil {
		k.t.Error(err)
	}
}

// cni runs the bridge plugin as libcni does, and keeps its result as that does.
func (c *crio) cni(command, netns string) (addr netip.Addr) {
	c.t.Helper()
	plugins := testnet.Plugins(c.t)
	var list struct{ Plugins []json.RawMessage }
	if err := json.Unmarshal([]byte(network), &list); err != nil {
		c.t.Fatal(err)
	}
	config := strings.Replace(string(list.Plugins[0]), "{", `{"cniVersion": "1.0.0", "name": "pods",`, 1)
	cmd := c.enter("/", plugins+"/bridge")
	cmd.Stdin = strings.NewReader(config)
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+command, "CNI_CONTAINERID="+c.pod, "CNI_NETNS="+netns, "CNI_IFNAME=eth0", "CNI_PATH="+plugins)
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("%s: %v: %s", command, err, out)
	}
	cache := c.root("/var/lib/cni/results/pods-" + c.pod + "-eth0")
	if command == "DEL" {
		if err := os.Remove(cache); err != nil {
			c.t.Error(err)
		}
		return addr
	}
	kept, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": c.pod, "config": []byte(network), "ifName": "eth0", "networkName": "pods", "netns": netns,
		"result": json.RawMessage(out),
	})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(cache), 0o755)
	}
	if err == nil {
		err = os.WriteFile(cache, kept, 0o600)
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err != nil || json.Unmarshal(out, &result) != nil || len(result.IPs) != 1 {
		c.t.Fatalf("the result: %v: %s", err, out)
	}
	return result.IPs[0].Address.Addr()
}

// A pod by the calls of CRI-O, in their order, to the real shim with a real guest.
func TestCRIO(t *testing.T) {
	kernel, initrd, cmdline := guest.Artifacts(t)
	n := newBare(t)
	n.start()
	before := n.state()
	const netns = "/run/ns/netns/0e3b5c1e-4c67-4a21-9b0f-5f3f6a0c8b11"
	on := func(args ...string) {
		t.Helper()
		if out, err := n.enter("/", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	on("sh", "-c", "mkdir -p /run/ns/netns && touch "+netns+" && unshare --net="+netns+" true")
	c := &crio{n, strings.Repeat("5b71039c", 8)}
	addr := c.cni("ADD", netns)

	resolvers := file{"resolv.conf", []byte("search default.svc.cluster.local\nnameserver 192.0.2.53\n")}
	sandbox := c.create(c.pod, "sandbox", netns, resolvers)
	sandbox.is(tasktypes.Status_CREATED)
	sandboxEnded := sandbox.run()
	image := []file{{"rootfs/boot/cmdline", []byte(cmdline)}}
	for name, path := range map[string]string{"rootfs/boot/vmlinuz": kernel, "rootfs/boot/initrd": initrd} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		image = append(image, file{name, data})
	}
	work := c.create(strings.Repeat("c0ffee11", 8), "container", netns, append(image, resolvers)...)
	workEnded := work.run()
	if vm := n.vm(t); vm.Config.Pod != "default/web" || vm.Config.Memory != 192 || len(vm.Results) != 1 {
		t.Errorf("the VM is %+v", vm)
	}
	var r guest.Report
	n.eventually("the guest reports", func() (ok bool) {
		r, ok = guest.ParseReport([]byte(work.said()))
		return ok
	})
	if len(r.NICs) != 1 || testAddr(r) != addr || r.Hostname != "web" || strings.Join(r.NICs[0].DNS, " ") != "192.0.2.53" {
		t.Errorf("CNI gave %s, and the guest has %+v", addr, r)
	}
	if out, err := n.run("curl", "-sS", "--max-time", "30", "http://"+addr.String()+"/"); err != nil {
		t.Errorf("the node reaches the guest: %v: %s", err, out)
	}
	if s, err := work.Stats(n.limit(), &task.StatsRequest{ID: work.id}); err != nil || s.Stats.GetTypeUrl() == "" {
		t.Errorf("stats %v, %v", s, err)
	}

	// CRI-O is started anew, and finds the shim by the file.
	kept, err := os.ReadFile(n.root(work.bundle + "/address"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", n.root(strings.TrimPrefix(string(kept), "unix://")))
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	work.TTRPCTaskService = task.NewTTRPCTaskClient(client)
	work.is(tasktypes.Status_RUNNING)

	work.stop(workEnded, 0)
	if !strings.Contains(work.said(), "Power down") {
		t.Errorf("the guest was not asked; it has said:\n%s", work.said())
	}
	work.remove()
	sandbox.stop(sandboxEnded, 128+uint32(unix.SIGTERM))
	if st, err := n.store().List(); err != nil || len(st) != 0 && st[0].Status != vm.Stopped {
		t.Errorf("the sandbox has ended, and there are VMs: %+v, %v", st, err)
	}
	c.cni("DEL", netns) // the namespace is as CNI left it
	sandbox.remove()
	if _, err := sandbox.State(n.limit(), &task.StateRequest{ID: c.pod}); err == nil || status.Code(err) == codes.OK {
		t.Error("the shim still serves")
	}
	on("sh", "-c", "umount "+netns+" && rm -r /run/ns /run/containers")
	n.left(before)
}
