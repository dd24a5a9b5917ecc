package vm

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
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
	if err := writeJSON(s.run("web", "state.json"), State{Config: Config{Name: "web"}, Status: Running}); err != nil {
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

func TestEveryReaderSeesAll(t *testing.T) {
	s, c, guest := testConsole(t)
	var follower, log bytes.Buffer
	followed, logged := make(chan error, 1), make(chan error, 1)
	go func() { followed <- c.copyTo(&follower, true) }()
	go func() { logged <- s.CopyLog(&log, "web", true) }()
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
	if err := writeJSON(s.run("web", "state.json"), State{Config: Config{Name: "web"}, Status: Stopped}); err != nil {
		t.Fatal(err)
	}
	os.Remove(s.run("web", "lock")) // as when its supervisor ends
	if err := <-logged; err != nil || !bytes.Equal(log.Bytes(), want.Bytes()) {
		t.Errorf("logs -f got %d of %d bytes, %v", log.Len(), want.Len(), err)
	}
	var whole bytes.Buffer
	if err := s.CopyLog(&whole, "web", false); err != nil || !bytes.Equal(whole.Bytes(), want.Bytes()) {
		t.Errorf("logs got %d of %d bytes, %v", whole.Len(), want.Len(), err)
	}
}

func TestAChattyGuestFillsNoDisk(t *testing.T) {
	s, c, guest := testConsole(t)
	counted, followed := &counter{}, make(chan error, 1)
	go func() { followed <- c.copyTo(counted, true) }()
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

func TestAttachToNothing(t *testing.T) {
	s := testStore(t)
	if _, err := s.Attach("web"); err == nil || !strings.Contains(err.Error(), "virtlet ps") {
		t.Errorf("attach to no VM: %v", err)
	}
}
