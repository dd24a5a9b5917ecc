// Package agent runs programs inside a guest through the QEMU guest agent (qemu-ga), if the guest has one.
//
// [New] takes the host's end of the agent's virtio-serial port; [Client.Exec] starts a program, [Exec.Wait] waits for its
// end, [Exec.Kill] sends it a signal. The methods may be called by several goroutines; the agent does one thing at a time.
// The client owns the connection, and [Client.Close] ends it and whoever waits on it.
//
// The protocol is QMP's way round, without its greeting: a line of JSON each way (QEMU, qga/qapi-schema.json). Whoever
// answers is a program of the guest: sizes and times are bounded, and nothing it says is more than text, two outputs and a
// number. Nothing is read while nobody has asked, so that a guest that talks without end fills its own buffers.
package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrRefused says that the agent answered that it does not do that, or could not.
var ErrRefused = errors.New("the guest agent refuses")

// ErrClosed says that the guest has ended.
var ErrClosed = errors.New("the guest has ended")

// Bounds of what is exchanged with a guest.
const (
	// MaxInput and MaxOutput are how many bytes a program may be given, and how many both its outputs may have. Agents keep at
	// most 16 MiB of each (GUEST_EXEC_MAX_OUTPUT), and send them in one line.
	MaxInput  = 1 << 20
	MaxOutput = 6 << 20

	maxLine = MaxOutput/3*4 + 64<<10 // in base64, with what is around it
	// maxStale is how much of older answers is skipped to find that to a new question: an agent may have sent the longest
	// answer that there is, 16 MiB of each output in base64, when the client had stopped listening.
	maxStale = 64 << 20

	maxError = 1 << 10 // of an agent's words

	// answerTime is how long one answer may take. Agents answer at once; guests without KVM are slow, and busy.
	answerTime = 20 * time.Second
)

// delimiter comes before the answer to guest-sync-delimited, and is in no JSON: what was before it belongs to the past.
const delimiter = 0xff

// Client is a connection to a guest's agent.
type Client struct {
	conn   net.Conn
	turn   chan struct{} // has one token: whoever has it may use what follows
	r      *bufio.Reader
	synced bool // the next line is the answer to the next question
}

// New makes a client of the host's end of the port. It sends nothing.
func New(conn net.Conn) *Client {
	c := &Client{conn: conn, turn: make(chan struct{}, 1), r: bufio.NewReader(conn)}
	c.turn <- struct{}{}
	return c
}

// Close ends the connection, and every call that waits for an answer.
func (c *Client) Close() error { return c.conn.Close() }

// request is what agents read.
type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
}

// answer is what they say: one of the two.
type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// do sends one command and reads its answer into out.
func (c *Client) do(ctx context.Context, command string, args, out any) error {
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("guest agent: %s: %w", command, ctx.Err())
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	_ = c.conn.SetDeadline(time.Time{})
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetDeadline(time.Unix(1, 0)) // ends what reads or writes now
		close(ended)
	})
	defer func() {
		if !stop() {
			<-ended // not in somebody else's turn
		}
	}()
	line, err := c.exchange(request{command, args})
	if err != nil {
		c.synced = false
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("wait for the answer, for %v at most: %w", answerTime, err)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
			errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
			err = ErrClosed
		}
		return fmt.Errorf("guest agent: %s: %w", command, err)
	}
	var a answer
	err = json.Unmarshal(line, &a)
	switch {
	case err != nil:
	case a.Error != nil:
		return fmt.Errorf("%w %s: %s", ErrRefused, command, sentence(a.Error.Desc))
	case a.Return == nil:
		err = errors.New("an answer without a result")
	default:
		err = json.Unmarshal(a.Return, out)
	}
	if err != nil {
		c.synced = false
		return fmt.Errorf("guest agent: read the answer to %s: %w", command, err)
	}
	return nil
}

// exchange sends a request and gives the line that answers it. Whoever calls has the turn, and has set a deadline.
func (c *Client) exchange(q request) ([]byte, error) {
	if !c.synced {
		if err := c.sync(); err != nil {
			return nil, err
		}
	}
	if err := c.send(nil, q); err != nil {
		return nil, err
	}
	return c.line()
}

// sync leaves behind whatever was said to others, or to us before: an agent may have been started anew, or have answered
// when nobody waited any more.
func (c *Client) sync() error {
	id := rand.Uint32()
	// The delimiter makes the agent forget half a line; it answers that with an error, which is skipped.
	if err := c.send([]byte{delimiter}, request{"guest-sync-delimited", map[string]uint32{"id": id}}); err != nil {
		return err
	}
	for skipped := 0; ; {
		chunk, err := c.r.ReadSlice(delimiter)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		if skipped += len(chunk); skipped > maxStale {
			return fmt.Errorf("more than %d bytes that nobody has asked for", maxStale)
		}
		if err != nil {
			continue
		}
		line, err := c.line()
		if err != nil {
			return err
		}
		skipped += len(line)
		var a struct {
			Return *uint64 `json:"return"`
		}
		if json.Unmarshal(line, &a) == nil && a.Return != nil && *a.Return == uint64(id) {
			c.synced = true
			return nil
		}
	}
}

func (c *Client) send(before []byte, q request) error {
	b, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("marshal: %w", err)
	}
	_, err = c.conn.Write(append(append(before, b...), '\n'))
	return err
}

// line reads up to the end of a line.
func (c *Client) line() ([]byte, error) {
	var line []byte
	for {
		chunk, err := c.r.ReadSlice('\n')
		if len(line)+len(chunk) > maxLine {
			return nil, fmt.Errorf("it says more than %d bytes at once: a program's output may have %d MiB", maxLine, MaxOutput>>20)
		}
		line = append(line, chunk...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		default:
			return bytes.TrimSpace(line), nil
		}
	}
}

// sentence makes a guest's words fit for an error: short, and on one line.
func sentence(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxError {
		s = strings.ToValidUTF8(s[:maxError], "") + "..."
	}
	return s
}
