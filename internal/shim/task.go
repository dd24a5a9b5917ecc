package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/virtlet/virtlet/internal/vm"
)

// task is a container as its manager sees it: the sandbox, or the one workload.
type task struct {
	id      string
	bundle  *bundle
	sandbox bool
	request *taskapi.CreateTaskRequest
	group   cgroup // QEMU's; of a workload
	rootfs  string // likewise
	mounted bool
	cfg     vm.Config
	stdio   stdio

	// Guarded by the daemon's mu.
	status  tasktypes.Status
	pid     int
	guest   *vm.Guest
	cancel  context.CancelFunc // of a start that goes on
	exit    uint32
	exited  time.Time
	closing bool // the sandbox's end has begun
	execs   map[string]*process

	ended chan struct{} // closed when exit is known
}

// newTask makes a task that has been created; its process is the daemon until it has one.
func newTask(b *bundle, r *taskapi.CreateTaskRequest, sandbox bool) *task {
	return &task{
		id: r.ID, bundle: b, sandbox: sandbox, request: r, status: tasktypes.Status_CREATED, pid: os.Getpid(), ended: make(chan struct{}),
		execs: map[string]*process{},
	}
}

// create makes the pod, or prepares its guest.
func (d *daemon) create(ctx context.Context, r *taskapi.CreateTaskRequest) (*task, error) {
	b, err := readBundle(r.Bundle)
	if err != nil {
		return nil, err
	}
	id, itself, err := b.sandbox()
	if err != nil {
		return nil, err
	}
	if id != d.id || itself && r.ID != d.id {
		return nil, fmt.Errorf("container %s is of pod %s, and this shim serves %s", r.ID, id, d.id)
	}
	t := newTask(b, r, itself)
	if itself {
		if d.pod != nil {
			return nil, errors.New("the pod is there already")
		}
		if t.stdio, err = openStdio(r.Stdin, r.Stdout, r.Stderr); err != nil {
			return nil, err
		}
		d.group = d.cgroup(b.spec.Linux.CgroupsPath)
		t.group = d.group
		if err := d.prepare(ctx, b); err != nil {
			return nil, errors.Join(err, t.stdio.Close())
		}
		return t, nil
	}
	if d.pod == nil {
		return nil, errors.New("the pod has no sandbox, or it has ended")
	}
	if other := d.workload(); other != nil {
		return nil, fmt.Errorf("container %s: pod %s has a VM already, and a pod of this runtime has one container; move sidecars to pods of their own, or out of the way by annotation (docs/kubernetes.md)",
			r.ID, b.pod())
	}
	t.group = d.cgroup(b.spec.Linux.CgroupsPath)
	t.rootfs = filepath.Join(r.Bundle, "rootfs")
	if err := mountAll(r.Rootfs, t.rootfs); err != nil {
		return nil, err
	}
	t.mounted = len(r.Rootfs) > 0
	if err := d.prepareGuest(t); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

// prepareGuest finds all that the guest needs, and opens its streams.
func (d *daemon) prepareGuest(t *task) (err error) {
	if t.cfg, err = d.guestConfig(t.bundle, t.rootfs); err != nil {
		return err
	}
	// On the container's writable layer, whose limits hold for what the guest writes. The name is new, so it leads nowhere.
	if t.cfg.DiskDir, err = os.MkdirTemp(t.rootfs, ".virtlet-*"); err != nil {
		return fmt.Errorf("make a place for the guest's disk: %w", err)
	}
	t.cfg.Started = func(pid int) error { return settle(t.bundle, t.group, pid) }
	t.stdio, err = openStdio(t.request.Stdin, t.request.Stdout, t.request.Stderr)
	return err
}

// close takes away what create made for a workload.
func (t *task) close() error {
	errs := []error{t.stdio.Close()}
	if t.cfg.DiskDir != "" {
		errs = append(errs, os.RemoveAll(t.cfg.DiskDir))
	}
	if t.mounted {
		errs = append(errs, unmount(t.rootfs))
	}
	return errors.Join(append(errs, t.group.remove())...)
}

// workload gives the pod's container, nil without one.
func (d *daemon) workload() *task {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range d.tasks {
		if !t.sandbox {
			return t
		}
	}
	return nil
}

// boot starts the guest of a workload.
func (d *daemon) boot(ctx context.Context, t *task) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	t.cancel = cancel
	d.mu.Unlock()
	guest, err := d.pod.Boot(ctx, t.cfg)
	t.cfg.Volumes = vm.Volumes{} // the guest has them
	d.mu.Lock()
	defer d.mu.Unlock()
	t.cancel = nil
	if err != nil {
		return err
	}
	t.guest, t.pid, t.status = guest, guest.PID(), tasktypes.Status_RUNNING
	end := t.stdio.connect(guest)
	go d.attend(t, guest, end)
	return nil
}

