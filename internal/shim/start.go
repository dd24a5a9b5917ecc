package shim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/virtlet/virtlet/internal/vm"
)

// The start protocol. Four callers speak four dialects:
//
//	containerd 1.6      nothing on standard input; an address as text
//	containerd 1.7      MAX_SHIM_VERSION=2; JSON
//	containerd 2.x      before 2.3 as 1.7; since then a protobuf on standard input, and one as the answer
//	CRI-O               MAX_SHIM_VERSION=2, no TTRPC_ADDRESS; JSON, of version 2 at most
//
// The answer's version is that of the task service that the manager then calls. The daemon serves both; whoever reads the
// protobuf knows version 3, and CRI-O refuses it.
const (
	jsonVersion     = 2
	protobufVersion = 3
)

// listenFD is the daemon's socket, the first descriptor beside the standard ones.
const listenFD = 3

// start makes the daemon of a pod, or finds it, and gives the answer to the manager.
func (c *call) start() ([]byte, error) {
	input, err := io.ReadAll(io.LimitReader(c.in, maxInput))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	b, err := readBundle(c.bundle)
	if err != nil {
		return nil, err
	}
	sandbox, itself, err := b.sandbox()
	if err != nil {
		return nil, err
	}
	socket := c.socket(sandbox)
	if itself {
		err = c.startDaemon(b, socket)
	} else if !answers(socket) {
		err = fmt.Errorf("the shim of pod %s has ended", b.pod())
	}
	if err != nil {
		return nil, err
	}
	address := "unix://" + socket
	// containerd before 2.0 finds the daemon again by this file.
	if err := os.WriteFile(filepath.Join(c.bundle, "address"), []byte(address), 0o600); err != nil {
		return nil, err
	}
	return c.answer(input, address)
}

// answer words the address in the caller's dialect.
func (c *call) answer(input []byte, address string) ([]byte, error) {
	var params bootstrap.BootstrapParams
	if len(input) > 0 && proto.Unmarshal(input, &params) == nil && params.InstanceID == c.id && params.Namespace == c.namespace {
		return proto.Marshal(&bootstrap.BootstrapResult{Version: protobufVersion, Address: address, Protocol: "ttrpc"})
	}
	if c.getenv("MAX_SHIM_VERSION") != "" {
		return json.Marshal(struct {
			Version  int    `json:"version"`
			Address  string `json:"address"`
			Protocol string `json:"protocol"`
		}{jsonVersion, address, "ttrpc"})
	}
	return []byte(address), nil
}

// socket gives where the daemon of a pod listens. A socket's path is at most 107 bytes (unix(7)).
func (c *call) socket(sandbox string) string {
	sum := sha256.Sum256([]byte(c.address + "/" + c.namespace + "/" + sandbox))
	return filepath.Join(c.Sockets, "virtlet-"+hex.EncodeToString(sum[:16]))
}

// answers asks a daemon something that none knows. To connect is not enough: one that has been killed can do so for its
// last moments.
func answers(socket string) bool {
	const limit = 2 * time.Second
	conn, err := net.DialTimeout("unix", socket, limit)
	if err != nil {
		return false
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, err = taskapi.NewTTRPCTaskClient(client).Connect(ctx, &taskapi.ConnectRequest{})
	return status.Code(err) == codes.NotFound
}

// startDaemon starts the daemon of a pod: a process in a session of its own, born in the pod's network namespace, where
// the kubelet looks for the pod's traffic, and moved to the pod's cgroup.
func (c *call) startDaemon(b *bundle, socket string) (err error) {
	ns, err := b.netns()
	if err != nil {
		return err
	}
	if answers(socket) {
		return fmt.Errorf("the shim of pod %s runs already", b.pod())
	}
	if err := os.MkdirAll(c.Sockets, 0o711); err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // of one that was killed
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen for the manager: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(socket))
		}
	}()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	args := []string{self, "-namespace", c.namespace, "-address", c.address, "-publish-binary", c.publish, "-id", c.id}
	if c.debug {
		args = append(args, "-debug")
	}
	var daemon *os.Process
	err = vm.InNetNS(ns, func() (err error) {
		daemon, err = os.StartProcess(self, args, &os.ProcAttr{
			Dir: c.bundle, Env: os.Environ(), Files: []*os.File{null, null, null, f}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("start the shim of pod %s: %w", b.pod(), err)
	}
	if err := c.cgroup(b.spec.Linux.CgroupsPath).join(daemon.Pid); err != nil {
		return errors.Join(fmt.Errorf("move the shim of pod %s to its cgroup: %w", b.pod(), err), daemon.Kill())
	}
	return daemon.Release()
}

// openLog makes a FIFO that the manager reads, or nothing where it has none, the place of this process's errors. It is
// never waited for.
func openLog(dir string) (io.Writer, error) {
	fd, err := unix.Open(filepath.Join(dir, "log"), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return io.Discard, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Dup3(fd, unix.Stderr, 0); err != nil {
		return nil, err
	}
	return logFIFO{}, nil
}

// logFIFO is standard error without Go's poller: what does not fit is lost.
type logFIFO struct{}

func (logFIFO) Write(b []byte) (int, error) {
	_, _ = unix.Write(unix.Stderr, b)
	return len(b), nil
}

// one makes one line of an error that has several, as managers show it.
func one(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
