package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/qemu"
)

// noOffloads takes from virtio-net what lets segments and checksums cross unfinished.
var noOffloads = []string{
	"csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4", "host_tso6", "host_ecn", "host_ufo", "mrg_rxbuf",
}

// guestVM is a guest on one of the product's datapaths.
type guestVM struct {
	way      ownWay
	offloads bool
	*rig
	proc    *qemu.Process
	console net.Conn

	mu   sync.Mutex
	said bytes.Buffer
}

func (g *guestVM) name() string { return fmt.Sprintf("%s, offloads %t", g.way.name, g.offloads) }

// boot starts QEMU on the rig's TAP, with the command line of the product.
func (g *guestVM) boot(dir string) error {
	open := func(name string) (*os.File, error) {
		f, err := os.Open(filepath.Join(dir, name))
		if err == nil {
			g.defers(f.Close)
		}
		return f, err
	}
	m := qemu.Machine{
		Arch: "amd64", Name: "bench", Accel: qemu.TCG, CPUs: 1, Memory: 256,
		NICs: []qemu.Netdev{{ID: "net0", MAC: guestMAC.String(), MTU: mtu, Taps: g.taps, Slot: qemu.NICSlot(0)}},
	}
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return err
	}
	m.Append = strings.TrimSpace(string(line)) + " virtlet.no_dhcp"
	if m.Kernel, err = open("vmlinuz"); err != nil {
		return err
	}
	if m.Initrd, err = open("initrd"); err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours := os.NewFile(uintptr(fds[0]), "console")
	m.Console = os.NewFile(uintptr(fds[1]), "QEMU's console")
	g.console, err = net.FileConn(ours)
	ours.Close()
	defer m.Console.Close()
	if err != nil {
		return err
	}
	g.defers(g.console.Close)
	c, err := qemu.NewCommand(m)
	if err != nil {
		return err
	}
	if !g.offloads {
		for _, name := range noOffloads {
			c.Args = append(c.Args, "-global", "virtio-net-pci."+name+"=off")
		}
	}
	const nobody = 1879050000 // a user without a name, who owns nothing
	g.proc, err = qemu.Start(c, qemu.ProcOptions{UID: nobody, GID: nobody, Dir: "/"})
	if err != nil {
		return err
	}
	g.defers(func() error { err := g.proc.Kill(); g.proc.Wait(); return err })
	go g.listen()
	return nil
}

// listen keeps what the guest says, until its console is closed.
func (g *guestVM) listen() {
	for b := make([]byte, 4096); ; {
		n, err := g.console.Read(b)
		g.mu.Lock()
		g.said.Write(b[:n])
		g.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// prompt is what the guest's shell says when it waits for a command.
const prompt = "guest# "

// ready waits for the guest's shell and gives the guest its address.
func (g *guestVM) ready() error {
	if err := g.says(prompt, 1); err != nil {
		return err
	}
	return g.types(fmt.Sprintf("ip addr add %s dev eth0", guestAddr))
}

// types gives the shell a command.
func (g *guestVM) types(command string) error {
	_, err := g.console.Write([]byte(command + "\n"))
	return err
}

// says waits until the console has shown a text n times.
func (g *guestVM) says(text string, n int) error {
	for end := time.Now().Add(guestPatience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		g.mu.Lock()
		seen := strings.Count(g.said.String(), text)
		g.mu.Unlock()
		if seen >= n {
			return nil
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	tail := g.said.String()
	return fmt.Errorf("its console does not say %q within %s, but %q", text, guestPatience, tail[max(0, len(tail)-500):])
}

// idle waits until the guest has nothing to do.
func (g *guestVM) idle() error {
	const look, most = 500 * time.Millisecond, 0.05
	for end := time.Now().Add(guestPatience); ; {
		before, err := cpuTimeOf(g.proc.PID())
		if err != nil {
			return err
		}
		time.Sleep(look)
		after, err := cpuTimeOf(g.proc.PID())
		switch {
		case err != nil:
			return err
		case float64(after-before) < most*float64(look):
			return nil
		case time.Now().After(end):
			return fmt.Errorf("it still has something to do %s after its boot", guestPatience)
		}
	}
}

// How a stream is looked at: after TCP has found its window, for some time. While QEMU does not have nearly a CPU to itself,
// because other programs want it, the next window is looked at too.
const (
	streamSettle = 250 * time.Millisecond
	streamWindow = 500 * time.Millisecond
	streamShare  = 0.9 // of a CPU
	streamTries  = 3
)

// streamTCP gives how many bytes a TCP connection of the guest's carries by the second of QEMU's CPU time, in the window that
// QEMU had most of.
func (g *guestVM) streamTCP(outward bool) (rate float64, err error) {
	c, err := g.connect(outward)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	move := c.Read
	if !outward {
		move = c.Write
	}
	if _, err := moveFor(c, move, streamSettle); err != nil {
		return 0, err
	}
	for try, share := 0, 0.0; try < streamTries && share < streamShare; try++ {
		waiting, err := unsent(c)
		if err != nil {
			return 0, err
		}
		before, err := cpuTimeOf(g.proc.PID())
		if err != nil {
			return 0, err
		}
		begin := time.Now()
		n, err := moveFor(c, move, streamWindow)
		if err != nil {
			return 0, err
		}
		took := time.Since(begin)
		after, err := cpuTimeOf(g.proc.PID())
		if err != nil {
			return 0, err
		}
		later, err := unsent(c)
		if err != nil {
			return 0, err
		}
		used := (after - before).Seconds()
		if s := used / took.Seconds(); s > share {
			rate, share = float64(n+waiting-later)/used, s
		}
	}
	return rate, nil
}

// connect has the guest open a TCP connection by which it sends, or receives, as fast as it can.
func (g *guestVM) connect(outward bool) (*net.TCPConn, error) {
	var l *net.TCPListener
	err := g.host.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addrPort(hostAddr, 0)))
		return err
	})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	file := "of=/dev/null"
	if outward {
		file = "if=/dev/zero"
	}
	// Not nc itself, which moves a KiB at a time: what it sends then goes out in segments as short as that, or in long ones, as
	// chance will have it.
	if err := g.types(fmt.Sprintf("nc %s %d -e dd bs=256k %s", hostAddr.Addr(), l.Addr().(*net.TCPAddr).Port, file)); err != nil {
		return nil, err
	}
	if err := l.SetDeadline(time.Now().Add(guestPatience)); err != nil {
		return nil, err
	}
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, fmt.Errorf("the guest does not connect: %w", err)
	}
	return c, nil
}

// moveFor reads or writes for a time, and gives how many bytes.
func moveFor(c net.Conn, move func([]byte) (int, error), d time.Duration) (sum int, err error) {
	if err := c.SetDeadline(time.Now().Add(d)); err != nil {
		return 0, err
	}
	for b := make([]byte, 256<<10); ; {
		n, err := move(b)
		sum += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return sum, nil
		}
		if err != nil {
			return sum, err
		}
	}
}

// unsent gives the bytes that were written and that the other end has not yet acknowledged.
func unsent(c *net.TCPConn) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var get error
	err = raw.Control(func(fd uintptr) { n, get = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, errors.Join(err, get)
}
