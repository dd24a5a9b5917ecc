package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

func TestBootTalkShutdown(t *testing.T) {
	g := boot(t, Machine{Kernel: guestKernel(t), Initrd: content(t, "initrd", []byte("initrd!!rest")), Append: "a=b,c two"})
	if out := g.says(">", 1); !strings.Contains(out, "a=b,c two|initrd!!>") {
		t.Errorf("the guest printed %q", out)
	}
	g.types("xyz")
	g.says("xyz", 1)
	ctx := within(t)
	want, err := Version(ctx, needQEMU(t))
	if err != nil || g.Version() != want {
		t.Errorf("the monitor says version %q, the program %q, %v", g.Version(), want, err)
	}
	for _, step := range []struct {
		do     func() error
		status string
		event  string
	}{
		{func() error { return nil }, "running", ""},
		{func() error { return g.Stop(ctx) }, "paused", "STOP"},
		{func() error { return g.Cont(ctx) }, "running", "RESUME"},
		{func() error { return g.Powerdown(ctx) }, "running", "POWERDOWN"}, // this guest does not obey
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if step.event != "" {
			if e := g.event(step.event); time.Since(e.Time).Abs() > patience {
				t.Errorf("%s at %v", step.event, e.Time)
			}
		}
		if s, err := g.Status(ctx); err != nil || s != step.status {
			t.Errorf("status %q, %v, want %q", s, err, step.status)
		}
	}
	g.types("s")
	if e := g.event("SHUTDOWN"); reason(t, e) != "guest-shutdown" {
		t.Errorf("SHUTDOWN %s", e.Data)
	}
	if e := g.ends(); e.Err() != nil {
		t.Errorf("a clean end: %v", e)
	}
}

func reason(t *testing.T, e Event) string {
	t.Helper()
	var d struct{ Reason string }
	if err := json.Unmarshal(e.Data, &d); err != nil {
		t.Errorf("%s %q: %v", e.Name, e.Data, err)
	}
	return d.Reason
}

func TestRebootIsARebootAndPanicTheEnd(t *testing.T) {
	g := boot(t, Machine{Kernel: guestKernel(t)})
	g.says(">", 1)
	g.types("r")
	if e := g.event("RESET"); reason(t, e) != "guest-reset" {
		t.Errorf("RESET %s", e.Data)
	}
	g.says(">", 2)
	g.types("p")
	g.event("GUEST_PANICKED")
	if e := g.event("SHUTDOWN"); reason(t, e) != "guest-panic" {
		t.Errorf("SHUTDOWN %s", e.Data)
	}
	if e := g.ends(); e.Err() != nil {
		t.Errorf("QEMU's end after a panic: %v", e)
	}
}

func TestQuit(t *testing.T) {
	g := boot(t, Machine{Kernel: guestKernel(t)})
	if err := g.Quit(within(t)); err != nil {
		t.Error(err)
	}
	if e := g.event("SHUTDOWN"); reason(t, e) != "host-qmp-quit" {
		t.Errorf("SHUTDOWN %s", e.Data)
	}
	if e := g.ends(); e.Err() != nil {
		t.Error(e)
	}
}

func TestNameWithCommas(t *testing.T) {
	const name = "a,debug-threads=on,,process=b"
	g := boot(t, Machine{Kernel: guestKernel(t), Name: name})
	var got struct{ Name string }
	if err := g.Do(within(t), "query-name", nil, &got); err != nil || got.Name != name {
		t.Errorf("QEMU's name is %q, %v", got.Name, err)
	}
}

// TestArm64Starts has no guest, only a board: QEMU takes every option and device.
func TestArm64Starts(t *testing.T) {
	binary := needProgram(t, DefaultBinary("arm64"))
	f := sized(t, "disk", 1<<20)
	for _, m := range []Machine{
		{Kernel: guestKernel(t), Append: "quiet"},
		{Firmware: content(t, "uefi", make([]byte, 1<<20))},
	} {
		m.Binary, m.Arch, m.CPUs = binary, "arm64", 9 // one more than version 2 of the interrupt controller has
		m.Drives = []Drive{{ID: "disk0", Format: "raw", File: f}}
		_, m.Agent = socketPair(t, "agent")
		m.Balloon = true
		g := boot(t, m)
		if s, err := g.Status(within(t)); err != nil || s != "running" {
			t.Errorf("status %q, %v", s, err)
		}
		g.quit()
	}
}

