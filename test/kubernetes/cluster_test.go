package kubernetes

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/internal/testnet"
)

// Addresses of documentation (RFC 5737, RFC 2544); they are known in the sandbox alone.
const (
	nodeName, nodeAddr, worldAddr = "node", "198.18.0.1", "198.18.0.2"
	podRange, serviceRange        = "198.51.100.0/24", "203.0.113.0/24"
	clusterDNS                    = "192.0.2.53"
	home                          = "/var/lib/lab" // of the cluster's files
)

// cluster is the node's programs. They are started in the order of a machine that boots.
type cluster struct {
	t       *testing.T
	logs    string
	running map[string]*program
	begin   time.Time
}

// program is one that was started; ended is closed when it has.
type program struct {
	*exec.Cmd
	ended chan struct{}
}

// commands are the programs of the cluster with their arguments, by name. Everything is allowed to everybody who has the
// token: the lab is about pods.
var commands = map[string]string{
	"containerd": "--config /etc/containerd/config.toml",
	"etcd": "--data-dir /var/lib/etcd --unsafe-no-fsync --listen-client-urls http://127.0.0.1:2379 " +
		"--advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 " +
		"--initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380",
	"kube-apiserver": "--etcd-servers http://127.0.0.1:2379 --cert-dir " + home + "/apiserver --advertise-address " + nodeAddr +
		" --token-auth-file " + home + "/tokens --authorization-mode AlwaysAllow --service-cluster-ip-range " + serviceRange +
		" --service-account-issuer https://lab.test --service-account-signing-key-file " + home + "/accounts.pem" +
		" --service-account-key-file " + home + "/accounts.pem --kubelet-preferred-address-types InternalIP", // there is no DNS
	"kube-controller-manager": "--kubeconfig " + home + "/kubeconfig --leader-elect=false --bind-address 127.0.0.1" +
		" --service-account-private-key-file " + home + "/accounts.pem --root-ca-file " + home + "/apiserver/apiserver.crt" +
		" --flex-volume-plugin-dir " + home + "/volumes",
	"kube-scheduler": "--config " + home + "/scheduler.yaml --bind-address 127.0.0.1",
	"kubelet":        "--config " + home + "/kubelet.yaml --kubeconfig " + home + "/kubeconfig --node-ip " + nodeAddr + " --hostname-override " + nodeName,
	"kube-proxy":     "--config " + home + "/proxy.yaml",
}

// files are the programs' configuration, in the lab's directory; the handler of VMs is the installer's to add. Lowering an OOM score takes CAP_SYS_RESOURCE, and AppArmor's profiles are loaded
// for the whole machine; cgroup v1 is what the test machine has.
var files = map[string]string{
	"tokens": "lab,admin,admin,system:masters\n",
	"kubeconfig": `{apiVersion: v1, kind: Config, current-context: lab, contexts: [{name: lab, context: {cluster: lab, user: lab}}],
clusters: [{name: lab, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}], users: [{name: lab, user: {token: lab}}]}`,
	"scheduler.yaml": `apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
leaderElection: {leaderElect: false}
clientConnection: {kubeconfig: ` + home + `/kubeconfig}
`,
	"kubelet.yaml": `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
evictionHard: {memory.available: 1Mi, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%}
volumePluginDir: ` + home + `/volumes
resolvConf: ` + home + `/resolv.conf
clusterDNS: [` + clusterDNS + `]
clusterDomain: cluster.test
`,
	"resolv.conf": "nameserver " + clusterDNS + "\n",
	"proxy.yaml": `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: ` + podRange + `
hostnameOverride: ` + nodeName + `
clientConnection: {kubeconfig: ` + home + `/kubeconfig}
# The table of connections is the machine's.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`,
	"/etc/containerd/config.toml": `version = 3
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri"]
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "` + pauseImage + `"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["PLUGINS", "MULTUS"]
conf_dir = "` + home + `/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.virtlet-multus]
runtime_type = "io.containerd.virtlet.v2"
cni_conf_dir = "` + home + `/multus.d"
cni_max_conf_num = 1
`,
	"net.d/10-pods.conflist": pods,
	// The kubelet's pods of this handler alone have Multus before the network of all the others.
	"multus.d/00-multus.conf": `{"cniVersion": "1.0.0", "name": "multus", "type": "multus", "kubeconfig": "` + home + `/kubeconfig",
"cniDir": "/run/multus", "binDir": "PLUGINS", "capabilities": {"portMappings": true}, "delegates": [` + pods + `]}`,
}

