package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/vm"
)

// Where an image has what a VM boots from, unless annotations say otherwise: one disk image in /disk, as in KubeVirt's
// containerDisks; or a kernel, which may come with an initrd, its command line in a text file, and a disk.
const (
	diskDir     = "disk"
	bootKernel  = "boot/vmlinuz"
	bootCmdline = "boot/cmdline"
	maxCmdline  = 2048 // bytes, COMMAND_LINE_SIZE of x86
)

var (
	bootInitrds = []string{"boot/initrd", "boot/initrd.img"}
	diskEndings = []string{".qcow2", ".img", ".raw"}
)

// findMedia completes cfg with what an image, mounted at rootfs, has to boot from.
func findMedia(rootfs string, w wishes, cfg *vm.Config) error {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return fmt.Errorf("open the image: %w", err)
	}
	defer root.Close()
	m := media{root: root, rootfs: rootfs}
	kernel := m.find(w.kernel, bootKernel)
	initrd := m.find(w.initrd, bootInitrds...)
	disk := w.image
	if disk == "" {
		if disk, err = m.onlyDisk(); err != nil {
			return err
		}
	}
	if disk = m.find(disk); disk != "" {
		cfg.Image = &vm.Disk{Path: disk}
		if w.cfg.Image != nil {
			cfg.Image.Format = w.cfg.Image.Format
		}
	}
	// A disk image alone may lie beside the files of a system that it was made with: only /disk counts then.
	if kernel != "" && (disk == "" || w.kernel != "") {
		cfg.Kernel, cfg.Initrd = kernel, initrd
		cfg.Append = m.cmdline(w.append)
	}
	if err := errors.Join(m.errs...); err != nil {
		return err
	}
	if cfg.Image == nil && cfg.Kernel == "" {
		return errors.New("the container's image is not a VM's: it has no /disk/*.qcow2, *.img or *.raw and no /boot/vmlinuz (annotations virtlet.cloud/image and virtlet.cloud/kernel name others)")
	}
	return nil
}

// media looks into an image. Nothing in it is followed: a symbolic link could lead to a file of the node.
type media struct {
	root   *os.Root
	rootfs string
	errs   []error
}

// find gives the node's path of the file that was asked for, or of the first of the others that is there.
func (m *media) find(asked string, others ...string) string {
	if asked != "" {
		name := strings.TrimPrefix(path.Clean("/"+asked), "/")
		if err := m.regular(name); err != nil {
			m.errs = append(m.errs, fmt.Errorf("%s in the container's image: %w", asked, err))
			return ""
		}
		return filepath.Join(m.rootfs, name)
	}
	for _, name := range others {
		switch err := m.regular(name); {
		case err == nil:
			return filepath.Join(m.rootfs, name)
		case !errors.Is(err, fs.ErrNotExist):
			m.errs = append(m.errs, fmt.Errorf("/%s in the container's image: %w", name, err))
		}
	}
	return ""
}

// regular says what is wrong with a path that should lead to a file, through directories alone.
func (m *media) regular(name string) error {
	return m.check(name, fs.FileMode.IsRegular)
}

// check looks at each part of a path from the top: the last must be good, and those before it directories.
func (m *media) check(name string, good func(fs.FileMode) bool) error {
	if dir := path.Dir(name); dir != "." {
		if err := m.check(dir, fs.FileMode.IsDir); err != nil {
			return err
		}
	}
	fi, err := m.root.Lstat(name)
	if err == nil && !good(fi.Mode()) {
		err = fmt.Errorf("/%s is a %v: only files in directories are used, and no links", name, fi.Mode().Type())
	}
	return err
}

// onlyDisk gives the disk image of the image, "" if it has none.
func (m *media) onlyDisk() (string, error) {
	entries, err := fs.ReadDir(m.root.FS(), diskDir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("look for a disk in the container's image: %w", err)
	}
	var disks []string
	for _, e := range entries {
		if slices.Contains(diskEndings, path.Ext(e.Name())) {
			disks = append(disks, diskDir+"/"+e.Name())
		}
	}
	if len(disks) > 1 {
		return "", fmt.Errorf("the container's image has %d disks (%s): name one by the annotation virtlet.cloud/image", len(disks), strings.Join(disks, ", "))
	}
	return strings.Join(disks, ""), nil
}

// cmdline gives the kernel's command line: as asked, or the image's. Without either, what a serial console takes.
func (m *media) cmdline(asked *string) string {
	if asked != nil {
		return *asked
	}
	if m.find("", bootCmdline) == "" {
		return "console=ttyS0"
	}
	b, err := m.root.ReadFile(bootCmdline)
	if err == nil && len(b) > maxCmdline {
		err = fmt.Errorf("it has %d bytes, more than %d", len(b), maxCmdline)
	}
	if err != nil {
		m.errs = append(m.errs, fmt.Errorf("/%s in the container's image: %w", bootCmdline, err))
	}
	return string(bytes.TrimSpace(b))
}
