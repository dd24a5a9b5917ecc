package qemu

import (
	"bytes"
	"context"
	"encoding/hex"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testUID is an unprivileged user that has no name and owns nothing.
const testUID = 1879050000

// patience is how long a test waits for what QEMU does under TCG on a busy machine.
const patience = 60 * time.Second

// needQEMU gives the amd64 emulator to test with: VIRTLET_TEST_QEMU, or that of the path.
func needQEMU(t testing.TB) string {
	t.Helper()
	if other := os.Getenv("VIRTLET_TEST_QEMU"); other != "" {
		return needProgram(t, other)
	}
	return needProgram(t, DefaultBinary("amd64"))
}

func needProgram(t testing.TB, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: runs QEMU as another user")
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
	return path
}

// guestCode is a guest of 139 bytes, a Multiboot 1 kernel. It prints its command line, "|", the first 8 bytes of its
// initrd if there is one, and ">"; then it echoes what it reads from the serial port, except for three letters:
// s powers off (ACPI S5 through q35's PM1a_CNT, port 0x604), p says through pvpanic (port 0x505) that it panicked,
// r resets the machine (port 0xcf9).
//
//	        .long 0x1badb002, 0x10000, -0x1badb002-0x10000, 0x100000, 0x100000, 0, 0, 0x100020
//	        mov $0x3f8,%edx; mov 16(%ebx),%esi
//	line:   lodsb; test %al,%al; jz initrd; out %al,%dx; jmp line
//	initrd: mov $'|',%al; out %al,%dx; cmpl $0,20(%ebx); je prompt
//	        mov 24(%ebx),%esi; mov (%esi),%esi; mov $8,%ecx; rep outsb
//	prompt: mov $'>',%al; out %al,%dx
//	wait:   pause; mov $0x3fd,%edx; in %dx,%al; test $1,%al; jz wait
//	        mov $0x3f8,%edx; in %dx,%al; cmp $'s',%al; je off; cmp $'p',%al; je panic; cmp $'r',%al; je reset
//	        out %al,%dx; jmp wait
//	off:    mov $0x604,%edx; mov $0x2000,%eax; out %ax,%dx; jmp wait
//	panic:  mov $0x505,%edx; mov $1,%al; out %al,%dx; jmp wait
//	reset:  mov $0xcf9,%edx; mov $6,%al; out %al,%dx; jmp wait
const guestCode = "02b0ad1b00000100fe4f51e40000100000001000000000000000000020001000" +
	"baf80300008b7310ac84c07403eeebf8b07cee837b1400740c8b73188b36b908000000f36e" +
	"b03eeef390bafd030000eca80174f4baf8030000ec3c73740b3c7074153c72741beeebdf" +
	"ba04060000b80020000066efebd1ba05050000b001eeebc7baf90c0000b006eeebbd"

// content gives an open read-only file that any user may read and nobody can reach by its path.
func content(t testing.TB, name string, b []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o444); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func guestKernel(t testing.TB) *os.File {
	t.Helper()
	b, err := hex.DecodeString(guestCode)
	if err != nil {
		t.Fatal(err)
	}
	return content(t, "kernel", b)
}

// socketPair gives two connected sockets: ours and QEMU's.
func socketPair(t testing.TB, name string) (net.Conn, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" of QEMU")
	defer ours.Close()
	t.Cleanup(func() { theirs.Close() })
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, theirs
}

// guest is a running QEMU with its two sockets.
type guest struct {
	*Process
	*Monitor
	t       testing.TB
	console net.Conn
	ios     int // of qemuIO

	mu  sync.Mutex
	out bytes.Buffer // of the console
	got chan struct{}
}

