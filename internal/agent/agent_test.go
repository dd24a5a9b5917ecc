package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guest is an agent, or whatever pretends to be one: it has the other end of a client's connection.
type guest struct {
	net.Conn
	lines *bufio.Scanner
}

// newGuest gives a client of a guest that does what script says; the client is closed with the test.
func newGuest(t *testing.T, script func(g *guest)) *Client {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	theirs := ends[1]
	c := New(ends[0])
	var running sync.WaitGroup
	running.Go(func() {
		defer theirs.Close()
		g := &guest{theirs, bufio.NewScanner(theirs)}
		g.lines.Buffer(nil, 64<<20)
		script(g)
	})
	t.Cleanup(func() { c.Close(); running.Wait() })
	return c
}

// asked gives the next question: its command, and what it has of the arguments.
func (g *guest) asked() (command string, args struct {
	ID    uint32
	PID   int
	Path  string
	Arg   []string
	Env   []string
	Input []byte `json:"input-data"`
},
) {
	var q struct {
		Execute   string
		Arguments json.RawMessage
	}
	if g.lines.Scan() {
		_ = json.Unmarshal(bytes.TrimLeft(g.lines.Bytes(), "\xff"), &q)
		_ = json.Unmarshal(q.Arguments, &args)
	}
	return q.Execute, args
}

func (g *guest) says(format string, a ...any) { fmt.Fprintf(g, format+"\r\n", a...) }

// synced answers a question that the client asks first.
func (g *guest) synced() {
	if command, args := g.asked(); command == "guest-sync-delimited" {
		g.says("\xff{\"return\": %d}", args.ID)
	}
}

func TestExec(t *testing.T) {
	c := newGuest(t, func(g *guest) {
		g.says(`{"return": {"pid": 9}}`) // of a question long ago
		g.Write([]byte("\xff half an ans"))
		_, args := g.asked()
		g.says(`{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}`)
		g.says("\xff{\"return\": %d}", args.ID+1) // somebody else's
		g.says("\xff{\"return\": %d}", args.ID)
		command, args := g.asked()
		if command != "guest-exec" || args.Path != "cat" || fmt.Sprint(args.Arg, args.Env) != "[-A b] [X=1]" || string(args.Input) != "in\x00put" {
			t.Errorf("asked for %s %+v", command, args)
		}
		g.says(`{"return": {"pid": 17}}`)
		for i := range 3 {
			if command, args := g.asked(); command != "guest-exec-status" || args.PID != 17 {
				t.Errorf("asked for %s %+v", command, args)
			}
			if i < 2 {
				g.says(`{"return": {"exited": false}}`)
			}
		}
		g.says(`{"return": {"exited": true, "exitcode": 3, "out-data": "aGkK", "err-data": "", "err-truncated": true}}`)
	})
	e, err := c.Exec(t.Context(), Command{Args: []string{"cat", "-A", "b"}, Env: []string{"X=1"}, Input: []byte("in\x00put")})
	if err != nil {
		t.Fatal(err)
	}
	r, err := e.Wait(t.Context())
	if err != nil || r.Code != 3 || r.Signal != 0 || string(r.Stdout) != "hi\n" || len(r.Stderr) != 0 || !r.Truncated {
		t.Errorf("got %+v, %v", r, err)
	}
}

// Ends that no program of Linux has are not taken for success, nor for others.
func TestEnds(t *testing.T) {
	for said, want := range map[string]Result{
		`"exitcode": 0`: {Code: 0}, `"exitcode": 254`: {Code: 254}, `"exitcode": 256`: {Code: 255}, `"exitcode": -1073741819`: {Code: 255},
		`"signal": 15`: {Code: -1, Signal: 15}, `"signal": 0`: {Code: 255}, `"signal": 4096`: {Code: 255}, `"out-truncated": false`: {Code: 255},
	} {
		c := newGuest(t, func(g *guest) {
			g.synced()
			g.asked()
			g.says(`{"return": {"pid": 17}}`)
			g.asked()
			g.says(`{"return": {"exited": true, %s}}`, said)
		})
		e, err := c.Exec(t.Context(), Command{Args: []string{"true"}})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := e.Wait(t.Context()); err != nil || r.Code != want.Code || r.Signal != want.Signal {
			t.Errorf("%s: %+v, %v", said, r, err)
		}
	}
}

