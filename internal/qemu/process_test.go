package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// parentEnv makes of the test binary a supervisor that starts the guest of its standard input's kernel and waits to
// be killed.
const parentEnv = "VIRTLET_TEST_QEMU_PARENT"

func TestMain(m *testing.M) {
	if binary := os.Getenv(parentEnv); binary != "" {
		err := beParent(binary)
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func beParent(binary string) error {
	c, err := NewCommand(Machine{Binary: binary, Arch: "amd64", Accel: TCG, Name: "child", CPUs: 1, Memory: 64, Kernel: os.Stdin})
	if err != nil {
		return err
	}
	p, err := Start(c, ProcOptions{UID: testUID, GID: testUID})
	if err != nil {
		return err
	}
	fmt.Println(p.PID(), p.StartTime())
	return p.Wait().Err()
}

// orphan runs a supervisor with a QEMU and gives both.
func orphan(t *testing.T) (supervisor *exec.Cmd, pid int, start uint64) {
	t.Helper()
	supervisor = exec.Command(os.Args[0])
	supervisor.Env = append(os.Environ(), parentEnv+"="+needQEMU(t))
	supervisor.Stdin = guestKernel(t)
	out, err := supervisor.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := supervisor.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { supervisor.Process.Kill(); supervisor.Wait() })
	if _, err := fmt.Fscan(out, &pid, &start); err != nil {
		rest, _ := io.ReadAll(out)
		t.Fatalf("%v: %s", err, rest)
	}
	return supervisor, pid, start
}

func TestDiesWithItsParent(t *testing.T) {
	supervisor, pid, start := orphan(t)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if StartTime(pid) != start || start == 0 {
		t.Errorf("start time %d, read as %d", start, StartTime(pid))
	}
	if gone, err := awaitPidfd(fd, 300*time.Millisecond); gone || err != nil {
		t.Fatalf("QEMU ended before its parent: %v", err)
	}
	supervisor.Process.Kill()
	supervisor.Wait()
	if gone, err := awaitPidfd(fd, killTimeout); !gone || err != nil {
		t.Errorf("QEMU outlives its killed parent: %v", err)
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// TestOutlivesTheStartingThread starts QEMU from a thread that ends at once. The kernel's parent-death signal is bound
// to threads; here it must be bound to one that stays.
func TestOutlivesTheStartingThread(t *testing.T) {
	needQEMU(t)
	var p *Process
	var tid int
	started := make(chan error)
	var begin func()
	begin = func() {
		runtime.LockOSThread()
		if tid = unix.Gettid(); tid == os.Getpid() { // a process's first thread does not end: hold it, take another
			defer runtime.UnlockOSThread()
			begun := make(chan struct{})
			go func() { defer close(begun); begin() }()
			<-begun
			return
		}
		var err error
		p, err = Start(Command{Path: "/bin/sleep", Args: []string{"60"}}, ProcOptions{UID: testUID, GID: testUID})
		started <- err
	} // still locked: the runtime ends the thread
	go begin()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	defer func() { p.Kill(); p.Wait() }()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); err != nil {
			break
		}
	}
	select {
	case <-p.Done():
		t.Errorf("the child ended with the thread that started it: %v", p.Wait())
	case <-time.After(200 * time.Millisecond):
	}
}

func TestKillPID(t *testing.T) {
	_, pid, start := orphan(t)
	if err := KillPID(pid, start+1); err != nil {
		t.Errorf("of a reused id: %v", err)
	}
	if StartTime(pid) != start {
		t.Fatal("KillPID killed a process with another start time")
	}
	if err := KillPID(pid, start); err != nil {
		t.Error(err)
	}
	if now := StartTime(pid); now != 0 {
		t.Errorf("start time %d after KillPID", now)
	}
	for _, p := range []int{pid, 1<<22 - 1} { // PID_MAX_LIMIT is 1<<22
		if err := KillPID(p, start); err != nil {
			t.Errorf("of a process that is gone: %v", err)
		}
	}
	for _, p := range []int{-1, 0, 1} {
		if err := KillPID(p, StartTime(1)); err == nil {
			t.Errorf("KillPID(%d) is no error", p)
		}
	}
}

// TestConfined looks at QEMU from outside: user, capabilities, seccomp, process group, environment, open files.
func TestConfined(t *testing.T) {
	secret := open(t, sized(t, "secret", 1).Name(), os.O_RDONLY)
	leak, err := unix.Dup(int(secret.Fd())) // without close-on-exec, as a descriptor that we inherited would be
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	t.Setenv("VIRTLET_TEST_SECRET", "1")
	disk := sized(t, "disk", 1<<20)
	g := boot(t, Machine{Kernel: guestKernel(t), Drives: []Drive{{ID: "disk0", Format: "raw", File: disk}}})
	proc := fmt.Sprintf("/proc/%d/", g.PID())
	status := map[string]string{}
	for l := range strings.Lines(read(t, proc+"status")) {
		k, v, _ := strings.Cut(l, ":")
		status[k] = strings.Join(strings.Fields(v), " ")
	}
	id := strings.TrimSpace(strings.Repeat(strconv.Itoa(testUID)+" ", 4))
	for k, want := range map[string]string{
		"Uid": id, "Gid": id, "Groups": "", "Seccomp": "2", "NoNewPrivs": "1",
		"CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
	} {
		if status[k] != want {
			t.Errorf("%s: %q, want %q", k, status[k], want)
		}
	}
	if pgid, err := unix.Getpgid(g.PID()); err != nil || pgid != g.PID() {
		t.Errorf("process group %d of process %d, %v", pgid, g.PID(), err)
	}
	if env := read(t, proc+"environ"); env != "LC_ALL=C\x00" {
		t.Errorf("environment %q", env)
	}
	if cwd, _ := os.Readlink(proc + "cwd"); cwd != "/" {
		t.Errorf("working directory %s", cwd)
	}
	var kernels, disks, sockets int
	entries, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink(proc + "fd/" + e.Name())
		switch {
		case err != nil:
			t.Error(err)
		case filepath.Base(to) == "kernel":
			kernels++
		case to == disk.Name():
			disks++
		case strings.HasPrefix(to, "socket:"):
			sockets++
		case e.Name() == "0" && to == "/dev/null":
		case (e.Name() == "1" || e.Name() == "2") && strings.HasPrefix(to, "pipe:"):
		case strings.HasPrefix(to, "anon_inode:"): // QEMU's own: eventfd, signalfd
		default:
			t.Errorf("QEMU has descriptor %s: %s", e.Name(), to)
		}
	}
	// One socket each for console and monitor; QEMU copies the disk's descriptor when it opens it.
	if kernels != 1 || disks < 1 || sockets != 2 {
		t.Errorf("%d kernels, %d disks, %d sockets", kernels, disks, sockets)
	}
}

