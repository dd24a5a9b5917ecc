package shim

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
)

// mountFlags are the options of mount(8) that are flags of mount(2). Others go to the file system.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"ro": {unix.MS_RDONLY, false}, "rw": {unix.MS_RDONLY, true},
	"bind": {unix.MS_BIND, false}, "rbind": {unix.MS_BIND | unix.MS_REC, false},
	"nosuid": {unix.MS_NOSUID, false}, "nodev": {unix.MS_NODEV, false}, "noexec": {unix.MS_NOEXEC, false},
	"noatime": {unix.MS_NOATIME, false}, "relatime": {unix.MS_RELATIME, false}, "strictatime": {unix.MS_STRICTATIME, false},
	"sync": {unix.MS_SYNCHRONOUS, false}, "defaults": {0, false},
	// Nobody but this process looks at what the image holds, so devices and set-uid programs have no place in it.
	"dev": {}, "suid": {}, "exec": {},
}

// mountArgs gives one mount as mount(2) wants it.
func mountArgs(m *types.Mount) (flags uintptr, data string, err error) {
	flags = unix.MS_NODEV | unix.MS_NOSUID
	var rest []string
	for _, o := range m.Options {
		f, known := mountFlags[o]
		switch {
		case !known && o == "loop":
			return 0, "", errors.New("loop mounts are not served: use the snapshotter overlayfs")
		case !known:
			rest = append(rest, o)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	data = strings.Join(rest, ",")
	if most := unix.Getpagesize() - 1; len(data) > most {
		return 0, "", fmt.Errorf("the mount options have %d bytes, more than %d: the image has too many layers for a VM; make it of one", len(data), most)
	}
	return flags, data, nil
}

// mountAll mounts a container's root file system on dir. On an error nothing is mounted.
func mountAll(mounts []*types.Mount, dir string) error {
	for _, m := range mounts {
		flags, data, err := mountArgs(m)
		if err == nil && m.Target != "" {
			err = fmt.Errorf("a mount inside (%s) is not served", m.Target)
		}
		if err == nil {
			err = os.MkdirAll(dir, 0o711)
		}
		if err == nil {
			err = unix.Mount(m.Source, dir, m.Type, flags, data)
		}
		if err == nil && flags&unix.MS_BIND != 0 { // which takes no other flags the first time
			err = unix.Mount("", dir, "", flags&^unix.MS_REC|unix.MS_REMOUNT, "")
		}
		if err != nil {
			return errors.Join(fmt.Errorf("mount the image (%s): %w", m.Type, err), unmount(dir))
		}
	}
	return nil
}

// patiently does what fails for the moments in which the kernel still lets go of a process that has just ended.
func patiently(do func() error) error {
	const moments = 2 * time.Second // a manager waits 5 s for `delete`
	for end := time.Now().Add(moments); ; time.Sleep(10 * time.Millisecond) {
		if err := do(); !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// unmount takes away whatever is mounted on dir. What is not there, or no mount, is done already.
func unmount(dir string) error {
	const layers = 64 // of mounts on one place, at most
	for range layers {
		err := patiently(func() error { return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW) })
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		default:
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	return fmt.Errorf("unmount %s: there are more than %d mounts", dir, layers)
}
