package shim

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// Bounds of a container's read-only volumes, which the guest gets as one disk. A ConfigMap or Secret has 1 MiB at most.
const (
	maxVolumeBytes = 32 << 20
	maxVolumeFiles = 4096
	maxVolumeDepth = 16 // directories in each other: a link can lead back
)

// volumes reads the read-only volumes of a container: ConfigMaps, Secrets, the downward API, projected ones, and others that
// are small. Later changes are not followed.
func volumes(b *bundle) (vm.Volumes, error) {
	c := collector{bytes: maxVolumeBytes, files: maxVolumeFiles}
	var v vm.Volumes
	for _, m := range b.spec.Mounts {
		if m.Type != "bind" || !readOnly(m) || everyPod(m) {
			continue
		}
		to, err := mountPoint(m)
		if err != nil {
			return v, err
		}
		if err := c.volume(m.Source, to[1:]); err != nil {
			return v, fmt.Errorf("volume at %s: %w", m.Destination, err)
		}
		v.Mounts = append(v.Mounts, to)
	}
	slices.Sort(v.Mounts) // one inside another comes after that
	v.Files = c.all
	return v, nil
}

func readOnly(m specs.Mount) bool { return slices.Contains(m.Options, "ro") }

// collector reads files of the node, within bounds.
type collector struct {
	bytes, files int // that may still be read
	all          []vm.File
}

// volume reads the directory or file at source. Links are followed inside that directory, as kubelet's volumes are made of
// them; one that leads out is an error.
func (c *collector) volume(source, to string) error {
	fi, err := os.Stat(source)
	if err != nil {
		return err
	}
	if !fi.IsDir() { // a subPath of a volume
		root, err := os.OpenRoot(path.Dir(source))
		if err != nil {
			return err
		}
		defer root.Close()
		return c.read(root, path.Base(source), to)
	}
	root, err := os.OpenRoot(source)
	if err != nil {
		return err
	}
	defer root.Close()
	return c.directory(root, ".", to, 0)
}

func (c *collector) directory(root *os.Root, name, to string, depth int) error {
	if depth > maxVolumeDepth {
		return fmt.Errorf("%s: more than %d directories in each other", name, maxVolumeDepth)
	}
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := c.add(d, vm.File{Path: to}); err != nil {
		return err
	}
	entries, err := d.ReadDir(c.files + 2) // no more than that is of use
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") { // kubelet's own: where the links of a volume lead
			continue
		}
		from, to := path.Join(name, e.Name()), path.Join(to, e.Name())
		fi, err := root.Stat(from)
		switch {
		case err != nil:
		case fi.IsDir():
			err = c.directory(root, from, to, depth+1)
		case fi.Mode().IsRegular():
			err = c.read(root, from, to)
		default:
			err = fmt.Errorf("%s is a %v: only files and directories can be given to a guest", from, fi.Mode().Type())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) read(root *os.Root, name, to string) error {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may have become a FIFO
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(c.bytes)+1))
	if err != nil {
		return err
	}
	if c.bytes -= len(data); c.bytes < 0 {
		return fmt.Errorf("the read-only volumes have more than %d MiB, which a guest gets as one disk: use a block volume (volumeMode: Block, volumeDevices)", maxVolumeBytes>>20)
	}
	return c.add(f, vm.File{Path: to, Data: data})
}

// add keeps a file with the mode and the owners that f has.
func (c *collector) add(f *os.File, file vm.File) error {
	if c.files--; c.files < 0 {
		return fmt.Errorf("the read-only volumes have more than %d files, which a guest gets as one disk: use a block volume (volumeMode: Block, volumeDevices)", maxVolumeFiles)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	file.Mode, file.UID, file.GID = fs.FileMode(st.Mode&0o777), int(st.Uid), int(st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		file.Mode |= fs.ModeDir
	case unix.S_IFREG:
	default:
		return fmt.Errorf("%s is no file any more", file.Path)
	}
	c.all = append(c.all, file)
	return nil
}
