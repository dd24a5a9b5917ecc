package kubernetes

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/test/guest"
)

// web is two VMs behind a service. (No limit of the CPU: guests are to boot as fast as they can.)
const web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      runtimeClassName: virtlet
      containers:
      - name: vm
        image: ` + guestImage + `
        resources: {limits: {memory: 192Mi}, requests: {cpu: 100m}}
        readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1, failureThreshold: 300}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 8000, targetPort: 80}], clusterIP: 203.0.113.80}
`

// single is a VM with a port of the node, whose console can be typed at.
const single = `
apiVersion: v1
kind: Pod
metadata: {name: single, labels: {app: single}}
spec:
  runtimeClassName: virtlet
  terminationGracePeriodSeconds: 120
  containers:
  - name: vm
    image: ` + guestImage + `
    stdin: true
    ports: [{containerPort: 80, hostPort: 8080}]
    resources: {limits: {memory: 192Mi}, requests: {cpu: 100m}}
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1, failureThreshold: 300}
`

// client is a pod of runc in another namespace.
const client = `
apiVersion: v1
kind: Namespace
metadata: {name: other}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: other}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: ` + busyboxImage + `}]
`

func TestInside(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		t.Skip("part of TestKubernetes")
	}
	c := newCluster(t)
	before := state(t)
	c.install()
	c.apply(web)
	c.apply(single)
	c.apply(client)
	c.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	c.kubectl("wait", "--for=condition=Ready", "pod/single", "--timeout="+patience.String())
	c.progress("3 VM pods are ready")
	for _, part := range []struct {
		name string
		run  func(*cluster)
	}{
		{"Guests", (*cluster).guests},
		{"Reached", (*cluster).reached},
		{"Summary", (*cluster).summary},
		{"Attach", (*cluster).attach},
		{"PortForward", (*cluster).portForward},
		{"Exec", (*cluster).exec},
		{"Restarts", (*cluster).restarts},
		{"Crash", (*cluster).crash},
		{"Delete", (*cluster).delete},
		{"Rollout", (*cluster).rollout},
		{"Networks", (*cluster).networks},
		{"Samples", (*cluster).samples},
		{"Figures", (*cluster).figures},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(c.within(t)) }) {
			t.FailNow()
		}
		c.progress("%s", part.name)
	}
	c.kubectl("delete", "deployment/web", "service/web", "namespace/other", "--timeout="+patience.String())
	c.uninstall()
	var left []string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if left = added(before, state(t)); len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
	}
	c.progress("nothing is left of the pods")
}

// guests have what Kubernetes and CNI say, and their console is the log.
func (c *cluster) guests() {
	for _, p := range append(c.pods("web"), c.only("single")) {
		r, ok := guest.ParseReport([]byte(c.kubectl("logs", p.Metadata.Name)))
		if !ok {
			c.t.Errorf("%s: no report in the log", p.Metadata.Name)
			continue
		}
		nic := r.NICs[0]
		if r.Hostname != p.Metadata.Name || nic.DHCP["ip"] != p.Status.PodIP || nic.MTU != 1430 {
			c.t.Errorf("pod %s has %s, and its guest is %q with %+v", p.Metadata.Name, p.Status.PodIP, r.Hostname, nic)
		}
		if got := strings.Join(nic.DNS, " ") + " " + strings.Join(nic.Search, " "); got != clusterDNS+" default.svc.cluster.test svc.cluster.test cluster.test" {
			c.t.Errorf("%s resolves by %q", p.Metadata.Name, got)
		}
		if len(r.Disks) != 1 || r.Disks[0].Label != "virtlet-volumes" || !r.Disks[0].ReadOnly { // the service account
			c.t.Errorf("%s has the disks %+v", p.Metadata.Name, r.Disks)
		}
	}
}

// reached: pods answer at their addresses, at their service's and at a port of the node, to the node, to another pod, to a
// guest, to the world.
func (c *cluster) reached() {
	c.kubectl("wait", "--for=condition=Ready", "pod/client", "-n", "other", "--timeout="+patience.String())
	names := map[string]bool{}
	for _, p := range append(c.pods("web"), c.only("single")) {
		if page, err := fetch("node", "http://"+p.Status.PodIP); err != nil || page != p.Metadata.Name {
			c.t.Errorf("%s says %q, %v", p.Metadata.Name, page, err)
		}
		page := c.kubectl("exec", "-n", "other", "client", "--", "/bin/client", "fetch", "http://"+p.Status.PodIP)
		if strings.TrimSpace(page) != p.Metadata.Name {
			c.t.Errorf("%s says %q to another pod", p.Metadata.Name, page)
		}
		names[p.Metadata.Name] = true
	}
	var slices struct {
		Items []struct {
			Endpoints []struct {
				Addresses  []string
				Conditions struct{ Ready bool }
			}
		}
	}
	if err := json.Unmarshal([]byte(c.kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", "json")), &slices); err != nil {
		c.t.Fatal(err)
	}
	if len(slices.Items) != 1 || len(slices.Items[0].Endpoints) != 2 || !slices.Items[0].Endpoints[0].Conditions.Ready {
		c.t.Errorf("the service has %+v", slices)
	}
	for i := range 4 {
		page, err := fetch("node", "http://203.0.113.80:8000")
		if i == 1 {
			page = c.kubectl("exec", "-n", "other", "client", "--", "/bin/client", "fetch", "http://203.0.113.80:8000")
		}
		if page = strings.TrimSpace(page); err != nil || !names[page] || page == "single" {
			c.t.Errorf("the service says %q, %v", page, err)
		}
	}
	c.types("wget -q -O - http://203.0.113.80:8000", "web-")
	if page, err := fetch("world", "http://"+nodeAddr+":8080"); err != nil || page != "single" {
		c.t.Errorf("hostPort says %q, %v", page, err)
	}
}

// summary: the kubelet sees the pod's memory and traffic.
func (c *cluster) summary() {
	uid := c.only("single").Metadata.UID
	var last string
	defer func() {
		if c.t.Failed() {
			c.t.Log(last)
		}
	}()
	c.eventually("the summary has the pod", func() bool {
		var s struct {
			Pods []struct {
				PodRef  struct{ UID string }
				Memory  struct{ WorkingSetBytes uint64 }
				CPU     struct{ UsageCoreNanoSeconds uint64 }
				Network struct {
					Name             string
					RxBytes, TxBytes uint64
				}
				Containers []struct {
					Name   string
					Memory struct{ WorkingSetBytes uint64 }
				}
			}
		}
		last = c.kubectl("get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/stats/summary")
		if err := json.Unmarshal([]byte(last), &s); err != nil {
			c.t.Fatal(err)
		}
		for _, p := range s.Pods {
			if p.PodRef.UID == uid && len(p.Containers) == 1 && p.Network.RxBytes > 0 && p.CPU.UsageCoreNanoSeconds > 0 &&
				p.Memory.WorkingSetBytes > 32<<20 && p.Containers[0].Memory.WorkingSetBytes > 32<<20 {
				c.t.Logf("pod %d MiB, its VM %d MiB; %s received %d bytes and sent %d", p.Memory.WorkingSetBytes>>20,
					p.Containers[0].Memory.WorkingSetBytes>>20, p.Network.Name, p.Network.RxBytes, p.Network.TxBytes)
				return p.Network.Name == "eth0" && p.Network.TxBytes > 0
			}
		}
		return false
	})
}

// attach joins the console of the guest.
func (c *cluster) attach() { c.types("echo typed-$((40+2)) to $(hostname)", "typed-42 to single") }

// types types a line at the console of the single VM and wants some text.
func (c *cluster) types(line, want string) {
	c.t.Helper()
	if said := guest.Type(c.t, exec.Command("kubectl", "attach", "-q", "-i", "single"), line); !strings.Contains(said, want) {
		c.t.Errorf("attached, typed %q, and heard %q", line, said)
	}
}

// portForward: a port of this machine leads to the guest.
func (c *cluster) portForward() {
	forward := exec.Command("kubectl", "port-forward", "pod/single", "8081:80")
	if err := forward.Start(); err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = forward.Process.Kill(); _ = forward.Wait() }()
	c.eventually("the port is forwarded", func() bool {
		page, err := fetch("node", "http://127.0.0.1:8081")
		return err == nil && page == "single"
	})
}

// exec runs a program in the guest, through its agent.
func (c *cluster) exec() {
	c.types(guest.Agent, "") // the guest's own do not start by themselves
	c.eventually("the guest's agent answers", func() bool { return c.try("exec", "single", "--", "true") == nil })
	if out := c.kubectl("exec", "single", "--", "hostname"); strings.TrimSpace(out) != "single" {
		c.t.Errorf("exec says %q", out)
	}
}

// restarts of containerd and the kubelet leave VMs alone.
func (c *cluster) restarts() {
	vms, pods := processes("qemu-system"), append(c.pods("web"), c.only("single"))
	for i, name := range []string{"containerd", "kubelet"} {
		c.stop(name)
		c.start(name)
		c.eventually(name+" serves pods again", func() bool { return c.try("exec", "-n", "other", "client", "--", "/bin/busybox", "true") == nil })
		c.types(fmt.Sprintf("echo typed-$((50+%d))", i), fmt.Sprintf("typed-%d", 50+i))
	}
	c.kubectl("wait", "--for=condition=Ready", "node/"+nodeName, "--timeout="+patience.String())
	c.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout="+patience.String())
	if now := processes("qemu-system"); fmt.Sprint(now) != fmt.Sprint(vms) {
		c.t.Errorf("VMs %v, were %v", now, vms)
	}
	for i, p := range append(c.pods("web"), c.only("single")) {
		if was := pods[i]; p.Metadata.UID != was.Metadata.UID || p.Status.PodIP != was.Status.PodIP || p.Status.ContainerStatuses[0].RestartCount != 0 ||
			p.Status.ContainerStatuses[0].ContainerID != was.Status.ContainerStatuses[0].ContainerID {
			c.t.Errorf("%+v, was %+v", p, was)
		}
	}
	if log := c.kubectl("logs", "single"); !strings.Contains(log, "typed-50") || !strings.Contains(log, "typed-51") {
		c.t.Error("the log does not go on")
	}
}

// crash: a guest that panics is started again in the same pod.
func (c *cluster) crash() {
	was := c.only("single")
	attached := exec.Command("kubectl", "attach", "-q", "-i", "single")
	attached.Stdin = strings.NewReader("echo c >/proc/sysrq-trigger\n")
	if out, err := attached.CombinedOutput(); err != nil {
		c.t.Logf("attach ended: %v: %s", err, out) // the guest may be gone before it
	}
	var now pod
	c.eventually("the guest is there again", func() bool {
		now = c.only("single")
		return now.Status.ContainerStatuses[0].RestartCount > 0 && now.ready()
	})
	st := now.Status.ContainerStatuses[0]
	if now.Metadata.UID != was.Metadata.UID || now.Status.PodIP != was.Status.PodIP || st.RestartCount != 1 || st.LastState.Terminated.ExitCode != 1 {
		c.t.Errorf("after the crash %+v, before %+v", now, was)
	}
	if log := c.kubectl("logs", "single", "--previous"); !strings.Contains(log, "Kernel panic") {
		c.t.Errorf("the log of the guest that crashed ends with %q", log[max(0, len(log)-300):])
	}
}

// delete gives the guest the time to power down.
func (c *cluster) delete() {
	logs := exec.Command("kubectl", "logs", "-f", "single")
	var said strings.Builder
	logs.Stdout = &said
	if err := logs.Start(); err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = logs.Process.Kill() }()
	c.kubectl("delete", "pod", "single", "--timeout="+patience.String())
	_ = logs.Wait()
	if !strings.Contains(said.String(), "Power down") {
		c.t.Errorf("the log ends with %q", said.String()[max(0, said.Len()-300):])
	}
	if page, err := fetch("world", "http://"+nodeAddr+":8080"); err == nil {
		c.t.Errorf("hostPort says %q after its pod has gone", page)
	}
}

// rollout replaces both VMs, one by one, and the service answers.
func (c *cluster) rollout() {
	old := map[string]bool{}
	for _, p := range c.pods("web") {
		old[p.Metadata.Name] = true
	}
	c.kubectl("set", "env", "deployment/web", "VERSION=2")
	c.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	c.eventually("the old pods are gone", func() bool { return len(c.pods("web")) == 2 })
	for _, p := range c.pods("web") {
		if old[p.Metadata.Name] || !p.ready() {
			c.t.Errorf("after the rollout: %+v", p)
		}
	}
	page, err := fetch("node", "http://203.0.113.80:8000")
	if err != nil || old[page] || !strings.HasPrefix(page, "web-") {
		c.t.Errorf("the service says %q, %v", page, err)
	}
	c.eventually("two VMs and no more", func() bool {
		return len(processes("qemu-system")) == 2 && len(processes("containerd-shim-virtlet-v2")) == 2
	})
}
