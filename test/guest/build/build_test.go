package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A guest that is there is used without the network, without apt, and without waiting for another build.
func TestRunUsesWhatIsThere(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("VIRTLET_CACHE", cache)
	t.Setenv("PATH", "")
	hash, err := hashInputs()
	if err != nil {
		t.Fatal(err)
	}
	var want string
	for i, name := range []string{
		runtime.GOARCH + "-1-a-" + hash, runtime.GOARCH + "-2-b-" + hash, runtime.GOARCH + "-3-b-other", "m68k-4-b-" + hash,
	} {
		dir := filepath.Join(cache, "guest", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		// The one made last counts, here not the one with the highest version.
		if err := os.Chtimes(dir, time.Time{}, time.Unix(int64(1000-i), 0)); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			want = dir
		}
	}
	unlock, err := lock(filepath.Join(cache, "guest", "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if got, err := run(t.Context(), runtime.GOARCH, false); err != nil || got != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestRunSaysWhatToDo(t *testing.T) {
	t.Setenv("VIRTLET_CACHE", t.TempDir())
	t.Setenv("PATH", "")
	tests := []struct{ arch, want string }{
		{"m68k", "only amd64 and arm64"},
		{runtime.GOARCH, "set VIRTLET_GUEST"},
	}
	for _, tt := range tests {
		if _, err := run(t.Context(), tt.arch, false); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want one with %q", tt.arch, err, tt.want)
		}
	}
}

// A build that fails leaves no directory that looks like a guest, and nothing else.
func TestFailedBuildLeavesNothing(t *testing.T) {
	cache, bin := t.TempDir(), t.TempDir()
	t.Setenv("VIRTLET_CACHE", cache)
	t.Setenv("PATH", bin)
	for name, body := range map[string]string{
		"apt-cache": "echo 'Version: 1'; echo 'Depends: linux-image-1.0-cloud (= 1.0-1)'",
		"apt-get":   "echo 'E: no such file' >&2; exit 100",
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, err := run(t.Context(), runtime.GOARCH, false)
	if err == nil || !strings.Contains(err.Error(), "E: no such file") {
		t.Errorf("got error %v, want apt's own words", err)
	}
	entries, err := os.ReadDir(filepath.Join(cache, "guest"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "lock" && e.Name() != "apt" {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

// Each package's version is in the name of the build.
func TestHashVersions(t *testing.T) {
	a := hashVersions([]pkg{{"busybox-static", "1:1.35"}, {"libc6", "2.36"}})
	if b := hashVersions([]pkg{{"busybox-static", "1:1.35"}, {"libc6", "2.37"}}); a == b {
		t.Errorf("two versions of libc6 have the same hash %s", a)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var inside, wrong int
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			unlock, err := lock(path)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			if inside++; inside > 1 {
				wrong++
			}
			mu.Unlock()
			time.Sleep(time.Millisecond) // time for another to come in
			mu.Lock()
			inside--
			mu.Unlock()
			unlock()
		})
	}
	all.Wait()
	if wrong > 0 {
		t.Errorf("%d times two held the lock", wrong)
	}
}

// The archive is what another implementation of the format reads.
func TestArchive(t *testing.T) {
	program, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox, to unpack: run `make setup`")
	}
	write := func() []byte {
		var b bytes.Buffer
		a := &archive{w: &b}
		a.dir("bin")
		a.file("bin/a", 0o755, []byte("#!/bin/sh\n"))
		a.file("empty", 0o644, nil)
		a.file("four", 0o600, []byte("1234"))
		a.symlink("bin/b", "a")
		if err := a.close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	data := write()
	if !bytes.Equal(data, write()) {
		t.Error("the same files do not give the same archive")
	}
	dir := t.TempDir()
	cmd := exec.Command(program, "cpio", "-i", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	var got []string
	for _, name := range []string{"bin", "bin/a", "bin/b", "empty", "four"} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		content, _ := os.ReadFile(filepath.Join(dir, name)) // of a directory: nothing
		got = append(got, fmt.Sprintf("%s %v %q", name, info.Mode(), content))
	}
	want := []string{
		`bin drwxr-xr-x ""`, `bin/a -rwxr-xr-x "#!/bin/sh\n"`, `bin/b Lrwxrwxrwx "#!/bin/sh\n"`, `empty -rw-r--r-- ""`,
		`four -rw------- "1234"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestModules(t *testing.T) {
	for path, want := range map[string]string{
		"kernel/net/packet/af_packet.ko": "af_packet", "a/nls_iso8859-1.ko": "nls_iso8859_1", "a/button.ko.xz": "button",
	} {
		if got := moduleName(path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	dir := t.TempDir()
	for name, content := range map[string]string{
		"modules.builtin": "kernel/a/in-side.ko\n", "broken.ko": strings.Repeat("no ELF", 20), "packed.ko.gz": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m, err := readModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, want string }{
		{"in_side", ""}, // part of the kernel: nothing to load
		{"absent", "none of that name"},
		{"broken", "bad magic"},
		{"packed", "unknown compression"},
	}
	for _, tt := range tests {
		got, err := m.resolve(context.Background(), []string{tt.name})
		if len(got) != 0 || (tt.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, %v; want error %q", tt.name, got, err, tt.want)
		}
	}
}
