package cloudinit

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	diskiso "github.com/diskfs/go-diskfs/filesystem/iso9660"
	"github.com/google/go-cmp/cmp"
	"github.com/kdomanski/iso9660"
	"golang.org/x/sys/unix"
)

func seed() Seed {
	return Seed{
		Kind:       NoCloud,
		InstanceID: "web-1-8f3c2a", Hostname: "web-1.example.org",
		SSHKeys:  []string{ed25519Key + ` "o'brien": {yaml} # \ & <b> ä 日本 😀`},
		UserData: []byte("#cloud-config\npackages: [nginx]\n"),
	}
}

func TestFiles(t *testing.T) {
	s := seed()
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 2 || !bytes.Equal(files["user-data"], s.UserData) {
		t.Errorf("got %q", files)
	}
	var got map[string]any
	if err := json.Unmarshal(files["meta-data"], &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"instance-id": s.InstanceID, "local-hostname": s.Hostname, "public-keys": []any{s.SSHKeys[0]}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if strings.Count(string(files["meta-data"]), "\n") != 7 {
		t.Errorf("not one setting a line:\n%s", files["meta-data"])
	}
	s.SSHKeys, s.UserData = nil, nil
	if files, err = s.Files(); err != nil {
		t.Fatal(err)
	}
	const bare = "{\n  \"instance-id\": \"web-1-8f3c2a\",\n  \"local-hostname\": \"web-1.example.org\"\n}\n"
	if d := cmp.Diff(map[string][]byte{"meta-data": []byte(bare), "user-data": []byte("#cloud-config\n{}\n")}, files); d != "" {
		t.Error(d)
	}
}

func TestFilesRefuses(t *testing.T) {
	tests := map[string]struct {
		spoil func(*Seed)
		text  string
	}{
		"no instance ID":           {func(s *Seed) { s.InstanceID = "" }, `bad instance ID ""`},
		"instance ID is a path":    {func(s *Seed) { s.InstanceID = "../../etc" }, `bad instance ID "../../etc"`},
		"instance ID of two lines": {func(s *Seed) { s.InstanceID = "a\nb" }, `bad instance ID "a"`},
		"long instance ID":         {func(s *Seed) { s.InstanceID = strings.Repeat("x", 129) }, "bad instance ID"},
		"no host name":             {func(s *Seed) { s.Hostname = "" }, `bad host name ""`},
		"host name with a setting": {func(s *Seed) { s.Hostname = "a\nruncmd: [reboot]" }, "bad host name"},
		"two keys in one":          {func(s *Seed) { s.SSHKeys = []string{ed25519Key + "\n" + rsaKey} }, "SSH key 1: "},
		"no key":                   {func(s *Seed) { s.SSHKeys = []string{ed25519Key, ""} }, "SSH key 2: "},
		"user-data":                {func(s *Seed) { s.UserData = []byte("hello") }, "user-data: "},
		"empty user-data":          {func(s *Seed) { s.UserData = []byte{} }, "user-data: it is empty"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := seed()
			tt.spoil(&s)
			if _, err := s.Files(); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Files: %v, want %q", err, tt.text)
			}
			var b bytes.Buffer
			if err := s.WriteISO(&b); err == nil || !strings.Contains(err.Error(), tt.text) || b.Len() > 0 {
				t.Errorf("WriteISO: %d bytes, %v, want %q", b.Len(), err, tt.text)
			}
		})
	}
}

func TestCheckHostname(t *testing.T) {
	l63 := strings.Repeat("a", 63)
	for _, s := range []string{
		"a", "1", "web-1", "Web-1.Example.ORG", "1.2.3", "a--b", "xn--bcher-kva.example", l63,
		strings.Join([]string{l63, l63, l63, strings.Repeat("a", 61)}, "."),
	} {
		if err := CheckHostname(s); err != nil {
			t.Error(err)
		}
	}
	for _, s := range []string{
		"", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "a_b", "a b", "a\n", "a\x00", "bücher", "$(reboot)", "a/b", "a:b", "\"a\"",
		l63 + "a", strings.Join([]string{l63, l63, l63, strings.Repeat("a", 62)}, "."), "192.0.2.1", "2001:db8::1", strings.Repeat("a.", 1<<20),
	} {
		err := CheckHostname(s)
		if err == nil {
			t.Errorf("CheckHostname(%.80q) is nil", s)
		} else if len(err.Error()) > 400 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("CheckHostname(%.80q): bad message %.500q", s, err)
		}
	}
}

