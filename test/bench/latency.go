package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// latency is the time of one question and its answer, one byte each.
type latency struct{ p50, p99 time.Duration }

// guestConn is the guest's end of a TCP connection to the host, no more than what an orderly one needs: nothing is lost or
// comes out of turn in a rig.
type guestConn struct {
	tap       int
	port      uint16
	peer      uint16
	seq, seen uint32
	frame     []byte // the question
	buf       []byte
}

// nextPort is the guest's for the next connection.
var nextPort uint16 = 20000

// roundTrips is TCP_RR: a connection of the guest's to a real socket of the host, a byte there and a byte back, for a time;
// one round trip at the least.
func (r *rig) roundTrips(d time.Duration) (latency, error) {
	var l *net.TCPListener
	err := r.host.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addrPort(hostAddr, 0)))
		return err
	})
	if err != nil {
		return latency{}, fmt.Errorf("listen on the host: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- echo(l) }()
	var times []time.Duration
	asked := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		pin(0)
		times, err = r.ask(uint16(l.Addr().(*net.TCPAddr).Port), d)
		asked <- err
	}()
	err = <-asked
	l.Close()
	if err2 := <-served; err == nil && err2 != nil {
		err = fmt.Errorf("the host's answers: %w", err2)
	}
	if err != nil {
		return latency{}, err
	}
	slices.Sort(times)
	return latency{times[len(times)/2], times[len(times)*99/100]}, nil
}

// echo answers one connection byte by byte, on a thread of its own that sleeps in the kernel.
func echo(l *net.TCPListener) error {
	runtime.LockOSThread()
	pin(1)
	c, err := l.Accept()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.(*net.TCPConn).SetNoDelay(true); err != nil {
		return err
	}
	f, err := c.(*net.TCPConn).File() // a copy that blocks once it is asked for its number
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	for b := make([]byte, 1); ; {
		n, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case n == 0 && err == nil, errors.Is(err, unix.ECONNRESET):
			return nil
		case err != nil:
			return err
		}
		if _, err := unix.Write(fd, b); err != nil {
			return err
		}
	}
}

func (r *rig) ask(port uint16, d time.Duration) (times []time.Duration, err error) {
	tap, err := descriptor(r.taps[0])
	if err != nil {
		return nil, err
	}
	for _, other := range r.taps[1:] { // which a multi-queue TAP would answer by
		if err := queue(other, unix.IFF_DETACH_QUEUE); err != nil {
			return nil, err
		}
	}
	defer func() {
		for _, other := range r.taps[1:] {
			err = errors.Join(err, queue(other, unix.IFF_ATTACH_QUEUE))
		}
	}()
	if err := empty(tap); err != nil {
		return nil, err
	}
	nextPort++
	c := &guestConn{tap: tap, port: nextPort, peer: port, seq: 1, buf: make([]byte, 1<<16+vnetHdrLen)}
	if err := c.connect(); err != nil {
		return nil, fmt.Errorf("connect from the guest: %w", err)
	}
	for end := time.Now().Add(d); len(times) == 0 || time.Now().Before(end); {
		begin := time.Now()
		if err := c.roundTrip(); err != nil {
			return nil, fmt.Errorf("ask from the guest: %w", err)
		}
		times = append(times, time.Since(begin))
	}
	return times, writeTo(tap, out.tcp(c.port, c.peer, c.seq, c.seen, rst|ack, 0))
}

func (c *guestConn) connect() error {
	for range 3 { // the first may meet a link that is just coming up
		if err := writeTo(c.tap, out.tcp(c.port, c.peer, c.seq, 0, syn, 0)); err != nil {
			return err
		}
		t, err := c.receive(func(flags byte, _ int) bool { return flags&syn != 0 })
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return err
		}
		c.seq++
		c.seen = binary.BigEndian.Uint32(t[4:]) + 1
		return writeTo(c.tap, out.tcp(c.port, c.peer, c.seq, c.seen, ack, 0))
	}
	return fmt.Errorf("no answer: %w", os.ErrDeadlineExceeded)
}

// roundTrip sends a byte and waits for one. What it carries is always the same, but for two numbers.
func (c *guestConn) roundTrip() error {
	if c.frame == nil {
		c.frame = out.tcp(c.port, c.peer, 0, 0, psh|ack, 1)
	}
	t := c.frame[vnetHdrLen+etherLen+ipLen:]
	binary.BigEndian.PutUint32(t[4:], c.seq)
	binary.BigEndian.PutUint32(t[8:], c.seen)
	if _, err := unix.Write(c.tap, c.frame); err != nil {
		return err
	}
	c.seq++
	if _, err := c.receive(func(_ byte, payload int) bool { return payload > 0 }); err != nil {
		return err
	}
	c.seen++
	return nil
}

// receive gives the TCP header of the next segment of the connection that is wanted.
func (c *guestConn) receive(wanted func(flags byte, payload int) bool) ([]byte, error) {
	const patience = 1000 // ms
	for {
		n, err := unix.Read(c.tap, c.buf)
		if errors.Is(err, unix.EAGAIN) {
			ready, err := unix.Poll([]unix.PollFd{{Fd: int32(c.tap), Events: unix.POLLIN}}, patience)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return nil, err
			}
			if ready == 0 && err == nil {
				return nil, os.ErrDeadlineExceeded
			}
			continue
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		b := c.buf[:n]
		if len(b) < vnetHdrLen+headLen || b[vnetHdrLen+etherLen+9] != unix.IPPROTO_TCP {
			continue
		}
		ip := b[vnetHdrLen+etherLen:]
		t := ip[ipLen:]
		payload := int(binary.BigEndian.Uint16(ip[2:])) - ipLen - int(t[12]>>4)*4
		if binary.BigEndian.Uint16(t[2:]) != c.port {
			continue
		}
		if t[13]&(rst|fin) != 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if wanted(t[13], payload) {
			return t, nil
		}
	}
}

// empty reads what an earlier window has left in a queue.
func empty(tap int) error {
	for b := make([]byte, 1<<16+vnetHdrLen); ; {
		_, err := unix.Read(tap, b)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// queue switches a queue on or off.
func queue(tap *os.File, how uint16) error {
	fd, err := descriptor(tap)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	req.SetUint16(how)
	return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, req)
}
