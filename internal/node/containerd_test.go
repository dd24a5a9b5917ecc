package node

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/vm"
)

// withContainerd puts a real containerd on a node, with what it is linked to, and gives its major version.
func withContainerd(t *testing.T, n Node) string {
	t.Helper()
	dir := os.Getenv("VIRTLET_CONTAINERD")
	if dir == "" {
		t.Skip("needs containerd: set VIRTLET_CONTAINERD to what hack/containerd.sh prints")
	}
	program := filepath.Join(dir, "containerd")
	libs, err := exec.Command("ldd", program).CombinedOutput()
	if err != nil && !strings.Contains(string(libs), "not a dynamic executable") {
		t.Fatalf("ldd: %v: %s", err, libs)
	}
	files := map[string]string{program: "/usr/bin/containerd"}
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(libs), -1) {
		if _, err := os.Stat(lib); err == nil {
			files[lib] = lib
		}
	}
	for from, to := range files {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(n.Root, to), string(data), 0o755)
	}
	version, err := (&tree{Node: n}).version(t.Context(), "/usr/bin/containerd")
	if err != nil {
		t.Fatal(err)
	}
	major, _, _ := strings.Cut(version, ".")
	return major
}

// The node's own containerd says what it makes of the configuration: runc as before, and ours.
func TestContainerdAgrees(t *testing.T) {
	needRoot(t)
	for i, m := range nodes {
		if m.into != "etc/containerd/config.toml" && !strings.HasPrefix(m.into, "etc/containerd/conf.d/") {
			continue // not a containerd's of its own
		}
		t.Run(m.name, func(t *testing.T) {
			n := known(t, i)
			if major := withContainerd(t, n); major < "2" && strings.HasPrefix(m.name, "containerd 2") {
				t.Skip("needs containerd 2.x")
			}
			before := contents(t, n.Root)
			rep, err := n.Install(t.Context())
			if err != nil || len(rep.Notes) > 0 {
				t.Fatalf("%+v, %v", rep, err)
			}
			tree, err := n.open()
			if err != nil {
				t.Fatal(err)
			}
			defer tree.close()
			c, err := tree.dump(t.Context(), "/usr/bin/containerd", "/etc/containerd/config.toml")
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"runc", Handler} {
				if c.runtimes()[name] == nil {
					t.Errorf("containerd does not have %q: %v", name, c.runtimes())
				}
			}
			if got := table(c.all, "plugins", c.plugin(), "containerd")["default_runtime_name"]; got != "runc" {
				t.Errorf("its default is %v", got)
			}
			tree.close()
			if _, err := n.Uninstall(t.Context()); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
				t.Errorf("left behind (-before +after):\n%s", diff)
			}
		})
	}
}

// A configuration with which the node's containerd would lose a handler is refused before anything is touched.
func TestContainerdDisagrees(t *testing.T) {
	needRoot(t)
	n := known(t, 0)
	major := withContainerd(t, n)
	tree, err := n.open()
	if err != nil {
		t.Fatal(err)
	}
	defer tree.close()
	f, err := tree.find()
	if err != nil {
		t.Fatal(err)
	}
	text, err := tree.read(f.config)
	if err != nil {
		t.Fatal(err)
	}
	without := slices.Concat(text, []byte(handlerText(criV2, "/usr/local/bin/"+Shim)))
	p := planned{steps: []step{{path: f.config, before: text, after: without}}}
	if _, err := tree.tryOut(t.Context(), f, p); major == "1" && (err == nil || !strings.Contains(err.Error(), `["virtlet"]`)) { // 2.x keeps its default
		t.Errorf("a file without runc: %v", err)
	}
	p.steps[0].after = []byte("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = 1\n")
	if _, err := tree.tryOut(t.Context(), f, p); err == nil {
		t.Error("a file that containerd does not take was taken")
	}
}

// manager is what the kubelet asks: one whose handlers are those of its configuration when it started.
type manager struct {
	cri.UnimplementedRuntimeServiceServer
	root string

	mu       sync.Mutex
	handlers map[string]any
}

func (m *manager) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "containerd", RuntimeVersion: "1.6.20"}, nil
}

func (m *manager) Status(context.Context, *cri.StatusRequest) (*cri.StatusResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	runtimes := map[string]any{}
	for name, h := range m.handlers {
		shim, _ := h.(map[string]any)["runtime_path"].(string)
		runtimes[name] = map[string]any{"runtimePath": shim}
	}
	config, err := json.Marshal(map[string]any{"containerd": map[string]any{"runtimes": runtimes}})
	return &cri.StatusResponse{Info: map[string]string{"config": string(config)}}, err
}

func (m *manager) start(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.root, "etc/containerd/config.toml"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	c, err := parseContainerd(text)
	if err != nil {
		t.Error(err)
	}
	m.mu.Lock()
	if m.handlers = c.runtimes(); len(m.handlers) == 0 {
		m.handlers = map[string]any{"runc": map[string]any{}}
	}
	m.mu.Unlock()
}

// startManager starts a manager of containers on a node, which a systemd restarts.
func startManager(t *testing.T, n Node) *manager {
	t.Helper()
	s := startSystemd(t, n.Root, "done")
	m := &manager{root: n.Root}
	m.start(t)
	socket := filepath.Join(n.Root, "run/containerd/containerd.sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, m)
	var all sync.WaitGroup
	all.Go(func() { _ = server.Serve(l) })
	done := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case <-s.restarted:
				m.start(t)
			case <-done:
				return
			}
		}
	})
	t.Cleanup(func() {
		server.Stop()
		close(done)
		all.Wait()
	})
	return m
}

// --restart restarts once, and waits until the handler is in use, or no longer; what the operator has restarted himself needs no
// further restart; the check tells all of these apart.
func TestRestartOnInstall(t *testing.T) {
	needRoot(t)
	n := known(t, 0)
	m := startManager(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	inUse := func(want vm.Level) {
		t.Helper()
		all, err := n.Check(ctx)
		i := slices.IndexFunc(all, func(f vm.Finding) bool { return f.What == "handler in use" })
		if err != nil || i < 0 || all[i].Level != want {
			t.Errorf("check: %+v, %v; want it %s", all, err, want)
		}
	}
	if rep, err := n.Install(ctx); err != nil || rep.Restarted || rep.Restart != "containerd.service" {
		t.Fatalf("without --restart: %+v, %v", rep, err)
	}
	inUse(vm.Fail)
	n.Restart = true
	if rep, err := n.Install(ctx); err != nil || !rep.Restarted || rep.Restart != "" {
		t.Fatalf("with --restart, nothing to write: %+v, %v", rep, err)
	}
	inUse(vm.OK)
	if rep, err := n.Install(ctx); err != nil || rep.Restarted {
		t.Errorf("again: %+v, %v", rep, err)
	}
	if rep, err := n.Uninstall(ctx); err != nil || !rep.Restarted || m.handlers[Handler] != nil {
		t.Errorf("uninstall: %+v, %v", rep, err)
	}
	n.Restart = false
	if _, err := n.Install(ctx); err != nil {
		t.Fatal(err)
	}
	m.start(t) // the operator
	if rep, err := n.Install(ctx); err != nil || rep.Restart != "" {
		t.Errorf("after a restart by hand: %+v, %v", rep, err)
	}
	n.BinDir = "/opt/virtlet/bin" // another path, which the running one does not know
	if rep, err := n.Install(ctx); err != nil || rep.Restart == "" || len(rep.Changes) != 5 {
		t.Errorf("another directory: %+v, %v", rep, err)
	}
	inUse(vm.Fail)
}
