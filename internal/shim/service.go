package shim

import (
	"context"
	"encoding/json"
	"os"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// The calls of the task service, as containerd's API defines them.

var done = &emptypb.Empty{}

// find gives a task by the ids of a call, and with an exec's id that program in the guest.
func (d *daemon) find(id, exec string) (*task, *process, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.tasks[id]
	if t == nil {
		return nil, nil, status.Errorf(codes.NotFound, "container %s: not found", id)
	}
	if exec == "" {
		return t, nil, nil
	}
	p := t.execs[exec]
	if p == nil {
		return nil, nil, status.Errorf(codes.NotFound, "process %s of container %s: not found", exec, id)
	}
	return t, p, nil
}

// Create makes the pod's network, or prepares its guest.
func (d *daemon) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	d.turn.Lock()
	defer d.turn.Unlock()
	if _, _, err := d.find(r.ID, ""); err == nil {
		return nil, status.Errorf(codes.AlreadyExists, "container %s: it is there already", r.ID)
	}
	t, err := d.create(ctx, r)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, one(err))
	}
	d.mu.Lock()
	d.tasks[t.id] = t
	d.mu.Unlock()
	d.events.send("/tasks/create", taskCreated(t))
	d.rest.Reset(restAfter)
	return &taskapi.CreateTaskResponse{Pid: uint32(t.pid)}, nil
}

// Start starts the guest; the sandbox has all that it needs.
func (d *daemon) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	t, p, err := d.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return d.startExec(ctx, p)
	}
	d.turn.Lock()
	defer d.turn.Unlock()
	d.mu.Lock()
	is := t.status
	if is == tasktypes.Status_CREATED && t.sandbox {
		t.status = tasktypes.Status_RUNNING
	}
	d.mu.Unlock()
	switch {
	case is != tasktypes.Status_CREATED:
		return nil, status.Errorf(codes.FailedPrecondition, "container %s: it has been started already", r.ID)
	case !t.sandbox && d.pod == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "container %s: its pod has ended", r.ID)
	case !t.sandbox:
		if err := d.boot(ctx, t); err != nil {
			d.finish(t, 1)
			return nil, status.Error(codes.Unknown, one(err))
		}
	}
	d.rest.Reset(restAfter)
	d.events.send("/tasks/start", &events.TaskStart{ContainerID: t.id, Pid: uint32(t.pid)})
	return &taskapi.StartResponse{Pid: uint32(t.pid)}, nil
}

// Kill powers the guest down, or ends it. A sandbox ends at any signal that ends a process.
func (d *daemon) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	t, p, err := d.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return done, d.killExec(ctx, p, unix.Signal(r.Signal))
	}
	d.mu.Lock()
	guest, is, closing := t.guest, t.status, t.closing
	t.closing = t.closing || t.sandbox
	d.mu.Unlock()
	if is == tasktypes.Status_STOPPED {
		return nil, status.Errorf(codes.NotFound, "container %s: it has ended", r.ID)
	}
	const systemdPoweroff = 38 // SIGRTMIN+4 (systemd(1)), with +3 for a halt one below: stop signals of images with systemd
	switch signal := unix.Signal(r.Signal); signal {
	case unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGPWR, systemdPoweroff, systemdPoweroff - 1:
		switch {
		case t.sandbox && !closing:
			go d.endSandbox(t, exitStatus(signal))
		case t.sandbox:
		case signal == unix.SIGKILL || guest == nil:
			d.kill(t)
		default:
			guest.Powerdown()
		}
		return done, nil
	default:
		return nil, status.Errorf(codes.Unimplemented, "signal %d: a VM has a power button (TERM) and a plug (KILL), and hears no other signals", r.Signal)
	}
}

// Wait blocks until a task has ended.
func (d *daemon) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	t, p, err := d.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	ended := t.ended
	if p != nil {
		ended = p.ended
	}
	select {
	case <-ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p != nil {
		return &taskapi.WaitResponse{ExitStatus: p.exit, ExitedAt: timestamppb.New(p.exited)}, nil
	}
	return &taskapi.WaitResponse{ExitStatus: t.exit, ExitedAt: timestamppb.New(t.exited)}, nil
}

// Delete forgets a task that has ended, or was never started.
func (d *daemon) Delete(_ context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	t, p, err := d.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p != nil {
		return d.deleteExec(p)
	}
	d.mu.Lock()
	is := t.status
	d.mu.Unlock()
	switch {
	case is == tasktypes.Status_RUNNING || is == tasktypes.Status_PAUSED:
		return nil, status.Errorf(codes.FailedPrecondition, "container %s: it runs: stop it first", r.ID)
	case is == tasktypes.Status_CREATED && t.sandbox:
		d.endSandbox(t, 0)
	case is == tasktypes.Status_CREATED:
		d.finish(t, 0)
	}
	d.turn.Lock()
	defer d.turn.Unlock()
	if !t.sandbox {
		if err := t.close(); err != nil {
			d.log.Error("clean up after a container", "container", t.id, "err", one(err)) // `delete` tries again
		}
	}
	d.mu.Lock()
	delete(d.tasks, t.id)
	d.mu.Unlock()
	at := timestamppb.New(t.exited)
	d.events.send("/tasks/delete", &events.TaskDelete{ContainerID: t.id, Pid: uint32(t.pid), ExitStatus: t.exit, ExitedAt: at})
	return &taskapi.DeleteResponse{Pid: uint32(t.pid), ExitStatus: t.exit, ExitedAt: at}, nil
}

