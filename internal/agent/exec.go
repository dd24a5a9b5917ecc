package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Command is a program to run in a guest. It runs as the agent does, which is as root in most, in the agent's directory.
type Command struct {
	Args  []string `json:"args"`            // the program first: a path, or a name that the agent's PATH has
	Env   []string `json:"env,omitempty"`   // NAME=VALUE; none: the agent's own
	Input []byte   `json:"input,omitempty"` // its standard input; nil: empty
}

// Result is the end of a program, and what it said.
type Result struct {
	Code           int // 0 to 255, as an exit code of Linux; -1 when a signal ended it
	Signal         int // 0: none; at most 127
	Stdout, Stderr []byte
	Truncated      bool // the agent has not kept all of it
}

// Exec is a program in the guest.
type Exec struct {
	c      *Client
	pid    int64
	kill   sync.Once
	killed chan struct{} // closed after SIGKILL
}

// How often the agent is asked whether a program has ended: soon at first, as most are short.
const (
	firstLook = 10 * time.Millisecond
	lastLook  = 500 * time.Millisecond
	// killTime is how long a program may take to end after SIGKILL, until it is given up.
	killTime = 5 * time.Second
)

const (
	lost      = 255 // an exit code that is not known, or none of Linux's
	maxSignal = 128 // signals are less: they share a byte with exit codes
)

// ErrGivenUp says that a program was killed and has not ended, or that nothing tells that it has.
var ErrGivenUp = errors.New("killed, and the guest agent does not say that it has ended")

// Exec starts a program. An error of [ErrRefused] has the agent's reason: there may be no such program. When an answer does
// not come in time the program may run all the same.
func (c *Client) Exec(ctx context.Context, cmd Command) (*Exec, error) {
	if len(cmd.Args) == 0 || cmd.Args[0] == "" {
		return nil, errors.New("run a program in the guest: no program is named")
	}
	if len(cmd.Input) > MaxInput {
		return nil, fmt.Errorf("run %q in the guest: its standard input has more than %d bytes", cmd.Args[0], MaxInput)
	}
	args := struct {
		Path    string   `json:"path"`
		Arg     []string `json:"arg,omitempty"`
		Env     []string `json:"env,omitempty"`
		Input   []byte   `json:"input-data,omitempty"` // base64 in JSON, as agents want it
		Capture bool     `json:"capture-output"`
	}{cmd.Args[0], cmd.Args[1:], cmd.Env, cmd.Input, true}
	var started struct {
		PID int64 `json:"pid"`
	}
	if err := c.do(ctx, "guest-exec", args, &started); err != nil {
		return nil, fmt.Errorf("run %q in the guest: %w", cmd.Args[0], err)
	}
	if started.PID <= 0 {
		return nil, fmt.Errorf("run %q in the guest: the guest agent says that it is process %d", cmd.Args[0], started.PID)
	}
	return &Exec{c: c, pid: started.PID, killed: make(chan struct{})}, nil
}

// Wait waits until the program has ended. One that cannot be asked about any more is an error, as is the end of ctx. One
// call at a time, and none after a Result.
func (e *Exec) Wait(ctx context.Context) (Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-e.killed:
			defer time.AfterFunc(killTime, func() { cancel(ErrGivenUp) }).Stop()
			<-ctx.Done()
		case <-ctx.Done():
		}
	}()
	for pause := firstLook; ; pause = min(2*pause, lastLook) {
		r, ended, err := e.look(ctx)
		if ctx.Err() == nil && errors.Is(err, os.ErrDeadlineExceeded) {
			continue // a guest that is busy, or paused: its programs have not ended for that
		}
		if ended || err != nil && ctx.Err() == nil {
			return r, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return Result{}, fmt.Errorf("wait for process %d of the guest: %w", e.pid, context.Cause(ctx))
		}
	}
}

// look asks whether the program has ended.
func (e *Exec) look(ctx context.Context) (r Result, ended bool, err error) {
	var st struct {
		Exited       bool   `json:"exited"`
		Code         *int32 `json:"exitcode"`
		Signal       *int32 `json:"signal"`
		Out          []byte `json:"out-data"`
		Err          []byte `json:"err-data"`
		OutTruncated bool   `json:"out-truncated"`
		ErrTruncated bool   `json:"err-truncated"`
	}
	if err := e.c.do(ctx, "guest-exec-status", map[string]int64{"pid": e.pid}, &st); err != nil || !st.Exited {
		return Result{}, false, err
	}
	r = Result{Code: lost, Stdout: st.Out, Stderr: st.Err, Truncated: st.OutTruncated || st.ErrTruncated}
	switch {
	case st.Code != nil && *st.Code >= 0 && *st.Code < lost: // Windows has others
		r.Code = int(*st.Code)
	case st.Signal != nil && *st.Signal > 0 && *st.Signal < maxSignal:
		r.Code, r.Signal = -1, int(*st.Signal)
	}
	return r, true, nil
}

// Kill sends a signal to the program, through another one that the guest must have: kill. After signal 9, which nothing
// ignores, Wait does not wait for long.
func (e *Exec) Kill(ctx context.Context, signal int) error {
	const sigkill = 9
	if signal == sigkill {
		e.kill.Do(func() { close(e.killed) })
	}
	k, err := e.c.Exec(ctx, Command{Args: []string{"kill", fmt.Sprintf("-%d", signal), fmt.Sprint(e.pid)}})
	if err != nil {
		return err
	}
	r, err := k.Wait(ctx)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("send signal %d to process %d of the guest: kill ended with %d: %s", signal, e.pid, r.Code, sentence(string(r.Stderr)))
	}
	return err
}
