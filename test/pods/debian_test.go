package pods

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A whole Debian from a disk image: cloud-init mounts the pod's volumes before it runs what the user wants, and the agent
// that Debian starts by itself runs programs, as a readiness probe does.
func TestDebian(t *testing.T) {
	dir := os.Getenv("VIRTLET_DEBIAN")
	if dir == "" {
		t.Skip("needs the Debian image: set VIRTLET_DEBIAN to what hack/debian.sh prints")
	}
	n := newNode(t)
	disk, err := os.ReadFile(filepath.Join(dir, "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	n.load(writeImage(t, guestImage, file{"disk/disk.qcow2", disk}))
	n.load(writeImage(t, pauseImage, file{"pause", []byte("never run")}))
	before := n.state()
	p, err := n.runPod("debian", map[string]string{
		"virtlet.cloud/memory":    "512M",
		"virtlet.cloud/user-data": "#cloud-config\nruncmd: [[cp, /etc/app/it's/App.conf, /root/seen], touch /run/ready]\n",
	})
	if err != nil {
		t.Fatal(err)
	}
	config := n.configMap("config", map[string]string{"App.conf": "a=1\n", "key": "k"})
	p.mounts = []*cri.Mount{
		{HostPath: config, ContainerPath: "/etc/app/it's", Readonly: true},
		{HostPath: config, ContainerPath: "/var/run/secrets/kubernetes.io/serviceaccount", Readonly: true},
		{HostPath: filepath.Join(config, "key"), ContainerPath: "/etc/hosts.key", Readonly: true},
		{HostPath: n.emptyDir("scratch"), ContainerPath: "/data"},
	}
	id := p.start("vm")
	t.Cleanup(func() {
		if log := p.log(); t.Failed() {
			t.Logf("the guest's console:\n%s", log[max(0, len(log)-8000):])
		}
	})
	// As a readiness probe asks. A boot takes the better part of a minute without KVM, and several beside other tests.
	const bootTime, period = 10 * time.Minute, time.Second
	for end := time.Now().Add(bootTime); ; time.Sleep(period) {
		r, err := p.exec(id, 20, "test", "-e", "/run/ready")
		if err == nil && r.ExitCode == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the guest is not ready after %v: %v, %v", bootTime, r, err)
		}
	}
	for line, want := range map[string]string{
		"cat /root/seen /run/secrets/kubernetes.io/serviceaccount/key /etc/hosts.key": "a=1\nkk",
		`stat -c %a "/etc/app/it's/App.conf"`:                                         "440",
		`touch "/etc/app/it's/new" 2>&1 | grep -o "Read-only file system"`:            "Read-only file system",
		"echo kept >/data/file; stat -c %a /data; findmnt -no FSTYPE /data":           "777\next4",
		"findmnt -no OPTIONS /etc/hosts.key | grep -o nosuid":                         "nosuid",
	} {
		if got := p.shell(id, line); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	p.remove(before)
}
