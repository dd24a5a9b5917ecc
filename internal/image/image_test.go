package image

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func write(t *testing.T, b []byte, edits ...edit) string {
	t.Helper()
	for _, e := range edits {
		e(b)
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// qemuImg runs qemu-img in dir, or skips the test where there is none.
func qemuImg(t *testing.T, dir string, args ...string) {
	t.Helper()
	var out []byte
	var err error
	for range 20 {
		cmd := exec.Command("qemu-img", args...)
		cmd.Dir = dir
		out, err = cmd.CombinedOutput()
		// LUKS measures how fast the CPU is, and gives up where the kernel counts a process's time coarsely.
		if !bytes.Contains(out, []byte("accurate CPU usage")) {
			break
		}
	}
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs qemu-img")
	}
	if err != nil {
		t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
	}
}

func TestRawAndForeign(t *testing.T) {
	zeros := func(n int, edits ...edit) []byte {
		b := make([]byte, n)
		for _, e := range edits {
			e(b)
		}
		return b
	}
	mbr := put(510, "\x55\xaa")
	tests := []struct {
		name string
		b    []byte
		want error // nil: it is a raw disk
		text string
	}{
		{"zeros", zeros(4096), nil, ""},
		{"one sector", zeros(512), nil, ""},
		{"MBR and GPT", zeros(4096, mbr, put(512, "EFI PART")), nil, ""},
		{"ISO 9660", zeros(1<<20, put(32769, "CD001")), nil, ""},
		{"qcow2 magic later", zeros(4096, put(512, qcow2Magic)), nil, ""},

		{"empty", nil, ErrTruncated, "empty"},
		{"one byte", zeros(1), ErrTruncated, "1 bytes are no multiple of 512"},
		{"half a sector more", zeros(4096 + 256), ErrTruncated, "truncate -s %512 FILE"},
		{"a web page", []byte("<!DOCTYPE html><p>404</p>"), ErrTruncated, "no multiple of 512"},

		{"VMDK", zeros(4096, put(0, "KDMV")), ErrUnsupported, "VMDK image: make a copy that is: qemu-img convert"},
		{"VMDK of ESX", zeros(4096, put(0, "COWD")), ErrUnsupported, "VMDK"},
		{"VMDK descriptor", zeros(700, put(0, "# Disk DescriptorFile\n")), ErrUnsupported, "VMDK descriptor"},
		{"VHDX", zeros(4096, put(0, "vhdxfile")), ErrUnsupported, "VHDX"},
		{"dynamic VHD", zeros(4096, put(0, "conectix")), ErrUnsupported, "VHD"},
		{"fixed VHD", zeros(4096, mbr, put(4096-512, "conectix")), ErrUnsupported, "VHD"},
		{"VDI", zeros(4096, put(0x40, "\x7f\x10\xda\xbe")), ErrUnsupported, "VDI"},
		{"QED", zeros(4096, put(0, "QED\x00")), ErrUnsupported, "QED"},
		{"Parallels", zeros(4096, put(0, "WithouFreSpacExt")), ErrUnsupported, "Parallels"},
		{"DMG", zeros(4096, put(4096-512, "koly")), ErrUnsupported, "DMG"},
		{"LUKS", zeros(4096, put(0, "LUKS\xba\xbe")), ErrUnsupported, "encrypted"},
		{"gzip", zeros(700, put(0, "\x1f\x8b\x08")), ErrUnsupported, "gunzip -k"},
		{"xz", zeros(700, put(0, "\xfd7zXZ\x00")), ErrUnsupported, "unxz"},
		{"zstd", zeros(700, put(0, "\x28\xb5\x2f\xfd")), ErrUnsupported, "unzstd"},
		{"bzip2", zeros(700, put(0, "BZh91AY&SY")), ErrUnsupported, "bunzip2"},
		{"lz4", zeros(700, put(0, "\x04\x22\x4d\x18")), ErrUnsupported, "unlz4"},
		{"ZIP", zeros(700, put(0, "PK\x03\x04")), ErrUnsupported, "unzip"},
		{"OVA", zeros(10240, put(0, "disk.ovf"), put(257, "ustar")), ErrUnsupported, "tar -xf"},
		{"initrd", zeros(4096, put(0, "070701")), ErrUnsupported, "--initrd"},
		{"ELF", zeros(4096, put(0, "\x7fELF")), ErrUnsupported, "--kernel"},
		{"bzImage", zeros(4096, mbr, put(0x202, "HdrS")), ErrUnsupported, "--kernel"},
		{"arm64 kernel", zeros(4096, put(56, "ARM\x64")), ErrUnsupported, "--kernel"},
		{"gzip of a few bytes", []byte("\x1f\x8b\x08"), ErrUnsupported, "gunzip"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := write(t, tt.b)
			f, info, err := Open(path, false, "")
			if tt.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if n := int64(len(tt.b)); info != (Info{Path: path, Format: Raw, VirtualSize: n, FileSize: n}) {
					t.Errorf("got %+v", info)
				}
				return
			}
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v\nwant %v with %q", err, tt.want, tt.text)
			}
			// Said to be raw, it is raw: a guest may write what it likes at the start of its disk.
			f, _, err = Open(path, false, Raw)
			if aligned := len(tt.b) > 0 && len(tt.b)%sector == 0; aligned != (err == nil) {
				t.Errorf("as raw: %v", err)
			}
			if err == nil {
				f.Close()
			}
		})
	}
}

