package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

const hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n"

// fake plays QEMU's end of a monitor.
type fake struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// request is a command as it came.
type request struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
}

// plays runs what QEMU does beside the test, which waits for its end.
func (f *fake) plays(role func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		role()
	}()
	f.t.Cleanup(func() {
		f.Close() // a role that still reads or writes ends
		<-ended
	})
}

func (f *fake) says(s string) {
	if _, err := f.Write([]byte(s)); err != nil {
		f.t.Logf("fake: %v", err)
	}
}

func (f *fake) event(name string) {
	f.says(fmt.Sprintf(`{"event": %q, "timestamp": {"seconds": 1700000000, "microseconds": 500000}}`+"\r\n", name))
}

func (f *fake) request() (r request) {
	line, err := f.r.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		f.t.Logf("fake: read a command: %v: %q", err, line) // the test sees what comes of it
	}
	return r
}

func (f *fake) answers(r request, body string) {
	f.says(fmt.Sprintf(`{%s, "id": %d}`+"\r\n", body, r.ID))
}

// newFake gives the two ends of a monitor's connection.
func newFake(t testing.TB) (net.Conn, *fake) {
	t.Helper()
	ours, file := socketPair(t, "qmp")
	theirs, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	t.Cleanup(func() { theirs.Close() })
	return ours, &fake{t, theirs, bufio.NewReader(theirs)}
}

// connected gives a monitor past its greeting, and the fake QEMU behind it.
func connected(t testing.TB) (*Monitor, *fake) {
	t.Helper()
	conn, f := newFake(t)
	return greet(t, conn, f), f
}

func greet(t testing.TB, conn net.Conn, f *fake) *Monitor {
	t.Helper()
	f.plays(func() {
		f.says(hello)
		f.answers(f.request(), `"return": {}`)
	})
	m, err := NewMonitor(within(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func TestGreeting(t *testing.T) {
	long := strings.Repeat(" ", maxMessage)
	for _, tt := range []struct {
		name, says string
		closed     bool   // by QEMU afterwards
		answer     string // to the first command
		want       string
	}{
		{"ends at once", "", true, "", "closed by QEMU"},
		{"ends in the middle", hello[:40], true, "", "closed by QEMU"},
		{"another protocol", "220 ready\r\n", false, "", "invalid character"},
		{"an event first", `{"event": "RESET"}` + "\n", false, "", "not QEMU's greeting"},
		{"an answer first", `{"return": {}, "id": 1}` + "\n", false, "", "not QEMU's greeting"},
		{"null", "null\n", false, "", "not QEMU's greeting"},
		{"wrong types", `{"QMP": {"version": {"qemu": {"major": "x"}}}}` + "\n", false, "", "cannot unmarshal"},
		{"a huge line", `{"QMP":` + long + hello[7:], false, "", "more than 1048576 bytes"},
		{"a line without end", long + long, false, "", "more than 1048576 bytes"},
		{"ends after its greeting", hello, true, "", "closed by QEMU"},
		{"refused capabilities", hello, false, `"error": {"class": "CommandNotFound", "desc": "no"}`, "no (CommandNotFound)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, f := newFake(t)
			f.plays(func() {
				f.says(tt.says)
				if tt.closed {
					f.Close()
				}
				if tt.answer != "" {
					f.answers(f.request(), tt.answer)
				}
			})
			m, err := NewMonitor(within(t), conn)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("monitor %v, error %v; want %q in it", m, err, tt.want)
			}
			if _, err := conn.Write(nil); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is left open: %v", err)
			}
		})
	}
}

func TestNoGreeting(t *testing.T) {
	conn, _ := newFake(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := NewMonitor(ctx, conn); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a QEMU that says nothing: %v", err)
	}
}

