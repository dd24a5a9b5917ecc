package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/services/ttrpc/events/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
)

// daemonEnv makes this program the daemon that `start` starts; its value is the test's directory.
const daemonEnv = "VIRTLET_TEST_DAEMON"

func TestMain(m *testing.M) {
	if dir := os.Getenv(daemonEnv); dir != "" {
		s := Shim{Version: "test", Store: testStore(dir), CNI: dir, Cgroups: "/sys/fs/cgroup", Sockets: filepath.Join(dir, "s")}
		if err := s.Run(os.Args[1:], strings.NewReader(""), os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testnet.Isolate(m)
}

func testStore(dir string) vm.Store {
	return vm.Store{Run: filepath.Join(dir, "run"), Data: filepath.Join(dir, "data")}
}

// manager is what runs a shim: it serves events and has connections to the daemon.
type manager struct {
	t   *testing.T
	dir string
	d   *daemon
	taskapi.TTRPCTaskService
	old taskv2.TTRPCTaskService // as of version 2

	mu     sync.Mutex
	topics []string
	ended  chan error
}

func (m *manager) Forward(_ context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Envelope.Namespace != "k8s.io" || r.Envelope.Event.GetTypeUrl() == "" || r.Envelope.Timestamp == nil {
		m.t.Errorf("event %v", r.Envelope)
	}
	m.topics = append(m.topics, r.Envelope.Topic)
	return &emptypb.Empty{}, nil
}

func (m *manager) told() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.topics)
}

