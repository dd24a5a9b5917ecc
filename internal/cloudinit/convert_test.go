package cloudinit

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// debian gives the directory that hack/cloudinit.sh has unpacked cloud-init into.
func debian(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("VIRTLET_CLOUDINIT")
	if dir == "" {
		t.Skip("needs cloud-init: VIRTLET_CLOUDINIT=$(hack/cloudinit.sh)")
	}
	return dir
}

// python runs a program with Debian's cloud-init.
func python(t testing.TB, stdin []byte, args ...string) string {
	t.Helper()
	cmd := exec.Command("python3", args...)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+filepath.Join(debian(t), "usr/lib/python3/dist-packages"), "PYTHONDONTWRITEBYTECODE=1")
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("python3 %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// renderers are cloud-init's, with a distribution that has each. NetworkManager's drops metrics and says "auto" for
// interfaces without addresses, in 22.4; it is not among the promises.
var renderers = map[string]string{"netplan": "ubuntu", "networkd": "debian", "eni": "debian", "sysconfig": "rhel"}

// form is a file that carries a network configuration, and what net-convert calls it.
type form struct {
	version     Version
	kind        Kind
	file, input string
	renderers   []string
}

var forms = map[string]form{
	"v1": {V1, NoCloud, "network-config", "yaml", slices.Sorted(maps.Keys(renderers))},
	// For all others cloud-init 22.4 loses metrics, what is on the link, and the IPv6 default route (it becomes ::/64).
	"v2":           {V2, NoCloud, "network-config", "yaml", []string{"netplan"}},
	"network-data": {V1, ConfigDrive, "openstack/latest/network_data.json", "network_data.json", slices.Sorted(maps.Keys(renderers))},
}

// files gives the seed's files with a network configuration.
func (f form) files(t testing.TB, interfaces []Interface) map[string][]byte {
	t.Helper()
	n, _, err := NewNetwork(f.version, interfaces)
	if err != nil {
		t.Fatal(err)
	}
	s := seed()
	s.Kind, s.Network = f.kind, n
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestRealCloudInitRenders has Debian's cloud-init render every case in every form for every renderer, and reads from
// what it wrote what the guest would have.
func TestRealCloudInitRenders(t *testing.T) {
	debian(t)
	dir := t.TempDir()
	var jobs [][]string
	outputs := map[string]string{} // golden file and renderer -> directory
	for name, c := range netCases {
		for formName, f := range forms {
			if f.version == V1 && c.refusesV1 {
				continue
			}
			golden := name + "." + formName
			in := filepath.Join(dir, golden)
			if err := os.WriteFile(in, f.files(t, c.interfaces)[f.file], 0o600); err != nil {
				t.Fatal(err)
			}
			for _, r := range f.renderers {
				out := filepath.Join(dir, golden+"."+r)
				outputs[golden+" "+r] = out
				jobs = append(jobs, []string{"-p", in, "-k", f.input, "-d", out, "-D", renderers[r], "-O", r})
			}
		}
	}
	input, err := json.Marshal(jobs)
	if err != nil {
		t.Fatal(err)
	}
	if said := python(t, input, "testdata/convert.py"); said != "" {
		t.Errorf("cloud-init says:\n%s", said)
	}
	for name, c := range netCases {
		for formName, f := range forms {
			if f.version == V1 && c.refusesV1 {
				continue
			}
			t.Run(name+"/"+formName, func(t *testing.T) {
				golden := name + "." + formName
				text := "### " + f.file + "\n" + string(f.files(t, c.interfaces)[f.file])
				for _, r := range f.renderers {
					files := readTree(t, outputs[golden+" "+r])
					for _, file := range slices.Sorted(maps.Keys(files)) {
						text += "\n### " + r + ": " + file + "\n" + files[file]
					}
					checkRendered(t, r, c, files)
					if r == "netplan" {
						checkRendered(t, "networkd", c, netplanGenerate(t, outputs[golden+" "+r]))
					}
				}
				compareGolden(t, golden, text)
			})
		}
	}
}

// readTree gives the files below a directory by their paths, without comments, which name versions.
func readTree(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		var kept strings.Builder
		for line := range strings.Lines(string(b)) {
			if !strings.HasPrefix(line, "# ") && line != "#\n" || strings.HasPrefix(line, "# control-") {
				kept.WriteString(line)
			}
		}
		rel, _ := filepath.Rel(dir, path)
		files[rel] = kept.String()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func compareGolden(t testing.TB, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "net", name+".golden")
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (write it: go test -update)", err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (write it again: go test -update):\n%s", path, d)
	}
}

// netplanGenerate turns what is in dir's /etc/netplan into networkd's files with netplan itself, which refuses what it
// does not know.
func netplanGenerate(t testing.TB, dir string) map[string]string {
	t.Helper()
	d := debian(t)
	libs, err := filepath.Glob(filepath.Join(d, "usr/lib/*-linux-gnu"))
	if err != nil || len(libs) != 1 {
		t.Fatal(libs, err)
	}
	cmd := exec.Command(filepath.Join(d, "usr/libexec/netplan/generate"), "--root-dir", dir)
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+libs[0])
	out, err := cmd.CombinedOutput()
	said := strings.ReplaceAll(string(out), "has been deprecated", "") // gateway4 is cloud-init's choice
	if err != nil || strings.Contains(said, "conflict") {
		t.Fatalf("netplan: %v\n%s", err, out)
	}
	return readTree(t, filepath.Join(dir, "run/systemd/network"))
}