// attend waits for the end of a guest and tells of it.
func (d *daemon) attend(t *task, g *vm.Guest, end func()) {
	exit, err := g.Wait()
	d.endExecs(t)
	end()
	if err != nil {
		d.log.Error("clean up after a guest", "container", t.id, "err", one(err))
	}
	if e := exit.Err(); e != nil {
		d.log.Warn("the guest has ended", "container", t.id, "err", e)
	}
	d.finish(t, exitCode(exit))
}

// exitCode is how a manager sees the end of a guest.
func exitCode(e vm.Exit) uint32 {
	switch e.Reason {
	case vm.Shutdown:
		return 0
	case vm.Killed:
		return exitStatus(unix.SIGKILL)
	}
	return 1
}

// finish says that a task has ended, once.
func (d *daemon) finish(t *task, code uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.status == tasktypes.Status_STOPPED {
		return
	}
	t.status, t.exit, t.exited = tasktypes.Status_STOPPED, code, time.Now()
	close(t.ended)
	d.events.send("/tasks/exit", &events.TaskExit{
		ContainerID: t.id, ID: t.id, Pid: uint32(t.pid), ExitStatus: code, ExitedAt: timestamppb.New(t.exited),
	})
}

// endSandbox gives the network back, and tells of the sandbox's end only then: CNI DEL may follow at once. What cannot be
// undone must not keep the pod from ending; it stays recorded.
func (d *daemon) endSandbox(t *task, code uint32) {
	if w := d.workload(); w != nil {
		d.kill(w)
	}
	d.turn.Lock()
	defer d.turn.Unlock()
	if d.pod != nil {
		if err := d.pod.Close(); err != nil {
			d.log.Error("give the pod's network back (virtlet gc tries again)", "err", one(err))
		}
		pod := d.pod
		d.pod = nil
		d.closing.Go(func() {
			if err := pod.Closed(); err != nil {
				d.log.Error("close the pod's TAPs", "err", err)
			}
		})
	}
	if err := t.stdio.Close(); err != nil {
		d.log.Error("close the sandbox's streams", "err", err)
	}
	d.finish(t, code)
}

// kill ends a workload without asking its guest.
func (d *daemon) kill(t *task) {
	d.mu.Lock()
	guest, cancel, status := t.guest, t.cancel, t.status
	d.mu.Unlock()
	switch {
	case cancel != nil: // Start fails then
		cancel()
	case guest != nil:
		if err := guest.Kill(); err != nil {
			d.log.Error("kill a guest", "container", t.id, "err", err)
		}
	case status == tasktypes.Status_CREATED:
		d.finish(t, exitStatus(unix.SIGKILL))
	}
}

func taskCreated(t *task) *events.TaskCreate {
	r := t.request
	return &events.TaskCreate{
		ContainerID: t.id, Bundle: r.Bundle, Rootfs: append([]*types.Mount(nil), r.Rootfs...), Pid: uint32(t.pid),
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	}
}