// newManager starts a daemon in this process; the tests of pods have it in one of its own.
func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, dir: t.TempDir(), ended: make(chan error, 1)}
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(m.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	events.RegisterTTRPCEventsService(server, m)
	go server.Serve(context.Background(), listen("events"))
	t.Cleanup(func() { server.Close() })
	s := Shim{Version: "test", Store: testStore(m.dir), CNI: filepath.Join(m.dir, "cni"), Cgroups: "/sys/fs/cgroup"}
	m.d = newDaemon(s, "k8s.io", podID, filepath.Join(m.dir, "events"), slog.New(slog.DiscardHandler))
	l := listen("task")
	go func() { m.ended <- m.d.run(l) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	m.TTRPCTaskService, m.old = taskapi.NewTTRPCTaskClient(client), taskv2.NewTTRPCTaskClient(client)
	return m
}

const podID = "5b7103956c319d61cff2fe902c876ab3b0258d95b0c271a58d1bc28ce5888c35"

// bundle makes a directory as of CRI-O, which has mounted the image already: a guest that does nothing.
func (m *manager) bundle(id, kind, netns string) string {
	m.t.Helper()
	dir := filepath.Join(m.dir, id)
	disk := filepath.Join(dir, "rootfs", "disk", "empty.raw")
	if err := os.MkdirAll(filepath.Dir(disk), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		m.t.Fatal(err)
	}
	writeBundle(m.t, dir, kind, podID, func(c map[string]any) {
		c["annotations"].(map[string]string)["virtlet.cloud/memory"] = "64M"
		c["linux"] = map[string]any{"namespaces": []any{map[string]any{"type": "network", "path": netns}}}
	})
	for _, fifo := range []string{"in", "out"} {
		if err := unix.Mkfifo(filepath.Join(dir, fifo), 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	return dir
}

func (m *manager) create(id, kind, netns string) error {
	dir := m.bundle(id, kind, netns)
	_, err := m.Create(m.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdin: dir + "/in", Stdout: dir + "/out"})
	return err
}

// is fails on an error of another kind, or one whose text does not have want.
func is(t *testing.T, what string, err error, code codes.Code, want string) {
	t.Helper()
	if status.Code(err) != code || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("%s: got %v, want %v %q", what, err, code, want)
	}
}

func TestLifeOfAPod(t *testing.T) {
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	node := testnet.NewNode(t, netip.MustParsePrefix("192.0.2.1/24"))
	pod, _ := node.AddPod(t, testnet.PodSpec{Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}})
	address := func() string { return pod.MustRun("ip", "-4", "-o", "addr", "show", "dev", "eth0") }
	m, ctx := newManager(t), t.Context()
	was := address()

	_, err := m.State(ctx, &taskapi.StateRequest{ID: podID})
	is(t, "state of nothing", err, codes.NotFound, "")
	_, err = m.old.State(ctx, &taskv2.StateRequest{ID: podID})
	is(t, "the same in version 2", err, codes.NotFound, "not found")
	is(t, "a container without a pod", m.create("early", "container", pod.Path()), codes.FailedPrecondition, "no sandbox")

	is(t, "the sandbox", m.create(podID, "sandbox", pod.Path()), codes.OK, "")
	if now := address(); now == was {
		t.Error("the namespace has kept its address")
	}
	started, err := m.Start(ctx, &taskapi.StartRequest{ID: podID})
	if is(t, "start of the sandbox", err, codes.OK, ""); started.GetPid() != uint32(os.Getpid()) {
		t.Errorf("process %d", started.GetPid())
	}

	for i, id := range []string{"first", "second"} { // the second after a crash of the first
		is(t, "create "+id, m.create(id, "container", pod.Path()), codes.OK, "")
		is(t, "a sidecar", m.create("sidecar"+id, "container", pod.Path()), codes.FailedPrecondition, "one container")
		started, err := m.Start(ctx, &taskapi.StartRequest{ID: id})
		is(t, "start "+id, err, codes.OK, "")
		_, err = m.Start(ctx, &taskapi.StartRequest{ID: id})
		is(t, "start again", err, codes.FailedPrecondition, "already")
		_, err = m.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		is(t, "delete of one that runs", err, codes.FailedPrecondition, "runs")
		st, err := m.State(ctx, &taskapi.StateRequest{ID: id})
		if is(t, "state", err, codes.OK, ""); st.GetStatus() != tasktypes.Status_RUNNING || st.GetPid() != started.GetPid() || !strings.HasSuffix(st.GetStdout(), "/out") {
			t.Errorf("state %v", st)
		}
		pids, err := m.Pids(ctx, &taskapi.PidsRequest{ID: id})
		if is(t, "pids", err, codes.OK, ""); len(pids.GetProcesses()) != 1 || pids.Processes[0].Pid != started.GetPid() {
			t.Errorf("pids %v", pids)
		}
		if i == 0 {
			m.small(id)
			if err := unix.Kill(int(started.GetPid()), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		} else {
			_, err = m.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGTERM)}) // which this guest does not hear
			is(t, "power button", err, codes.OK, "")
			_, err = m.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL)})
			is(t, "plug", err, codes.OK, "")
		}
		end, err := m.Wait(ctx, &taskapi.WaitRequest{ID: id})
		if want := []uint32{1, 137}[i]; err != nil || end.ExitStatus != want || end.ExitedAt == nil {
			t.Errorf("end %v, %v, want %d", end, err, want)
		}
		_, err = m.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: 15})
		is(t, "kill of one that has ended", err, codes.NotFound, "")
		if f, err := os.OpenFile(filepath.Join(m.dir, id, "out"), os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
			f.Close()
			t.Error("the daemon still has the FIFO open: a manager would wait for ever")
		}
		if now := address(); now == was {
			t.Error("the namespace has its address back while its pod lives")
		}
		gone, err := m.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		if is(t, "delete", err, codes.OK, ""); gone.GetExitStatus() != end.GetExitStatus() {
			t.Errorf("deleted %v", gone)
		}
		if left, _ := filepath.Glob(filepath.Join(m.dir, id, "rootfs", ".virtlet-*")); len(left) > 0 {
			t.Errorf("left in the image: %v", left)
		}
		_, err = m.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id})
		is(t, "shutdown with a pod", err, codes.OK, "")
	}

	is(t, "a third", m.create("third", "container", pod.Path()), codes.OK, "")
	_, err = m.Kill(ctx, &taskapi.KillRequest{ID: podID, Signal: 9})
	is(t, "kill of the sandbox", err, codes.OK, "")
	_, err = m.Wait(ctx, &taskapi.WaitRequest{ID: podID})
	is(t, "wait for it", err, codes.OK, "")
	if now := address(); now != was {
		t.Errorf("the sandbox has ended, and the namespace has %q, was %q", now, was)
	}
	_, err = m.Start(ctx, &taskapi.StartRequest{ID: "third"})
	is(t, "start in a pod that has ended", err, codes.FailedPrecondition, "")
	for _, id := range []string{"third", podID} {
		_, err = m.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		is(t, "delete", err, codes.OK, "")
	}
	if _, err := m.Shutdown(ctx, &taskapi.ShutdownRequest{ID: podID}); err != nil && !strings.Contains(err.Error(), "closed") {
		t.Error(err)
	}
	select {
	case err := <-m.ended:
		if err != nil && err != ttrpc.ErrServerClosed {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon goes on")
	}
	want := []string{
		"/tasks/create", "/tasks/start", // the sandbox
		"/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete",
		"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete",
		"/tasks/create", "/tasks/exit", "/tasks/exit", "/tasks/delete", "/tasks/delete",
	}
	if got := m.told(); !slices.Equal(got, want) {
		t.Errorf("events %v\nwant %v", got, want)
	}
	if all, err := m.d.Store.List(); err != nil || len(all) > 0 {
		t.Errorf("VMs: %+v, %v", all, err)
	}
}