func TestDo(t *testing.T) {
	m, f := connected(t)
	if m.Version() != "7.2.22" {
		t.Errorf("version %q", m.Version())
	}
	f.plays(func() {
		f.event("NIC_RX_FILTER_CHANGED")
		r := f.request()
		f.event("RTC_CHANGE") // events between command and answer
		f.says("\r\n{\"return\": 1, \"id\": 999}\r\n")
		if r.Execute != "query-x" || string(r.Arguments) != `{"a":"b"}` {
			t.Errorf("the command came as %+v", r)
		}
		f.answers(r, `"return": {"n": 7}`)
		r = f.request()
		if r.Arguments != nil {
			t.Errorf("arguments of none: %s", r.Arguments)
		}
		f.answers(r, `"error": {"class": "GenericError", "desc": "it is busy"}`)
		f.answers(f.request(), `"return": "text"`)
	})
	ctx := within(t)
	var out struct{ N int }
	if err := m.Do(ctx, "query-x", map[string]string{"a": "b"}, &out); err != nil || out.N != 7 {
		t.Errorf("%+v, %v", out, err)
	}
	var refused *Error
	err := m.Do(ctx, "device_del", nil, nil)
	if !errors.As(err, &refused) || *refused != (Error{"device_del", "GenericError", "it is busy"}) {
		t.Errorf("a refusal: %v", err)
	}
	if err := m.Do(ctx, "query-x", nil, &out); err == nil || !strings.Contains(err.Error(), "read the answer") {
		t.Errorf("an answer of another type: %v", err)
	}
	if err := m.Do(ctx, "query-x", func() {}, nil); err == nil || !strings.Contains(err.Error(), "marshal") {
		t.Errorf("arguments that are no JSON: %v", err)
	}
	for _, want := range []string{"NIC_RX_FILTER_CHANGED", "RTC_CHANGE"} {
		if e := <-m.Events(); e.Name != want || !e.Time.Equal(time.Unix(1700000000, 5e8)) {
			t.Errorf("event %+v, want %s", e, want)
		}
	}
}

func TestConcurrentCommandsGetTheirOwnAnswers(t *testing.T) {
	m, f := connected(t)
	const n = 50
	f.plays(func() {
		var all []request
		for range n {
			all = append(all, f.request())
		}
		for i := range all { // the last first
			r := all[n-1-i]
			f.answers(r, `"return": `+string(r.Arguments))
		}
	})
	ctx := within(t)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			in, out := map[string]int{"i": i}, map[string]int{}
			if err := m.Do(ctx, "echo", in, &out); err != nil || out["i"] != i {
				t.Errorf("command %d got %v, %v", i, out, err)
			}
		})
	}
	wg.Wait()
}

func TestAnswerTooLate(t *testing.T) {
	m, f := connected(t)
	ctx, cancel := context.WithCancel(context.Background())
	slow := make(chan request)
	f.plays(func() {
		slow <- f.request()
		cancel()
	})
	f.plays(func() {
		late := <-slow
		r := f.request()
		f.answers(late, `"return": {"status": "late"}`)
		f.answers(r, `"return": {"status": "running"}`)
	})
	if err := m.Stop(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled command: %v", err)
	}
	if s, err := m.Status(within(t)); s != "running" || err != nil {
		t.Errorf("the next command got %q, %v", s, err)
	}
	if err := m.Stop(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a command cancelled before it was sent: %v", err)
	}
}

