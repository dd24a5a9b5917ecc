package kubernetes

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// runSandbox is the first process of the sandbox: it makes its file systems, cgroups and network, starts TestInside in
// it, and ends with the status of that, or when its standard input ends; the kernel ends all the others then.
func runSandbox(name string) (status int, err error) {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	// A cgroup namespace is the thread's; what it starts inherits it.
	runtime.LockOSThread()
	groups, err := enterGroups(name)
	if err != nil {
		return 1, err
	}
	for _, step := range []func() error{mounts, func() error { return mountGroups(groups) }, settings, network} {
		if err := step(); err != nil {
			return 1, err
		}
	}
	if err := unix.Sethostname([]byte(nodeName)); err != nil {
		return 1, err
	}
	// Not by os/exec: this process reaps whatever ends.
	args := []string{os.Args[0], "-test.run=^TestInside$", "-test.v", "-test.timeout=" + limit.String()}
	if err := os.Unsetenv(sandboxEnv); err != nil { // for what is started
		return 1, err
	}
	nothing, err := os.Open(os.DevNull)
	if err != nil {
		return 1, err
	}
	self, err := os.StartProcess("/proc/self/exe", args, &os.ProcAttr{Files: []*os.File{nothing, os.Stdout, os.Stderr}})
	if err != nil {
		return 1, err
	}
	for {
		var how unix.WaitStatus
		pid, err := unix.Wait4(-1, &how, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, err
		case pid == self.Pid && how.Exited():
			return how.ExitStatus(), nil
		case pid == self.Pid:
			return 1, fmt.Errorf("the lab ended by %v", how.Signal())
		}
	}
}

// hierarchy is one of cgroup v1.
type hierarchy struct {
	options string // of its mount: the controllers, or the name
	dir     string // of the group that a process is in
}

// readHierarchies gives those that a process, or "self", is in.
func readHierarchies(pid string) ([]hierarchy, error) {
	text, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return nil, err
	}
	var all []hierarchy
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7)
		if len(f) != 3 || f[1] == "" {
			continue // cgroup v2
		}
		name, named := strings.CutPrefix(f[1], "name=")
		h := hierarchy{f[1], filepath.Join("/sys/fs/cgroup", name, f[2])}
		if named {
			h.options = "none,name=" + name
		}
		all = append(all, h)
	}
	if len(all) == 0 {
		return nil, errors.New("this machine has cgroup v2 alone, for which the lab has no sandbox yet")
	}
	return all, nil
}

// enterGroups makes a cgroup in each hierarchy, enters it, and makes it the top of what this thread sees.
func enterGroups(name string) ([]hierarchy, error) {
	all, err := readHierarchies("self")
	if err != nil {
		return nil, err
	}
	for _, h := range all {
		dir := filepath.Join(h.dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty at first, and then no process may enter
			if above, err := os.ReadFile(filepath.Join(h.dir, file)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, file), above, 0); err != nil {
					return nil, err
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return nil, err
		}
	}
	return all, unix.Unshare(unix.CLONE_NEWCGROUP)
}

// mounts gives the sandbox directories of its own wherever its programs write.
func mounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Namespaces that others pin: a copy of their mounts would keep them.
	before, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(before)) {
		at := strings.Fields(line)[1]
		if strings.HasPrefix(at, "/run/") || at == "/sys" || strings.HasPrefix(at, "/sys/") {
			_ = unix.Unmount(at, unix.MNT_DETACH) // one below another has gone with it
		}
	}
	for _, m := range []struct{ dir, kind string }{
		{"/proc", "proc"}, {"/sys", "sysfs"}, {"/sys/fs/cgroup", "tmpfs"}, {"/run", "tmpfs"}, {"/var/lib", "tmpfs"}, {"/var/log", "tmpfs"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	// What an installer writes to a node stays in the sandbox.
	for _, dir := range []string{"/etc", "/usr/local/bin"} {
		over := home + "/over" + dir
		for _, d := range []string{over + "/upper", over + "/work"} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+over+"/upper,workdir="+over+"/work"); err != nil {
			return fmt.Errorf("mount over %s: %w", dir, err)
		}
	}
	return nil
}

func mountGroups(all []hierarchy) error {
	for _, h := range all {
		dir := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(h.options, "none,name="))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("cgroup", dir, "cgroup", 0, h.options); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// settings puts files in the place of those settings of the whole machine that a kubelet writes (setupKernelTunables in
// its container manager).
func settings() error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file := home + "/" + filepath.Base(name)
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", name, err)
		}
	}
	return nil
}

// network gives the node its address, and the world beside it, a namespace from which its ports can be reached.
func network() error {
	for _, line := range []string{
		"link set lo up", "netns add world", "link add node0 type veth peer name eth0 netns world",
		"addr add " + nodeAddr + "/24 dev node0", "link set node0 up", "route add default via " + worldAddr,
		"-n world addr add " + worldAddr + "/24 dev eth0", "-n world link set eth0 up",
	} {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, out)
		}
	}
	return nil
}
