package pods

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/websocket"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/vm"
	"github.com/virtlet/virtlet/test/guest"
)

// pod is a pod on a node.
type pod struct {
	*node
	id      string
	config  *cri.PodSandboxConfig
	devices []*cri.Device // of its container
	mounts  []*cri.Mount
	tries   uint32
}

const guestImage, pauseImage = "localhost/guest:1", "localhost/pause:1"

// images loads what pods are made of: the test guest as an image to boot by its kernel, and what containerd wants for a
// sandbox, which this runtime does not look at. Further archives are put behind the guest's initrd.
func (n *node) images(further ...string) {
	n.t.Helper()
	kernel, initrd, cmdline := guest.Artifacts(n.t)
	files := []file{{name: "boot/cmdline", data: []byte(cmdline)}}
	for name, paths := range map[string][]string{"boot/vmlinuz": {kernel}, "boot/initrd": append([]string{initrd}, further...)} {
		var all []byte
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				n.t.Fatal(err)
			}
			all = append(all, data...)
		}
		files = append(files, file{name, all})
	}
	n.load(writeImage(n.t, guestImage, files...))
	n.load(writeImage(n.t, pauseImage, file{"pause", []byte("never run")}))
}

// runPod makes a pod of this runtime; it has no container yet.
func (n *node) runPod(name string, annotations map[string]string) (*pod, error) {
	return n.runPodWith("virtlet", name, func(c *cri.PodSandboxConfig) { c.Annotations = annotations })
}

// runPodWith makes a pod of some runtime, after a change.
func (n *node) runPodWith(handler, name string, change func(*cri.PodSandboxConfig)) (*pod, error) {
	p := &pod{node: n, config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Uid: name + "-uid", Namespace: "default"},
		Hostname: name, LogDirectory: filepath.Join(n.dir, "log", name),
		DnsConfig: &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"default.svc.cluster.local"}},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: n.cgroup + "/" + name, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{}},
		},
	}}
	change(p.config)
	r, err := n.runtime.RunPodSandbox(n.limit(), &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	return p, nil
}

// create makes the pod's container, anew after one that has ended.
func (p *pod) create(name string) (string, error) {
	p.tries++
	r, err := p.runtime.CreateContainer(p.limit(), &cri.CreateContainerRequest{
		PodSandboxId: p.id, SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name, Attempt: p.tries}, Image: &cri.ImageSpec{Image: guestImage}, Stdin: true,
			LogPath: fmt.Sprintf("%d.log", p.tries), Devices: p.devices, Mounts: p.mounts,
			Linux: &cri.LinuxContainerConfig{
				Resources:       &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 192 << 20},
				SecurityContext: &cri.LinuxContainerSecurityContext{},
			},
		},
	})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

func (p *pod) start(name string) string {
	p.t.Helper()
	id, err := p.create(name)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.runtime.StartContainer(p.limit(), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		p.t.Fatal(err)
	}
	return id
}

// log gives what the container has said: the log without containerd's words before each line.
func (p *pod) log() string {
	b, _ := os.ReadFile(filepath.Join(p.config.LogDirectory, fmt.Sprintf("%d.log", p.tries)))
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(line, " ", 4); len(f) == 4 {
			text := strings.TrimSuffix(f[3], "\n")
			if f[2] == "F" {
				text += "\n"
			}
			out.WriteString(text)
		}
	}
	return out.String()
}

func (p *pod) report() guest.Report {
	p.t.Helper()
	var r guest.Report
	p.eventually("the guest reports", func() (ok bool) {
		if st := p.status(""); st != nil && st.State == cri.ContainerState_CONTAINER_EXITED {
			p.t.Fatalf("the container has ended: %v; its log:\n%s", st, p.log())
		}
		r, ok = guest.ParseReport([]byte(p.log()))
		return ok
	})
	return r
}