func TestStartRefuses(t *testing.T) {
	needQEMU(t)
	sh := Command{Path: "/bin/sh", Args: []string{"-c", "exit 0"}}
	user := ProcOptions{UID: testUID, GID: testUID}
	for _, tt := range []struct {
		name, want string
		c          Command
		o          ProcOptions
	}{
		{"no such program", "no-such-qemu", Command{Path: "no-such-qemu"}, user},
		{"no such path", "no such file", Command{Path: "/no/such/qemu"}, user},
		{"not a program", "permission denied", Command{Path: "/proc/self/status"}, user},
		{"no such directory", "no such file", sh, ProcOptions{UID: testUID, GID: testUID, Dir: "/no/such/dir"}},
		{"root", "refused to run as root", sh, ProcOptions{}},
		{"group root", "refused to run as root", sh, ProcOptions{UID: testUID}},
		{"no device", "find device /dev/no-such", Command{Path: sh.Path, Devices: []string{"/dev/no-such"}}, user},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Start(tt.c, tt.o)
			if err == nil {
				t.Fatalf("it started, and ended: %v", p.Wait())
			}
			if !strings.HasPrefix(err.Error(), "start QEMU") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q, want %q in it", err, tt.want)
			}
		})
	}
}

func TestQEMUsOwnWordsOfABadStart(t *testing.T) {
	for _, tt := range []struct{ name, arg, value, want string }{
		{"machine", "-machine", "no-such-board", "unsupported machine type"},
		{"device", "-device", "no-such-device", "no-such-device"},
		{"descriptor", "-add-fd", "fd=99,set=9", "99"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Command{Path: needQEMU(t), Args: []string{"-nodefaults", "-display", "none", "-accel", "tcg", tt.arg, tt.value}}
			p := start(t, c)
			e := p.Wait()
			if e.Code != 1 || e.Err() == nil || !strings.Contains(e.Err().Error(), tt.want) {
				t.Errorf("%+v, want status 1 and %q", e, tt.want)
			}
			var as *Exit
			if !errors.As(e.Err(), &as) || as.Code != 1 {
				t.Errorf("%T is no *Exit", e.Err())
			}
			if err := p.Kill(); err != nil {
				t.Errorf("Kill after the end: %v", err)
			}
			if p.StartTime() == 0 {
				t.Error("no start time")
			}
		})
	}
}

