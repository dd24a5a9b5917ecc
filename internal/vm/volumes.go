package vm

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/cloudinit"
)

// Volumes are what a guest gets as a disk of files, which it reads and nobody writes.
type Volumes struct {
	Mounts []string // paths in the guest; cloud-init mounts each of them
	Files  []File   // of all of them: each at its path in the guest, without the slash at the start
}

// File is a file or directory for the guest.
type File = cloudinit.File

// makeVolumes makes the disk of the volumes, in memory alone: Secrets are among them, and must not outlive the guest on a
// disk.
func (v *VM) makeVolumes() error {
	if len(v.cfg.Volumes.Mounts) == 0 {
		return nil
	}
	b, err := cloudinit.Volumes(v.cfg.Volumes.Files)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("volumes", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make a disk of volumes: %w", err)
	}
	f := os.NewFile(uintptr(fd), "volumes")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("make a disk of volumes: %w", err)
	}
	v.cfg.Volumes.Files = nil // which a supervisor need not hold for as long as its guest lives
	// QEMU wants a descriptor that is read-only, as the disk is.
	if v.media.volumes, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		return fmt.Errorf("make a disk of volumes: %w", err)
	}
	return nil
}
