package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
)

// configMap makes a directory as kubelet makes those of ConfigMaps, Secrets and projected volumes: links to a directory
// that can be replaced in one step.
func configMap(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	now := filepath.Join(dir, "..2026_11_24_18_00_00.123")
	tops := map[string]bool{}
	for name, text := range files {
		path := filepath.Join(now, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		top, _, _ := strings.Cut(name, "/")
		tops[top] = true
	}
	link(t, filepath.Base(now), filepath.Join(dir, "..data"))
	for top := range tops {
		link(t, "..data/"+top, filepath.Join(dir, top))
	}
	return dir
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func bound(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

func readVolumes(mounts ...specs.Mount) (vm.Volumes, error) {
	return volumes(&bundle{spec: specs.Spec{Mounts: mounts}})
}

func TestVolumesOfAPod(t *testing.T) {
	testnet.NeedRoot(t)
	config := configMap(t, map[string]string{"app.conf": "a=1", "sub/deep/key": "b=2"})
	secret := configMap(t, map[string]string{"token": "s3cret"})
	if err := os.Chown(filepath.Join(secret, "token"), 0, 2000); err != nil {
		t.Fatal(err)
	}
	got, err := readVolumes(
		bound(config, "/etc/config/", "ro"), bound(filepath.Join(secret, "token"), "/etc/config/token", "ro"),
		bound("/etc/hosts", "/etc/hosts", "ro"), bound("/tmp", "/data", "rw"), specs.Mount{Type: "proc", Destination: "/proc"},
		bound(secret, "/var/run/secrets/kubernetes.io/serviceaccount", "ro"),
	)
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{}
	for _, f := range got.Files {
		said[f.Path] = fmt.Sprintf("%v %d:%d %s", f.Mode, f.UID, f.GID, f.Data)
	}
	want := map[string]string{
		"etc/config": "drwxr-xr-x 0:0 ", "etc/config/app.conf": "-rw-r----- 0:0 a=1", "etc/config/sub": "drwxr-xr-x 0:0 ",
		"etc/config/sub/deep": "drwxr-xr-x 0:0 ", "etc/config/sub/deep/key": "-rw-r----- 0:0 b=2",
		"etc/config/token": "-rw-r----- 0:2000 s3cret", "var/run/secrets/kubernetes.io/serviceaccount": "drwxr-xr-x 0:0 ",
		"var/run/secrets/kubernetes.io/serviceaccount/token": "-rw-r----- 0:2000 s3cret",
	}
	if d := cmp.Diff(want, said); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"/etc/config", "/etc/config/token", "/var/run/secrets/kubernetes.io/serviceaccount"}, got.Mounts); d != "" {
		t.Error(d)
	}
}

// What a volume must not lead to, and how much it may have.
func TestVolumesThatAreRefused(t *testing.T) {
	tests := []struct {
		name string
		make func(dir string) error
		want string
	}{
		{"a link out", func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "a")) }, "escapes"},
		{"a link upwards", func(dir string) error { return os.Symlink("../../../../etc", filepath.Join(dir, "a")) }, "escapes"},
		{"a link in a circle", func(dir string) error { return os.Symlink(".", filepath.Join(dir, "a")) }, "too many levels"},
		{"a link to nothing", func(dir string) error { return os.Symlink("b", filepath.Join(dir, "a")) }, "no such file"},
		{"a FIFO", func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "a"), 0o600) }, "only files and directories"},
		{"a large file", func(dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "a"), nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(filepath.Join(dir, "a"), maxVolumeBytes+1)
		}, "more than 32 MiB"},
		{"many files", func(dir string) error {
			for i := range maxVolumeFiles {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		}, "more than 4096 files"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := tt.make(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := readVolumes(bound(dir, "/data", "ro")); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "/data") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	for _, to := range []string{"/", "/a\nb"} {
		if _, err := readVolumes(bound(t.TempDir(), to, "ro")); err == nil {
			t.Errorf("mounted at %q", to)
		}
	}
	if v, err := readVolumes(); err != nil || len(v.Files)+len(v.Mounts) > 0 {
		t.Errorf("no volumes: %+v, %v", v, err)
	}
}

// An emptyDir is a disk that outlives the container.
func TestEmptyDirs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volumes", "kubernetes.io~empty-dir", "scratch")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	b := &bundle{spec: specs.Spec{Mounts: []specs.Mount{bound(dir, "/data/", "rw"), bound(dir, "/dev/shm", "rw"), bound("/tmp", "/tmp", "rw")}}}
	for range 2 {
		disks, err := emptyDirs(b)
		want := []vm.Disk{{Path: filepath.Join(dir, emptyDisk), Format: "raw", Serial: "virtlet-empty-0", Mount: "/data"}}
		if d := cmp.Diff(want, disks); err != nil || d != "" {
			t.Fatalf("%v, %s", err, d)
		}
		fi, err := os.Stat(disks[0].Path)
		if err != nil || fi.Size() < minEmpty || fi.Size() > maxEmpty || fi.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", fi, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(disks[0].Path, &st); err != nil || st.Blocks > 16 {
			t.Errorf("it takes %d blocks, %v", st.Blocks, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, emptyDisk)); err != nil {
		t.Fatal(err)
	}
	link(t, "/etc/passwd", filepath.Join(dir, emptyDisk))
	if _, err := emptyDirs(b); err == nil || !strings.Contains(err.Error(), "/data") {
		t.Errorf("a link in its place: %v", err)
	}
}