// asJSON packs a part of the runtime specification as containerd does.
func asJSON(t *testing.T, kind string, v any) *anypb.Any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/" + kind, Value: b}
}

// small tries the calls that do little.
func (m *manager) small(id string) {
	m.t.Helper()
	ctx := m.t.Context()
	spec := asJSON(m.t, "Process", specs.Process{Args: []string{"true"}})
	_, err := m.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "sh", Spec: spec})
	is(m.t, "exec without an agent", err, codes.Unimplemented, "kubectl attach")
	_, err = m.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "sh", Spec: spec, Terminal: true})
	is(m.t, "exec with a terminal", err, codes.Unimplemented, "leave -t out")
	_, err = m.Exec(ctx, &taskapi.ExecProcessRequest{ID: podID, ExecID: "sh", Spec: spec})
	is(m.t, "exec in the sandbox", err, codes.Unimplemented, "sandbox")
	_, err = m.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "sh"})
	is(m.t, "exec of nothing", err, codes.InvalidArgument, "")
	_, err = m.State(ctx, &taskapi.StateRequest{ID: id, ExecID: "sh"})
	is(m.t, "state of an exec", err, codes.NotFound, "")
	_, err = m.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: id})
	is(m.t, "checkpoint", err, codes.Unimplemented, "")
	_, err = m.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGUSR1)})
	is(m.t, "a signal that no VM hears", err, codes.Unimplemented, "power button")
	_, err = m.CloseIO(ctx, &taskapi.CloseIORequest{ID: id, Stdin: true})
	is(m.t, "close", err, codes.OK, "")
	_, err = m.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id, Width: 80, Height: 25})
	is(m.t, "resize", err, codes.OK, "")
	_, err = m.Update(ctx, &taskapi.UpdateTaskRequest{ID: id})
	is(m.t, "update of nothing", err, codes.OK, "")
	less := int64(48 << 20)
	limits := asJSON(m.t, "LinuxResources", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &less}})
	_, err = m.Update(ctx, &taskapi.UpdateTaskRequest{ID: id, Resources: limits})
	is(m.t, "update", err, codes.OK, "")
	_, err = m.Update(ctx, &taskapi.UpdateTaskRequest{ID: podID, Resources: limits})
	is(m.t, "update of the sandbox", err, codes.OK, "")
	_, err = m.Resume(ctx, &taskapi.ResumeRequest{ID: id})
	is(m.t, "resume of one that runs", err, codes.FailedPrecondition, "")
	_, err = m.Pause(ctx, &taskapi.PauseRequest{ID: id})
	is(m.t, "pause", err, codes.OK, "")
	st, _ := m.State(ctx, &taskapi.StateRequest{ID: id})
	if st.GetStatus() != tasktypes.Status_PAUSED {
		m.t.Errorf("paused: %v", st)
	}
	_, err = m.Resume(ctx, &taskapi.ResumeRequest{ID: id})
	is(m.t, "resume", err, codes.OK, "")
	c, err := m.Connect(ctx, &taskapi.ConnectRequest{ID: id})
	if is(m.t, "connect", err, codes.OK, ""); c.GetShimPid() != uint32(os.Getpid()) || c.GetVersion() != "test" {
		m.t.Errorf("connect %v", c)
	}
	s, err := m.Stats(ctx, &taskapi.StatsRequest{ID: id})
	if is(m.t, "stats", err, codes.OK, ""); !strings.HasPrefix(s.GetStats().GetTypeUrl(), "io.containerd.cgroups.v") {
		m.t.Errorf("stats %v", s)
	}
}

