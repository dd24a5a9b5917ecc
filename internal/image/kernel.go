package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxKernel is the size that a kernel or an initrd can have, in bytes. QEMU loads it below 4 GiB beside the devices.
const maxKernel = 2 << 30

// StageKernel opens a kernel or an initrd for a QEMU of another user, which opens /proc/self/fd/N of an inherited
// descriptor: the kernel checks that open against the file's mode. So a file that everybody may read is given as it
// is, and any other as a sealed copy in memory that everybody may read who has the descriptor. The caller closes it.
func StageKernel(path string) (*os.File, error) {
	f, err := stage(path)
	if err != nil {
		return nil, fmt.Errorf("open kernel or initrd %q: %w", path, err)
	}
	return f, nil
}

func stage(path string) (*os.File, error) {
	f, st, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	const worldReadable = 0o004
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("%w: it is a %s: give a regular file", ErrUnsupported, kind(st.Mode))
	case st.Size == 0:
		err = fmt.Errorf("%w: it is empty: copy it again", ErrTruncated)
	case st.Size > maxKernel:
		err = fmt.Errorf("%w: %d bytes are too many for a kernel or initrd (at most %d)", ErrUnsupported, st.Size, maxKernel)
	case st.Mode&worldReadable != 0:
		return f, nil
	}
	defer f.Close()
	if err != nil {
		return nil, err
	}
	return sealedCopy(f)
}

// sealedCopy copies what is in f into memory, where nobody can change it any more.
func sealedCopy(f *os.File) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("virtlet-kernel", flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // MFD_NOEXEC_SEAL is Linux 6.3; sysctl vm.memfd_noexec can demand it there
		fd, err = unix.MemfdCreate("virtlet-kernel", flags)
	}
	if err != nil {
		return nil, fmt.Errorf("make a copy in memory: %w", err)
	}
	mem := os.NewFile(uintptr(fd), f.Name()+" (copy)")
	n, err := io.Copy(mem, io.LimitReader(f, maxKernel))
	if err == nil && n == 0 {
		err = ErrTruncated
	}
	if err == nil {
		_, err = mem.Seek(0, io.SeekStart)
	}
	if err == nil {
		err = mem.Chmod(0o444)
	}
	if err == nil {
		const seals = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
		_, err = unix.FcntlInt(mem.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		mem.Close()
		return nil, fmt.Errorf("make a copy in memory: %w", err)
	}
	return mem, nil
}

// CheckKernel says whether QEMU can boot f with -kernel on arch, which is as in GOARCH. It does not move f's offset.
func CheckKernel(f *os.File, arch string) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("check kernel %q: %w", f.Name(), err)
	}
	if err := checkKernel(f, st.Size(), arch); err != nil {
		return fmt.Errorf("check kernel %q: %w", f.Name(), err)
	}
	return nil
}

// Where kernels show what they are: Documentation/arch/x86/boot.rst and Documentation/arch/arm64/booting.rst of Linux.
var (
	bzImage    = signature{offset: 0x202, magic: "HdrS"}
	bootFlag   = signature{offset: 0x1fe, magic: "\x55\xaa"}
	arm64Image = signature{offset: 56, magic: "ARM\x64"}
	zboot      = signature{offset: 4, magic: "zimg"} // an EFI program that unpacks itself: drivers/firmware/efi/libstub
	gzipped    = signature{magic: "\x1f\x8b\x08"}
	elf        = signature{magic: "\x7fELF"}
)

