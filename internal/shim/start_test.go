package shim

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// What four container managers were seen to give to `start`, and the answers that they understand.
func TestDialects(t *testing.T) {
	const id, address = "5b71", "unix:///run/containerd/s/virtlet-0"
	params := func(id string) []byte {
		b, err := proto.Marshal(&bootstrap.BootstrapParams{InstanceID: id, Namespace: "k8s.io"})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// The options of a runtime, which managers before 2.3 give: an Any with a type URL in field 1.
	options := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "containerd.runc.v1.Options")
	const text, asJSON, protobuf = "text", "JSON", "protobuf"
	tests := []struct {
		manager string
		input   []byte
		env     map[string]string
		want    string
	}{
		{"containerd 1.6", nil, map[string]string{"TTRPC_ADDRESS": "/run/c.sock.ttrpc"}, text},
		{"containerd 1.6 with options", options, nil, text},
		{"containerd 1.7", nil, map[string]string{"MAX_SHIM_VERSION": "2", "TTRPC_ADDRESS": "/run/c.sock.ttrpc"}, asJSON},
		{"containerd 2.1", options, map[string]string{"MAX_SHIM_VERSION": "3"}, asJSON},
		{"containerd 2.4", params(id), map[string]string{"MAX_SHIM_VERSION": "3"}, protobuf},
		{"something that only looks like it", params("other"), map[string]string{"MAX_SHIM_VERSION": "3"}, asJSON},
		{"CRI-O", nil, map[string]string{"MAX_SHIM_VERSION": "2", "TTRPC_ADDRESS": ""}, asJSON},
	}
	for _, tt := range tests {
		t.Run(tt.manager, func(t *testing.T) {
			c := &call{id: id, namespace: "k8s.io", getenv: func(k string) string { return tt.env[k] }}
			got, err := c.answer(tt.input, address)
			if err != nil {
				t.Fatal(err)
			}
			var j struct {
				Version           int
				Address, Protocol string
			}
			var p bootstrap.BootstrapResult
			switch tt.want {
			case text:
				if string(got) != address {
					t.Errorf("got %q", got)
				}
			case asJSON:
				if err := json.Unmarshal(got, &j); err != nil || j.Version != 2 || j.Address != address || j.Protocol != "ttrpc" {
					t.Errorf("got %q, %v", got, err)
				}
			case protobuf:
				if err := proto.Unmarshal(got, &p); err != nil || p.Version != 3 || p.Address != address || p.Protocol != "ttrpc" {
					t.Errorf("got %q, %v", got, err)
				}
			}
		})
	}
}

func TestCommandLines(t *testing.T) {
	none := func(string) string { return "" }
	run := func(args string) (string, error) {
		var out bytes.Buffer
		err := Shim{Version: "v1"}.Run(strings.Fields(args), strings.NewReader(""), &out)
		return out.String(), err
	}
	if out, err := run("-v"); err != nil || !strings.Contains(out, "v1") {
		t.Errorf("-v: %q, %v", out, err)
	}
	out, err := run("-info")
	var info types.RuntimeInfo
	if err != nil || proto.Unmarshal([]byte(out), &info) != nil || info.Name != "io.containerd.virtlet.v2" || info.Version.Version != "v1" {
		t.Errorf("-info: %q, %v", out, err)
	}
	for _, args := range []string{"", "start", "-id x start", "-namespace k8s.io delete", "-bogus", "-namespace n -id i dance"} {
		if _, err := run(args); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
	c, err := Shim{}.parse(strings.Fields("-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id x -bundle /b -debug delete"), none)
	if err != nil || c.id != "x" || c.bundle != "/b" || c.address != "/run/c.sock" || c.action != "delete" || !c.debug {
		t.Errorf("%+v, %v", c, err)
	}
	// CRI-O's, where an address is given and empty.
	if c, err = (Shim{}).parse([]string{"-namespace", "default", "-address", "", "-publish-binary", "/bin/crio", "-id", "x", "start"}, none); err != nil || c.address != "" || c.bundle == "" {
		t.Errorf("%+v, %v", c, err)
	}
	if n := len(c.Shim.Sockets + Default("").Sockets + filepath.Base((&call{Shim: Default("")}).socket("x"))); n > 100 {
		t.Errorf("the socket's path has %d bytes", n)
	}
}

// `delete` of a container whose pod has no daemon and no VM has nothing to do, and says so, as it may be called again.
func TestDeleteOfNothing(t *testing.T) {
	dir := t.TempDir()
	s := Shim{Store: testStore(dir), Sockets: dir, Cgroups: dir}
	writeBundle(t, dir, "container", "5b71", nil)
	var out bytes.Buffer
	for range 2 {
		out.Reset()
		if err := s.Run([]string{"-namespace", "k8s.io", "-id", "c1", "-bundle", dir, "-address", "/c.sock", "delete"}, strings.NewReader(""), &out); err != nil {
			t.Fatal(err)
		}
	}
	var answer taskapi.DeleteResponse
	if err := proto.Unmarshal(out.Bytes(), &answer); err != nil || answer.ExitStatus != 137 || answer.ExitedAt == nil {
		t.Errorf("answer %v, %v", &answer, err)
	}
	if err := os.Remove(filepath.Join(dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	if err := s.Run([]string{"-namespace", "k8s.io", "-id", "c1", "-bundle", dir, "delete"}, strings.NewReader(""), &out); err != nil {
		t.Errorf("delete without a bundle: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Run([]string{"-namespace", "k8s.io", "-id", "c1", "-bundle", dir, "delete"}, strings.NewReader(""), &out); err == nil {
		t.Error("delete with half a bundle: no error")
	}
}

func TestStartRefuses(t *testing.T) {
	tests := []struct {
		name, kind string
		change     func(map[string]any)
		want       string
	}{
		{"no pod", "", nil, "virtlet run"},
		{"host network", "sandbox", func(c map[string]any) { c["linux"] = map[string]any{} }, "hostNetwork"},
		{"the node's namespace", "sandbox", func(c map[string]any) {
			c["linux"] = map[string]any{"namespaces": []any{map[string]any{"type": "network", "path": "/proc/self/ns/net"}}}
		}, "node's own"},
		{"a dead pod's container", "container", nil, "has ended"},
		{"a kind of tomorrow", "ephemeral", nil, `"ephemeral"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeBundle(t, dir, tt.kind, "5b71", tt.change)
			s := Shim{Store: testStore(dir), Sockets: filepath.Join(dir, "s"), Cgroups: dir}
			err := s.Run([]string{"-namespace", "k8s.io", "-id", "5b71", "-bundle", dir, "start"}, strings.NewReader(""), &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if left, _ := filepath.Glob(dir + "/s/*"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// writeBundle makes a bundle as of containerd.
func writeBundle(t *testing.T, dir, kind, sandbox string, change func(map[string]any)) {
	t.Helper()
	annotations := map[string]string{"io.kubernetes.cri.sandbox-name": "web", "io.kubernetes.cri.sandbox-namespace": "default"}
	if kind != "" {
		annotations["io.kubernetes.cri.container-type"], annotations["io.kubernetes.cri.sandbox-id"] = kind, sandbox
	}
	config := map[string]any{
		"ociVersion": "1.0.2", "hostname": "web", "annotations": annotations,
		"linux": map[string]any{"namespaces": []any{map[string]any{"type": "network", "path": "/run/netns/none"}}},
	}
	if change != nil {
		change(config)
	}
	b, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}
