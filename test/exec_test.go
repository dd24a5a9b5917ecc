package test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/test/guest"
)

// Commands run in a guest by its agent, and end with whoever wanted them.
func TestExec(t *testing.T) {
	l := newLab(t)
	var initrd []byte
	for _, path := range []string{l.boot[3], guest.Extra(t)} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		initrd = append(initrd, b...)
	}
	l.boot[3] = filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(l.boot[3], initrd, 0o644); err != nil {
		t.Fatal(err)
	}
	l.virtlet(l.run("", "", "-d", "--name", "agent")...)
	l.report("agent")
	l.type_("agent", guest.Agent+"; echo started") // it prints nothing itself
	run := func(stdin string, args ...string) (stdout, stderr string, code int) {
		t.Helper()
		var out, said bytes.Buffer
		cmd := l.command(append([]string{"exec"}, args...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &said
		err := cmd.Run()
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return out.String(), said.String(), cmd.ProcessState.ExitCode()
	}
	for end := time.Now().Add(bootTime); ; time.Sleep(100 * time.Millisecond) {
		_, said, code := run("", "agent", "--", "true")
		if code == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the agent does not answer: %s", said)
		}
	}
	for _, tt := range []struct {
		stdin, stdout, stderr string
		code                  int
		args                  []string
	}{
		{"", "out\n", "err\n", 3, []string{"agent", "--", "sh", "-c", "echo out; echo err >&2; exit 3"}},
		{"typed", "typed", "", 0, []string{"-i", "agent", "--", "cat"}},
		{"typed", "", "", 0, []string{"agent", "--", "cat"}},
		{"", "", "", 128 + 9, []string{"agent", "--", "sh", "-c", "kill -KILL $$"}},
	} {
		if out, said, code := run(tt.stdin, tt.args...); out != tt.stdout || said != tt.stderr || code != tt.code {
			t.Errorf("%q: %q, %q, %d; want %q, %q, %d", tt.args, out, said, code, tt.stdout, tt.stderr, tt.code)
		}
	}
	if _, said, code := run("", "agent", "--", "no-such-program"); code != 255 || !strings.Contains(said, "No such file") {
		t.Errorf("a program that is not there: %d, %q", code, said)
	}

	// The program ends with the command that wanted it.
	cmd := l.command("exec", "agent", "--", "sleep", "1234")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	counts := func(want string) {
		t.Helper()
		for end := time.Now().Add(bootTime); ; time.Sleep(100 * time.Millisecond) {
			out, _, _ := run("", "agent", "--", "sh", "-c", "ps | grep -c '[s]leep 1234'")
			if strings.TrimSpace(out) == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the guest has %s such programs, want %s", out, want)
			}
		}
	}
	counts("1")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	counts("0")
}