func iso(t *testing.T, s Seed) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.WriteISO(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sizes are those where the last sector of a file is empty, full, and begun.
func sizes() map[string]Seed {
	all := map[string]Seed{}
	for name, n := range map[string]int{"one sector": sectorSize, "one byte more": sectorSize + 1, "one less": sectorSize - 1, "largest": maxUserData} {
		s := seed()
		s.UserData = append([]byte("#cloud-config\n#"), bytes.Repeat([]byte("x"), n-15)...)
		all[name] = s
	}
	all["small"] = seed()
	drive := seed()
	drive.Kind, drive.EveryBoot = ConfigDrive, true
	drive.Network, _, _ = NewNetwork(V1, netCases["many-search-domains"].interfaces)
	all["drive"] = drive
	all["default"] = Seed{Kind: NoCloud, InstanceID: "i", Hostname: "h"}
	return all
}

func TestISOReadsBack(t *testing.T) {
	readers := map[string]func(*testing.T, []byte) (label string, files map[string][]byte){"iso9660": readISO, "diskfs": readDiskFS}
	for name, s := range sizes() {
		want, err := s.Files()
		if err != nil {
			t.Fatal(err)
		}
		for reader, read := range readers {
			t.Run(name+" by "+reader, func(t *testing.T) {
				label, files := read(t, iso(t, s))
				if label != labels[s.Kind] {
					t.Errorf("label %q", label)
				}
				if !maps.EqualFunc(want, files, bytes.Equal) {
					t.Errorf("read %d files, not as written", len(files))
				}
			})
		}
	}
}

func readISO(t *testing.T, b []byte) (string, map[string][]byte) {
	img, err := iso9660.OpenImage(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	label, err := img.Label()
	if err != nil {
		t.Fatal(err)
	}
	root, err := img.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	var walk func(dir string, f *iso9660.File)
	walk = func(dir string, f *iso9660.File) {
		children, err := f.GetChildren()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range children {
			name := path.Join(dir, c.Name())
			if c.IsDir() {
				walk(name, c)
			} else if files[name], err = io.ReadAll(c.Reader()); err != nil {
				t.Fatal(err)
			}
		}
	}
	walk("", root)
	return strings.TrimSpace(label), files
}

func readDiskFS(t *testing.T, b []byte) (string, map[string][]byte) {
	image := filepath.Join(t.TempDir(), "seed.iso")
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := file.OpenFromPath(image, true)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	img, err := diskiso.Read(disk, int64(len(b)), 0, sectorSize)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	err = fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := img.OpenFile(name, os.O_RDONLY)
		if err != nil {
			return err
		}
		name, _, _ = strings.Cut(name, ";")
		files[strings.TrimSuffix(name, ".")], err = io.ReadAll(f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(img.Label()), files
}

func TestISOSameSeedSameBytes(t *testing.T) {
	first := iso(t, seed())
	// A clock in the image would count hundredths of a second.
	unix.Nanosleep(&unix.Timespec{Nsec: 20e6}, nil)
	if !bytes.Equal(first, iso(t, seed())) {
		t.Error("the same seed gave other bytes")
	}
	other := seed()
	other.InstanceID += "x"
	if bytes.Equal(first, iso(t, other)) {
		t.Error("another seed gave the same bytes")
	}
}

func TestISOLayout(t *testing.T) {
	b := iso(t, seed())
	if len(b)%sectorSize != 0 || len(b) != (sectorFiles+2)*sectorSize {
		t.Errorf("%d bytes", len(b))
	}
	// Fields of the primary volume descriptor, by their byte positions in ECMA-119, 8.4.
	for at, want := range map[int]string{
		1: "\x01CD001\x01\x00", 41: "cidata                          ", 81: "\x1a\x00\x00\x00\x00\x00\x00\x1a", 129: "\x00\x08\x08\x00",
		133: "\x0a\x00\x00\x00\x00\x00\x00\x0a", 141: "\x12\x00\x00\x00", 149: "\x00\x00\x00\x13", 157: "\x22\x00\x14\x00\x00\x00\x00\x00\x00\x14",
		814: timeUnset, 831: timeUnset, 848: timeUnset, 865: timeUnset, 882: "\x01\x00",
	} {
		at += 16*sectorSize - 1
		if got := string(b[at : at+len(want)]); got != want {
			t.Errorf("byte %d: %q, want %q", at, got, want)
		}
	}
	if _, err := volume("x", map[string][]byte{"a/b/c/d/e": nil}); err == nil {
		t.Error("five directories fit into four sectors")
	}
	many := map[string][]byte{}
	for i := range 60 {
		many["file-"+strconv.Itoa(i)] = nil
	}
	if _, err := volume("x", many); err == nil {
		t.Error("60 files fit into the sector of the root directory")
	}
}

type brokenWriter struct{}

var errBroken = errors.New("broken")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestISOWriteFails(t *testing.T) {
	if err := seed().WriteISO(brokenWriter{}); !errors.Is(err, errBroken) {
		t.Errorf("got %v", err)
	}
}

// What a guest's kernel shows, where this machine's has the file system.
func TestISOMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(strings.Fields(string(known)), "iso9660") {
		t.Skip("this kernel has no iso9660 (CONFIG_ISO9660_FS)")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "seed.iso")
	if err := os.WriteFile(path, iso(t, seed()), 0o600); err != nil {
		t.Fatal(err)
	}
	want, err := seed().Files()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread gets a mount namespace of its own, which ends with it: it is never unlocked.
		runtime.LockOSThread()
		if err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
			t.Errorf("private mount namespace: %v", err)
			return
		}
		dev, err := loop(path)
		if err != nil {
			t.Errorf("loop device: %v", err)
			return
		}
		defer dev.Close()
		if err := unix.Mount(dev.Name(), dir, "iso9660", unix.MS_RDONLY, ""); err != nil {
			t.Errorf("mount: %v", err)
			return
		}
		defer unix.Unmount(dir, 0)
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != len(want) {
			t.Errorf("entries %v, %v", entries, err)
		}
		for name, b := range want {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
	}()
	<-done
}

// loop shows a file as a read-only block device, which goes when the returned file and the mounts of it are closed.
func loop(path string) (*os.File, error) {
	back, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, err
	}
	dev, err := os.Open("/dev/loop" + strconv.Itoa(n))
	if err != nil {
		return nil, err
	}
	config := unix.LoopConfig{Fd: uint32(back.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY}}
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &config); err != nil {
		dev.Close()
		return nil, err
	}
	return dev, nil
}