// A daemon that died with a running guest: `delete` of the container ends QEMU, gives the network back, and leaves nothing,
// and may be called for the sandbox and again. While a daemon lives, it does none of that.
func TestDeleteAfterADeadDaemon(t *testing.T) {
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	node := testnet.NewNode(t, netip.MustParsePrefix("192.0.2.1/24"))
	pod, _ := node.AddPod(t, testnet.PodSpec{Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}})
	address := func() string { return pod.MustRun("ip", "-4", "-o", "addr", "show", "dev", "eth0") }
	was := address()
	dir := t.TempDir()
	m := &manager{t: t, dir: dir}
	bundles := map[string]string{podID: m.bundle(podID, "sandbox", pod.Path()), "vm": m.bundle("vm", "container", pod.Path())}
	s := Shim{Version: "test", Store: testStore(dir), CNI: dir, Cgroups: "/sys/fs/cgroup", Sockets: filepath.Join(dir, "s")}
	run := func(id, action string) []byte {
		t.Helper()
		var out bytes.Buffer
		if err := s.Run([]string{"-namespace", "k8s.io", "-id", id, "-bundle", bundles[id], "-address", "/c.sock", action}, strings.NewReader(""), &out); err != nil {
			t.Fatalf("%s of %s: %v", action, id, err)
		}
		return out.Bytes()
	}
	// The daemon is this test's program, told by the environment where things are.
	t.Setenv(daemonEnv, dir)
	socket := strings.TrimPrefix(string(run(podID, "start")), "unix://")
	if again := string(run("vm", "start")); again != "unix://"+socket {
		t.Errorf("the container's shim is at %s, the pod's at %s", again, socket)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	m.TTRPCTaskService = taskapi.NewTTRPCTaskClient(client)
	var pids []int
	for _, id := range []string{podID, "vm"} {
		_, err := m.Create(t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: bundles[id]})
		is(t, "create", err, codes.OK, "")
		r, err := m.Start(t.Context(), &taskapi.StartRequest{ID: id})
		is(t, "start", err, codes.OK, "")
		pids = append(pids, int(r.GetPid()))
	}
	t.Cleanup(func() { // it is this process's child
		_ = unix.Kill(pids[0], unix.SIGKILL)
		_, _ = unix.Wait4(pids[0], nil, 0, nil)
	})
	here, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pids[0]))
	if inside := pod.MustRun("readlink", "/proc/self/ns/net"); here != inside {
		t.Errorf("the daemon was born in %s, and the pod is %s", here, inside)
	}
	run("vm", "delete")
	if now := address(); now == was || unix.Kill(pids[1], 0) != nil {
		t.Error("delete while the daemon lives has ended the guest")
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for answers(socket) {
		time.Sleep(time.Millisecond)
	}
	for _, id := range []string{"vm", podID, podID} {
		run(id, "delete")
		if now := address(); now != was {
			t.Errorf("after delete of %s the namespace has %q, was %q", id, now, was)
		}
	}
	if all, err := s.Store.List(); err != nil || len(all) > 0 || answers(socket) {
		t.Errorf("left: %+v, %v", all, err)
	}
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left")
	}
}
