// Package shim is the front end of Kubernetes: a runtime of containerd and CRI-O (their "shim v2"), one process for each
// pod, over package vm.
//
// [Run] is the whole program. The container manager runs it as `start`, which leaves a daemon behind and prints where
// that listens, and as `delete`, which cleans up after one container, or after a dead daemon. The daemon serves the
// manager's task calls until the pod is gone: the pod's sandbox is the VM's network ([vm.Prepare]), its one workload
// container is the guest ([vm.VM.Boot]), as often as it is created again.
//
// Nothing else imports containerd. What the manager, the pod's annotations and the image say is not trusted.
package shim

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/virtlet/virtlet/internal/vm"
)

// RuntimeName is what a container manager calls this runtime; it makes the program's name of it.
const RuntimeName = "io.containerd.virtlet.v2"

// Shim is where things are. The zero value of a field is a real machine's.
type Shim struct {
	Version string
	Store   vm.Store
	CNI     string // libcni's directory
	Sockets string // where daemons listen
	Cgroups string // where cgroup file systems are mounted
}

// Default is a shim of a real machine.
func Default(version string) Shim {
	return Shim{
		Version: version, Store: vm.Store{Run: "/run/virtlet", Data: "/var/lib/virtlet"}, CNI: "/var/lib/cni",
		Sockets: "/run/containerd/s", Cgroups: "/sys/fs/cgroup",
	}
}

// call is one run of the program.
type call struct {
	Shim
	id, namespace, bundle string
	address, publish      string
	info, version, debug  bool
	action                string

	getenv func(string) string
	in     io.Reader
}

// maxInput bounds what is read of a manager's standard input and of a bundle's files, in bytes.
const maxInput = 4 << 20

// Run is the program: args are those after its name. What it prints is the manager's to read.
func (s Shim) Run(args []string, in io.Reader, out io.Writer) error {
	c, err := s.parse(args, os.Getenv)
	if err != nil {
		return err
	}
	c.in = in
	var answer []byte
	switch {
	case c.version:
		_, err := fmt.Fprintf(out, "containerd-shim-virtlet-v2:\n  Version:  %s\n", s.Version)
		return err
	case c.info:
		answer, err = proto.Marshal(&types.RuntimeInfo{Name: RuntimeName, Version: &types.RuntimeVersion{Version: s.Version}})
	case c.action == "start":
		answer, err = c.start()
	case c.action == "delete":
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		answer, err = c.delete(ctx)
	case c.action == "":
		return c.serve()
	default:
		err = fmt.Errorf("%q is nothing that this program does: it is run by containerd and CRI-O (start, delete)", c.action)
	}
	if err != nil {
		return err
	}
	_, err = out.Write(answer)
	return err
}

// parse reads the command line, whose form is containerd's.
func (s Shim) parse(args []string, getenv func(string) string) (*call, error) {
	c := &call{Shim: s, getenv: getenv}
	f := flag.NewFlagSet("containerd-shim-virtlet-v2", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.id, "id", "", "")
	f.StringVar(&c.namespace, "namespace", "", "")
	f.StringVar(&c.bundle, "bundle", "", "")
	f.StringVar(&c.address, "address", "", "")
	f.StringVar(&c.publish, "publish-binary", "", "")
	f.String("socket", "", "") // of callers before 1.4, and never used
	f.BoolVar(&c.debug, "debug", false, "")
	f.BoolVar(&c.info, "info", false, "")
	f.BoolVar(&c.version, "v", false, "")
	if err := f.Parse(args); err != nil {
		return nil, fmt.Errorf("read arguments: %w", err)
	}
	c.action = f.Arg(0)
	if c.info || c.version {
		return c, nil
	}
	if c.id == "" || c.namespace == "" {
		return nil, errors.New("-id and -namespace are missing: this program is run by containerd and CRI-O, not by hand")
	}
	if c.bundle == "" {
		var err error
		if c.bundle, err = os.Getwd(); err != nil { // start and delete run in the bundle
			return nil, err
		}
	}
	return c, nil
}
