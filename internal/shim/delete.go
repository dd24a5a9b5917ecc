package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/virtlet/virtlet/internal/vm"
)

// delete cleans up after one container: after each that has been deleted in order, also while the pod's daemon lives, and
// after a dead daemon once for every container of its pod. The first of those undoes all that the VM had.
func (c *call) delete(ctx context.Context) ([]byte, error) {
	sandbox, itself, group := c.id, true, ""
	b, err := readBundle(c.bundle)
	switch {
	case errors.Is(err, os.ErrNotExist): // a manager that crashed; what the id alone leads to can still be cleaned
	case err != nil:
		return nil, err
	default:
		if sandbox, itself, err = b.sandbox(); err != nil {
			return nil, err
		}
		group = b.spec.Linux.CgroupsPath
	}
	var errs []error
	alive := answers(c.socket(sandbox))
	if !alive {
		errs = append(errs, c.undoDead(ctx, vmName(c.namespace, sandbox)))
		if itself {
			if err := os.Remove(c.socket(sandbox)); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	if !itself && c.address != "" { // CRI-O gives no address, and has mounted the image itself
		errs = append(errs, unmount(filepath.Join(c.bundle, "rootfs")))
	}
	if !itself || !alive { // a daemon removes its own when it ends
		errs = append(errs, c.cgroup(group).remove())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return proto.Marshal(&taskapi.DeleteResponse{
		ExitStatus: exitStatus(unix.SIGKILL), ExitedAt: timestamppb.New(time.Now()),
	})
}

// undoDead undoes the VM of a daemon that is dead: QEMU, the network, its files.
func (c *call) undoDead(ctx context.Context, name string) error {
	err := c.Store.RemovePod(ctx, name)
	if errors.Is(err, vm.ErrNotFound) {
		return nil
	}
	return err
}

// exitStatus is how a shell, and so a manager, says that a signal ended something.
func exitStatus(s unix.Signal) uint32 { return 128 + uint32(s) }