// boot starts m, with its two sockets, and waits for the monitor. The guest ends with the test.
func boot(t testing.TB, m Machine) *guest {
	t.Helper()
	if m.Accel = TCG; m.Arch == "" {
		m.Arch, m.Binary = "amd64", needQEMU(t)
	}
	if m.Name == "" {
		m.Name = "vlt-test"
	}
	m.CPUs, m.Memory = max(m.CPUs, 1), max(m.Memory, 64)
	g := &guest{t: t, got: make(chan struct{}, 1)}
	var qmp net.Conn
	g.console, m.Console = socketPair(t, "console")
	qmp, m.QMP = socketPair(t, "qmp")
	c, err := NewCommand(m)
	if err != nil {
		t.Fatal(err)
	}
	if g.Process, err = Start(c, ProcOptions{UID: testUID, GID: testUID, Dir: "/"}); err != nil {
		t.Fatal(err)
	}
	m.Console.Close()
	m.QMP.Close()
	t.Cleanup(func() {
		g.Kill()
		g.Wait()
	})
	if g.Monitor, err = NewMonitor(within(t), qmp); err != nil {
		g.Kill()
		t.Fatalf("%v; %v\n%s", err, g.Wait(), c)
	}
	t.Cleanup(func() { g.Monitor.Close() })
	listened := make(chan struct{})
	go func() {
		defer close(listened)
		g.listen()
	}()
	t.Cleanup(func() { g.console.Close(); <-listened })
	return g
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func (g *guest) listen() {
	b := make([]byte, 4096)
	for {
		n, err := g.console.Read(b)
		g.mu.Lock()
		g.out.Write(b[:n])
		g.mu.Unlock()
		select {
		case g.got <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// says waits until the console has shown the text n times in all, and gives what it showed.
func (g *guest) says(text string, n int) string {
	g.t.Helper()
	for timeout := time.After(patience); ; {
		g.mu.Lock()
		s := g.out.String()
		g.mu.Unlock()
		if strings.Count(s, text) >= n {
			return s
		}
		select {
		case <-g.got:
		case <-g.Done():
			g.t.Fatalf("QEMU ended: %v; the console said %q, not %q %d times", g.Wait(), s, text, n)
		case <-timeout:
			g.t.Fatalf("the console said %q, not %q %d times", s, text, n)
		}
	}
}

func (g *guest) types(s string) {
	g.t.Helper()
	if _, err := g.console.Write([]byte(s)); err != nil {
		g.t.Fatal(err)
	}
}

// event waits for the next event of that name.
func (g *guest) event(name string) Event {
	g.t.Helper()
	var seen []string
	for timeout := time.After(patience); ; {
		select {
		case e, ok := <-g.Events():
			if !ok {
				g.t.Fatalf("the monitor ended without a %s; it had %q", name, seen)
			}
			if e.Name == name {
				return e
			}
			seen = append(seen, e.Name)
		case <-timeout:
			g.t.Fatalf("no %s; there was %q", name, seen)
		}
	}
}

// ends waits for QEMU's end.
func (g *guest) ends() Exit {
	g.t.Helper()
	select {
	case <-g.Done():
	case <-time.After(patience):
		g.t.Fatal("QEMU does not end")
	}
	return g.Wait()
}

// qemuIO has QEMU's own qemu-io read or write through the guest's disk, command by command, then ends QEMU: its output
// tells what came of them.
func (g *guest) qemuIO(disk string, commands ...string) {
	g.t.Helper()
	for _, c := range commands {
		if out := g.hmp("qemu-io -d " + backend(disk) + ` "` + c + `"`); out != "" {
			g.t.Errorf("qemu-io %s: %s", c, out)
		}
	}
	g.ios += len(commands)
}

// quit ends QEMU and fails the test if not everything that qemuIO did went well.
func (g *guest) quit() {
	g.t.Helper()
	if err := g.Quit(within(g.t)); err != nil {
		g.t.Fatal(err)
	}
	out := g.ends().Stderr
	if strings.Contains(out, "ailed") || strings.Count(out, "bytes at offset") != g.ios {
		g.t.Errorf("%d qemu-io commands: %s", g.ios, out)
	}
}

// hmp runs a command of QEMU's monitor for people.
func (g *guest) hmp(command string) (out string) {
	g.t.Helper()
	if err := g.Do(within(g.t), "human-monitor-command", map[string]string{"command-line": command}, &out); err != nil {
		g.t.Fatal(err)
	}
	return out
}

// backend gives the part of a virtio-blk-pci device that holds the disk.
func backend(disk string) string { return "/machine/peripheral/" + disk + "/virtio-backend" }
