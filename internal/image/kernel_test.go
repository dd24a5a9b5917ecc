package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// elfFile makes a 64-bit ELF file with one PT_NOTE segment.
func elfFile(machine uint16, noteType uint32, name string) []byte {
	var b bytes.Buffer
	h := elfHeader{Machine: machine, PhOff: 64, PhSize: 56, PhNum: 2}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	note := elfNote{NameSize: uint32(len(name)), DescSize: 4, Type: noteType}
	for _, v := range []any{
		h, uint16(64), uint16(0), uint16(0), // section headers: none
		elfSegment{Type: 1},
		elfSegment{Type: 4, Off: 176, FileSize: 64},
		elfNote{NameSize: 4, DescSize: 3, Type: 6},
		[4]byte{'L', 'n', 'x'},
		[4]byte{1, 2, 3},
		note, [4]byte([]byte(name + "\x00\x00\x00\x00")[:4]),
		[4]byte{},
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return append(b.Bytes(), make([]byte, 1024)...)
}

func TestCheckKernel(t *testing.T) {
	zeros := func(edits ...edit) []byte {
		b := make([]byte, 4096)
		for _, e := range edits {
			e(b)
		}
		return b
	}
	pack := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		if _, err := z.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	x86, arm := zeros(put(0x1fe, "\x55\xaa"), put(0x202, "HdrS")), zeros(put(0, "MZ"), put(56, "ARM\x64"))
	pvh := elfFile(62, 18, "Xen\x00")
	past := bytes.Clone(pvh)
	binary.LittleEndian.PutUint64(past[32:], 1<<63) // PhOff
	long := bytes.Clone(pvh)
	binary.LittleEndian.PutUint64(long[64+56+32:], 1<<63) // FileSize of the notes
	tests := []struct {
		name, arch string
		b          []byte
		text       string // "": good
	}{
		{"bzImage", "amd64", x86, ""},
		{"bzImage", "arm64", x86, "a kernel for x86"},
		{"bzImage without boot flag", "amd64", zeros(put(0x202, "HdrS")), "no kernel"},
		{"cut bzImage", "amd64", x86[:0x204], "no kernel"},
		{"Image", "arm64", arm, ""},
		{"Image", "amd64", arm, "a kernel for arm64"},
		{"Image.gz", "arm64", pack(arm), ""},
		{"Image.gz", "amd64", pack(arm), "compressed with gzip"},
		{"gzip of something else", "arm64", pack(x86), "no arm64 Image"},
		{"broken gzip", "arm64", []byte("\x1f\x8b\x08xxxxxxxxxxxxxxxxxxxxxx"), "no arm64 Image"},
		{"zboot", "arm64", zeros(put(0, "MZ\x00\x00zimg")), "self-extracting EFI program"},
		{"vmlinux with PVH", "amd64", pvh, ""},
		{"vmlinux with PVH, long notes", "amd64", long, ""},
		{"vmlinux without PVH", "amd64", elfFile(62, 17, "Xen\x00"), "without a PVH entry"},
		{"note of another name", "amd64", elfFile(62, 18, "Foo\x00"), "without a PVH entry"},
		{"ELF for arm64", "amd64", elfFile(183, 18, "Xen\x00"), "not for 64-bit x86"},
		{"program headers outside", "amd64", past, "program headers are not in the file"},
		{"cut ELF", "amd64", pvh[:100], "program headers are not in the file"},
		{"cut ELF header", "amd64", pvh[:20], "read ELF header"},
		{"text", "amd64", []byte("hello"), "no kernel"},
		{"nothing", "arm64", nil, "no kernel"},
		{"any", "riscv64", x86, "no kernel format is known for riscv64"},
	}
	for _, tt := range tests {
		t.Run(tt.arch+" "+tt.name, func(t *testing.T) {
			path := write(t, tt.b)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			err = CheckKernel(f, tt.arch)
			if tt.text == "" {
				if err != nil {
					t.Error(err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
			if at, _ := f.Seek(0, io.SeekCurrent); at != 0 {
				t.Errorf("the offset moved to %d", at)
			}
		})
	}
}

func TestStageKernel(t *testing.T) {
	want := bytes.Repeat([]byte("kernel"), 100_000)
	for _, tt := range []struct {
		mode   os.FileMode
		copied bool
	}{{0o600, true}, {0o640, true}, {0o644, false}, {0o604, false}} {
		path := write(t, bytes.Clone(want))
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		f, err := StageKernel(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
			t.Errorf("mode %o: read %d bytes, %v", tt.mode, len(got), err)
		}
		seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
		if copied := err == nil; copied != tt.copied {
			t.Errorf("mode %o: a copy in memory: %t, want %t", tt.mode, copied, tt.copied)
		}
		if tt.copied {
			if all := unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL; seals&all != all {
				t.Errorf("mode %o: seals %#x", tt.mode, seals)
			}
		}
		if _, err := f.WriteAt([]byte{0}, 0); err == nil {
			t.Errorf("mode %o: the file can be changed", tt.mode)
		}
		if os.Geteuid() != 0 {
			continue // nobody else to read it as
		}
		const nobody = 65534
		cmd := exec.Command("cat", "/proc/self/fd/3")
		cmd.ExtraFiles = []*os.File{f}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if got, err := cmd.Output(); err != nil || !bytes.Equal(got, want) {
			t.Errorf("mode %o: another user reads %d bytes, %v", tt.mode, len(got), err)
		}
	}
}

func TestStageKernelRefuses(t *testing.T) {
	if _, err := StageKernel(write(t, nil)); !errors.Is(err, ErrTruncated) {
		t.Errorf("empty file: %v", err)
	}
	path := write(t, nil)
	if err := os.Truncate(path, maxKernel+1); err != nil { // sparse
		t.Fatal(err)
	}
	if _, err := StageKernel(path); !errors.Is(err, ErrUnsupported) {
		t.Errorf("file of %d bytes: %v", maxKernel+1, err)
	}
}
