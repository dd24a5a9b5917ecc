package shim

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// stdio are the FIFOs of a container. They are opened for reading and writing: so opening waits for nobody, and they
// outlive a manager that restarts. They must be closed when the guest ends, as the manager waits for that.
type stdio struct {
	in, out, err *os.File // nil: none
}

// lastWords is how long a manager that does not read can delay the end of a container.
const lastWords = 2 * time.Second

func openStdio(in, out, err string) (s stdio, failed error) {
	for _, f := range []struct {
		path string
		file **os.File
	}{{in, &s.in}, {out, &s.out}, {err, &s.err}} {
		if f.path == "" {
			continue
		}
		if strings.Contains(f.path, "://") {
			return stdio{}, errors.Join(fmt.Errorf("open %s: only FIFOs are served", f.path), s.Close())
		}
		file, err := os.OpenFile(f.path, unix.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			return stdio{}, errors.Join(fmt.Errorf("open the container's standard streams: %w", err), s.Close())
		}
		*f.file = file
	}
	return s, nil
}

// Close closes all of them, as far as a copy of s has not.
func (s *stdio) Close() error {
	var errs []error
	for _, f := range []*os.File{s.in, s.out, s.err} {
		if f == nil {
			continue
		}
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	*s = stdio{}
	return errors.Join(errs...)
}

// connect joins the streams to a guest's console. The function that it gives waits until the guest's last words are
// through, and closes the streams; the guest has ended.
func (s stdio) connect(g *vm.Guest) (end func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if s.out != nil {
			_ = g.Console(s.out) // who does not read loses
		}
	}()
	typed := make(chan struct{})
	go func() {
		defer close(typed)
		if s.in != nil {
			_ = g.Type(s.in)
		}
	}()
	return func() {
		if s.out != nil {
			_ = s.out.SetWriteDeadline(time.Now().Add(lastWords))
		}
		<-done
		_ = s.Close() // ends the typing
		<-typed
	}
}