const pods = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": 1430, "ipam": {"type": "host-local",
"dataDir": "/run/ipam", "ranges": [[{"subnet": "` + podRange + `"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]}`

// newCluster starts all but the kubelet's pods, and waits until the node is ready.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, logs: os.Getenv(insideEnv), running: map[string]*program{}, begin: time.Now()}
	t.Cleanup(c.ended)
	t.Setenv("KUBECONFIG", home+"/kubeconfig")
	t.Setenv("HOME", home) // kubectl's cache
	multus, err := exec.LookPath("multus")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(home, name)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		text = strings.NewReplacer("PLUGINS", testnet.Plugins(t), "MULTUS", filepath.Dir(multus)).Replace(text)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	if err := os.WriteFile(home+"/accounts.pem", pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"containerd", "etcd", "kube-apiserver"} {
		c.start(name)
	}
	c.loadImages()
	c.eventually("the API server is ready", func() bool { return c.try("get", "--raw", "/readyz") == nil })
	c.progress("API server ready")
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"} {
		c.start(name)
	}
	c.eventually("the node registers", func() bool { return c.try("get", "node", nodeName) == nil })
	c.kubectl("wait", "--for=condition=Ready", "node/"+nodeName, "--timeout=60s")
	c.eventually("there is an account for pods", func() bool { return c.try("get", "serviceaccount", "default") == nil })
	c.progress("node ready")
	return c
}

func (c *cluster) progress(format string, args ...any) {
	c.t.Helper()
	c.t.Logf("%6.1f s: "+format, append([]any{time.Since(c.begin).Seconds()}, args...)...)
}

// start starts one of the cluster's programs; its log goes on where an earlier one's ended.
func (c *cluster) start(name string) {
	c.t.Helper()
	log, err := os.OpenFile(filepath.Join(c.logs, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(name, strings.Fields(commands[name])...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	p := &program{cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.ended)
	}()
	c.running[name] = p
}

// stop kills one.
func (c *cluster) stop(name string) {
	c.t.Helper()
	p := c.running[name]
	if err := p.Process.Kill(); err != nil {
		c.t.Fatalf("%s: %v", name, err)
	}
	<-p.ended
}

// ended tells of programs that should run and do not.
func (c *cluster) ended() {
	for name, p := range c.running {
		select {
		case <-p.ended:
			log, _ := os.ReadFile(filepath.Join(c.logs, name+".log"))
			c.t.Errorf("%s has ended (%v); its log ends with:\n%s", name, p.ProcessState, log[max(0, len(log)-1000):])
		default:
		}
	}
}

// patience bounds whatever waits for a guest: without KVM, beside other programs, one boots in some ten seconds.
const patience = 3 * time.Minute

// eventually waits until ok.
func (c *cluster) eventually(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// within is the cluster for a part of the lab.
func (c *cluster) within(t *testing.T) *cluster {
	part := *c
	part.t = t
	return &part
}

// kubectl gives what it prints; the lab ends when it fails.
func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	cmd := exec.Command("kubectl", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("kubectl %s: %v: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

func (c *cluster) try(args ...string) error {
	return exec.Command("kubectl", args...).Run()
}

// apply makes what a manifest says.
func (c *cluster) apply(manifest string) {
	c.t.Helper()
	cmd := exec.Command("kubectl", "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("kubectl apply: %v: %s\n%s", err, out, manifest)
	}
}

// pod is what the lab reads of a pod.
type pod struct {
	Metadata struct{ Name, UID, Namespace, DeletionTimestamp string }
	Status   struct {
		Phase, PodIP      string
		Conditions        []struct{ Type, Status string }
		ContainerStatuses []struct {
			ContainerID  string
			RestartCount int
			Ready        bool
			LastState    struct {
				Terminated struct {
					ExitCode int
					Reason   string
				}
			}
		}
	}
}

func (p pod) ready() bool {
	return p.Metadata.DeletionTimestamp == "" && len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready
}

// pods gives those of an app in the default namespace, by name.
func (c *cluster) pods(app string) []pod {
	c.t.Helper()
	var list struct{ Items []pod }
	if err := json.Unmarshal([]byte(c.kubectl("get", "pods", "-l", "app="+app, "-o", "json")), &list); err != nil {
		c.t.Fatal(err)
	}
	return list.Items
}

// only gives the only pod of an app.
func (c *cluster) only(app string) pod {
	c.t.Helper()
	all := c.pods(app)
	if len(all) != 1 {
		c.t.Fatalf("%d pods %q", len(all), app)
	}
	return all[0]
}

// fetch gets a page, from the node or from the world beside it.
func fetch(from, url string) (string, error) {
	args := []string{"curl", "-sS", "--max-time", "20", url}
	if from == "world" {
		args = append([]string{"ip", "netns", "exec", "world"}, args...)
	}
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s from the %s: %w: %s", url, from, err, out)
	}
	return strings.TrimSpace(string(out)), err
}
