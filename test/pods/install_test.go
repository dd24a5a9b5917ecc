package pods

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/vm"
)

// installer runs the command that is not installed yet on the node, in its mounts and among its processes, as by hand there.
func (n *node) installer(args ...string) (string, error) {
	n.t.Helper()
	cmd := exec.Command("nsenter", append([]string{"-m", "-n", "-p", "-t", fmt.Sprint(n.holder.Process.Pid), n.dir + "/from/virtlet"}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	return out.String() + errs.String(), err
}

// check gives what `virtlet node check` has found of one thing.
func (n *node) check(what string, args ...string) vm.Finding {
	n.t.Helper()
	out, _ := n.installer(append([]string{"node", "check", "--json"}, args...)...)
	var all []vm.Finding
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&all); err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
	i := slices.IndexFunc(all, func(f vm.Finding) bool { return f.What == what })
	if i < 0 {
		n.t.Fatalf("nothing of %q in %+v", what, all)
	}
	return all[i]
}

// containerd takes the handler from what `virtlet node install` writes: a pod starts with it, the check sees it in use; it
// cannot be uninstalled under the pod, and afterwards the configuration is byte for byte what it was.
func TestInstalled(t *testing.T) {
	n := newMachine(t)
	if !strings.HasPrefix(n.version, "1.") {
		t.Skip("the configuration that is cut here is that of containerd 1")
	}
	config, bin := filepath.Join(n.dir, "config.toml"), filepath.Join(n.dir, "bin") // which is in containerd's PATH
	if err := os.Rename(bin, filepath.Join(n.dir, "from")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	plain, _, _ := strings.Cut(string(text), "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n")
	n.write("config.toml", plain)
	n.startContainerd()
	where := []string{"--config", config, "--bin-dir", bin}
	if f := n.check("handler", where...); f.Level != vm.Fail || !strings.Contains(f.Do, "install") {
		t.Errorf("before: %+v", f)
	}
	out, err := n.installer(append([]string{"node", "install"}, where...)...)
	if err != nil || !strings.Contains(out, "systemctl restart containerd") {
		t.Fatalf("install: %v: %s", err, out)
	}
	if f := n.check("handler in use", where...); f.Level != vm.Fail || !strings.Contains(f.Do, "systemctl restart containerd") {
		t.Errorf("before the restart: %+v", f)
	}
	n.order("kill")
	n.startContainerd()
	if f := n.check("handler in use", where...); f.Level != vm.OK || !strings.Contains(f.Is, "containerd 1.") {
		t.Errorf("after the restart: %+v", f)
	}
	if out, err := n.installer(append([]string{"node", "install"}, where...)...); err != nil || !strings.HasSuffix(out, "nothing to do\n") {
		t.Errorf("install after the restart: %v: %s", err, out)
	}
	st, err := n.runtime.Status(n.limit(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, handler := range []string{`"virtlet":{`, `"runc":{`} { // containerd's own, which would be gone if it were not named
		if !strings.Contains(st.Info["config"], handler) {
			t.Errorf("containerd does not have %s in %s", handler, st.Info["config"])
		}
	}

	// The installer's image is one that containerd takes and unpacks.
	image := filepath.Join(n.dir, "installer.tar")
	build := exec.Command("go", "run", "github.com/virtlet/virtlet/deploy/image", "-o", image, "-t", "localhost/virtlet-installer:1", n.dir+"/from/virtlet", n.dir+"/from/containerd-shim-virtlet-v2")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.load(image)
	n.load(writeImage(t, guestImage, file{"disk/empty.raw", make([]byte, 1<<20)}))
	n.load(writeImage(t, pauseImage, file{"pause", []byte("never run")}))
	before := n.state()
	p, err := n.runPod("web", nil)
	if err != nil {
		t.Fatal(err)
	}
	p.start("vm")
	if shim := n.processes()[n.process(bin+"/containerd-shim-virtlet-v2")]; shim == "" {
		t.Error("the shim is not the one that was installed")
	}
	if out, err := n.installer(append([]string{"node", "uninstall"}, where...)...); err == nil || !strings.Contains(out, "default/web") {
		t.Errorf("uninstall under a pod: %v: %s", err, out)
	}
	p.remove(before)
	if out, err := n.installer(append([]string{"node", "uninstall"}, where...)...); err != nil {
		t.Errorf("uninstall: %v: %s", err, out)
	}
	if now, _ := os.ReadFile(config); string(now) != plain {
		t.Errorf("the configuration is now %s", now)
	}
	if _, err := os.Stat(bin); err == nil {
		t.Errorf("%s is left", bin)
	}
	n.order("kill")
	n.startContainerd()
	if _, err := n.runPod("late", nil); err == nil || !strings.Contains(err.Error(), "virtlet") {
		t.Errorf("a pod without the handler: %v", err)
	}
}