// TestBrokenMonitor has the fake answer a command wrongly: the command fails, and so does every later one, at once.
func TestBrokenMonitor(t *testing.T) {
	for _, tt := range []struct {
		name, says, want string
	}{
		{"ends", "", "closed by QEMU"},
		{"ends in the middle", `{"return": {`, "closed by QEMU"},
		{"garbage", "\x00\xff\x01\n", "read QMP"},
		{"huge", `{"return": "` + strings.Repeat("a", maxMessage) + `"}` + "\n", "more than 1048576 bytes"},
		{"deep", strings.Repeat("[", maxMessage/2) + "\n", "read QMP"},
		{"neither", `{"x": 1}` + "\n", "neither answer nor event"},
		{"no id", `{"return": {}}` + "\n", "neither answer nor event"},
		{"id alone", `{"id": 2}` + "\n", "neither answer nor event"},
		{"id of another type", `{"return": {}, "id": "2"}` + "\n", "read QMP"},
		{"not understood", `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n", "JSON parse error"},
		{"greeting again", hello, "neither answer nor event"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, f := connected(t)
			f.plays(func() {
				f.request()
				f.event("SHUTDOWN")
				f.says(tt.says)
				if strings.Contains(tt.name, "ends") {
					f.Close()
				}
			})
			ctx := within(t)
			for range 2 {
				err := m.Cont(ctx)
				if !errors.Is(err, ErrMonitorClosed) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want ErrMonitorClosed with %q", err, tt.want)
				}
			}
			if e, ok := <-m.Events(); e.Name != "SHUTDOWN" {
				t.Errorf("the event before the end: %+v, %t", e, ok)
			}
			if e, ok := <-m.Events(); ok {
				t.Errorf("an event after the end: %+v", e)
			}
		})
	}
}

func TestLongAnswer(t *testing.T) {
	m, f := connected(t)
	long := strings.Repeat("a", maxMessage-100)
	f.plays(func() { f.answers(f.request(), `"return": "`+long+`"`) })
	var got string
	if err := m.Do(within(t), "query-qmp-schema", nil, &got); err != nil || got != long {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestQuitWithoutAnswer(t *testing.T) {
	m, f := connected(t)
	f.plays(func() { f.request(); f.Close() })
	if err := m.Quit(within(t)); err != nil {
		t.Errorf("QEMU ended before it answered: %v", err)
	}
	if err := m.Quit(within(t)); err != nil {
		t.Errorf("QEMU had ended: %v", err)
	}
}

func TestQuitRefused(t *testing.T) {
	m, f := connected(t)
	f.plays(func() { f.answers(f.request(), `"error": {"class": "GenericError", "desc": "no"}`) })
	if err := m.Quit(within(t)); err == nil {
		t.Error("a refused quit is no error")
	}
}

// TestStuckQEMU sends to a QEMU that does not read: the command must end with its context.
func TestStuckQEMU(t *testing.T) {
	ours, theirs := net.Pipe() // without a buffer
	m := greet(t, ours, &fake{t, theirs, bufio.NewReader(theirs)})
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := m.Stop(ctx); !errors.Is(err, ErrMonitorClosed) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("half a command was sent, and then: %v", err)
	}
}

// TestLastEventsOfAnEndedQEMU has a command fail because QEMU has gone: what it said before must still be read.
func TestLastEventsOfAnEndedQEMU(t *testing.T) {
	for range 50 {
		m, f := connected(t)
		f.event("SHUTDOWN")
		f.Close()
		if err := m.Powerdown(within(t)); !errors.Is(err, ErrMonitorClosed) {
			t.Errorf("a command to nobody: %v", err)
		}
		if e := <-m.Events(); e.Name != "SHUTDOWN" {
			t.Fatalf("the last event was lost; there was %+v", e)
		}
	}
}

// TestSlowReader has a guest cause more events than are kept, with nobody reading.
func TestSlowReader(t *testing.T) {
	m, f := connected(t)
	const noise = 3 * maxQueued
	f.plays(func() {
		f.event("GUEST_PANICKED")
		for range noise {
			f.event("RTC_CHANGE")
		}
		for range noise {
			f.event("RESET")
		}
		f.event("SHUTDOWN")
		f.answers(f.request(), `"return": {"status": "running"}`)
		f.Close()
	})
	if _, err := m.Status(within(t)); err != nil {
		t.Errorf("a command waits for a reader of events: %v", err)
	}
	if m.Dropped() == 0 {
		t.Error("no event was dropped")
	}
	var total int
	count, last := map[string]int{}, ""
	for e := range m.Events() {
		count[e.Name]++
		total++
		last = e.Name
	}
	if count["GUEST_PANICKED"] != 1 || count["RESET"] == 0 || count["SHUTDOWN"] != 1 || last != "SHUTDOWN" {
		t.Errorf("kept %v, last %s", count, last)
	}
	if total > maxQueued+4 { // one is in the hand of the pump
		t.Errorf("%d events were queued", total)
	}
	if got := uint64(total) + m.Dropped(); got != 2*noise+2 {
		t.Errorf("%d delivered and %d dropped of %d", total, m.Dropped(), 2*noise+2)
	}
}

func TestEventsWithoutTimeOrData(t *testing.T) {
	m, f := connected(t)
	f.says(`{"event": "A", "timestamp": {"seconds": -1, "microseconds": -1}}` + "\n" + `{"event": "B", "data": {"x": 1}}` + "\n")
	if e := <-m.Events(); !e.Time.IsZero() || e.Data != nil {
		t.Errorf("%+v", e)
	}
	if e := <-m.Events(); string(e.Data) != `{"x": 1}` {
		t.Errorf("%+v", e)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	m, f := connected(t)
	f.event("RESET") // nobody reads it
	waits := make(chan error, 1)
	go func() { waits <- m.Cont(context.Background()) }()
	f.request()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { m.Close() })
	}
	wg.Wait()
	if err := <-waits; !errors.Is(err, ErrMonitorClosed) {
		t.Errorf("a command that waited: %v", err)
	}
	for range m.Events() { // ends, as the channel is closed
	}
	if err := m.Cont(within(t)); !errors.Is(err, ErrMonitorClosed) {
		t.Errorf("a command after Close: %v", err)
	}
}
