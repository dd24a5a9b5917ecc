package pods

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// containerdVersion gives what the containerd in a directory says of itself: 1.6.20~ds1, 1.7.24~ds1, v2.4.2+unknown.
func containerdVersion(t testing.TB, bin string) string {
	t.Helper()
	out, err := exec.Command(bin+"/containerd", "--version").CombinedOutput() // containerd MODULE VERSION REVISION
	f := strings.Fields(string(out))
	if err != nil || len(f) < 3 {
		t.Fatalf("containerd --version: %v: %s", err, out)
	}
	return strings.TrimPrefix(f[2], "v")
}

// What is the same for every containerd: plugins that a test has no use for and that want much of a machine.
const preamble = `oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri"]
`

// The lowering of an OOM score takes CAP_SYS_RESOURCE, and AppArmor's profiles are loaded for the whole machine.
const configuration1 = `version = 2
` + preamble + `
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "%[2]s"
conf_dir = "%[1]s/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "virtlet"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.virtlet]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
container_annotations = ["virtlet.cloud/*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.virtlet-two]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
cni_conf_dir = "%[1]s/two.d"
cni_max_conf_num = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
`

const configuration2 = `version = 3
` + preamble + `
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "localhost/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["%[2]s"]
conf_dir = "%[1]s/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "virtlet"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.virtlet]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
container_annotations = ["virtlet.cloud/*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.virtlet-two]
runtime_type = "io.containerd.virtlet.v2"
pod_annotations = ["virtlet.cloud/*"]
cni_conf_dir = "%[1]s/two.d"
cni_max_conf_num = 2
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
`

// configuration is containerd's config.toml; dir is the node's, plugins that of the CNI plugins.
func configuration(version, dir, plugins string) string {
	if strings.HasPrefix(version, "1.") {
		return fmt.Sprintf(configuration1, dir, plugins)
	}
	return fmt.Sprintf(configuration2, dir, plugins)
}

const network = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1430,
"ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "198.51.100.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]}`

// secondNetwork is of the handler virtlet-two, beside the first. Its name comes before that of the first.
const secondNetwork = `{"cniVersion": "1.0.0", "name": "data", "plugins": [{"type": "bridge", "bridge": "cni1", "mtu": 1400,
"ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "203.0.113.0/24"}]]}}]}`
