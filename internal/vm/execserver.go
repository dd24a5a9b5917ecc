package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Other processes run programs in a guest through its supervisor, which has the agent's port: a request and an answer in
// JSON on a connection, whose end before the answer is the program's.
const (
	execSocket = "exec.sock"
	// maxExecRequest bounds a request, in bytes: the input in base64, and the arguments, as Linux bounds those (ARG_MAX, 2 MiB).
	maxExecRequest = MaxInput/3*4 + 4<<20
	execSendTime   = 30 * time.Second // to write a request or an answer, and to read a request
)

// execAnswer is the end of a program, or why there was none.
type execAnswer struct {
	ExecResult
	Error   string `json:"error,omitempty"`
	NoAgent bool   `json:"noAgent,omitempty"`
}

// execServer serves the requests for one guest.
type execServer struct {
	guest  *Guest
	accept net.Listener
	ctx    context.Context
	cancel context.CancelFunc
	all    sync.WaitGroup
}

func newExecServer(s Store, name string, g *Guest) (*execServer, error) {
	l, err := s.listen(name, execSocket)
	if err != nil {
		return nil, fmt.Errorf("listen for programs to run in the guest: %w", err)
	}
	e := &execServer{guest: g, accept: l}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			e.all.Go(func() { e.serve(conn) })
		}
	})
	return e, nil
}

// Close ends all that is served. The agent's connection is closed before, so nobody waits for the guest.
func (e *execServer) Close() error {
	err := e.accept.Close()
	e.cancel()
	e.all.Wait()
	return err
}

func (e *execServer) serve(conn net.Conn) {
	defer conn.Close()
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	_ = conn.SetReadDeadline(time.Now().Add(execSendTime))
	var c Command
	if json.NewDecoder(io.LimitReader(conn, maxExecRequest)).Decode(&c) != nil {
		return // somebody who speaks something else
	}
	_ = conn.SetReadDeadline(time.Time{})
	var left sync.WaitGroup
	left.Go(func() {
		_, _ = io.Copy(io.Discard, conn) // until the client leaves
		cancel()
	})
	var a execAnswer
	var err error
	if a.ExecResult, err = e.run(ctx, c); err != nil {
		a.Error, a.NoAgent = err.Error(), errors.Is(err, ErrNoAgent)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(execSendTime))
	_ = json.NewEncoder(conn).Encode(a)
	conn.Close()
	left.Wait()
}

// run runs a program; with the end of ctx it is killed.
func (e *execServer) run(ctx context.Context, c Command) (ExecResult, error) {
	x, err := e.guest.Exec(ctx, c)
	if err != nil {
		return ExecResult{}, err
	}
	killed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		_ = x.Kill(context.WithoutCancel(ctx), int(unix.SIGKILL))
	})
	defer func() {
		if !stop() {
			<-killed
		}
	}()
	return x.Wait(context.WithoutCancel(ctx))
}

// Exec runs a program in a running VM by its guest agent, and waits for its end; with the end of ctx the program is killed.
// [ErrStopped] when the VM does not run, [ErrNoAgent] when nothing in it listens.
func (s Store) Exec(ctx context.Context, name string, c Command) (ExecResult, error) {
	st, err := s.Get(name)
	if err != nil {
		return ExecResult{}, err
	}
	if st.Status != Running {
		return ExecResult{}, fmt.Errorf("run a program in VM %q: %w: it is %s", name, ErrStopped, st.Status)
	}
	conn, err := s.dial(name, execSocket)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) { // it ends at this moment
		err = errors.Join(err, ErrStopped)
	}
	var a execAnswer
	if err == nil {
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
		if err = json.NewEncoder(conn).Encode(c); err == nil {
			err = json.NewDecoder(conn).Decode(&a)
		}
		if errors.Is(err, io.EOF) {
			err = ErrStopped
		}
	}
	switch {
	case err != nil:
	case a.NoAgent:
		err = ErrNoAgent
	case a.Error != "":
		err = errors.New(a.Error)
	}
	if err != nil {
		return ExecResult{}, fmt.Errorf("VM %q: %w", name, err)
	}
	return a.ExecResult, nil
}
