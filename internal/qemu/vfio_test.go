package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMemoryLock(t *testing.T) {
	m := kernelVM(t)
	if n := m.MemoryLock(); n != 0 {
		t.Errorf("without a function: %d bytes", n)
	}
	m.VFIO = make([]VFIO, 1)
	const want = (128 + 1024) << 20
	if n := m.MemoryLock(); n != want {
		t.Errorf("%d bytes, want %d", n, want)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to raise the limit")
	}
	var before, after unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
		t.Fatal(err)
	}
	limit := int64(min(before.Max/2, want)) // raising the hard limit takes CAP_SYS_RESOURCE, which root may lack in a container
	p, err := Start(Command{Path: "/bin/sh", Args: []string{"-c", "ulimit -l"}}, ProcOptions{UID: testUID, GID: testUID, MemoryLock: limit})
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Wait(); strings.TrimSpace(e.Stderr) != fmt.Sprint(limit>>10) {
		t.Errorf("the child may lock %q KiB, want %d", e.Stderr, limit>>10)
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &after); after != before || err != nil {
		t.Errorf("our own limit was %+v, is %+v, %v", before, after, err)
	}
}

// What QEMU 7.2 and 10.0 print.
func TestTakesVFIODescriptors(t *testing.T) {
	for _, tt := range []struct {
		help string
		want bool
	}{
		{"  host=<str>             - Address (bus/device/function) of the host device, example: 04:10.0\n  sysfsdev=<str>\n", false},
		{"vfio-pci options:\n  fd=<string>\n  iommufd=<link<iommufd>> - Set host IOMMUFD backend device\n", true},
	} {
		binary := filepath.Join(t.TempDir(), "qemu")
		if err := os.WriteFile(binary, []byte("#!/bin/sh\ncat <<'END'\n"+tt.help+"END\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if got, err := TakesVFIODescriptors(context.Background(), binary); got != tt.want || err != nil {
			t.Errorf("got %t, %v of %q", got, err, tt.help)
		}
	}
	if _, err := TakesVFIODescriptors(context.Background(), "/bin/false"); err == nil {
		t.Error("a QEMU that fails is no error")
	}
}
