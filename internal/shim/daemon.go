package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// daemon serves one pod.
type daemon struct {
	Shim
	id, namespace string // of the pod's sandbox
	log           *slog.Logger
	events        *publisher

	// turn is held by whoever makes or takes away a part of the pod, which takes time. mu guards what is known of the
	// tasks, and is held for moments; whoever needs both takes turn first.
	turn  sync.Mutex
	pod   *vm.VM            // nil before Create of the sandbox and after its end
	group cgroup            // the daemon's own
	told  map[string]string // annotations as the networks know them
	// podOurs are this project's annotations in the sandbox's bundle.
	podOurs map[string]string

	mu    sync.Mutex
	tasks map[string]*task

	rest    *time.Timer // gives back the memory that making a part of the pod took
	ended   sync.Once
	closing sync.WaitGroup // what goes on when the pod's end has been told
	quit    chan struct{}  // closed by Shutdown
}

func newDaemon(s Shim, namespace, id, events string, log *slog.Logger) *daemon {
	return &daemon{
		Shim: s, id: id, namespace: namespace, log: log, events: newPublisher(events, namespace, log),
		tasks: map[string]*task{}, quit: make(chan struct{}), rest: time.AfterFunc(restAfter, vm.Rest),
	}
}

// restAfter is when a pod is at rest: what it took to make a part of it is not needed again for long, and given back then,
// not while somebody waits for an answer.
const restAfter = time.Second

// goodbye is how long the last answers may take.
const goodbye = 3 * time.Second

// serve is the daemon: it ends when the manager says so and the pod has no task left.
func (c *call) serve() error {
	// Systemd ends what it can find with a service; the pod's end is the manager's to say.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	debug.SetGCPercent(vm.GCPercent) // from the begin: what it ever has is the pod's overhead
	out, err := openLog(c.bundle)
	if err != nil {
		return err
	}
	f := os.NewFile(listenFD, "socket")
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("serve: no socket: %w (start makes one)", err)
	}
	f.Close()
	level := slog.LevelInfo
	if c.debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level})).With("pod", c.id)
	d := newDaemon(c.Shim, c.namespace, c.id, c.getenv("TTRPC_ADDRESS"), log)
	err = d.run(l)
	if err == nil || errors.Is(err, ttrpc.ErrServerClosed) {
		if err = os.Remove(c.socket(c.id)); errors.Is(err, os.ErrNotExist) { // `delete` was faster
			err = nil
		}
	}
	if err != nil {
		log.Error(one(err))
	}
	return errors.Join(err, d.group.leave(), d.group.remove())
}

// run serves on a socket until the pod is gone.
func (d *daemon) run(l net.Listener) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	register(server, d)
	defer d.rest.Stop()
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	select {
	case err = <-served:
	case <-d.quit:
		ctx, cancel := context.WithTimeout(context.Background(), goodbye)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			_ = server.Close()
		}
		<-served
	}
	err = errors.Join(err, d.events.Close())
	d.closing.Wait()
	return err
}

// register gives the calls under the names of both versions of the task service: their messages are the same. Those of
// version 2 are used, as the package of version 3 brings all of gRPC, in every pod's memory.
func register(server *ttrpc.Server, d *daemon) {
	methods := map[string]ttrpc.Method{
		"State": method(d.State), "Create": method(d.Create), "Start": method(d.Start), "Delete": method(d.Delete),
		"Pids": method(d.Pids), "Pause": method(d.Pause), "Resume": method(d.Resume), "Checkpoint": method(d.Checkpoint),
		"Kill": method(d.Kill), "Exec": method(d.Exec), "ResizePty": method(d.ResizePty), "CloseIO": method(d.CloseIO),
		"Update": method(d.Update), "Wait": method(d.Wait), "Stats": method(d.Stats), "Connect": method(d.Connect),
		"Shutdown": method(d.Shutdown),
	}
	for _, name := range []string{"containerd.task.v2.Task", "containerd.task.v3.Task"} {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
}

var _ taskapi.TTRPCTaskService = (*daemon)(nil)

// method makes a call of ttrpc of one with types.
func method[Q, A any](do func(context.Context, *Q) (*A, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		q := new(Q)
		if err := unmarshal(q); err != nil {
			return nil, err
		}
		return do(ctx, q)
	}
}
