package shim

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

const (
	// emptyDisk is the file in an emptyDir that is the guest's disk. The kubelet measures the directory, limits it and removes
	// it, and it outlives the container.
	emptyDisk = "virtlet-disk.raw"
	// maxEmpty bounds a disk, in bytes; it is sparse. minEmpty is what holds a file system.
	maxEmpty = 16 << 30
	minEmpty = 8 << 20
)

// isEmptyDir says whether a mount is an emptyDir, by the place where the kubelet makes those.
func isEmptyDir(m specs.Mount) bool { return strings.Contains(m.Source, "/kubernetes.io~empty-dir/") }

// emptyDirs gives the guest a disk for each emptyDir of a container, in the order of its mounts.
func emptyDirs(b *bundle) (disks []vm.Disk, err error) {
	for _, m := range b.spec.Mounts {
		if m.Type != "bind" || !isEmptyDir(m) || readOnly(m) || everyPod(m) {
			continue
		}
		to, err := mountPoint(m)
		if err != nil {
			return nil, err
		}
		if err := makeEmptyDisk(m.Source); err != nil {
			return nil, fmt.Errorf("volume at %s: %w", to, err)
		}
		disks = append(disks, vm.Disk{
			Path: filepath.Join(m.Source, emptyDisk), Format: "raw", Serial: fmt.Sprintf("virtlet-empty-%d", len(disks)), Mount: to,
		})
	}
	return disks, nil
}

// makeEmptyDisk makes the disk, unless the guest before this one had it: as large as the directory's file system lets it be.
func makeEmptyDisk(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.OpenFile(emptyDisk, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		fi, err := root.Lstat(emptyDisk)
		if err == nil && !fi.Mode().IsRegular() {
			err = fmt.Errorf("%s is a %v", emptyDisk, fi.Mode().Type())
		}
		return err
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err
	}
	size := min(int64(st.Bavail)*st.Bsize, maxEmpty) &^ (1<<20 - 1) // whole MiB
	if size < minEmpty {
		return errors.Join(fmt.Errorf("its file system has room for %d MiB, too few for a disk", size>>20), root.Remove(emptyDisk))
	}
	return f.Truncate(size)
}

// mountPoint gives the path in the guest of a mount.
func mountPoint(m specs.Mount) (string, error) {
	to := path.Clean("/" + m.Destination)
	if to == "/" || strings.ContainsFunc(to, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", fmt.Errorf("volume at %q: nothing can be mounted there", m.Destination)
	}
	return to, nil
}
