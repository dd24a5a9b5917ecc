package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// CopyLog writes what the VM's console has said to w, and with follow goes on until the VM ends.
func (s Store) CopyLog(w io.Writer, name string, follow bool) error {
	if _, err := s.Get(name); err != nil {
		return err
	}
	path := s.data(name, consoleLog)
	if err := copyFile(w, path+".1"); err != nil {
		return err
	}
	r, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && !follow {
		return nil // its guest has not run yet
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read log of VM %s: %w", name, err)
	}
	defer func() { r.Close() }()
	const pause = 100 * time.Millisecond
	for ; ; time.Sleep(pause) {
		alive := s.alive(name) // asked first: what is written before the end is read after it
		if r != nil {
			if _, err := io.Copy(w, r); err != nil {
				return err
			}
		}
		if !follow || !alive {
			return nil
		}
		// A log that turned over goes on in a new file.
		if r != nil && sameFileAt(r, path) {
			continue
		}
		if next, err := os.Open(path); err == nil {
			if r != nil {
				if _, err := io.Copy(w, r); err != nil { // what came between the copy and the turn
					next.Close()
					return err
				}
				r.Close()
			}
			r = next
		}
	}
}

func copyFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// RedirectLog sends the standard output and error of this process, a supervisor that nobody listens to any more, to the
// VM's supervisor.log.
func (s Store) RedirectLog(name string) error {
	f, err := os.OpenFile(s.data(name, "supervisor.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		// Whoever started us must not wait for us to let go of his.
		null, nerr := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if nerr != nil {
			return errors.Join(err, nerr)
		}
		f = null
	}
	defer f.Close()
	for _, fd := range []int{unix.Stdout, unix.Stderr} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("redirect to the supervisor's log: %w", err)
		}
	}
	return os.Chdir("/") // and hold no directory of whoever started it
}
