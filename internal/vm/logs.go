package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// CopyLog writes what the VM's console has said to w, or the last lines of it (a negative number stands for all), and
// with follow goes on until the VM ends.
func (s Store) CopyLog(w io.Writer, name string, lines int, follow bool) error {
	if _, err := s.Get(name); err != nil {
		return err
	}
	path := s.data(name, consoleLog)
	r, older, err := openLogs(path)
	defer func() { r.Close() }()
	defer older.Close()
	if err == nil && lines >= 0 {
		err = lastLines(lines, older, r)
	}
	if err != nil {
		return fmt.Errorf("read log of VM %s: %w", name, err)
	}
	if older != nil {
		if _, err := io.Copy(w, older); err != nil {
			return err
		}
	}
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

// openLogs opens the two parts of a log; one that is not there is nil. The caller closes both.
func openLogs(path string) (current, older *os.File, err error) {
	if current, err = openIfThere(path); err != nil {
		return nil, nil, err
	}
	if older, err = openIfThere(path + ".1"); err != nil {
		return current, nil, err
	}
	if current != nil && older != nil && sameFileAt(current, older.Name()) { // it has turned over meanwhile
		older.Close()
		older = nil
	}
	return current, older, nil
}

func openIfThere(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// lastLines sets the files, which follow each other, to where their last n lines begin. A nil file is empty.
func lastLines(n int, files ...*os.File) error {
	last := true // the newline that ends the last line separates it from nothing
	block := make([]byte, 64<<10)
	for _, f := range slices.Backward(files) {
		if f == nil {
			continue
		}
		at, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		for n > 0 && at > 0 {
			b := block[:min(at, int64(len(block)))]
			at -= int64(len(b))
			if _, err := f.ReadAt(b, at); err != nil {
				return err
			}
			for i := len(b) - 1; i >= 0 && n > 0; i-- {
				if b[i] == '\n' && !last {
					if n--; n == 0 {
						at += int64(i) + 1
					}
				}
				last = false
			}
		}
		if _, err := f.Seek(at, io.SeekStart); err != nil {
			return err
		}
	}
	return nil
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