// TestExit runs a shell in QEMU's place.
func TestExit(t *testing.T) {
	needQEMU(t)
	for _, tt := range []struct {
		name, script string
		want         Exit
		says         string
	}{
		{"clean", "exit 0", Exit{}, "QEMU ended with status 0"},
		{"status", "echo no; exit 3", Exit{Code: 3, Stderr: "no\n"}, "QEMU ended with status 3: no"},
		{"signal", "kill -9 $$", Exit{Code: -1, Signal: syscall.SIGKILL}, "QEMU was ended by signal 9 (killed)"},
		{"both streams", "echo a; echo b >&2", Exit{Stderr: "a\nb\n"}, "QEMU ended with status 0: a\nb"},
		{"control characters", `printf 'a\033[31mb\000\n'`, Exit{Stderr: "a[31mb\n"}, "QEMU ended with status 0: a[31mb"},
		{"no input", "cat", Exit{}, "QEMU ended with status 0"},
		// 3 is ls's own.
		{"descriptors", "ls /proc/self/fd | tr '\n' ' '", Exit{Stderr: "0 1 2 3 "}, "QEMU ended with status 0: 0 1 2 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := start(t, Command{Path: "/bin/sh", Args: []string{"-c", "PATH=/bin:/usr/bin; " + tt.script}}).Wait()
			if got != tt.want || got.String() != tt.says {
				t.Errorf("%+v %q, want %+v %q", got, got, tt.want, tt.says)
			}
			if (got.Err() == nil) != (tt.want.Code == 0) {
				t.Errorf("Err is %v", got.Err())
			}
		})
	}
}

