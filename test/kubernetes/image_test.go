package kubernetes

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/virtlet/virtlet/test/guest"
)

// Images: a guest to boot by its kernel, a disk from which nothing boots, a program to compare with, and what holds a pod
// of runc open.
const guestImage, emptyImage, busyboxImage, pauseImage = "localhost/guest:1", "localhost/empty:1", "localhost/busybox:1", "localhost/pause:1"

// file is a file of an image.
type file struct {
	name string
	data []byte
}

// loadImages gives containerd the images: there is no registry.
func (c *cluster) loadImages() {
	c.t.Helper()
	c.eventually("containerd answers", func() bool { return exec.Command("ctr", "version").Run() == nil })
	kernel, initrd, cmdline := guest.Artifacts(c.t)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		c.t.Fatal(err)
	}
	program := file{"bin/busybox", read(c.t, busybox)}
	client := file{"bin/client", read(c.t, "/proc/self/exe")} // static, by the Makefile
	for ref, image := range map[string]struct {
		command []string
		files   []file
	}{
		guestImage: {[]string{"vm"}, []file{ // Kubernetes wants a command
			{"boot/cmdline", []byte(cmdline)}, {"boot/vmlinuz", read(c.t, kernel)}, {"boot/initrd", append(read(c.t, initrd), read(c.t, guest.Extra(c.t))...)},
		}},
		emptyImage:   {[]string{"vm"}, []file{{"disk/empty.raw", make([]byte, 1<<20)}}},
		busyboxImage: {[]string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"}, []file{program, client, {"www/index.html", []byte("runc\n")}}},
		pauseImage:   {[]string{"/bin/busybox", "sleep", "1000000"}, []file{program}},
	} {
		c.load(writeImage(c.t, ref, image.command, image.files))
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

// writeImage makes a tar as of `docker save`: an image with one layer.
func writeImage(t *testing.T, ref string, command []string, files []file) string {
	t.Helper()
	layer := pack(t, files...)
	sum := sha256.Sum256(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{"Cmd": command},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{ref}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	image := pack(t, file{"config.json", config}, file{"layer.tar", layer}, file{"manifest.json", manifest})
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func pack(t *testing.T, files ...file) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		if dir := filepath.Dir(f.name); dir != "." {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o755, Size: int64(len(f.data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
