package pods

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/test/guest"
)

// configMap makes a volume as the kubelet makes those of ConfigMaps and Secrets, on the node.
func (n *node) configMap(name string, files map[string]string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "pods", name)
	for key, text := range files {
		n.write(filepath.Join("pods", name, "..2026_11_24", key), text)
		if err := os.Chmod(filepath.Join(dir, "..2026_11_24", key), 0o440); err != nil {
			n.t.Fatal(err)
		}
		if err := os.Symlink("..data/"+key, filepath.Join(dir, key)); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := os.Symlink("..2026_11_24", filepath.Join(dir, "..data")); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// emptyDir makes a volume as the kubelet makes an emptyDir.
func (n *node) emptyDir(name string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "pods", "volumes", "kubernetes.io~empty-dir", name)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// A guest reads the ConfigMaps and Secrets of its pod from a read-only disk, here on SCSI, of which nothing stays on the node.
// An emptyDir is a disk that the next guest of the pod finds as the first has left it.
func TestVolumes(t *testing.T) {
	n := newNode(t)
	n.images(guest.Extra(t))
	before := n.state()
	p, err := n.runPod("web", map[string]string{"virtlet.cloud/disk-bus": "scsi"})
	if err != nil {
		t.Fatal(err)
	}
	config := n.configMap("config", map[string]string{"App.Properties": "a=1\n", ".hidden": "b=2\n"})
	secret := n.configMap("secret", map[string]string{"token": "s3cret"})
	p.mounts = []*cri.Mount{
		{HostPath: config, ContainerPath: "/etc/config", Readonly: true},
		{HostPath: secret, ContainerPath: "/var/run/secrets/kubernetes.io/serviceaccount", Readonly: true},
		{HostPath: filepath.Join(secret, "token"), ContainerPath: "/etc/one/token", Readonly: true},
		{HostPath: n.emptyDir("scratch"), ContainerPath: "/data"},
	}
	id := p.start("vm")
	empty, volumes := p.scsiDisks()
	p.withAgent(id)
	p.shell(id, fmt.Sprintf("mke2fs %s && mkdir /run/d && mount -t ext4 %[1]s /run/d && echo kept >/run/d/file && umount /run/d", empty))
	p.shell(id, "mkdir /run/v && mount -t iso9660 -o ro "+volumes+" /run/v")
	for line, want := range map[string]string{
		"cat /run/v/etc/config/App.Properties /run/v/etc/config/.hidden":  "a=1\nb=2",
		"cat /run/v/var/run/secrets/kubernetes.io/serviceaccount/token":   "s3cret",
		"cat /run/v/etc/one/token":                                        "s3cret",
		"stat -c '%a %u' /run/v/etc/config/App.Properties":                "440 0",
		"stat -c '%a %F' /run/v/etc/config":                               "755 directory",
		"ls -A /run/v/etc/config | sort | tr '\\n' ' '":                   ".hidden App.Properties",
		"touch /run/v/etc/config/new 2>/dev/null && echo written || true": "",
	} {
		if got := p.shell(id, line); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	for _, dir := range []string{"/run/virtlet", "/var/lib/virtlet"} {
		_ = filepath.WalkDir(n.root(dir), func(path string, e os.DirEntry, err error) error {
			if b, _ := os.ReadFile(path); strings.Contains(string(b), "s3cret") {
				t.Errorf("the Secret is in %s", path)
			}
			return nil
		})
	}
	if _, err := n.runtime.StopContainer(n.limit(), &cri.StopContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	id = p.start("vm")
	empty, _ = p.scsiDisks()
	p.withAgent(id)
	if got := p.shell(id, "mkdir /run/d && mount -t ext4 "+empty+" /run/d && cat /run/d/file"); got != "kept" {
		t.Errorf("the next guest finds %q", got)
	}
	p.remove(before)

	// A volume that does not fit is a refusal with a reason.
	if p, err = n.runPod("large", nil); err != nil {
		t.Fatal(err)
	}
	n.write("large/file", "")
	if err := os.Truncate(filepath.Join(n.dir, "large", "file"), 1<<30); err != nil {
		t.Fatal(err)
	}
	p.mounts = []*cri.Mount{{HostPath: filepath.Join(n.dir, "large"), ContainerPath: "/data", Readonly: true}}
	if id, err = p.create("vm"); err == nil {
		_, err = n.runtime.StartContainer(n.limit(), &cri.StartContainerRequest{ContainerId: id})
	}
	if err == nil || !strings.Contains(err.Error(), "volume at /data") || !strings.Contains(err.Error(), "block volume") {
		t.Errorf("a volume of 1 GiB: %v", err)
	}
	p.remove(before)
}

// scsiDisks gives the devices of the guest's two disks. The kernel looks for SCSI disks in parallel: sda may be either.
func (p *pod) scsiDisks() (empty, volumes string) {
	p.t.Helper()
	disks := p.report().Disks
	for _, d := range disks {
		switch {
		case !strings.HasPrefix(d.Name, "sd"):
		case d.ReadOnly && d.Label == "virtlet-volumes":
			volumes = "/dev/" + d.Name
		case !d.ReadOnly:
			empty = "/dev/" + d.Name
		}
	}
	if len(disks) != 2 || empty == "" || volumes == "" {
		p.t.Fatalf("the guest has disks %+v", disks)
	}
	return empty, volumes
}

// A handler with two networks: the guest has both, in the order of the interfaces, whichever is ready first.
func TestTwoNetworks(t *testing.T) {
	n := newNode(t)
	n.images()
	before := n.state()
	p, err := n.runPodWith("virtlet-two", "web", func(*cri.PodSandboxConfig) {})
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(n.root("/var/lib/cni/results/*" + p.id + "*"))
	if err != nil || len(files) != 3 { // and the loopback
		t.Errorf("results %q, %v", files, err)
	}
	p.start("vm")
	r := p.report()
	if len(r.NICs) != 2 {
		t.Fatalf("the guest has %+v", r.NICs)
	}
	state := n.vm(t)
	for i, want := range []struct {
		subnet string
		mtu    int
		router string
	}{{"198.51.100.", 1430, "198.51.100.1"}, {"203.0.113.", 1400, ""}} {
		got := r.NICs[i]
		if !strings.HasPrefix(got.DHCP["ip"], want.subnet) || got.MTU != want.mtu || got.DHCP["router"] != want.router || got.MAC != state.NICs[i].MAC.String() {
			t.Errorf("NIC %d is %+v, want %+v", i, got, want)
		}
	}
	if names := []string{state.NICs[0].Name, state.NICs[1].Name}; names[0] != "eth0" || names[1] != "eth1" || len(state.Results) != 2 || state.Results[0].Network != "pods" {
		t.Errorf("NICs %q, results %+v", names, state.Results)
	}
	if p.ip().String() != r.NICs[0].DHCP["ip"] {
		t.Errorf("the pod is %s", p.ip())
	}
	p.remove(before)
}
