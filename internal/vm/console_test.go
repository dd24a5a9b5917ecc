package vm

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// testConsole gives a console and the guest's end of it. Its directories' paths are longer than a socket's may be.
func testConsole(t *testing.T) (Store, *console, net.Conn) {
	t.Helper()
	s := testStore(t)
	s.Run += "/" + strings.Repeat("long", 30)
	l, err := s.create("web")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.release() })
	if err := writeJSON(s.run("web", "state.json"), State{Config: Config{Name: "web"}, Status: Running}, false); err != nil {
		t.Fatal(err)
	}
	ours, theirs, err := socketPair("console")
	if err != nil {
		t.Fatal(err)
	}
	guest, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	c, err := newConsole(s, "web", ours)
	if err != nil {
		t.Fatal(err)
	}
	return s, c, guest
}

func stays() bool { return false }

func TestEveryReaderSeesAll(t *testing.T) {
	s, c, guest := testConsole(t)
	var follower, log bytes.Buffer
	followed, logged := make(chan error, 1), make(chan error, 1)
	go func() { followed <- c.copyTo(&follower, true, stays) }()
	go func() { logged <- s.CopyLog(&log, "web", -1, true) }()
	client, err := s.Attach("web")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// What the client types reaches the guest; then it listens, and what the guest says next reaches the client.
	fmt.Fprint(client, "hello\n")
	typed := make([]byte, 6)
	if _, err := io.ReadFull(guest, typed); err != nil || string(typed) != "hello\n" {
		t.Fatalf("the guest got %q, %v", typed, err)
	}
	var want bytes.Buffer
	heard := make(chan []byte, 1)
	go func() { b, _ := io.ReadAll(client); heard <- b }()
	for i := range 5000 {
		fmt.Fprintf(io.MultiWriter(guest, &want), "line %d\n", i)
	}
	guest.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-followed; err != nil || !bytes.Equal(follower.Bytes(), want.Bytes()) {
		t.Errorf("the follower got %d of %d bytes, %v", follower.Len(), want.Len(), err)
	}
	if b := <-heard; !bytes.HasSuffix(want.Bytes(), b) || len(b) == 0 {
		t.Errorf("the client got %d of %d bytes", len(b), want.Len())
	}
	if err := writeJSON(s.run("web", "state.json"), State{Config: Config{Name: "web"}, Status: Stopped}, false); err != nil {
		t.Fatal(err)
	}
	os.Remove(s.data("web", lockFile)) // as when its supervisor ends
	if err := <-logged; err != nil || !bytes.Equal(log.Bytes(), want.Bytes()) {
		t.Errorf("logs -f got %d of %d bytes, %v", log.Len(), want.Len(), err)
	}
	var whole bytes.Buffer
	if err := s.CopyLog(&whole, "web", -1, false); err != nil || !bytes.Equal(whole.Bytes(), want.Bytes()) {
		t.Errorf("logs got %d of %d bytes, %v", whole.Len(), want.Len(), err)
	}
}

