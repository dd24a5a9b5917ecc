package cloudinit

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	diskiso "github.com/diskfs/go-diskfs/filesystem/iso9660"
)

// volumeFiles are files for a volume: names that ISO 9660 alone could not have, modes, owners, and more than fits into one sector of
// a directory.
func volumeFiles() []File {
	files := []File{
		{Path: "etc/config", Mode: fs.ModeDir | 0o750, UID: 1000, GID: 2000},
		{Path: "etc/config/app.Properties", Mode: 0o440, UID: 7, GID: 8, Data: []byte("a=1\n")},
		{Path: "etc/config/APP.properties", Mode: 0o644, Data: []byte("A=1\n")},
		{Path: "etc/config/.hidden", Mode: 0o600},
		{Path: "etc/config/" + strings.Repeat("long-", 31), Mode: 0o644, Data: bytes.Repeat([]byte("x"), 5000)},
		{Path: "var/run/secrets/kubernetes.io/serviceaccount/a/b/c/d/e/token", Mode: 0o444, Data: []byte("secret")},
		{Path: "etc/it's", Mode: 0o644, Data: []byte("quoted")},
	}
	for i := range 60 {
		files = append(files, File{Path: fmt.Sprintf("many/file-%02d", i), Mode: 0o644, Data: []byte{byte(i)}})
	}
	for i := range 120 {
		files = append(files, File{Path: fmt.Sprintf("dirs/dir-%03d/f", i), Mode: 0o644})
	}
	return files
}

// Readers find what was put in. That of the kernel is shown by a guest (test/pods).
func TestVolumes(t *testing.T) {
	files := volumeFiles()
	b, err := Volumes(files)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Volumes(files); err != nil || !bytes.Equal(b, again) {
		t.Errorf("the same files give another volume: %v", err)
	}
	image := filepath.Join(t.TempDir(), "volumes.iso")
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	iso, err := diskiso.Read(file.New(f, true), int64(len(b)), 0, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if label := iso.Label(); strings.TrimSpace(label) != VolumesLabel {
		t.Errorf("label %q", label)
	}
	for _, want := range files {
		entries, err := iso.ReadDir(filepath.Dir(want.Path))
		if err != nil {
			t.Fatalf("%s: %v", want.Path, err)
		}
		found := false
		for _, e := range entries {
			if e.Name() != strings.TrimPrefix(filepath.Base(want.Path), ".") { // the library takes that off; a guest does not (test/pods)
				continue
			}
			found = true
			fi, err := e.Info()
			if err != nil || fi.IsDir() != want.Mode.IsDir() || !fi.IsDir() && fi.Size() != int64(len(want.Data)) {
				t.Errorf("%s: %v %d bytes, %v", want.Path, fi.Mode(), fi.Size(), err)
			}
		}
		if !found {
			t.Errorf("%s is not there", want.Path)
		}
	}
	// bsdtar's reader of Rock Ridge is another one.
	if _, err := exec.LookPath("bsdtar"); err == nil {
		out, err := exec.Command("bsdtar", "-tvf", image).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "-r--r-----  1 7      8             4") || !strings.Contains(string(out), "drwxr-x---") {
			t.Errorf("bsdtar: %v\n%s", err, out)
		}
	}
}

func TestNoSuchVolumes(t *testing.T) {
	for what, files := range map[string][]File{
		"a file in a file":         {{Path: "a", Mode: 0o644}, {Path: "a/b", Mode: 0o644}},
		"the same file twice":      {{Path: "a", Mode: 0o644}, {Path: "a", Mode: 0o644}},
		"a file and a directory":   {{Path: "a/b", Mode: 0o644}, {Path: "a", Mode: 0o644}},
		"a way out":                {{Path: "../a", Mode: 0o644}},
		"a rooted path":            {{Path: "/a", Mode: 0o644}},
		"a link":                   {{Path: "a", Mode: fs.ModeSymlink | 0o777}},
		"a name that does not fit": {{Path: strings.Repeat("n", maxName+1), Mode: 0o644}},
	} {
		if _, err := Volumes(files); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
	if b, err := Volumes(nil); err != nil || len(b)%sectorSize != 0 {
		t.Errorf("no files: %d bytes, %v", len(b), err)
	}
}

// The hook that mounts volumes is a program of a shell, whatever the paths are called, and goes beside what is there.
func TestMounts(t *testing.T) {
	s := Seed{Kind: NoCloud, InstanceID: "i", Hostname: "h", Mounts: []string{"/etc/it's $(false); ok"}, EveryBoot: true}
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	vendor := string(files["vendor-data"])
	if !strings.HasPrefix(vendor, "#cloud-config-archive\n[") || !strings.Contains(vendor, "text/cloud-boothook") || !strings.Contains(vendor, "boot-new-instance") {
		t.Errorf("vendor-data:\n%s", vendor)
	}
	s.Kind = ConfigDrive
	if files, err = s.Files(); err != nil || !strings.Contains(string(files["openstack/latest/vendor_data.json"]), "cloud-config-archive") {
		t.Errorf("%v, %s", err, files)
	}
	s.Scratch = []Scratch{{"empty-0", "/var/it's"}}
	hook := s.mountHook()
	if out, err := exec.Command("sh", "-n", "-c", hook).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	var calls strings.Builder
	for line := range strings.Lines(hook) {
		if strings.HasPrefix(line, "volume '") || strings.HasPrefix(line, "scratch '") {
			calls.WriteString(line)
		}
	}
	out, err := exec.Command("sh", "-c", "volume() { printf '<%s>' \"$@\"; }\nscratch() { volume \"$@\"; }\n"+calls.String()).CombinedOutput()
	if err != nil || string(out) != "<empty-0></var/it's><"+s.Mounts[0]+">" {
		t.Errorf("%v: %s", err, out)
	}
	if s.Mounts = nil; strings.Contains(s.mountHook(), "iso9660") {
		t.Error("a disk of volumes is wanted where there is none")
	}
}
