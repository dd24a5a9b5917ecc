package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/virtlet/virtlet/internal/vm"
)

// process is a program in the guest that a manager wants: an exec.
type process struct {
	id      string
	task    *task
	request *taskapi.ExecProcessRequest
	cmd     vm.Command

	// Guarded by the daemon's mu.
	status tasktypes.Status
	stdio  stdio
	typing *os.File           // keeps its standard input from ending until the manager says so
	cancel context.CancelFunc // of one that runs
	exec   *vm.Exec           // nil: not in the guest yet
	exit   uint32
	exited time.Time

	ended chan struct{} // closed when exit is known
}

// Codes of programs that did not run, as shells have them.
const (
	exitCannot = 126
	exitLost   = 255 // what became of it is not known
)

const (
	// outputTime is how long a manager may take to read what a program has said.
	outputTime = 30 * time.Second
	// signalTime is how long it may take to send a program in the guest a signal.
	signalTime = 10 * time.Second
)

const noExec = "use its serial console (kubectl attach -it) or SSH"

// Exec prepares a program to run in the guest.
func (d *daemon) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	t, _, err := d.find(r.ID, "")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	guest, is := t.guest, t.status
	d.mu.Unlock()
	switch {
	case t.sandbox:
		return nil, status.Error(codes.Unimplemented, "the pod's sandbox has no processes: its container is the VM")
	case is != tasktypes.Status_RUNNING:
		return nil, status.Errorf(codes.FailedPrecondition, "container %s: nothing can run in it: it is %v", r.ID, is)
	case r.Terminal:
		return nil, status.Error(codes.Unimplemented, "the container is a VM, whose guest agent has no terminals: leave -t out, or "+noExec)
	}
	p := &process{id: r.ExecID, task: t, request: r, status: tasktypes.Status_CREATED, ended: make(chan struct{})}
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "process %s of container %s: read what to run: %v", r.ExecID, r.ID, err)
	}
	p.cmd = vm.Command{Args: spec.Args, Env: spec.Env}
	if err := guest.CheckAgent(ctx); err != nil {
		return nil, execError(err)
	}
	d.mu.Lock()
	if t.execs[r.ExecID] != nil {
		d.mu.Unlock()
		return nil, status.Errorf(codes.AlreadyExists, "process %s of container %s: it is there already", r.ExecID, r.ID)
	}
	t.execs[r.ExecID] = p
	d.mu.Unlock()
	d.events.send("/tasks/exec-added", &events.TaskExecAdded{ContainerID: t.id, ExecID: p.id})
	return done, nil
}

// execError makes an error of a program in the guest one for a manager.
func execError(err error) error {
	if errors.Is(err, vm.ErrNoAgent) {
		return status.Errorf(codes.Unimplemented, "the container is a VM, and %v; or %s", err, noExec)
	}
	return status.Error(codes.Unknown, one(err))
}

// startExec runs a program. One that is given input starts when all of it is there: an agent takes it once.
func (d *daemon) startExec(ctx context.Context, p *process) (*taskapi.StartResponse, error) {
	d.mu.Lock()
	is, guest := p.status, p.task.guest
	if is == tasktypes.Status_CREATED {
		p.status = tasktypes.Status_RUNNING
	}
	d.mu.Unlock()
	if is != tasktypes.Status_CREATED {
		return nil, status.Errorf(codes.FailedPrecondition, "process %s: it has been started already", p.id)
	}
	q := p.request
	s, err := openStdio("", q.Stdout, q.Stderr)
	var typing *os.File
	if err == nil && q.Stdin != "" {
		s.in, typing, err = openInput(q.Stdin)
	}
	var exec *vm.Exec
	if err == nil && q.Stdin == "" {
		exec, err = guest.Exec(ctx, p.cmd)
	}
	running, cancel := context.WithCancel(context.Background())
	d.mu.Lock()
	p.stdio, p.typing, p.exec, p.cancel = s, typing, exec, cancel
	d.mu.Unlock()
	if err != nil {
		d.finishExec(p, exitCannot)
		return nil, execError(err)
	}
	d.events.send("/tasks/exec-started", &events.TaskExecStarted{ContainerID: p.task.id, ExecID: p.id, Pid: uint32(p.task.pid)})
	go d.attendExec(running, p, guest)
	return &taskapi.StartResponse{Pid: uint32(p.task.pid)}, nil
}

// openInput opens a FIFO to read it to its end, which comes when typing is closed and nobody else writes.
func openInput(path string) (in, typing *os.File, err error) {
	if strings.Contains(path, "://") {
		return nil, nil, fmt.Errorf("open %s: only FIFOs are served", path)
	}
	if typing, err = os.OpenFile(path, unix.O_RDWR|unix.O_NONBLOCK, 0); err == nil { // first: so the other has a writer
		if in, err = os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			typing.Close()
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open the process's standard input: %w", err)
	}
	return in, typing, nil
}