// status gives the state of a container, or of the pod's only one.
func (p *pod) status(id string) *cri.ContainerStatus {
	if id == "" {
		list, err := p.runtime.ListContainers(p.limit(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
		if err != nil || len(list.Containers) != 1 {
			return nil
		}
		id = list.Containers[0].Id
	}
	st, err := p.runtime.ContainerStatus(p.limit(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return nil
	}
	return st.Status
}

func (p *pod) ip() netip.Addr {
	p.t.Helper()
	st, err := p.runtime.PodSandboxStatus(p.limit(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	return netip.MustParseAddr(st.Status.Network.Ip)
}

// remove ends a pod as the kubelet does, and looks for what is left.
func (p *pod) remove(before []string) {
	p.t.Helper()
	if _, err := p.runtime.StopPodSandbox(p.limit(), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Error(err)
	}
	if _, err := p.runtime.RemovePodSandbox(p.limit(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Error(err)
	}
	p.left(before)
}

// left waits until nothing more is there than before: a shim ends some moments after its pod.
func (n *node) left(before []string) {
	n.t.Helper()
	var diff string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if diff = cmp.Diff(before, n.state()); diff == "" {
			return
		}
	}
	n.t.Errorf("left behind (-before +after):\n%s", diff)
}

// The life of a pod: the guest has what CNI gave, its console is the log, containerd may restart, the guest may crash and
// be started again, it powers down when asked, and nothing is left.
func TestPod(t *testing.T) {
	n := newNode(t)
	n.images()
	before := n.state()
	p, err := n.runPod("web", map[string]string{"virtlet.cloud/spoof-check": "true"})
	if err != nil {
		t.Fatal(err)
	}
	ip := p.ip()
	const size = 3 << 20
	volume := n.blockDevice(size)
	p.devices = []*cri.Device{{HostPath: volume, ContainerPath: "/dev/data", Permissions: "rw"}}
	id := p.start("vm")
	r := p.report()
	check := func(r guest.Report) {
		t.Helper()
		if len(r.NICs) != 1 || r.NICs[0].MTU != 1430 || r.NICs[0].DHCP["ip"] != ip.String() || testAddr(r) != ip {
			t.Errorf("CNI gave %s, and the guest has %+v", ip, r.NICs)
		}
		if len(r.Disks) != 1 || r.Disks[0].Size != size || r.Disks[0].ReadOnly {
			t.Errorf("the guest has disks %+v", r.Disks)
		}
		if r.Hostname != "web" || strings.Join(r.NICs[0].DNS, " ") != "192.0.2.53" || strings.Join(r.NICs[0].Search, " ") != "default.svc.cluster.local" {
			t.Errorf("the guest is %q and asks %q of %q", r.Hostname, r.NICs[0].Search, r.NICs[0].DNS)
		}
	}
	check(r)
	if out, err := n.run("curl", "-sS", "--max-time", "30", "http://"+ip.String()+"/"); err != nil {
		t.Errorf("the node reaches the guest: %v: %s", err, out)
	}
	state := n.vm(t)
	if state.Config.Memory != 192 || state.Config.CPUs != 1 || state.Config.Pod != "default/web" || len(state.Results) != 1 {
		t.Errorf("the VM is %+v", state)
	}
	stats, err := n.runtime.ContainerStats(n.limit(), &cri.ContainerStatsRequest{ContainerId: id})
	if err != nil || stats.Stats.Memory.GetWorkingSetBytes().GetValue() < 32<<20 || stats.Stats.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("stats %+v, %v", stats, err)
	}
	p.summary()
	p.refusesSidecar()

	// What is typed reaches the guest, before and after containerd has gone.
	p.attach(id, "echo typed-$((40+2))", "typed-42")
	shim, qemu := n.process("containerd-shim-virtlet-v2"), n.process("qemu-system")
	n.order("kill")
	n.startContainerd()
	if st := p.status(id); st == nil || st.State != cri.ContainerState_CONTAINER_RUNNING || n.process("qemu-system") != qemu || n.process("containerd-shim-virtlet-v2") != shim {
		t.Errorf("containerd restarted, and the container is %v", st)
	}
	p.attach(id, "echo typed-$((40+3))", "typed-43")
	p.eventually("the log goes on", func() bool { return strings.Contains(p.log(), "typed-43") })

	// The guest crashes while containerd is away, and another is started in the same pod.
	n.order("kill")
	if err := unix.Kill(qemu, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.startContainerd()
	p.eventually("the container ends", func() bool {
		st := p.status(id)
		return st != nil && st.State == cri.ContainerState_CONTAINER_EXITED && st.ExitCode == 1
	})
	id = p.start("vm")
	check(p.report())
	if now := n.process("containerd-shim-virtlet-v2"); now != shim {
		t.Errorf("another shim: %d, was %d", now, shim)
	}
	if _, err := n.runtime.StopContainer(n.limit(), &cri.StopContainerRequest{ContainerId: id, Timeout: 120}); err != nil {
		t.Error(err)
	}
	if st := p.status(id); st == nil || st.ExitCode != 0 || !strings.Contains(p.log(), "Power down") {
		t.Errorf("stopped: %v; its log ends with %q", st, p.log()[max(0, len(p.log())-400):])
	}
	p.remove(before)
}

// shimSize is how large a shim may be at rest, in MB: what it has of its own and the pages of its program that it uses.
const shimSize = 15

// Five pods at once, each with a disk image in the way of containerDisks; their guests do nothing.
func TestPodsAtOnce(t *testing.T) {
	n := newNode(t)
	n.load(writeImage(t, guestImage, file{"disk/empty.raw", make([]byte, 1<<20)}))
	n.load(writeImage(t, pauseImage, file{"pause", []byte("never run")}))
	before := n.state()
	var pods [5]*pod
	var all errgroup.Group
	begin := time.Now()
	for i := range pods {
		all.Go(func() error {
			p, err := n.runPod(fmt.Sprintf("pod%d", i), map[string]string{"virtlet.cloud/memory": "64M"})
			if err != nil {
				return err
			}
			pods[i] = p
			id, err := p.create("vm")
			if err == nil {
				_, err = n.runtime.StartContainer(n.limit(), &cri.StartContainerRequest{ContainerId: id})
			}
			return err
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pods with running guests after %v", len(pods), time.Since(begin).Round(time.Millisecond))
	addrs := map[netip.Addr]bool{}
	for i, p := range pods {
		addrs[p.ip()] = true
		if st := p.status(""); st == nil || st.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("container %d: %v", i, st)
		}
	}
	vms, err := n.store().List()
	if err != nil || len(vms) != len(pods) || len(addrs) != len(pods) {
		t.Errorf("%d VMs, %d addresses, %v", len(vms), len(addrs), err)
	}
	for _, v := range vms {
		if v.Status != vm.Running || v.Config.Memory != 64 || len(v.Leases) != 1 || !addrs[v.Leases[0].Addr.Addr()] {
			t.Errorf("VM %+v", v)
		}
	}
	var sizes []float64
	n.eventually("the shims are at rest, and small", func() bool {
		sizes = nil
		for pid, command := range n.processes() {
			if strings.Contains(command, "containerd-shim-virtlet-v2") {
				sizes = append(sizes, n.rollup(pid, "Rss:"))
			}
		}
		return len(sizes) == len(pods) && slices.Max(sizes) <= shimSize
	})
	t.Logf("resident sets of the shims: %.1f MB", sizes)
	for _, p := range pods {
		all.Go(func() error {
			_, err := n.runtime.StopPodSandbox(n.limit(), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
			if err == nil {
				_, err = n.runtime.RemovePodSandbox(n.limit(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			}
			return err
		})
	}
	begin = time.Now()
	if err := all.Wait(); err != nil {
		t.Error(err)
	}
	n.left(before)
	t.Logf("removed after %v", time.Since(begin).Round(time.Millisecond))
}

// A shim that is killed leaves nothing once its pod is removed, and the pod can be made anew.
func TestShimKilled(t *testing.T) {
	n := newNode(t)
	n.images()
	before := n.state()
	if _, err := n.runPod("typo", map[string]string{"virtlet.cloud/spoofcheck": "false"}); err == nil || !strings.Contains(err.Error(), "spoofcheck") {
		t.Errorf("a mistyped annotation: %v", err)
	}
	n.left(before)
	for range 2 {
		p, err := n.runPod("web", nil)
		if err != nil {
			t.Fatal(err)
		}
		id := p.start("vm")
		shim := n.process("containerd-shim-virtlet-v2")
		if err := unix.Kill(shim, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.eventually("the container ends", func() bool {
			st := p.status(id)
			return st != nil && st.State == cri.ContainerState_CONTAINER_EXITED
		})
		p.remove(before)
	}
}

// summary looks at the pod as the kubelet does for its summary: through the manager, or through the process of the sandbox,
// whose network is counted, and through the pod's cgroup.
func (p *pod) summary() {
	p.t.Helper()
	const least = 32 << 20 // bytes that a guest that has booted has touched
	r, err := p.runtime.PodSandboxStats(p.limit(), &cri.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatal(err)
	}
	pod := r.GetStats().GetLinux()
	if eth0 := pod.GetNetwork().GetDefaultInterface(); eth0.GetName() != "eth0" || eth0.GetRxBytes().GetValue() == 0 || eth0.GetTxBytes().GetValue() == 0 {
		p.t.Errorf("the pod's traffic: %v", pod.GetNetwork())
	}
	if pod.GetMemory().GetWorkingSetBytes().GetValue() < least {
		p.t.Errorf("the pod's memory: %v", pod.GetMemory())
	}
	shim := p.process("containerd-shim-virtlet-v2")
	dev, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", shim))
	if err != nil || !strings.Contains(string(dev), "eth0:") {
		p.t.Errorf("what is counted for the sandbox's process: %v\n%s", err, dev)
	}
	for _, pid := range []int{shim, p.process("qemu-system")} {
		group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !strings.Contains(string(group), p.config.Linux.CgroupParent+"/") {
			p.t.Errorf("process %d is not in the pod's cgroup: %v\n%s", pid, err, group)
		}
	}
}

// refusesSidecar starts a second container.
func (p *pod) refusesSidecar() {
	p.t.Helper()
	id, err := p.create("sidecar")
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.runtime.StartContainer(p.limit(), &cri.StartContainerRequest{ContainerId: id}); err == nil || !strings.Contains(err.Error(), "has a VM already") {
		p.t.Errorf("a second container: %v", err)
	}
	if _, err := p.runtime.RemoveContainer(p.limit(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
		p.t.Error(err)
	}
	p.tries--
}

// attach is `kubectl attach -i`: it types a line and waits until the guest has said something. The streams of Kubernetes
// are messages of a WebSocket that begin with the number of the stream.
func (p *pod) attach(id, line, want string) {
	p.t.Helper()
	r, err := p.runtime.Attach(p.limit(), &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true})
	if err != nil {
		p.t.Fatal(err)
	}
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(r.Url, "http"), "http://localhost")
	if err != nil {
		p.t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", p.holder.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	defer ns.Close()
	var conn net.Conn
	if err := ns.Do(func() error { conn, err = net.Dial("tcp", config.Location.Host); return err }); err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		p.t.Fatal(err)
	}
	defer ws.Close()
	const stdin, stdout = 0, 1
	if err := websocket.Message.Send(ws, append([]byte{stdin}, line+"\n"...)); err != nil {
		p.t.Fatal(err)
	}
	for heard := ""; !strings.Contains(heard, want); {
		var message []byte
		if err := websocket.Message.Receive(ws, &message); err != nil {
			p.t.Fatalf("attached, and heard %q: %v", heard, err)
		}
		if len(message) > 1 && message[0] == stdout {
			heard += string(message[1:])
		}
	}
}

// vm gives the state of the node's only VM, as `virtlet inspect` sees it.
func (n *node) vm(t *testing.T) vm.State {
	t.Helper()
	all, err := n.store().List()
	if err != nil || len(all) != 1 || all[0].Status != vm.Running {
		t.Fatalf("VMs: %+v, %v", all, err)
	}
	return all[0]
}

func testAddr(r guest.Report) netip.Addr {
	for _, a := range r.NICs[0].Addrs {
		if a.Addr().Is4() {
			return a.Addr()
		}
	}
	return netip.Addr{}
}
