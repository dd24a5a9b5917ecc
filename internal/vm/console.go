package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The guest's serial console. QEMU's end is a socket to the supervisor, so that QEMU needs no path and no file of its
// own. What the guest says goes to a log, and everybody who listens reads the log at his own pace: the guest never waits
// for a slow reader. A reader that falls a whole log behind is told how much it has missed.
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
	grown   *sync.Cond // the log has more, the guest has ended, or a client has left
	file    *os.File
	base    int64 // bytes that the guest had said before this log
	size    int64 // of this log, in bytes
	ended   bool
	clients map[net.Conn]bool

	readers sync.WaitGroup
	pump    sync.WaitGroup
}

// newConsole takes the guest's end over (Close closes it) and listens for `virtlet console`.
func newConsole(s Store, name string, guest net.Conn) (*console, error) {
	c := &console{guest: guest, log: s.data(name, consoleLog), clients: map[net.Conn]bool{}}
	c.grown = sync.NewCond(&c.mu)
	if err := c.begin(); err != nil {
		return nil, err
	}
	var err error
	if c.accept, err = s.listen(name, consoleSocket); err != nil {
		c.file.Close()
		return nil, fmt.Errorf("listen for the console: %w", err)
	}
	c.pump.Go(c.listen)
	c.pump.Go(c.serve)
	return c, nil
}

// listen makes a socket of a VM, and dial connects to it.
func (s Store) listen(name, socket string) (l net.Listener, err error) {
	err = inDir(s.run(name), func(dir string) (err error) {
		path := filepath.Join(dir, socket)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // of the guest before this one
			return err
		}
		l, err = net.Listen("unix", path)
		return err
	})
	if err == nil {
		l.(*net.UnixListener).SetUnlinkOnClose(false) // the path it knows is gone; the directory's end is the socket's
	}
	return l, err
}

func (s Store) dial(name, socket string) (conn net.Conn, err error) {
	err = inDir(s.run(name), func(dir string) (err error) {
		conn, err = net.Dial("unix", filepath.Join(dir, socket))
		return err
	})
	return conn, err
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

// begin starts a log; the one before it stays as the older part. After an error the one before is written on.
func (c *console) begin() error {
	next := c.log + ".next"
	f, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err == nil && c.file != nil {
		err = os.Rename(c.log, c.log+".1")
	}
	if err == nil {
		err = os.Rename(next, c.log)
	}
	if err != nil {
		f.Close() // a nil file is no obstacle
		_ = os.Remove(next)
		return fmt.Errorf("begin a console log: %w", err)
	}
	c.file.Close()
	c.file, c.base, c.size = f, c.base+c.size, 0
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
			if c.size+int64(n) <= consoleLimit || c.begin() == nil {
				k, _ := c.file.Write(buf[:n])
				c.size += int64(k)
			}
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
		c.clients[conn] = true
		c.mu.Unlock()
		c.readers.Go(func() {
			_ = c.copyTo(conn, false, func() bool { return !c.clients[conn] }) // a client that left is no error
			conn.Close()
		})
		c.readers.Go(func() {
			_, _ = io.Copy(c.guest, conn) // ends when the client leaves, or with the copy above
			c.mu.Lock()
			delete(c.clients, conn)
			c.grown.Broadcast()
			c.mu.Unlock()
		})
	}
}

// copyTo writes the console to w until the guest has ended and w has all of it, or left says that nobody listens any
// more: from its beginning, or from now on.
func (c *console) copyTo(w io.Writer, all bool, left func() bool) error {
	c.mu.Lock()
	r, err := os.Open(c.log)
	base, pos := c.base, c.base
	if !all {
		pos += c.size
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() { r.Close() }()
	if _, err := r.Seek(pos-base, io.SeekStart); err != nil {
		return err
	}
	for {
		n, err := io.Copy(w, r)
		if err != nil {
			return err
		}
		pos += n
		c.mu.Lock()
		for c.base == base && pos >= c.base+c.size && !c.ended && !left() {
			c.grown.Wait()
		}
		turned, ended := c.base != base, c.ended || left()
		c.mu.Unlock()
		// What r had gained before that look is still to be read: a log that turned over, or a guest that ended, writes
		// no more to it.
		if n, err = io.Copy(w, r); err != nil {
			return err
		}
		pos += n
		switch {
		case turned:
			r.Close()
			c.mu.Lock()
			r, err = os.Open(c.log)
			base = c.base
			c.mu.Unlock()
			if err != nil {
				return err
			}
			if missed := base - pos; missed > 0 {
				if _, err := fmt.Fprintf(w, "\r\n[virtlet: %d bytes left out, this reader is too slow]\r\n", missed); err != nil {
					return err
				}
			}
			pos = base
		case ended:
			return nil
		}
	}
}

// Close waits until every reader has the guest's last words, and closes the console. QEMU has ended.
func (c *console) Close() error {
	c.accept.Close()
	soon := time.Now().Add(lastWords)
	_ = c.guest.SetDeadline(soon) // QEMU had the only copy of its end, unless a wrapper script has one
	c.pump.Wait()
	c.mu.Lock()
	for conn := range c.clients {
		_ = conn.SetWriteDeadline(soon)
	}
	c.mu.Unlock()
	c.readers.Wait()
	return errors.Join(c.guest.Close(), c.file.Close())
}

// Console writes the guest's serial console to w, from its beginning to its end, and returns then.
func (g *Guest) Console(w io.Writer) error {
	return g.console.copyTo(w, true, func() bool { return false })
}

// Type types on the guest's serial console what r gives, until r or the guest ends.
func (g *Guest) Type(r io.Reader) error {
	_, err := io.Copy(g.console.guest, r)
	return err
}

// Attach connects to the console of a running VM. The caller closes the connection.
func (s Store) Attach(name string) (net.Conn, error) {
	st, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	if st.Status != Running {
		return nil, fmt.Errorf("console of VM %q: %w: it is %s; `virtlet logs %[1]s` shows what it said", name, ErrStopped, st.Status)
	}
	conn, err := s.dial(name, consoleSocket)
	if err != nil {
		return nil, fmt.Errorf("console of VM %q: %w", name, err)
	}
	return conn, nil
}
