package qemu

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
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrMonitorClosed says that the monitor's connection has ended, by QEMU's end or by Close.
var ErrMonitorClosed = errors.New("the monitor's connection is closed")

// Error is QEMU's refusal of a command.
type Error struct {
	Command string
	Class   string // QapiErrorClass: GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound, KVMMissingCap
	Desc    string // for people
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("QMP command %s: QEMU refused: %s (%s)", e.Command, e.Desc, e.Class)
}

const (
	// maxMessage bounds one line of QEMU's. The longest known is the answer to query-qmp-schema: 207 kB in QEMU 7.2,
	// 236 kB in 10.0.
	maxMessage = 1 << 20
	// writeTimeout bounds the sending of one command: QEMU's main loop reads it unless it is stuck.
	writeTimeout = 10 * time.Second
)

// Monitor is a connection to QEMU's monitor, which speaks QMP: one JSON object on each line, commands with an id one
// way, answers with the same id and events the other way (docs/interop/qmp-spec). Its methods may be called by several
// goroutines. Close ends it; that QEMU ends too is not implied.
type Monitor struct {
	conn    net.Conn
	version string
	events  *eventQueue
	readers sync.WaitGroup
	closed  chan struct{} // by Close
	ended   chan struct{} // closed with err set when nothing more is read

	sending sync.Mutex // one command's bytes after the other's

	mu      sync.Mutex
	pending map[uint64]chan<- message
	lastID  uint64
	err     error
}

// message is any line of QEMU's.
type message struct {
	Greeting *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`

	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`

	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"` // both -1: QEMU could not read its clock
	} `json:"timestamp"`
}

// NewMonitor waits for QEMU's greeting and opens the monitor for commands. QEMU greets once all devices are made, so
// when NewMonitor returns the guest runs. It owns conn from the call on, and closes it on an error; ctx bounds the
// wait alone.
func NewMonitor(ctx context.Context, conn net.Conn) (*Monitor, error) {
	m := &Monitor{
		conn: conn, events: newEventQueue(), pending: map[uint64]chan<- message{},
		closed: make(chan struct{}), ended: make(chan struct{}),
	}
	greeting := make(chan message, 1)
	m.readers.Go(func() { m.read(greeting) })
	m.readers.Go(func() { m.events.pump(m.closed) })
	if err := m.negotiate(ctx, greeting); err != nil {
		m.Close()
		return nil, fmt.Errorf("open QEMU's monitor: %w", err)
	}
	return m, nil
}

func (m *Monitor) negotiate(ctx context.Context, greeting <-chan message) error {
	select {
	case g := <-greeting:
		v := g.Greeting.Version.QEMU
		m.version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	case <-m.ended:
		return fmt.Errorf("wait for QEMU's greeting: %w", m.cause())
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU's greeting: %w", ctx.Err())
	}
	return m.Do(ctx, "qmp_capabilities", nil, nil)
}

// Do sends one command and waits for its answer. args is marshalled to a JSON object, nil for none; the answer is
// unmarshalled to out, unless that is nil. An *[Error] is QEMU's refusal, [ErrMonitorClosed] the end of the
// connection. After the end of ctx QEMU may still carry the command out.
func (m *Monitor) Do(ctx context.Context, command string, args, out any) error {
	answer := make(chan message, 1)
	id, err := m.expect(answer)
	if err == nil {
		defer m.forget(id)
		err = m.send(ctx, command, args, id)
	}
	if err != nil {
		return fmt.Errorf("QMP command %s: %w", command, err)
	}
	var reply message
	select {
	case reply = <-answer:
	case <-ctx.Done():
		return fmt.Errorf("QMP command %s: wait for the answer: %w", command, ctx.Err())
	case <-m.ended:
		select {
		case reply = <-answer: // it came with the last bytes
		default:
			return fmt.Errorf("QMP command %s: wait for the answer: %w", command, m.cause())
		}
	}
	if reply.Error != nil {
		return &Error{Command: command, Class: reply.Error.Class, Desc: reply.Error.Desc}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Return, out); err != nil {
		return fmt.Errorf("QMP command %s: read the answer: %w", command, err)
	}
	return nil
}

// Powerdown presses the guest's power button. It returns at once; whether the guest obeys, its SHUTDOWN event tells.
func (m *Monitor) Powerdown(ctx context.Context) error {
	return m.Do(ctx, "system_powerdown", nil, nil)
}

// Quit ends QEMU without asking the guest; disks are flushed. That QEMU ends before it answers is no error.
func (m *Monitor) Quit(ctx context.Context) error {
	if err := m.Do(ctx, "quit", nil, nil); err != nil && !errors.Is(err, ErrMonitorClosed) {
		return err
	}
	return nil
}

// Stop halts the guest's CPUs until Cont.
func (m *Monitor) Stop(ctx context.Context) error { return m.Do(ctx, "stop", nil, nil) }

// Cont lets the guest's CPUs run.
func (m *Monitor) Cont(ctx context.Context) error { return m.Do(ctx, "cont", nil, nil) }

// Status gives QEMU's RunState: running, paused, shutdown, guest-panicked, io-error ...
func (m *Monitor) Status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.Do(ctx, "query-status", nil, &s)
	return s.Status, err
}