func TestExplicitFormat(t *testing.T) {
	path := write(t, build())
	for want, format := range map[Format]Format{"": QCOW2, QCOW2: QCOW2, Raw: Raw} {
		f, info, err := Open(path, true, want)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if info.Format != format || info.FileSize != atEnd {
			t.Errorf("want %q: got %+v", want, info)
		}
	}
	if _, _, err := Open(path, false, "vmdk"); err == nil || !strings.Contains(err.Error(), `unknown format "vmdk"`) {
		t.Errorf("format vmdk: %v", err)
	}
	if _, _, err := Open(write(t, make([]byte, 4096)), false, QCOW2); !errors.Is(err, ErrUnsupported) {
		t.Errorf("raw as qcow2: %v", err)
	}
}

func TestOpenGivesWhatWasAskedFor(t *testing.T) {
	path := write(t, make([]byte, 4096))
	f, _, err := Open(path, false, "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write([]byte{1}); err == nil {
		t.Error("an image opened for reading was written to")
	}
	w, _, err := Open(path, true, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write([]byte{1}); err != nil {
		t.Error(err)
	}
	flags, err := unix.FcntlInt(w.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v: O_NONBLOCK would go to QEMU", flags, err)
	}
}

func TestOnlyFilesAndBlockDevices(t *testing.T) {
	dir := t.TempDir()
	fifo, socket, dangling := filepath.Join(dir, "fifo"), filepath.Join(dir, "socket"), filepath.Join(dir, "dangling")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink("nowhere", dangling); err != nil {
		t.Fatal(err)
	}
	tests := map[string]error{
		dir:         ErrUnsupported,
		fifo:        ErrUnsupported,
		socket:      ErrUnsupported,
		"/dev/null": ErrUnsupported,
		dangling:    fs.ErrNotExist,
		"":          fs.ErrNotExist,
		"a\x00b":    unix.EINVAL,
	}
	for path, want := range tests {
		for _, write := range []bool{false, true} {
			if f, _, err := Open(path, write, Raw); !errors.Is(err, want) {
				t.Errorf("Open(%q, %t): %v, want %v", path, write, err, want)
				f.Close()
			}
		}
		if f, err := StageKernel(path); !errors.Is(err, want) {
			t.Errorf("StageKernel(%q): %v, want %v", path, err, want)
			f.Close()
		}
	}
}

func TestBlockDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: sets up a loop device")
	}
	path := write(t, build())
	dev, err := attachLoop(t, path)
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	f, info, err := Open(dev, false, "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info.Format != QCOW2 || info.FileSize != atEnd || info.VirtualSize != testDisk {
		t.Errorf("got %+v", info)
	}
	if at, err := f.Seek(0, 1); at != 0 || err != nil {
		t.Errorf("the file is at offset %d, %v", at, err)
	}
}

// attachLoop shows a file as a read-only block device that goes when the test ends.
func attachLoop(t *testing.T, path string) (string, error) {
	back, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", err
	}
	name := filepath.Join("/dev", "loop"+strconv.Itoa(n))
	dev, err := os.Open(name)
	if err != nil {
		return "", err
	}
	config := unix.LoopConfig{Fd: uint32(back.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY}}
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &config); err != nil {
		dev.Close()
		return "", err
	}
	t.Cleanup(func() { dev.Close() }) // the last close detaches: LO_FLAGS_AUTOCLEAR
	return name, nil
}

