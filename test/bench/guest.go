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

// guestRounds are how often every guest streams, and guestWindow how long each time.
const (
	guestRounds = 3
	guestWindow = 1200 * time.Millisecond
)

// guestPatience is how long is waited for what a guest does under TCG on a busy machine.
const guestPatience = 90 * time.Second

// guestFigure is a TCP stream between a guest under QEMU and the host.
type guestFigure struct {
	Datapath string `json:"datapath"`
	Offloads bool   `json:"offloads"`
	Out      spread `json:"out"`   // bytes/s from the guest
	In       spread `json:"in"`    // bytes/s to it
	OutBy    spread `json:"outBy"` // by the bridge with offloads, of the same round
	InBy     spread `json:"inBy"`
}

func (g guestFigure) offloads() string {
	if g.Offloads {
		return "on"
	}
	return "off"
}

func (g guestFigure) cell(v, by spread) string { return v.text(1e6) + " (" + digits(by.Median) + ")" }

// noOffloads takes from virtio-net what lets segments and checksums cross unfinished.
var noOffloads = []string{
	"csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4", "host_tso6", "host_ecn", "host_ufo", "mrg_rxbuf",
}

// guestVM is a guest on one of the product's datapaths.
type guestVM struct {
	way      ownWay
	offloads bool
	*rig
	console net.Conn

	mu   sync.Mutex
	said bytes.Buffer
}

func (g *guestVM) name() string { return fmt.Sprintf("%s, offloads %t", g.way.name, g.offloads) }

// measureGuests boots a guest on every datapath, with offloads and without, and has them stream in turn.
func measureGuests(dir string, say func(string, ...any)) (all []guestFigure, err error) {
	var guests []*guestVM
	defer func() {
		for _, g := range guests {
			err = errors.Join(err, g.Close())
		}
	}()
	for _, w := range ownWays() {
		for _, offloads := range []bool{true, false} {
			g := &guestVM{way: w, offloads: offloads}
			if g.rig, err = newRig(join{name: w.name, make: makeOwn(w)}, 1); err != nil {
				return nil, err
			}
			guests = append(guests, g)
			if err := g.boot(dir); err != nil {
				return nil, fmt.Errorf("boot a guest on %s: %w", g.name(), err)
			}
		}
	}
	for _, g := range guests {
		if err := g.ready(); err != nil {
			return nil, fmt.Errorf("guest on %s: %w", g.name(), err)
		}
	}
	say("%d guests booted", len(guests))
	s := samples{}
	for range guestRounds {
		for _, g := range guests {
			for _, d := range directions {
				v, err := g.streamTCP(d.outward)
				if err != nil {
					return nil, fmt.Errorf("stream %s on %s: %w", d.name, g.name(), err)
				}
				s.add(g.name(), d.id, v)
			}
		}
	}
	reference := guests[0].name()
	for _, g := range guests {
		f := guestFigure{
			Datapath: g.way.name, Offloads: g.offloads, Out: s.of(g.name(), "out"), In: s.of(g.name(), "in"),
			OutBy: s.ratio(g.name(), reference, "out"), InBy: s.ratio(g.name(), reference, "in"),
		}
		say("%s: from the guest %.0f MB/s, to it %.0f MB/s", g.name(), f.Out.Median/1e6, f.In.Median/1e6)
		all = append(all, f)
	}
	return all, nil
}

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
	p, err := qemu.Start(c, qemu.ProcOptions{UID: nobody, GID: nobody, Dir: "/"})
	if err != nil {
		return err
	}
	g.defers(func() error { err := p.Kill(); p.Wait(); return err })
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

// streamTCP gives how many bytes a second a TCP connection of the guest's carries.
func (g *guestVM) streamTCP(outward bool) (float64, error) {
	var l *net.TCPListener
	err := g.host.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addrPort(hostAddr, 0)))
		return err
	})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	redirection := ">/dev/null </dev/null"
	if outward {
		redirection = "</dev/zero >/dev/null"
	}
	if err := g.types(fmt.Sprintf("nc %s %d %s", hostAddr.Addr(), l.Addr().(*net.TCPAddr).Port, redirection)); err != nil {
		return 0, err
	}
	if err := l.SetDeadline(time.Now().Add(guestPatience)); err != nil {
		return 0, err
	}
	c, err := l.AcceptTCP()
	if err != nil {
		return 0, fmt.Errorf("the guest does not connect: %w", err)
	}
	defer c.Close()
	move := c.Read
	if !outward {
		move = c.Write
	}
	const settle = 400 * time.Millisecond // TCP finds its window
	if _, err := moveFor(c, move, settle); err != nil {
		return 0, err
	}
	waiting, err := unsent(c)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	n, err := moveFor(c, move, guestWindow)
	if err != nil {
		return 0, err
	}
	took := time.Since(begin)
	later, err := unsent(c)
	return float64(n+waiting-later) / took.Seconds(), err
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
