package kubernetes

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// figures compares pods that are VMs with pods of runc: the time until their containers run, from the request on, until
// they are deleted, and what is resident of a shim. The VMs have nothing to boot.
func (c *cluster) figures() {
	for _, class := range []struct{ name, spec string }{
		{"runc", "containers: [{name: c, image: " + busyboxImage + "}]"},
		{"virtlet", "runtimeClassName: virtlet, containers: [{name: c, image: " + emptyImage + ", resources: {limits: {memory: 64Mi}}}]"},
	} {
		for _, n := range []int{1, 1, 1, 10} {
			begin := time.Now()
			c.apply(fmt.Sprintf("---\n{apiVersion: apps/v1, kind: Deployment, metadata: {name: figure}, spec: {replicas: %d, "+
				"selector: {matchLabels: {app: figure}}, template: {metadata: {labels: {app: figure}}, spec: {"+
				"automountServiceAccountToken: false, terminationGracePeriodSeconds: 1, %s}}}}", n, class.spec))
			c.kubectl("rollout", "status", "deployment/figure", "--timeout="+patience.String())
			running := time.Since(begin)
			shims := processes("containerd-shim-" + class.name + "-v2")
			rss := resident(shims[len(shims)-1])
			begin = time.Now()
			c.kubectl("delete", "deployment/figure", "--cascade=foreground", "--timeout="+patience.String())
			c.kubectl("wait", "--for=delete", "pod", "-l", "app=figure", "--timeout="+patience.String())
			c.t.Logf("%-7s %2d pods run after %5.2f s and are deleted after %5.2f s; a shim has %s", class.name, n,
				running.Seconds(), time.Since(begin).Seconds(), rss)
		}
	}
}

// resident gives the memory of a process.
func resident(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		if rss, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.TrimSpace(rss)
		}
	}
	return "?"
}

// processes gives the numbers of those whose program's name has some text, in order.
func processes(name string) []int {
	var all []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		command, _ := os.ReadFile(dir + "/cmdline")
		program, _, _ := strings.Cut(string(command), "\x00")
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && strings.Contains(filepath.Base(program), name) {
			all = append(all, pid)
		}
	}
	slices.Sort(all)
	return all
}

// state is what pods could leave behind, in words.
func state(t *testing.T) []string {
	t.Helper()
	var all []string
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, "/run/") || strings.HasPrefix(at, "/var/lib/") {
			all = append(all, "mount "+at)
		}
	}
	for _, dir := range []string{"/run/virtlet", "/var/lib/virtlet", "/run/netns", "/run/containerd/s", "/var/lib/cni/results"} {
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				all = append(all, "file "+path)
			}
			return nil
		})
	}
	links, err := exec.Command("ip", "-br", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(links)) {
		if name, _, _ := strings.Cut(strings.Fields(line)[0], "@"); name != "cni0" && name != "data0" { // the plugin's for ever
			all = append(all, "link "+name)
		}
	}
	for _, kind := range []string{"qemu-system", "containerd-shim"} {
		for _, pid := range processes(kind) {
			all = append(all, fmt.Sprintf("process %d %s", pid, kind))
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/memory/kubepods/*/pod*")
	more, _ := filepath.Glob("/sys/fs/cgroup/memory/kubepods/pod*")
	for _, g := range append(groups, more...) {
		all = append(all, "cgroup "+g)
	}
	return all
}

// added gives what is in the second list alone.
func added(before, now []string) []string {
	return slices.DeleteFunc(slices.Clone(now), func(s string) bool { return slices.Contains(before, s) })
}