// State tells of a task.
func (d *daemon) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	t, p, err := d.find(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if p != nil {
		return p.state(), nil
	}
	q := t.request
	s := &taskapi.StateResponse{
		ID: t.id, Bundle: q.Bundle, Pid: uint32(t.pid), Status: t.status, Stdin: q.Stdin, Stdout: q.Stdout, Stderr: q.Stderr,
		Terminal: q.Terminal, ExitStatus: t.exit,
	}
	if !t.exited.IsZero() {
		s.ExitedAt = timestamppb.New(t.exited)
	}
	return s, nil
}

// Connect says who serves a task.
func (d *daemon) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	t, _, err := d.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: uint32(t.pid), Version: d.Version}, nil
}

// Pids gives one process, always: a containerd that restarts takes a task without any for one that has ended.
func (d *daemon) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	t, _, err := d.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: uint32(t.pid)}}}, nil
}

// Pause stops the guest's CPUs.
func (d *daemon) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	err := d.turnOver(ctx, r.ID, tasktypes.Status_RUNNING, tasktypes.Status_PAUSED)
	if err == nil {
		d.events.send("/tasks/paused", &events.TaskPaused{ContainerID: r.ID})
	}
	return done, err
}

// Resume lets the guest's CPUs go on.
func (d *daemon) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	err := d.turnOver(ctx, r.ID, tasktypes.Status_PAUSED, tasktypes.Status_RUNNING)
	if err == nil {
		d.events.send("/tasks/resumed", &events.TaskResumed{ContainerID: r.ID})
	}
	return done, err
}

// turnOver pauses a guest that runs, or resumes one that is paused.
func (d *daemon) turnOver(ctx context.Context, id string, from, to tasktypes.Status) error {
	t, _, err := d.find(id, "")
	if err != nil {
		return err
	}
	d.turn.Lock()
	defer d.turn.Unlock()
	d.mu.Lock()
	guest, is := t.guest, t.status
	d.mu.Unlock()
	if guest == nil || is != from {
		return status.Errorf(codes.FailedPrecondition, "container %s: it is %v", id, is)
	}
	do := guest.Pause
	if to == tasktypes.Status_RUNNING {
		do = guest.Resume
	}
	if err := do(ctx); err != nil {
		return status.Error(codes.Unknown, one(err))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.status == from {
		t.status = to
	}
	return nil
}

// Stats reads the counters of a task's cgroup.
func (d *daemon) Stats(_ context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	t, _, err := d.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	any, err := typeurl.MarshalAnyToProto(t.group.stats())
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: any}, nil
}

// CloseIO ends the input of a program in the guest. A serial console has no end of input.
func (d *daemon) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := d.find(r.ID, r.ExecID)
	if p != nil && r.Stdin {
		err = d.endInput(p)
	}
	return done, err
}

// ResizePty does nothing: a serial console has no size.
func (d *daemon) ResizePty(_ context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	_, _, err := d.find(r.ID, r.ExecID)
	return done, err
}

// Update asks the guest to make do with less memory, or gives it back, up to what it was booted with. It has as many CPUs
// as it was booted with: how much time they get is the cgroup's, whose limits are the pod's.
func (d *daemon) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	t, _, err := d.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	var limits specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &limits); err != nil && r.Resources != nil {
		return nil, status.Errorf(codes.InvalidArgument, "container %s: read its limits: %v", r.ID, err)
	}
	d.mu.Lock()
	guest := t.guest
	if t.status != tasktypes.Status_RUNNING {
		guest = nil
	}
	d.mu.Unlock()
	if guest == nil || limits.Memory == nil || limits.Memory.Limit == nil || *limits.Memory.Limit <= 0 {
		return done, nil
	}
	got, err := guest.SetMemory(ctx, *limits.Memory.Limit>>20)
	if err != nil {
		return nil, status.Error(codes.Unknown, one(err))
	}
	d.log.Info("the guest is asked to make do with other memory", "container", t.id, "MiB", got)
	return done, nil
}

// Checkpoint is refused.
func (d *daemon) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, status.Error(codes.Unimplemented, "the container is a VM, of which no checkpoints are made")
}

// Shutdown ends the daemon when no task is left; it is called after each.
func (d *daemon) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.tasks) == 0 {
		d.ended.Do(func() { close(d.quit) })
	}
	return done, nil
}
