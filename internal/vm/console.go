package vm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The guest's serial console. QEMU's end is a socket to the supervisor, so that QEMU needs no path and no file of its
// own. What the guest says goes to a log, and everybody who listens reads the log at his own pace: the guest never waits
// for a slow reader, and no reader misses a byte.
const (
	consoleLog    = "console.log"
	consoleSocket = "console.sock"
	// consoleLimit is the size of the log, in bytes, at which it becomes the older part and a new one begins: a guest
	// must not fill the host's disk.
	consoleLimit = 16 << 20
	// lastWords is how long a client that does not read can delay the end.
	lastWords = 2 * time.Second
)

type console struct {
	guest  net.Conn
	log    string // path
	accept net.Listener

	mu      sync.Mutex
	grown   *sync.Cond // the log has more, or the guest has ended
	file    *os.File
	size    int64
	started int // how many logs were begun
	ended   bool
	clients []net.Conn // all there ever were: a console is attached to by hand

	readers sync.WaitGroup
	pump    sync.WaitGroup
}

// newConsole takes the guest's end over (Close closes it) and listens for `virtlet console`.
func newConsole(s Store, name string, guest net.Conn) (*console, error) {
	c := &console{guest: guest, log: s.data(name, consoleLog)}
	c.grown = sync.NewCond(&c.mu)
	if err := c.begin(); err != nil {
		return nil, err
	}
	err := inDir(s.run(name), func(dir string) (err error) {
		c.accept, err = net.Listen("unix", filepath.Join(dir, consoleSocket))
		return err
	})
	if err != nil {
		c.file.Close()
		return nil, fmt.Errorf("listen for the console: %w", err)
	}
	c.accept.(*net.UnixListener).SetUnlinkOnClose(false) // the path it knows is gone; the directory's end is the socket's
	c.pump.Go(c.listen)
	c.pump.Go(c.serve)
	return c, nil
}

// inDir calls do with a short path of dir: a socket's path is at most 107 bytes (unix(7)), wherever dir is.
func inDir(dir string, do func(short string) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return do(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// begin starts a log; the one before it stays as the older part.
func (c *console) begin() error {
	if c.file != nil {
		c.file.Close()
		if err := os.Rename(c.log, c.log+".1"); err != nil {
			return fmt.Errorf("turn over the console log: %w", err)
		}
	}
	f, err := os.OpenFile(c.log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("begin the console log: %w", err)
	}
	c.file, c.size = f, 0
	c.started++
	return nil
}

// listen copies the guest's output to the log until the guest ends. A log that cannot be written (disk full) loses
// output; the guest runs on.
func (c *console) listen() {
	buf := make([]byte, 16<<10)
	for {
		n, err := c.guest.Read(buf)
		c.mu.Lock()
		if n > 0 {
			if c.size+int64(n) > consoleLimit {
				_ = c.begin()
			}
			k, _ := c.file.Write(buf[:n])
			c.size += int64(k)
		}
		c.ended = err != nil
		c.grown.Broadcast()
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// serve gives every client of the socket what the guest says from now on, and the guest what the client types.
func (c *console) serve() {
	for {
		conn, err := c.accept.Accept()
		if err != nil {
			return
		}
		c.mu.Lock()
		c.clients = append(c.clients, conn)
		c.mu.Unlock()
		c.readers.Go(func() {
			_ = c.copyTo(conn, false) // a client that left is no error
			conn.Close()
		})
		go func() { // ends with the client, or with the copy above
			_, _ = io.Copy(c.guest, conn)
			conn.Close()
		}()
	}
}

// copyTo writes the console to w until the guest has ended and w has all of it: from its beginning, or from now on.
func (c *console) copyTo(w io.Writer, all bool) error {
	c.mu.Lock()
	r, err := os.Open(c.log)
	which, offset := c.started, c.size
	c.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() { r.Close() }()
	if !all {
		if _, err := r.Seek(offset, io.SeekStart); err != nil {
			return err
		}
	}
	for {
		n, err := io.Copy(w, r)
		if err != nil {
			return err
		}
		offset += n
		c.mu.Lock()
		for c.started == which && offset >= c.size && !c.ended {
			c.grown.Wait()
		}
		turned, ended := c.started != which, c.ended
		c.mu.Unlock()
		// What r had gained before that look is still to be read: a log that turned over, or a guest that ended, writes
		// no more to it.
		if n, err = io.Copy(w, r); err != nil {
			return err
		}
		offset += n
		switch {
		case turned:
			r.Close()
			c.mu.Lock()
			r, err = os.Open(c.log)
			which, offset = c.started, 0
			c.mu.Unlock()
			if err != nil {
				return err
			}
		case ended:
			return nil
		}
	}
}

// Close waits until every reader has the guest's last words, and closes the console. QEMU has ended.
func (c *console) Close() error {
	c.accept.Close()
	c.pump.Wait() // the guest's end is closed: QEMU had the only copy
	for _, conn := range c.clients {
		_ = conn.SetWriteDeadline(time.Now().Add(lastWords)) // fails on those that have left
	}
	c.readers.Wait()
	return errors.Join(c.guest.Close(), c.file.Close())
}

// Console writes the guest's serial console to w, from its beginning to its end, and returns then.
func (v *VM) Console(w io.Writer) error { return v.console.copyTo(w, true) }

// Attach connects to the console of a running VM. The caller closes the connection.
func (s Store) Attach(name string) (net.Conn, error) {
	st, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	if st.Status != Running {
		return nil, fmt.Errorf("console of VM %q: %w: it is %s; `virtlet logs %[1]s` shows what it said", name, ErrStopped, st.Status)
	}
	var conn net.Conn
	err = inDir(s.run(name), func(dir string) (err error) {
		conn, err = net.Dial("unix", filepath.Join(dir, consoleSocket))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("console of VM %q: %w", name, err)
	}
	return conn, nil
}