func checkKernel(r io.ReaderAt, size int64, arch string) error {
	head, err := readUpTo(r, 0, size, headSize)
	if err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	is := func(s signature) bool { return s.in(head, nil) }
	wrong := func(is, want string) error { return fmt.Errorf("it is %s: %s", is, want) }
	switch arch {
	case "amd64":
		const want = "x86 guests boot a bzImage (/boot/vmlinuz-*), or a vmlinux with a PVH entry (CONFIG_PVH)"
		switch {
		case is(bzImage) && is(bootFlag):
			return nil
		case is(elf):
			if pvh, err := hasPVH(r, size); err != nil || !pvh {
				return errors.Join(wrong("an ELF file without a PVH entry", want), err)
			}
			return nil
		case is(arm64Image):
			return wrong("a kernel for arm64", want)
		case is(gzipped):
			return wrong("compressed with gzip", want)
		}
		return wrong("no kernel", want)
	case "arm64":
		const want = "arm64 guests boot an Image, plain or compressed with gzip (arch/arm64/boot/Image.gz)"
		switch {
		case is(arm64Image):
			return nil
		case is(gzipped):
			if !arm64Image.in(inflate(io.NewSectionReader(r, 0, size)), nil) {
				return wrong("compressed with gzip, but no arm64 Image", want)
			}
			return nil
		case is(zboot):
			return wrong("a self-extracting EFI program", want)
		case is(bzImage):
			return wrong("a kernel for x86", want)
		}
		return wrong("no kernel", want)
	}
	return fmt.Errorf("no kernel format is known for %s: use amd64 or arm64, or boot from a disk", arch)
}

// inflate gives the first bytes of what a gzip stream holds; none when it is broken before that.
func inflate(r io.Reader) []byte {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil
	}
	b := make([]byte, 64)
	n, _ := io.ReadFull(z, b) // a short answer shows in n
	return b[:n]
}

// The few fields of ELF (elf(5)) that lead to its notes.
type (
	elfHeader struct {
		Ident          [16]byte // magic, class, byte order, ...
		Type, Machine  uint16
		Version        uint32
		Entry, PhOff   uint64
		ShOff          uint64
		Flags          uint32
		EhSize, PhSize uint16
		PhNum          uint16
	}
	elfSegment struct {
		Type, Flags   uint32
		Off           uint64
		VAddr, PAddr  uint64
		FileSize, Mem uint64
		Align         uint64
	}
	elfNote struct{ NameSize, DescSize, Type uint32 }
)

// hasPVH says whether a 64-bit x86 ELF file has the note that QEMU takes the entry point from: name "Xen", type 18,
// XEN_ELFNOTE_PHYS32_ENTRY of Xen's public/elfnote.h.
func hasPVH(r io.ReaderAt, size int64) (bool, error) {
	const (
		class64, littleEndian = 2, 1
		machineX86            = 62
		segmentNote           = 4
		physEntry             = 18
		maxNotes              = 64 << 10 // of one segment; Linux has less than one KiB
		maxSegments           = 64
	)
	var h elfHeader
	if err := binary.Read(io.NewSectionReader(r, 0, size), binary.LittleEndian, &h); err != nil {
		return false, fmt.Errorf("read ELF header: %w", err)
	}
	if h.Ident[4] != class64 || h.Ident[5] != littleEndian || h.Machine != machineX86 {
		return false, errors.New("it is not for 64-bit x86")
	}
	for i := range min(int64(h.PhNum), maxSegments) {
		at := int64(h.PhOff) + i*int64(h.PhSize)
		var s elfSegment
		if at < 0 || binary.Read(io.NewSectionReader(r, at, size), binary.LittleEndian, &s) != nil {
			return false, fmt.Errorf("%w: its program headers are not in the file", ErrTruncated)
		}
		if s.Type != segmentNote || s.Off >= uint64(size) {
			continue
		}
		notes, err := readUpTo(r, int64(s.Off), size, int64(min(s.FileSize, maxNotes)))
		if err != nil {
			return false, fmt.Errorf("read ELF notes: %w", err)
		}
		for {
			var n elfNote
			used, err := binary.Decode(notes, binary.LittleEndian, &n)
			if err != nil {
				break
			}
			notes = notes[used:]
			name, desc := (uint64(n.NameSize)+3)&^3, (uint64(n.DescSize)+3)&^3 // each padded to a multiple of 4
			if name+desc > uint64(len(notes)) {
				break
			}
			if n.Type == physEntry && bytes.HasPrefix(notes, []byte("Xen\x00")) && n.NameSize == 4 {
				return true, nil
			}
			notes = notes[name+desc:]
		}
	}
	return false, nil
}
