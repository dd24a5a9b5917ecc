package pods

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/test/guest"
)

// A pod by crictl, as who looks after a node makes and looks at one.
func TestCrictl(t *testing.T) {
	tools := critools(t)
	n := newNode(t)
	n.images()
	before := n.state()
	crictl := func(args ...string) string {
		t.Helper()
		cmd := n.enter(n.dir, append([]string{tools + "/crictl", "--config=/dev/null", endpoint, "--timeout=3m"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("crictl %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	write := func(name string, v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		n.write(name, string(b))
		return n.dir + "/" + name
	}
	sandbox := write("pod.json", map[string]any{
		"metadata": map[string]any{"name": "web", "namespace": "default", "uid": "web-uid", "attempt": 1}, "hostname": "web",
		"log_directory": n.dir + "/log", "linux": map[string]any{"cgroup_parent": n.cgroup + "/web"},
		"annotations": map[string]string{"virtlet.cloud/memory": "192Mi"},
	})
	container := write("container.json", map[string]any{
		"metadata": map[string]any{"name": "vm"}, "image": map[string]any{"image": guestImage}, "log_path": "vm.log", "linux": map[string]any{},
	})
	if out := crictl("info"); !strings.Contains(out, "io.containerd.virtlet.v2") {
		t.Errorf("info: %s", out)
	}
	pod := crictl("runp", "--runtime=virtlet", sandbox)
	id := crictl("create", pod, container, sandbox)
	crictl("start", id)
	n.eventually("the guest reports", func() bool {
		_, ok := guest.ParseReport([]byte(crictl("logs", id)))
		return ok
	})
	for _, tt := range []struct{ command, want string }{
		{"pods", "virtlet"}, {"ps", "Running"}, {"stats", "vm"}, {"inspect " + id, "CONTAINER_RUNNING"}, {"inspectp " + pod, "SANDBOX_READY"},
	} {
		if out := crictl(strings.Fields(tt.command)...); !strings.Contains(out, tt.want) {
			t.Errorf("crictl %s: no %q in: %s", tt.command, tt.want, out)
		}
	}
	crictl("stop", "--timeout=60", id)
	if out := crictl("ps", "--all"); !strings.Contains(out, "Exited") {
		t.Errorf("crictl ps: %s", out)
	}
	crictl("rm", id)
	crictl("stopp", pod)
	crictl("rmp", pod)
	n.left(before)
}