func TestAChattyGuestFillsNoDisk(t *testing.T) {
	s, c, guest := testConsole(t)
	counted, followed := &counter{}, make(chan error, 1)
	go func() { followed <- c.copyTo(counted, true, stays) }()
	block := bytes.Repeat([]byte("x"), 1<<20)
	const blocks = 40
	for range blocks {
		if _, err := guest.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	guest.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-followed; err != nil || counted.n == 0 || counted.n > blocks<<20 {
		t.Errorf("the follower got %d bytes, %v", counted.n, err)
	}
	for _, name := range []string{consoleLog, consoleLog + ".1"} {
		fi, err := os.Stat(s.data("web", name))
		if err != nil || fi.Size() > consoleLimit {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
}

// A reader that falls more than a log behind is told how much it has missed.
func TestASlowReaderIsTold(t *testing.T) {
	s, c, guest := testConsole(t)
	w := &gated{open: make(chan struct{}), began: make(chan struct{})}
	followed := make(chan error, 1)
	go func() { followed <- c.copyTo(w, true, stays) }()
	block := bytes.Repeat([]byte("x"), 1<<20)
	const total = 4 * consoleLimit
	for n := 0; n < total; n += len(block) {
		if _, err := guest.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	<-w.began
	guest.Close()
	c.mu.Lock()
	for !c.ended {
		c.grown.Wait()
	}
	c.mu.Unlock()
	close(w.open)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	got := bytes.Count(w.got.Bytes(), []byte("x"))
	var missed int
	_, said, _ := bytes.Cut(w.got.Bytes(), []byte("[virtlet: "))
	if _, err := fmt.Sscanf(string(said), "%d bytes left out", &missed); err != nil || missed == 0 {
		t.Errorf("it was not told: %v", err)
	}
	if got+missed != total {
		t.Errorf("got %d, missed %d of %d bytes", got, missed, total)
	}
	if fi, err := os.Stat(s.data("web", consoleLog)); err != nil || fi.Size() > consoleLimit {
		t.Errorf("log: %v, %v", fi, err)
	}
}

// gated is a writer whose first Write waits.
type gated struct {
	got         bytes.Buffer
	began, open chan struct{}
	once        sync.Once
}

func (g *gated) Write(b []byte) (int, error) {
	g.once.Do(func() { close(g.began); <-g.open })
	return g.got.Write(b)
}

// A log that cannot be begun loses what the guest says, grows no further, and goes on when it can.
func TestLogThatCannotTurn(t *testing.T) {
	s, c, guest := testConsole(t)
	obstacle := s.data("web", consoleLog+".next")
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	block := bytes.Repeat([]byte("x"), 1<<20)
	for range 2 * consoleLimit / len(block) {
		if _, err := guest.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	var fi os.FileInfo
	for fi == nil || fi.Size() == 0 {
		fi, _ = os.Stat(s.data("web", consoleLog))
	}
	if fi.Size() > consoleLimit {
		t.Errorf("the log has grown to %d bytes", fi.Size())
	}
	if err := os.RemoveAll(obstacle); err != nil {
		t.Fatal(err)
	}
	for range consoleLimit / len(block) {
		guest.Write(block)
	}
	fmt.Fprint(guest, "the end")
	guest.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	if err := s.CopyLog(&log, "web", -1, false); err != nil || !bytes.HasSuffix(log.Bytes(), []byte("the end")) {
		t.Errorf("the log ends otherwise (%d bytes), %v", log.Len(), err)
	}
}

// A client that leaves while the guest is silent costs nothing any more.
func TestClientsThatLeave(t *testing.T) {
	s, c, guest := testConsole(t)
	visit := func() {
		client, err := s.Attach("web")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(client, "x")
		io.ReadFull(guest, make([]byte, 1)) // it is being served
		client.Close()
	}
	visit()
	files, goroutines := count(t, "/proc/self/fd"), runtime.NumGoroutine()
	for range 50 {
		visit()
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		f, g := count(t, "/proc/self/fd"), runtime.NumGoroutine()
		if f <= files && g <= goroutines {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after 50 clients: %d descriptors and %d goroutines, before: %d and %d", f, g, files, goroutines)
		}
	}
	guest.Close()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) { c.n += int64(len(b)); return len(b), nil }

func TestASleepingClientHoldsNothingUp(t *testing.T) {
	s, c, guest := testConsole(t)
	client, err := s.Attach("web") // and never reads
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	fmt.Fprint(client, "x")
	io.ReadFull(guest, make([]byte, 1)) // it is being served
	block := bytes.Repeat([]byte("x"), 1<<20)
	for range 8 {
		if _, err := guest.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	guest.Close()
	done := make(chan error, 1)
	go func() { done <- c.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(lastWords + 10*time.Second):
		t.Fatal("Close waits for a client that sleeps")
	}
}

func TestLastLines(t *testing.T) {
	long := strings.Repeat("x", 100<<10)
	for _, c := range []struct {
		older, current string
		n              int
		want           string
	}{
		{"", "", 3, ""},
		{"", "a\nb\nc\n", 0, ""},
		{"", "a\nb\nc\n", 1, "c\n"},
		{"", "a\nb\nc", 2, "b\nc"},
		{"", "a\nb\nc\n", 3, "a\nb\nc\n"},
		{"", "a\nb\nc\n", 9, "a\nb\nc\n"},
		{"a\nb\n", "c\n", 2, "b\nc\n"},
		{"a\nb", "c\nd\n", 2, "bc\nd\n"},
		{"a\n", "", 1, "a\n"},
		{"a\n" + long, long + "\nz\n", 2, long + long + "\nz\n"},
		{"\n\n", "\n", 2, "\n\n"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "log")
		for name, text := range map[string]string{path: c.current, path + ".1": c.older} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		current, older, err := openLogs(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := lastLines(c.n, older, current); err != nil {
			t.Error(err)
		}
		var got bytes.Buffer
		for _, f := range []*os.File{older, current} {
			if f != nil {
				io.Copy(&got, f)
				f.Close()
			}
		}
		if got.String() != c.want {
			t.Errorf("%d lines of %.20q, %.20q: got %d bytes %.20q, want %d", c.n, c.older, c.current, got.Len(), got.String(), len(c.want))
		}
	}
}

func TestAttachToNothing(t *testing.T) {
	s := testStore(t)
	if _, err := s.Attach("web"); err == nil || !strings.Contains(err.Error(), "virtlet ps") {
		t.Errorf("attach to no VM: %v", err)
	}
}
