// Package kubernetes is the lab of a whole Kubernetes: one node with etcd, API server, scheduler, controllers, proxy and
// kubelet, a containerd 2.x, and the shim, on which pods are VMs. `make lab-kubernetes` runs it; it takes some minutes
// once Kubernetes is built, and so is not part of `make test`.
//
//	TestKubernetes   makes the sandbox, and looks for what it leaves on the machine
//	  runSandbox     is the sandbox's first process: mounts, cgroups, network; everything ends with it
//	    TestInside   starts the cluster and is its user, by kubectl
//
// The sandbox has its own namespaces for mounts, network, processes, IPC, host name and cgroups, and nothing in it reaches
// the machine's network. What its programs say is kept when the lab fails.
package kubernetes

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/test/guest"
)

const (
	labEnv     = "VIRTLET_LAB_KUBERNETES"     // set: the lab is run
	sandboxEnv = "VIRTLET_KUBERNETES_SANDBOX" // the sandbox's name, in its first process
	insideEnv  = "VIRTLET_KUBERNETES_INSIDE"  // the lab's directory, in the sandbox
	limit      = 20 * time.Minute
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "fetch" { // in a container
		os.Exit(fetchPage(os.Args[2]))
	}
	if name := os.Getenv(sandboxEnv); name != "" {
		status, err := runSandbox(name)
		if err != nil {
			fmt.Println("sandbox:", err)
		}
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// fetchPage prints the page of a URL.
func fetchPage(url string) (status int) {
	client := http.Client{Timeout: 20 * time.Second}
	r, err := client.Get(url)
	if err == nil {
		defer r.Body.Close()
		_, err = io.Copy(os.Stdout, r.Body)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func TestKubernetes(t *testing.T) {
	if os.Getenv(labEnv) == "" {
		t.Skip("make lab-kubernetes runs it")
	}
	testnet.NeedRoot(t)
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin + "/containerd-shim-virtlet-v2"); err != nil {
		t.Fatal(err, ": make build")
	}
	kernel, _, _ := guest.Artifacts(t)
	path := []string{
		testnet.Fetch(t, "kubernetes.sh"), testnet.Tools(t, "test/pods/containerd"), testnet.Tools(t, "test/lab/multus"),
		testnet.Fetch(t, "containerd.sh", "runc"),
	}
	dir, err := os.MkdirTemp("", "virtlet-kubernetes-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // QEMU's user passes through
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("what the programs said: %s/*.log", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if out, err := exec.Command("go", "run", "../../deploy/image", "-o", dir+"/"+installerTar, "-t", installerImage, bin+"/virtlet",
		bin+"/containerd-shim-virtlet-v2").CombinedOutput(); err != nil {
		t.Fatalf("make the installer's image: %v: %s", err, out)
	}
	sweep(t)
	name := fmt.Sprintf("%s%d", prefix, os.Getpid())

	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), sandboxEnv+"="+name, insideEnv+"="+dir, "VIRTLET_CNI_BIN="+testnet.Plugins(t),
		"VIRTLET_GUEST="+filepath.Dir(kernel),
		"PATH="+strings.Join(append(path, os.Getenv("PATH")), ":"))
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	// The sandbox ends when its standard input does, and so with this process, however that ends.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	passed := relay(t, out)
	if err := cmd.Wait(); err != nil || !passed {
		t.Errorf("the sandbox: %v", err)
	}
	for _, h := range hierarchies(t, "self") {
		removeGroups(t, filepath.Join(h.dir, name))
	}
}

// relay prints what the sandbox says, and tells whether TestInside passed.
func relay(t *testing.T, out io.Reader) (passed bool) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		t.Log(lines.Text())
		passed = passed || strings.HasPrefix(lines.Text(), "--- PASS: TestInside ")
	}
	return passed
}

// prefix is that of the names of labs' cgroups; the number of the process that runs the lab follows.
const prefix = "virtlet-kubernetes-"

// sweep removes the cgroups of labs that were killed: those need a process that lives to remove them.
func sweep(t *testing.T) {
	for _, h := range hierarchies(t, "self") {
		dirs, _ := filepath.Glob(filepath.Join(h.dir, prefix+"*"))
		for _, dir := range dirs {
			if _, err := os.Stat("/proc/" + strings.TrimPrefix(filepath.Base(dir), prefix)); err != nil {
				removeGroups(t, dir)
			}
		}
	}
}

// removeGroups removes a cgroup and those below it, the lowest first. Their processes may take a moment to be gone.
func removeGroups(t *testing.T, dir string) {
	t.Helper()
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeGroups(t, filepath.Join(dir, e.Name()))
		}
	}
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = unix.Rmdir(dir); err == nil || err == unix.ENOENT {
			return
		}
	}
	t.Errorf("remove the cgroup %s: %v", dir, err)
}

func hierarchies(t *testing.T, pid string) []hierarchy {
	t.Helper()
	all, err := readHierarchies(pid)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