// attendExec runs a program that has no agent's answer yet, waits for its end, and hands over what it said.
func (d *daemon) attendExec(ctx context.Context, p *process, guest *vm.Guest) {
	r, err := d.runExec(ctx, p, guest)
	code := uint32(r.Code)
	switch {
	case r.Signal != 0:
		code = exitStatus(unix.Signal(r.Signal))
	case errors.Is(err, vm.ErrAgentClosed), errors.Is(err, vm.ErrGivenUp), errors.Is(err, context.Canceled):
		code = exitStatus(unix.SIGKILL)
	case errors.Is(err, vm.ErrAgentRefused):
		code = exitCannot
	case err != nil:
		code = exitLost
	}
	if err != nil {
		r.Stderr = append(r.Stderr, "virtlet: "+one(err)+"\n"...)
	}
	if r.Truncated {
		r.Stderr = append(r.Stderr, "virtlet: the guest agent has not kept all of the output\n"...)
	}
	d.mu.Lock()
	s := p.stdio
	d.mu.Unlock()
	until := time.Now().Add(outputTime)
	for f, text := range map[*os.File][]byte{s.out: r.Stdout, s.err: r.Stderr} {
		if f != nil {
			_ = f.SetWriteDeadline(until)
			_, _ = f.Write(text) // who does not read loses
		}
	}
	d.finishExec(p, code)
	const much = 1 << 20 // bytes: of a probe it would not be worth the time
	if len(r.Stdout)+len(r.Stderr) > much {
		debug.FreeOSMemory()
	}
}

func (d *daemon) runExec(ctx context.Context, p *process, guest *vm.Guest) (vm.ExecResult, error) {
	d.mu.Lock()
	exec, in := p.exec, p.stdio.in
	d.mu.Unlock()
	if exec == nil {
		stop := context.AfterFunc(ctx, func() { _ = in.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		input, err := io.ReadAll(io.LimitReader(in, vm.MaxInput+1)) // more is refused
		if ctx.Err() != nil {
			return vm.ExecResult{}, fmt.Errorf("read its standard input: %w", ctx.Err())
		}
		if err != nil {
			return vm.ExecResult{}, fmt.Errorf("read its standard input: %w", err)
		}
		p.cmd.Input = input
		if exec, err = guest.Exec(ctx, p.cmd); err != nil {
			return vm.ExecResult{}, err
		}
		d.mu.Lock()
		p.exec = exec
		d.mu.Unlock()
	}
	return exec.Wait(context.WithoutCancel(ctx)) // a program that runs is killed by its signal
}

// finishExec says that a program has ended, once. Its FIFOs are closed before.
func (d *daemon) finishExec(p *process, code uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.status == tasktypes.Status_STOPPED {
		return
	}
	err := p.stdio.Close()
	if p.typing != nil {
		err = errors.Join(err, p.typing.Close())
		p.typing = nil
	}
	if err != nil {
		d.log.Error("close the streams of a process", "exec", p.id, "err", err)
	}
	if p.cancel != nil {
		p.cancel()
	}
	p.status, p.exit, p.exited = tasktypes.Status_STOPPED, code, time.Now()
	close(p.ended)
	d.events.send("/tasks/exit", &events.TaskExit{
		ContainerID: p.task.id, ID: p.id, Pid: uint32(p.task.pid), ExitStatus: code, ExitedAt: timestamppb.New(p.exited),
	})
}

// endExecs waits until the programs of a guest that has ended are said to have ended: before the guest is, as a manager
// forgets them with it.
func (d *daemon) endExecs(t *task) {
	d.mu.Lock()
	var all []*process
	for _, p := range t.execs {
		if p.status == tasktypes.Status_RUNNING {
			all = append(all, p)
			if p.exec == nil && p.cancel != nil { // one that waits for its input
				p.cancel()
			}
		}
	}
	d.mu.Unlock()
	late := time.After(lastWords)
	for _, p := range all {
		select {
		case <-p.ended:
		case <-late:
			return
		}
	}
}

// killExec sends a signal to a program in the guest. One that still waits for its input ends at any.
func (d *daemon) killExec(ctx context.Context, p *process, signal unix.Signal) error {
	d.mu.Lock()
	is, exec, cancel := p.status, p.exec, p.cancel
	d.mu.Unlock()
	switch {
	case is == tasktypes.Status_STOPPED:
		return status.Errorf(codes.NotFound, "process %s: it has ended", p.id)
	case is == tasktypes.Status_CREATED:
		d.finishExec(p, exitStatus(signal))
		return nil
	case exec == nil:
		if cancel != nil {
			cancel()
		}
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, signalTime)
	defer stop()
	err := exec.Kill(ctx, int(signal))
	if err != nil && signal == unix.SIGKILL { // it is given up all the same
		d.log.Warn("kill a process in the guest", "exec", p.id, "err", one(err))
		return nil
	}
	if err != nil {
		return execError(err)
	}
	return nil
}

// deleteExec forgets a program that has ended, or was never started.
func (d *daemon) deleteExec(p *process) (*taskapi.DeleteResponse, error) {
	d.mu.Lock()
	is := p.status
	d.mu.Unlock()
	switch is {
	case tasktypes.Status_RUNNING:
		return nil, status.Errorf(codes.FailedPrecondition, "process %s: it runs: kill it first", p.id)
	case tasktypes.Status_CREATED:
		d.finishExec(p, 0)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(p.task.execs, p.id)
	return &taskapi.DeleteResponse{Pid: uint32(p.task.pid), ExitStatus: p.exit, ExitedAt: timestamppb.New(p.exited)}, nil
}

// state tells of a program. The daemon's mu is held.
func (p *process) state() *taskapi.StateResponse {
	q := p.request
	s := &taskapi.StateResponse{
		ID: p.task.id, ExecID: p.id, Bundle: p.task.request.Bundle, Pid: uint32(p.task.pid), Status: p.status,
		Stdin: q.Stdin, Stdout: q.Stdout, Stderr: q.Stderr, Terminal: q.Terminal, ExitStatus: p.exit,
	}
	if !p.exited.IsZero() {
		s.ExitedAt = timestamppb.New(p.exited)
	}
	return s
}

// endInput lets the input of a program end: its manager has written all of it.
func (d *daemon) endInput(p *process) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.typing == nil {
		return nil
	}
	err := p.typing.Close()
	p.typing = nil
	return err
}