func TestRealImages(t *testing.T) {
	dir := t.TempDir()
	const secret = "secret,id=s,data=x"
	for _, args := range []string{
		"-f qcow2 good 64M", "-f qcow2 -o compat=0.10 old 64M", "-f qcow2 -o extended_l2=on,compression_type=zstd ext 64M",
		"-f qcow2 -o cluster_size=512 small 64M", "-f qcow2 -o cluster_size=2M large 64M", "-f qcow2 -o preallocation=metadata meta 64M",
		"-f qcow2 -o lazy_refcounts=on,refcount_bits=64 lazy 64M",
		"-f qcow2 -b good -F qcow2 backed", "-f qcow2 -o data_file=data,data_file_raw=on external 64M",
		"-f qcow2 --object " + secret + " -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 crypt 64M",
		"-f qcow2 --object " + secret + " -o encrypt.format=aes,encrypt.key-secret=s aes 64M",
		"-f luks --object " + secret + " -o key-secret=s,iter-time=10 luks 1M",
		"-f raw raw 64M", "-f qcow qcow1 64M", "-f vmdk vmdk 64M", "-f vmdk -o subformat=monolithicFlat vmdkflat 64M", "-f vdi vdi 64M",
		"-f vhdx vhdx 64M", "-f vpc vhd 64M", "-f vpc -o subformat=fixed vhdfixed 4M", "-f qed qed 64M", "-f parallels parallels 64M",
	} {
		qemuImg(t, dir, append([]string{"create", "-q"}, strings.Fields(args)...)...)
	}
	qemuImg(t, dir, "snapshot", "-c", "one", "ext")
	tests := map[string]struct {
		want error
		text string
	}{
		"good": {}, "old": {}, "ext": {}, "small": {}, "large": {}, "meta": {}, "lazy": {}, "raw": {},
		"backed":    {ErrOtherFile, `backing file "good"`},
		"external":  {ErrOtherFile, `data file "data"`},
		"crypt":     {ErrUnsupported, "encrypted (method 2)"},
		"aes":       {ErrUnsupported, "encrypted (method 1)"},
		"luks":      {ErrUnsupported, "LUKS"},
		"qcow1":     {ErrUnsupported, "qcow version 1"},
		"vmdk":      {ErrUnsupported, "VMDK image"},
		"vmdkflat":  {ErrUnsupported, "VMDK descriptor"},
		"vdi":       {ErrUnsupported, "VDI"},
		"vhdx":      {ErrUnsupported, "VHDX"},
		"vhd":       {ErrUnsupported, "VHD image"},
		"vhdfixed":  {ErrUnsupported, "VHD image"},
		"qed":       {ErrUnsupported, "QED"},
		"parallels": {ErrUnsupported, "Parallels"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f, info, err := Open(filepath.Join(dir, name), true, "")
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v\nwant %v with %q", err, tt.want, tt.text)
			}
			if err == nil {
				f.Close()
				if info.VirtualSize != 64<<20 {
					t.Errorf("got %+v", info)
				}
			}
		})
	}
}

// A real image with data everywhere, cut at many points: only a cut in the last cluster can go unseen.
func TestRealImageTruncated(t *testing.T) {
	dir := t.TempDir()
	random := make([]byte, 8<<20)
	for i := range random {
		random[i] = byte(i * i >> 7)
	}
	if err := os.WriteFile(filepath.Join(dir, "raw"), random, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{"", "-c", "-o extended_l2=on", "-o compat=0.10"} {
		qemuImg(t, dir, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, strings.Fields(options)...), "raw", "disk")...)
		path := filepath.Join(dir, "disk")
		f, info, err := Open(path, false, "")
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		for at := info.FileSize - 1<<16; at > 0; at -= info.FileSize / 50 {
			if err := os.Truncate(path, at); err != nil {
				t.Fatal(err)
			}
			if _, _, err := Open(path, false, ""); !errors.Is(err, ErrTruncated) {
				t.Errorf("%q cut from %d to %d bytes: %v", options, info.FileSize, at, err)
			}
		}
	}
}
