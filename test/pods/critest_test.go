package pods

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// Where a group of critest's specs is, and how many of them there are in the version that test/pods/critools pins.
var critestGroups = []struct {
	focus string // a regular expression, of a spec's whole name
	specs int
}{
	{`Idempotence`, 7},
	{`Runtime info`, 2},
	{`\[k8s\.io\] PodSandbox`, 6},
	{`port mapping with`, 2},
	{`support portforward`, 2},
}

// critestWithout are specs of those groups that are left out, and why. One that is served is taken out of this table.
var critestWithout = []struct{ skip, why string }{
	{`should support safe sysctls`, "the spec reads the value by exec, and a sysctl of the pod is not one of the guest"},
	{`should support unsafe sysctls`, "likewise"},
	{`support portforward in host network`, "a VM cannot have the node's network, and such a pod is refused"},
}

// critools gives the directory of crictl and critest.
func critools(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("VIRTLET_CRITOOLS")
	if dir == "" {
		t.Skip("needs crictl and critest: make test-containerd builds them (VIRTLET_CRITOOLS)")
	}
	return dir
}

const endpoint = "--runtime-endpoint=unix:///run/containerd/containerd.sock"

// What Kubernetes asks of a runtime, in its own words: groups of critest, with a guest in the place of its images. The web
// server is the guest's.
func TestCritest(t *testing.T) {
	tools := critools(t)
	n := newNode(t)
	n.images()
	before := n.state()
	n.write("images.yaml", "defaultTestContainerImage: "+guestImage+"\nwebServerTestImage: "+guestImage+"\n")
	args := []string{
		tools + "/critest", endpoint, "--runtime-handler=virtlet", "--test-images-file=" + n.dir + "/images.yaml",
		"--config=/dev/null", "--ginkgo.no-color", "--ginkgo.v",
	}
	want := 0
	for _, g := range critestGroups {
		want += g.specs
		args = append(args, "--ginkgo.focus="+g.focus)
	}
	for _, w := range critestWithout {
		t.Logf("left out: %s: %s", w.skip, w.why)
		want--
		args = append(args, "--ginkgo.skip="+w.skip)
	}
	out, err := n.enter(n.dir, args...).CombinedOutput()
	for _, spec := range regexp.MustCompile(`(?m)^(?:•.*|\[k8s\.io\] .*)$`).FindAll(out, -1) {
		t.Logf("%s", spec)
	}
	ran := regexp.MustCompile(`Ran (\d+) of \d+ Specs in .*`).FindSubmatch(out)
	if err != nil || ran == nil {
		t.Fatalf("critest: %v\n%s", err, out[max(0, len(out)-20000):])
	}
	if string(ran[1]) != strconv.Itoa(want) {
		t.Errorf("critest: %s, want %d", ran[0], want)
	}
	t.Logf("%s", ran[0])
	n.left(before)
	// Without a kubelet, groups are at the top.
	log, err := os.ReadFile(n.dir + "/containerd.log")
	if err != nil {
		t.Fatal(err)
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/*")
	for _, dir := range groups {
		if id := filepath.Base(dir); len(id) == 64 && bytes.Contains(log, []byte(id)) {
			t.Errorf("left behind: cgroup %s: %v", dir, os.Remove(dir))
		}
	}
}
