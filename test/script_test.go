package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
)

func TestScripts(t *testing.T) {
	testnet.NeedRoot(t)
	for _, program := range []string{"qemu-system-x86_64", "qemu-img", "nsenter", "ip", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs ", program)
		}
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the guest is a boot sector of a PC")
	}
	bin, work := programs(t), t.TempDir()
	// QEMU, and what a script puts in its place, runs without privileges and must get there.
	if err := os.Chmod(filepath.Dir(work), 0o711); err != nil {
		t.Fatal(err)
	}
	plugins := testnet.Plugins(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:         "script",
		Cmds:        commands(),
		WorkdirRoot: work, // testscript's own would stay when only some scripts are run
		Setup: func(e *testscript.Env) error {
			t := e.T().(testing.TB)
			n, err := newNode(e.WorkDir, plugins)
			if err != nil {
				return err
			}
			e.Defer(func() { n.end(t, e) })
			e.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			e.Setenv("TEST_BIN", self)
			e.Setenv("NODE", fmt.Sprint(n.pid()))
			e.Setenv("VIRTLET_BIN", filepath.Join(bin, "real", "virtlet"))
			return disks(e)
		},
	})
}

// commands are what scripts can say beside the words of testscript.
func commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		// signal SIGNAL supervisor|qemu VM sends a signal to a process of a VM.
		"signal": func(ts *testscript.TestScript, neg bool, args []string) {
			if neg || len(args) != 3 {
				ts.Fatalf("usage: signal INT|KILL|TERM... supervisor|qemu VM")
			}
			st, err := store(ts.Getenv("WORK")).Get(args[2])
			ts.Check(err)
			pid := map[string]int{"supervisor": st.Supervisor.PID, "qemu": st.QEMU.PID}[args[1]]
			number := unix.SignalNum("SIG" + args[0])
			if pid <= 1 || number == 0 {
				ts.Fatalf("no such signal or process: %q, pid %d", args, pid)
			}
			ts.Check(unix.Kill(pid, number))
		},
		// await STATE VM waits until a VM is in that state; "none" until it is gone.
		"await": func(ts *testscript.TestScript, neg bool, args []string) {
			if neg || len(args) != 2 {
				ts.Fatalf("usage: await starting|running|stopped|dead|none VM")
			}
			ts.Check(poll(func() error {
				st, err := store(ts.Getenv("WORK")).Get(args[1])
				if is := string(st.Status); is != args[0] && !(err != nil && args[0] == "none") {
					return fmt.Errorf("VM %s is %q, %v; want %s", args[1], is, err, args[0])
				}
				return nil
			}))
		},
		// says VM TEXT waits until a VM's console has said something.
		"says": func(ts *testscript.TestScript, neg bool, args []string) {
			if neg || len(args) != 2 {
				ts.Fatalf("usage: says VM TEXT")
			}
			ts.Check(poll(func() error { return contains(ts.MkAbs("data/"+args[0]+"/console.log"), args[1]) }))
		},
		// holds FILE TEXT waits until a file that another program writes has that text.
		"holds": func(ts *testscript.TestScript, neg bool, args []string) {
			if neg || len(args) != 2 {
				ts.Fatalf("usage: holds FILE TEXT")
			}
			ts.Check(poll(func() error { return contains(ts.MkAbs(args[0]), args[1]) }))
		},
	}
}

// poll asks until there is no error, for as long as a slow machine may take.
func poll(ask func() error) (err error) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = ask(); err == nil {
			return nil
		}
	}
	return err
}

func contains(file, text string) error {
	b, err := os.ReadFile(file)
	if err == nil && !strings.Contains(string(b), text) {
		err = fmt.Errorf("%s does not say %q, but %q", file, text, b)
	}
	return err
}

func store(work string) vm.Store {
	return vm.Store{Run: filepath.Join(work, "run"), Data: filepath.Join(work, "data")}
}