// TestFirmwareIsHeard boots an empty disk: what SeaBIOS says of it must reach the log.
func TestFirmwareIsHeard(t *testing.T) {
	f := sized(t, "empty", 1<<20)
	g := boot(t, Machine{Drives: []Drive{{ID: "disk0", Format: "raw", File: f}}})
	g.says("No bootable device", 1)
}

// sized gives an open file of zeros that root alone may open.
func sized(t *testing.T, name string, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// image makes an image with qemu-img and fills it as said, and gives its path.
func image(t *testing.T, name, format, size string, qemuIO ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	commands := [][]string{{"qemu-img", "create", "-q", "-f", format, path, size}}
	for _, c := range qemuIO {
		commands = append(commands, []string{"qemu-io", "-f", format, "-c", c, path})
	}
	for _, c := range commands {
		if _, err := exec.LookPath(c[0]); err != nil {
			t.Skipf("needs %s: %v", c[0], err)
		}
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", c, err, out)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestDisks gives QEMU images that its user may neither open nor reach: an overlay on a lower layer, a raw disk, a
// read-only one and a seed.
func TestDisks(t *testing.T) {
	base := image(t, "base.qcow2", "qcow2", "1M", "write -P 0x11 0 128k")
	top := image(t, "top.qcow2", "qcow2", "2M")
	raw := sized(t, "raw", 1<<20)
	ro, seed := sized(t, "ro", 1<<20), sized(t, "seed.iso", 1<<20)
	before := read(t, base)
	g := boot(t, Machine{Kernel: guestKernel(t), Drives: []Drive{
		{
			ID: "disk0", Format: "qcow2", File: open(t, top, os.O_RDWR),
			Backing: &Drive{ID: "base0", Format: "qcow2", File: open(t, base, os.O_RDONLY), ReadOnly: true},
		},
		{ID: "data0", Format: "raw", File: raw, Serial: "a,b=c"},
		{ID: "data1", Format: "raw", File: open(t, ro.Name(), os.O_RDONLY), ReadOnly: true},
		{ID: "seed", Format: "raw", File: open(t, seed.Name(), os.O_RDONLY), CDROM: true},
	}})
	g.qemuIO("disk0",
		"read -P 0x11 0 128k",
		"read -P 0 1M 1M", // past the lower layer's end
		"write -P 0x22 64k 64k",
		"read -P 0x11 0 64k",
		"read -P 0x22 64k 64k")
	g.qemuIO("data0", "write -P 0x33 0 4k")
	var serial string
	args := map[string]string{"path": "/machine/peripheral/data0", "property": "serial"}
	if err := g.Do(within(t), "qom-get", args, &serial); err != nil || serial != "a,b=c" {
		t.Errorf("serial number %q, %v", serial, err)
	}
	for _, id := range []string{"data1", "seed"} {
		if out := g.hmp("qemu-io -d " + backend(id) + ` "write 0 4k"`); !strings.Contains(out, "ead-only") {
			t.Errorf("write to %s: %q", id, out)
		}
	}
	g.quit()
	if read(t, base) != before {
		t.Error("the lower layer was written to")
	}
	if !strings.HasPrefix(read(t, raw.Name()), strings.Repeat("\x33", 4096)) {
		t.Error("the raw disk was not written to")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestHeaderCannotNameABackingFile gives QEMU an overlay whose header names a file that its user could read.
func TestHeaderCannotNameABackingFile(t *testing.T) {
	bait := image(t, "bait.raw", "raw", "1M", "write -P 0x66 0 1M")
	top := image(t, "top.qcow2", "qcow2", "1M")
	if out, err := exec.Command("qemu-img", "rebase", "-u", "-F", "raw", "-b", bait, top).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for p := bait; p != "/"; p = filepath.Dir(p) {
		os.Chmod(p, 0o755)
	}
	g := boot(t, Machine{Kernel: guestKernel(t), Drives: []Drive{{ID: "disk0", Format: "qcow2", File: open(t, top, os.O_RDWR)}}})
	g.qemuIO("disk0", "read -P 0 0 64k")
	g.quit()
}

func TestSecondWriterIsRefused(t *testing.T) {
	disk := sized(t, "disk", 1<<20)
	drive := func() []Drive { return []Drive{{ID: "disk0", Format: "raw", File: open(t, disk.Name(), os.O_RDWR)}} }
	boot(t, Machine{Kernel: guestKernel(t), Drives: drive()})
	c, err := NewCommand(Machine{Binary: needQEMU(t), Arch: "amd64", Accel: TCG, Name: "second", CPUs: 1, Memory: 64, Drives: drive()})
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, c)
	if e := p.Wait(); e.Err() == nil || !strings.Contains(e.String(), `Failed to get "write" lock`) {
		t.Errorf("a second QEMU with the same disk: %v", e)
	}
}

// start runs c as the tests' user; it ends with the test.
func start(t *testing.T, c Command) *Process {
	t.Helper()
	p, err := Start(c, ProcOptions{UID: testUID, GID: testUID, Dir: "/"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	timer := time.AfterFunc(patience, func() { t.Errorf("QEMU does not end: %s", c); p.Kill() })
	go func() { p.Wait(); timer.Stop(); close(ended) }()
	t.Cleanup(func() { p.Kill(); <-ended })
	return p
}

// TestTAP gives QEMU the TAPs of a throw-away namespace, one of one queue and one of two, and looks from outside.
func TestTAP(t *testing.T) {
	needQEMU(t)
	ns := testnet.New(t, "qemu")
	tap := func(name string, queues int) (files []*os.File) {
		ns.Must(func() error {
			for range queues {
				fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err != nil {
					return err
				}
				f := os.NewFile(uintptr(fd), name)
				t.Cleanup(func() { f.Close() })
				req, err := unix.NewIfreq(name)
				if err != nil {
					return err
				}
				flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
				if queues > 1 {
					flags |= unix.IFF_MULTI_QUEUE
				}
				req.SetUint16(flags)
				if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
					return fmt.Errorf("make %s: %w", name, err)
				}
				files = append(files, f)
			}
			return nil
		})
		return files
	}
	m := Machine{Kernel: guestKernel(t), CPUs: 2, NICs: []Netdev{
		{ID: "net0", MAC: "02:00:5e:10:00:01", MTU: 1450, Taps: tap("tap0", 1), Slot: NICSlot(0)},
		{ID: "net1", MAC: "02:00:5e:10:00:02", Taps: tap("tap1", 2), Slot: NICSlot(MaxNICs - 1)},
	}}
	g := boot(t, m)
	for _, n := range m.NICs {
		for _, f := range n.Taps {
			f.Close() // QEMU has its own
		}
	}
	for _, name := range []string{"tap0", "tap1"} {
		if _, err := ns.Link().LinkByName(name); err != nil {
			t.Errorf("QEMU does not hold %s: %v", name, err)
		}
	}
	ctx := within(t)
	get := func(nic, property string) (v any) {
		if err := g.Do(ctx, "qom-get", map[string]string{"path": "/machine/peripheral/" + nic, "property": property}, &v); err != nil {
			t.Error(err)
		}
		return v
	}
	for _, tt := range []struct {
		nic, property string
		want          any
	}{
		{"net0", "host_mtu", 1450.0},
		{"net0", "mac", "02:00:5e:10:00:01"},
		{"net0", "mq", false},
		{"net0", "romfile", ""},
		{"net1", "host_mtu", 0.0},
		{"net1", "mq", true},
		{"net1", "vectors", 6.0},
		{"net1", "addr", float64(0x1e << 3)}, // slot and function: the property is a devfn
	} {
		if got := get(tt.nic, tt.property); got != tt.want {
			t.Errorf("%s.%s is %v, want %v", tt.nic, tt.property, got, tt.want)
		}
	}
	if out := g.hmp("info network"); !strings.Contains(out, "index=1,type=tap") {
		t.Errorf("no second queue:\n%s", out)
	}
	g.Kill()
	g.Wait()
	for _, name := range []string{"tap0", "tap1"} {
		if _, err := ns.Link().LinkByName(name); err == nil {
			t.Errorf("%s outlives QEMU", name)
		}
	}
}
