// Package image opens what a guest boots from: disk images, the overlay that takes a guest's writes, kernels and
// initrds.
//
// An image is untrusted. A qcow2 header can name any file of the host as backing or data file, so [Open] reads the
// header before QEMU does, and refuses every image that needs a second file. It also refuses what QEMU would take
// silently and a guest would suffer from: QEMU 7.2 shows the missing part of a truncated qcow2 file as zeros, and any
// other format, if called raw, as garbage. [CreateOverlay] makes the one file that is written, [StageKernel] opens a
// kernel so that an unprivileged QEMU can read it, and [CheckKernel] says whether QEMU can boot it.
//
// The files go to QEMU as descriptors, together with the format found here: never a path, never a probe of its own. The
// caller owns and closes every returned file. The checks hold for what the file was when it was opened; who can write
// to an image in use can break the guest on it, but must not reach further: that is QEMU's confinement.
package image

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Format of a disk image.
type Format string

// The formats that a guest's disk can have.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// Info is what the header says, and the file. VirtualSize, the size of the guest's disk, and FileSize are in bytes.
type Info struct {
	Path        string
	Format      Format
	VirtualSize int64
	FileSize    int64
	Device      bool // a block device, not a file
}

// Errors of Open, for errors.Is.
var (
	// ErrOtherFile says that an image needs a second file, which could be any file of the host.
	ErrOtherFile = errors.New("image needs another file")
	// ErrUnsupported says that a file is of a kind or format that no guest gets as a disk.
	ErrUnsupported = errors.New("not a supported disk image")
	// ErrTruncated says that a part of the image is missing.
	ErrTruncated = errors.New("image is truncated")
	// ErrDamaged says that a header contradicts itself.
	ErrDamaged = errors.New("image is damaged")
)

// sector is the unit of a disk's size: QEMU's BDRV_SECTOR_SIZE, and what every guest driver counts in.
const sector = 512

// Open opens a disk image, a regular file or a block device, for reading or for reading and writing, and checks its
// header before anything else sees it. want is "" to find the format by its magic number, or an explicit format: Raw
// then takes the bytes as they are, whatever they look like. The caller closes the file.
func Open(path string, write bool, want Format) (*os.File, Info, error) {
	flags := unix.O_RDONLY
	if write {
		flags = unix.O_RDWR
	}
	f, st, err := openFile(path, flags)
	if err != nil {
		return nil, Info{}, fmt.Errorf("open disk image %q: %w", path, err)
	}
	info, err := inspect(f, st, want)
	if err != nil {
		f.Close()
		return nil, Info{}, fmt.Errorf("open disk image %q: %w", path, err)
	}
	info.Path = path
	return f, info, nil
}

func inspect(f *os.File, st unix.Stat_t, want Format) (Info, error) {
	info := Info{FileSize: st.Size, Device: st.Mode&unix.S_IFMT == unix.S_IFBLK}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		var err error
		if info.FileSize, err = f.Seek(0, io.SeekEnd); err != nil {
			return info, fmt.Errorf("size of block device: %w", err)
		}
		if _, err = f.Seek(0, io.SeekStart); err != nil {
			return info, fmt.Errorf("rewind block device: %w", err)
		}
	default:
		return info, fmt.Errorf("%w: it is a %s: give a regular file or a block device", ErrUnsupported, kind(st.Mode))
	}
	var err error
	info.Format, info.VirtualSize, err = check(f, info.FileSize, want)
	return info, err
}

// check finds the format of an image of size bytes and verifies it. It reads the image and nothing else.
func check(r io.ReaderAt, size int64, want Format) (Format, int64, error) {
	if want != "" && want != Raw && want != QCOW2 {
		return "", 0, fmt.Errorf("unknown format %q: use %s or %s", want, Raw, QCOW2)
	}
	if size == 0 {
		return "", 0, fmt.Errorf("%w: it is empty: copy it again, or give it a size: truncate -s 10G FILE", ErrTruncated)
	}
	head, err := readUpTo(r, 0, size, headSize)
	if err != nil {
		return "", 0, fmt.Errorf("read header: %w", err)
	}
	isQCOW2 := len(head) >= 4 && string(head[:4]) == qcow2Magic
	if want == QCOW2 && !isQCOW2 {
		return "", 0, fmt.Errorf("%w: it has no qcow2 header: look at it with `qemu-img info`, or leave the format out", ErrUnsupported)
	}
	if isQCOW2 && want != Raw {
		virtual, err := checkQCOW2(r, size)
		return QCOW2, virtual, err
	}
	if want == "" {
		if err := checkForeign(r, size, head); err != nil {
			return "", 0, err
		}
	}
	if size%sector != 0 {
		return "", 0, fmt.Errorf("%w: %d bytes are no multiple of %d: copy it again, or, if it is meant so, pad it: truncate -s %%%[3]d FILE",
			ErrTruncated, size, sector)
	}
	return Raw, size, nil
}

// openFile opens path without waiting for anybody (a FIFO without a peer blocks otherwise) and without leaving that
// mode in the descriptor.
func openFile(path string, flags int) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	for errors.Is(err, unix.EINTR) { // a signal during an open on a network file system
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	switch {
	case errors.Is(err, unix.EISDIR):
		return nil, st, fmt.Errorf("%w (%w)", err, ErrUnsupported)
	case errors.Is(err, unix.ENXIO):
		return nil, st, fmt.Errorf("%w (a socket, or a device that is not there: %w)", err, ErrUnsupported)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		return nil, st, fmt.Errorf("%w (opened for %s: see its owner, mode and mount)", err, access(flags))
	case err != nil:
		return nil, st, err
	}
	if err = unix.Fstat(fd, &st); err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		unix.Close(fd)
		return nil, st, err
	}
	return os.NewFile(uintptr(fd), path), st, nil
}

func access(flags int) string {
	if flags&unix.O_ACCMODE == unix.O_RDWR {
		return "reading and writing"
	}
	return "reading"
}

func kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "FIFO"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("file of mode %#o", mode)
}

// readUpTo reads at most n bytes at offset off of a file of size bytes; what the file no longer has is left out.
func readUpTo(r io.ReaderAt, off, size, n int64) ([]byte, error) {
	if off >= size {
		return nil, nil
	}
	b := make([]byte, min(n, size-off))
	got, err := r.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:got], nil
}