// What a guest may say instead of what it should.
func TestHostileGuests(t *testing.T) {
	tests := []struct {
		name   string
		script func(g *guest)
		want   string
		is     error
	}{
		{"refuses", func(g *guest) {
			g.says(`{"error": {"class": "CommandNotFound", "desc": "guest-exec has been\ndisabled \u001b[31m%s"}}`, strings.Repeat("x", 5000))
		}, "guest-exec has been disabled  [31mxxx", ErrRefused},
		{"says nothing that is JSON", func(g *guest) { g.says("hello") }, "read the answer", nil},
		{"says another type", func(g *guest) { g.says(`{"return": {"pid": "one"}}`) }, "read the answer", nil},
		{"says nothing", func(g *guest) { g.says(`{}`) }, "without a result", nil},
		{"has a process of its own making", func(g *guest) { g.says(`{"return": {"pid": -1}}`) }, "process -1", nil},
		{"says too much", func(g *guest) {
			for range maxLine/1024 + 1 {
				if _, err := g.Write(bytes.Repeat([]byte("x"), 1024)); err != nil {
					return
				}
			}
		}, "at once", nil},
		{"goes away", func(g *guest) {}, "ended", ErrClosed},
		{"goes away in the middle", func(g *guest) { g.Write([]byte(`{"return"`)) }, "ended", ErrClosed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newGuest(t, func(g *guest) { g.synced(); g.asked(); tt.script(g) })
			_, err := c.Exec(t.Context(), Command{Args: []string{"true"}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && (len(err.Error()) > 2*maxError || strings.ContainsAny(err.Error(), "\n\x1b")) {
				t.Errorf("the guest's words are in the error as they came: %q", err)
			}
		})
	}
}

// A guest that never stops talking gets as far as maxStale.
func TestFlood(t *testing.T) {
	var sent int
	c := newGuest(t, func(g *guest) {
		g.asked()
		for chunk := append(bytes.Repeat([]byte("x"), 64<<10), "\xff{}\n"...); ; sent += len(chunk) {
			if _, err := g.Write(chunk); err != nil {
				return
			}
		}
	})
	_, err := c.Exec(t.Context(), Command{Args: []string{"true"}})
	if err == nil || !strings.Contains(err.Error(), "nobody has asked for") {
		t.Errorf("after %d bytes: %v", sent, err)
	}
}

// A caller that gives up does not spoil the answers of the next one.
func TestLateAnswer(t *testing.T) {
	give := make(chan struct{})
	c := newGuest(t, func(g *guest) {
		g.synced()
		g.asked()
		<-give
		g.says(`{"return": {"pid": 1}}`) // which nobody waits for any more
		g.synced()
		g.asked()
		g.says(`{"return": {"pid": 2}}`)
	})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := c.Exec(ctx, Command{Args: []string{"first"}}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("given up: %v", err)
	}
	close(give)
	e, err := c.Exec(t.Context(), Command{Args: []string{"second"}})
	if err != nil || e.pid != 2 {
		t.Errorf("the next: %+v, %v", e, err)
	}
}

// A program that is killed, and does not end or cannot be asked about, is given up.
func TestKill(t *testing.T) {
	c := newGuest(t, func(g *guest) {
		g.synced()
		for {
			switch command, args := g.asked(); {
			case command == "":
				return
			case command == "guest-exec" && args.Path == "kill":
				if fmt.Sprint(args.Arg) != "[-9 5]" {
					t.Errorf("kill %q", args.Arg)
				}
				g.says(`{"return": {"pid": 6}}`)
			case command == "guest-exec":
				g.says(`{"return": {"pid": 5}}`)
			case args.PID == 6:
				g.says(`{"return": {"exited": true, "exitcode": 1, "err-data": "bm8="}}`)
			default:
				g.says(`{"return": {"exited": false}}`)
			}
		}
	})
	e, err := c.Exec(t.Context(), Command{Args: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Kill(t.Context(), 9); err == nil || !strings.Contains(err.Error(), "kill ended with 1: no") {
		t.Errorf("kill: %v", err)
	}
	if _, err := e.Wait(t.Context()); !errors.Is(err, ErrGivenUp) {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsNotSent(t *testing.T) {
	c := newGuest(t, func(g *guest) {
		if command, _ := g.asked(); command != "" {
			t.Errorf("sent %s", command)
		}
	})
	if _, err := c.Exec(t.Context(), Command{}); err == nil {
		t.Error("no program")
	}
	if _, err := c.Exec(t.Context(), Command{Args: []string{"cat"}, Input: make([]byte, MaxInput+1)}); err == nil {
		t.Error("too much input")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	<-c.turn
	if _, err := c.Exec(ctx, Command{Args: []string{"cat"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("waited for a turn: %v", err)
	}
	c.turn <- struct{}{}
}

// FuzzAnswers: whatever a guest says, the client comes back, with bounded words.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte("\xff{\"return\": 1}\n{\"return\": {\"pid\": 1}}\n"))
	f.Add([]byte("{\"error\": {\"class\": \"x\", \"desc\": \"y\"}}\n\xff"))
	f.Fuzz(func(t *testing.T, said []byte) {
		c := newGuest(t, func(g *guest) {
			go io.Copy(io.Discard, g)
			_, _ = g.Write(said)
		})
		c.synced = len(said)%2 == 0
		if _, err := c.Exec(t.Context(), Command{Args: []string{"true"}}); err != nil && len(err.Error()) > 2*maxError {
			t.Errorf("%d bytes of error", len(err.Error()))
		}
	})
}