func TestOutputIsBoundedAndCopied(t *testing.T) {
	needQEMU(t)
	var all bytes.Buffer
	c := Command{Path: "/bin/sh", Args: []string{"-c", "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done"}}
	p, err := Start(c, ProcOptions{UID: testUID, GID: testUID, Stderr: &all})
	if err != nil {
		t.Fatal(err)
	}
	e := p.Wait()
	if e.Code != 0 || len(e.Stderr) > stderrKept || !strings.HasPrefix(e.Stderr, "line ") || !strings.HasSuffix(e.Stderr, "\nline 4999\n") {
		t.Errorf("%d bytes: %.20q", len(e.Stderr), e)
	}
	if n := strings.Count(all.String(), "\n"); n != 5000 {
		t.Errorf("%d lines copied", n)
	}
	// A writer that fails is no reason for QEMU to die of a broken pipe.
	p, err = Start(c, ProcOptions{UID: testUID, GID: testUID, Stderr: broken{}})
	if err != nil {
		t.Fatal(err)
	}
	if e := p.Wait(); e.Err() != nil || !strings.HasSuffix(e.Stderr, "\nline 4999\n") {
		t.Errorf("with a broken writer: %.40q", e)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestTail(t *testing.T) {
	for _, tt := range []struct {
		writes []string
		want   string
	}{
		{nil, ""},
		{[]string{"a\n", "b"}, "a\nb"},
		{[]string{"12345678"}, "12345678"},
		{[]string{"1234\n678", "9"}, "6789"},
		{[]string{"0123456789"}, "23456789"},
		{[]string{"x\n", strings.Repeat("y", 100) + "\nend"}, "end"},
	} {
		l := &tail{limit: 8}
		for _, w := range tt.writes {
			if n, err := l.Write([]byte(w)); n != len(w) || err != nil {
				t.Errorf("Write gives %d, %v", n, err)
			}
		}
		if got := l.String(); got != tt.want {
			t.Errorf("%q leave %q, want %q", tt.writes, got, tt.want)
		}
	}
}

func TestDeviceGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: gives files away")
	}
	const uid, gid, kvm = 1001, 1002, 107
	for _, tt := range []struct {
		name       string
		owner, grp int
		mode       os.FileMode
		want       []uint32
		refused    bool
	}{
		{"everybody's", 0, 0, 0o666, nil, false},
		{"of group kvm", 0, kvm, 0o660, []uint32{kvm}, false},
		{"of our group", 0, gid, 0o660, nil, false},
		{"ours", uid, 0, 0o600, nil, false},
		{"root's alone", 0, 0, 0o600, nil, true},
		{"of group root", 0, 0, 0o660, nil, true},
		{"read-only", 0, kvm, 0o640, nil, true},
		{"ours, but not for us", uid, 0, 0o066, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "dev")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, tt.owner, tt.grp), os.Chmod(path, tt.mode)); err != nil {
				t.Fatal(err)
			}
			got, err := deviceGroups([]string{path, path}, uid, gid)
			if (err != nil) != tt.refused || !slices.Equal(got, tt.want) {
				t.Errorf("groups %v, %v; want %v, refused %t", got, err, tt.want, tt.refused)
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	after := " S 1 1 1 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 12345 1 2"
	for _, tt := range []struct {
		in   string
		want stat
		bad  bool
	}{
		{"7 (qemu)" + after, stat{'S', 12345}, false},
		{"7 (a) Z (b) (c)" + after, stat{'S', 12345}, false},
		{"7 (a\n)" + strings.Replace(after, "S", "Z", 1), stat{'Z', 12345}, false},
		{"7 (qemu) S 1 1", stat{}, true},
		{"7 (qemu)" + strings.Replace(after, "12345", "-1", 1), stat{}, true},
		{"", stat{}, true},
	} {
		if got, err := parseStat([]byte(tt.in)); got != tt.want || (err != nil) != tt.bad {
			t.Errorf("%q: %+v, %v", tt.in, got, err)
		}
	}
	if StartTime(os.Getpid()) == 0 {
		t.Error("we have no start time")
	}
}

func TestVersion(t *testing.T) {
	fake := filepath.Join(t.TempDir(), "qemu-img")
	for _, tt := range []struct{ says, want string }{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "7.2.22"},
		{"qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2)", "10.0.2"},
		{"QEMU emulator version 9.1.0-rc2", "9.1.0"},
		{"busybox", ""},
	} {
		if err := os.WriteFile(fake, []byte("#!/bin/sh\necho '"+tt.says+"'\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		got, err := Version(context.Background(), fake)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q: %q, %v", tt.says, got, err)
		}
	}
	if _, err := Version(context.Background(), "no-such-qemu"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("of a program that is not there: %v", err)
	}
}