// AgentOpen says whether a program in the guest has opened the port of [Machine.Agent].
func (m *Monitor) AgentOpen(ctx context.Context) (bool, error) {
	var all []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	err := m.Do(ctx, "query-chardev", nil, &all)
	for _, c := range all {
		if c.Label == idAgent && c.Open {
			return true, err
		}
	}
	return false, err
}

// SetMemory asks the guest, through its balloon, to make do with so many bytes. It returns at once; whether the guest has a
// driver for that, and when it obeys, is its own affair.
func (m *Monitor) SetMemory(ctx context.Context, bytes int64) error {
	return m.Do(ctx, "balloon", map[string]int64{"value": bytes}, nil)
}

// MemoryActual gives how many bytes of memory the guest has at the moment.
func (m *Monitor) MemoryActual(ctx context.Context) (int64, error) {
	var b struct {
		Actual int64 `json:"actual"`
	}
	err := m.Do(ctx, "query-balloon", nil, &b)
	return b.Actual, err
}

// Version gives QEMU's version as its greeting had it, such as "7.2.22".
func (m *Monitor) Version() string { return m.version }

// Events gives QEMU's events in their order. It is closed when the connection has ended and all events are delivered,
// or by Close. Somebody should read it, but no command waits for that: see [Monitor.Dropped].
func (m *Monitor) Events() <-chan Event { return m.events.out }

// Dropped says how many events were not delivered because nobody read. SHUTDOWN, GUEST_PANICKED and RESET are never
// dropped; at worst the same event many times becomes the last one of them.
func (m *Monitor) Dropped() uint64 { return m.events.droppedCount() }

// Close ends the connection and waits until everything that reads it has ended. It is safe to call again.
func (m *Monitor) Close() error {
	m.fail(ErrMonitorClosed)
	m.mu.Lock()
	select {
	case <-m.closed:
	default:
		close(m.closed)
	}
	m.mu.Unlock()
	m.readers.Wait()
	return nil
}

func (m *Monitor) expect(answer chan<- message) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, m.err
	}
	m.lastID++
	m.pending[m.lastID] = answer
	return m.lastID, nil
}

func (m *Monitor) forget(id uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, id)
}

func (m *Monitor) send(ctx context.Context, command string, args any, id uint64) error {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("marshal its arguments: %w", err)
	}
	m.sending.Lock()
	defer m.sending.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	limit := time.Now().Add(writeTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	err = m.conn.SetWriteDeadline(limit)
	if err == nil {
		_, err = m.conn.Write(append(b, '\n'))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return m.fail(fmt.Errorf("%w: send: %w", ErrMonitorClosed, err)) // half a command may be out: no more can follow
	}
	if errors.Is(err, net.ErrClosed) {
		return m.cause() // whoever closed it has said why
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		// The reader still finds QEMU's last events, then the end.
		return fmt.Errorf("%w by QEMU: send: %w", ErrMonitorClosed, err)
	}
	if err != nil {
		return fmt.Errorf("%w: send: %w", ErrMonitorClosed, err)
	}
	return nil
}

// fail ends the connection for the first cause given, and gives that.
func (m *Monitor) fail(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
		m.conn.Close()
	}
	return m.err
}

func (m *Monitor) cause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// read takes what QEMU sends until the connection ends.
func (m *Monitor) read(greeting chan<- message) {
	defer close(m.ended)
	defer m.events.end()
	r := bufio.NewReader(m.conn)
	for greeted := false; ; {
		line, err := readLine(r)
		// ECONNRESET: it ended with a command of ours unread (unix(7)).
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			m.fail(fmt.Errorf("%w by QEMU", ErrMonitorClosed))
			return
		}
		var msg message
		if err == nil {
			if err = json.Unmarshal(line, &msg); err == nil {
				err = m.take(msg, &greeted, greeting)
			}
		}
		if err != nil {
			m.fail(fmt.Errorf("%w: read QMP: %w", ErrMonitorClosed, err))
			return
		}
	}
}

// take hands one message to whoever waits for it.
func (m *Monitor) take(msg message, greeted *bool, greeting chan<- message) error {
	switch {
	case !*greeted:
		if msg.Greeting == nil {
			return errors.New("the first message is not QEMU's greeting")
		}
		*greeted = true
		greeting <- msg
	case msg.Event != "":
		e := Event{Name: msg.Event, Data: msg.Data}
		if t := msg.Timestamp; t.Seconds > 0 {
			e.Time = time.Unix(t.Seconds, t.Microseconds*int64(time.Microsecond))
		}
		m.events.put(e)
	case msg.ID == nil && msg.Error != nil:
		return fmt.Errorf("QEMU did not understand a command: %s", msg.Error.Desc)
	case msg.ID == nil || (msg.Return == nil && msg.Error == nil):
		return errors.New("a message that is neither answer nor event")
	default:
		m.mu.Lock()
		answer := m.pending[*msg.ID]
		delete(m.pending, *msg.ID)
		m.mu.Unlock()
		if answer != nil { // nil: whoever asked has given up
			answer <- msg // has room for one, and gets one
		}
	}
	return nil
}

// readLine gives the next line that is not empty, without its end. An unfinished last line is io.EOF.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxMessage {
			return nil, fmt.Errorf("a line of more than %d bytes", maxMessage)
		}
		line = append(line, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case err != nil:
			return nil, err
		case len(bytes.TrimSpace(line)) == 0: // QEMU ends lines with CR LF
			line = line[:0]
		default:
			return line, nil
		}
	}
}
