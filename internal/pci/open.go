package pci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

const errNoDevice = unix.ENODEV

// InUse says whether a program has a function of the IOMMU group open through VFIO: only one at a time can.
func (s FS) InUse(group int) (bool, error) {
	file := s.path("dev/vfio", fmt.Sprint(group))
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("open %s: %w", file, err)
	}
	return false, unix.Close(fd)
}

// Owner is who may open a device file.
type Owner struct {
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Mode uint32 `json:"mode"` // permissions alone
}

// Owner gives the owner of the device file of an IOMMU group; nil if there is none yet.
func (s FS) Owner(group int) (*Owner, error) {
	var st unix.Stat_t
	file := s.path("dev/vfio", fmt.Sprint(group))
	if err := unix.Stat(file, &st); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("find the owner of %s: %w", file, err)
	}
	return &Owner{st.Uid, st.Gid, st.Mode & 0o777}, nil
}

// Own gives the device file of an IOMMU group to an owner. One that is not there is no error: it goes with the last
// function of its group.
func (s FS) Own(group int, o Owner) error {
	file := s.path("dev/vfio", fmt.Sprint(group))
	err := os.Chown(file, int(o.UID), int(o.GID))
	if err == nil {
		err = os.Chmod(file, fs.FileMode(o.Mode))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("give %s to uid %d: %w", file, o.UID, err)
	}
	return nil
}
