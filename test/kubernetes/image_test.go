package kubernetes

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/virtlet/virtlet/test/guest"
)

// Images: a guest to boot by its kernel, a disk from which nothing boots, a program to compare with, and what holds a pod
// of runc open.
const guestImage, emptyImage, busyboxImage, pauseImage = "localhost/guest:1", "localhost/empty:1", "localhost/busybox:1", "localhost/pause:1"

// loadImages gives containerd the images: there is no registry.
func (c *cluster) loadImages() {
	c.t.Helper()
	c.eventually("containerd answers", func() bool { return exec.Command("ctr", "version").Run() == nil })
	kernel, initrd, cmdline := guest.Artifacts(c.t)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		c.t.Fatal(err)
	}
	program := read(c.t, busybox)
	client := read(c.t, "/proc/self/exe") // static, by the Makefile
	for ref, image := range map[string]struct {
		command []string
		files   map[string][]byte
	}{
		guestImage: {[]string{"vm"}, map[string][]byte{ // Kubernetes wants a command
			"boot/cmdline": []byte(cmdline), "boot/vmlinuz": read(c.t, kernel), "boot/initrd": append(read(c.t, initrd), read(c.t, guest.Extra(c.t))...),
		}},
		emptyImage:   {[]string{"vm"}, map[string][]byte{"disk/empty.raw": make([]byte, 1<<20)}},
		busyboxImage: {[]string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"}, map[string][]byte{"bin/busybox": program, "bin/client": client, "www/index.html": []byte("runc\n")}},
		pauseImage:   {[]string{"/bin/busybox", "sleep", "1000000"}, map[string][]byte{"bin/busybox": program}},
	} {
		c.load(guest.WriteImage(c.t, ref, image.command, image.files))
	}
	c.load(filepath.Join(c.logs, installerTar))
}

func (c *cluster) load(tar string) {
	c.t.Helper()
	if out, err := exec.Command("ctr", "-n", "k8s.io", "images", "import", tar).CombinedOutput(); err != nil {
		c.t.Fatalf("import %s: %v: %s", tar, err, out)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
