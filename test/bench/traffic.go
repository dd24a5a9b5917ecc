package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// flows is how many connections each sender stands for: enough for the kernel's hash to fill every queue.
const flows = 16

// warmUp is how long traffic runs before it is counted.
const warmUp = 10 * time.Millisecond

// errNothing says that no frame has arrived in a window.
var errNothing = errors.New("nothing arrives")

// rate is what was seen in one window.
type rate struct {
	packets float64 // per second
	bits    float64 // per second, of whole frames
	cpu     float64 // nanoseconds of this process for each packet, the kernel's work for it among them
}

// stream sends frames by as many threads as there are queues, for a time, and says what arrived. With outward, the guest
// sends by its TAP and the host's sink counts; otherwise the host sends and the guest counts what it reads.
func (r *rig) stream(outward bool, frame func(way, uint16) []byte, d time.Duration) (rate, error) {
	var stop atomic.Bool
	var workers sync.WaitGroup
	errs := make(chan error, 4*len(r.taps))
	start := func(cpu int, work func() error) {
		workers.Go(func() {
			runtime.LockOSThread() // and never unlocked: the thread, tied to a CPU, ends here
			pin(cpu)
			if err := work(); err != nil {
				errs <- err
			}
		})
	}
	read := r.sink.read
	if outward {
		for i, tap := range r.taps {
			fd, err := descriptor(tap)
			if err != nil {
				return rate{}, err
			}
			start(i, func() error { return send(&stop, burst(out, i, frame), func(b []byte) error { return writeTo(fd, b) }) })
		}
	} else {
		for _, tap := range r.taps { // of what went before
			fd, err := descriptor(tap)
			if err == nil {
				err = empty(fd)
			}
			if err != nil {
				return rate{}, err
			}
		}
		counts := make([]readCount, len(r.taps))
		for i, tap := range r.taps {
			start(i+1, func() error { return drain(&stop, tap, &counts[i]) })
			c, err := r.newInjector()
			if err != nil {
				stop.Store(true)
				return rate{}, errors.Join(err, wait(&workers, errs))
			}
			defer c.close()
			w := &window{seen: counts, most: inFlight / len(r.taps)}
			if len(frame(in, 0)) > mtu {
				w.most = longInFlight / len(r.taps)
			}
			start(i, func() error {
				return send(&stop, burst(in, i, frame), func(b []byte) error { w.wait(&stop); return c.send(b) })
			})
		}
		read = func() (t tally, err error) {
			for i := range counts {
				t.Packets += counts[i].packets.Load()
				t.Bytes += counts[i].bytes.Load()
			}
			return t, nil
		}
	}
	err := awaitFirst(read)
	time.Sleep(warmUp)
	before, err0 := read()
	cpu, begin := cpuTime(), time.Now()
	time.Sleep(d)
	took, used := time.Since(begin), cpuTime()-cpu
	after, err2 := read()
	stop.Store(true)
	if err := errors.Join(err, err0, err2, wait(&workers, errs)); err != nil {
		return rate{}, err
	}
	n := float64(after.Packets - before.Packets)
	if n == 0 {
		return rate{}, errNothing
	}
	return rate{
		packets: n / took.Seconds(), bits: 8 * float64(after.Bytes-before.Bytes) / took.Seconds(), cpu: float64(used.Nanoseconds()) / n,
	}, nil
}

// awaitFirst waits for a frame: on a busy machine threads do not run at once.
func awaitFirst(read func() (tally, error)) error {
	const patience = 5 * time.Second
	was, err := read()
	for end := time.Now().Add(patience); err == nil; time.Sleep(time.Millisecond) {
		var now tally
		if now, err = read(); now.Packets != was.Packets {
			return err
		}
		if time.Now().After(end) {
			return errNothing
		}
	}
	return err
}

func wait(workers *sync.WaitGroup, errs chan error) error {
	workers.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}

// burst gives the i-th sender's frames, one for each of its connections.
func burst(w way, i int, frame func(way, uint16) []byte) [][]byte {
	var all [][]byte
	for port := range flows {
		all = append(all, frame(w, uint16(1024+i*flows+port)))
	}
	return all
}

func send(stop *atomic.Bool, frames [][]byte, write func([]byte) error) error {
	for !stop.Load() {
		for _, f := range frames {
			if err := write(f); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		}
	}
	return nil
}

// writeTo writes one frame; one that finds no room is lost, as on a wire.
func writeTo(fd int, frame []byte) error {
	_, err := unix.Write(fd, frame)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

type readCount struct {
	packets, bytes atomic.Uint64
	_              [48]byte // to a cache line of its own
}

// drain reads a queue as QEMU does: what is there, and then it sleeps until there is more.
func drain(stop *atomic.Bool, tap *os.File, seen *readCount) error {
	fd, err := descriptor(tap)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<16+vnetHdrLen)
	for !stop.Load() {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			const look = 20 // ms, until the next look at stop
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, look); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("poll the TAP: %w", err)
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("read the TAP: %w", err)
		default:
			seen.packets.Add(1)
			seen.bytes.Add(uint64(n - vnetHdrLen))
		}
	}
	return nil
}

// How many frames may be on their way to the guest. A sender that knew no limit would be measured dropping them; TCP has one.
const (
	inFlight     = 256
	longInFlight = 16 // of [segment] bytes: less than the CPU's cache
)

// window holds back one sender of several, until the guest has read.
type window struct {
	seen []readCount
	most int
	sent uint64 // by this sender, and not given up for lost
}

// wait returns when there is room. What nobody has read for a while is lost.
func (w *window) wait(stop *atomic.Bool) {
	const nap, lost = 20 * time.Microsecond, 100 // naps
	for i := 0; !stop.Load(); i++ {
		var read uint64
		for j := range w.seen {
			read += w.seen[j].packets.Load()
		}
		read /= uint64(len(w.seen)) // its share
		if i > lost || w.sent < read {
			w.sent = read
		}
		if w.sent < read+uint64(w.most) {
			break
		}
		ts := unix.NsecToTimespec(int64(nap))
		_ = unix.Nanosleep(&ts, nil)
	}
	w.sent++
}

// injector sends frames out by the host's end.
type injector struct {
	fd int
	to unix.SockaddrLinklayer
}

func (r *rig) newInjector() (c *injector, err error) {
	err = r.host.Do(func() error {
		// Without a protocol it hears nothing (packet(7)).
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c = &injector{fd: fd, to: unix.SockaddrLinklayer{Ifindex: r.hostIndex, Halen: 6}}
		copy(c.to.Addr[:], guestMAC[:])
		return unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	})
	if err != nil {
		return nil, fmt.Errorf("open the host's end: %w", err)
	}
	return c, nil
}

func (c *injector) send(frame []byte) error {
	err := unix.Sendto(c.fd, frame, 0, &c.to)
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

func (c *injector) close() { unix.Close(c.fd) }

// pin ties the calling thread to a CPU, counted beyond their number from the first again.
func pin(cpu int) {
	var set unix.CPUSet
	set.Set(cpu % runtime.NumCPU())
	_ = unix.SchedSetaffinity(0, &set) // where it is not allowed, the figures vary more
}

// cpuTime gives what this process has used.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
