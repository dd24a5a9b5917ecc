package cni

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

// ok is a plugin that does nothing well.
const ok = `cat >/dev/null; [ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0"}'`

// onAdd is ok but for ADD.
func onAdd(body string) string {
	return "cat >/dev/null\n[ $CNI_COMMAND = ADD ] || exit 0\n" + body
}

func TestAddOfBrokenPlugins(t *testing.T) {
	flood := `i=0; while [ $i -lt 80 ]; do printf '%065536d' 0; i=$((i+1)); done` // 5 MiB
	cases := map[string]struct {
		body    string
		version string // of the configuration; 1.0.0 if empty
		says    []string
		not     string
		code    uint // of a *types.Error
		is      error
	}{
		"exits 1 with nothing":  {body: `exit 1`, says: []string{"exit status 1", "printed nothing"}},
		"says it on stderr":     {body: `echo 'no daemon' >&2; exit 1`, says: []string{"printed nothing", "standard error: no daemon"}},
		"error JSON":            {body: `echo '{"code":7,"msg":"no subnet","details":"look at x"}'; exit 1`, says: []string{"no subnet; look at x", "code 7"}, code: 7},
		"try again":             {body: `echo '{"code":11,"msg":"busy"}'; exit 1`, says: []string{"busy", "again later"}, code: 11},
		"escapes in error JSON": {body: `printf '{"code":100,"msg":"a\\u001b[2Jb\\nc\\u202e"}'; exit 1`, says: []string{`a\x1b[2Jb\nc\u202e`}, not: "\x1b", code: 100},
		"long error JSON":       {body: `printf '{"code":100,"msg":"%020000d"}' 0; exit 1`, says: []string{"000..."}, code: 100},
		"error JSON, negative":  {body: `echo '{"code":-1,"msg":"x"}'; exit 1`, says: []string{"exit status 1", `{"code":-1`}},
		"garbage, exit 1":       {body: `printf '\033[31mpanic\377'; exit 2`, says: []string{"exit status 2", `\x1b[31mpanic\ufffd`}, not: "\x1b"},
		"killed":                {body: `kill -9 $$`, says: []string{"signal: killed"}},
		"garbage, exit 0":       {body: `echo hello`, says: []string{"cannot be used", "printed: hello"}},
		"nothing, exit 0":       {body: `exit 0`, says: []string{"cannot be used", "printed nothing"}},
		"stderr is no result":   {body: `echo '{"cniVersion":"1.0.0"}' >&2`, says: []string{"printed nothing"}},
		"two documents":         {body: `echo '{}{}'`, says: []string{"cannot be used"}},
		"array":                 {body: `echo '[]'`, says: []string{"cannot be used"}},
		"floods stdout":         {body: flood, says: []string{"more than 4194304 bytes"}},
		"floods and ignores it": {body: `trap '' PIPE; ` + flood + `; sleep 100`, says: []string{"more than 4194304 bytes"}},
		"floods stderr":         {body: `(` + flood + `; echo end) >&2; exit 1`, says: []string{"exit status 1", "0end"}},
		"result 0.2.0":          {body: `echo '{"cniVersion":"0.2.0","ip4":{"ip":"198.51.100.2/24"}}'`, says: []string{`"0.2.0"`, "0.3.0"}},
		"result 2.0.0":          {body: `echo '{"cniVersion":"2.0.0"}'`, says: []string{`"2.0.0"`}},
		"result version 1":      {body: `echo '{"cniVersion":1}'`, says: []string{"cniVersion"}},
		"null interface":        {body: `echo '{"interfaces":[null]}'`, says: []string{"interfaces", "null"}},
		"null IP, old":          {body: `echo '{"ips":[{"version":"4","address":"198.51.100.2/24"}, null ]}'`, version: "0.3.1", says: []string{"ips", "null"}},
		"null route":            {body: `echo '{"routes":[null]}'`, says: []string{"routes", "null"}},
		"ips is a string":       {body: `echo '{"ips":"x"}'`, says: []string{"ips"}},
		"ips is a number":       {body: `echo '{"ips":5}'`, says: []string{"ips"}},
		"address is wrong":      {body: `echo '{"ips":[{"address":"198.51.100.2"}]}'`, says: []string{"198.51.100.2"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r := scripted(t, map[string]string{"good": ok, "broken": onAdd(c.body)})
			if c.version == "" {
				c.version = "1.0.0"
			}
			a := chain(t, c.version, "good", "broken").Attachment("c1", here, "eth0")
			res, err := r.Add(t.Context(), a)
			if err == nil {
				t.Fatalf("gave %+v", res)
			}
			var pe *PluginError
			if !errors.As(err, &pe) || pe.Plugin != "broken" || pe.Verb != "ADD" || pe.Network != "net" {
				t.Errorf("%v is not about ADD of broken of net", err)
			}
			for _, s := range append(c.says, "ADD", `"net"`, `"broken"`) {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%v\ndoes not say %q", err, s)
				}
			}
			if c.not != "" && strings.Contains(err.Error(), c.not) {
				t.Errorf("%q holds %q", err.Error(), c.not)
			}
			if len(err.Error()) > 3*maxQuote {
				t.Errorf("%d bytes of error", len(err.Error()))
			}
			var te *types.Error
			if is := errors.As(err, &te); is != (c.code != 0) || is && (te.Code != c.code || strings.ContainsAny(te.Msg, "\x1b\n")) {
				t.Errorf("as a CNI error: %+v, want code %d", te, c.code)
			}
			if left, err := r.Cached(); len(left) > 0 || err != nil {
				t.Errorf("cached: %v, %v", left, err)
			}
		})
	}
}

func TestAddOfPluginsThatCannotStart(t *testing.T) {
	cases := map[string]struct {
		file string
		mode os.FileMode
		says []string
		is   error
	}{
		"missing":        {says: []string{"install"}, is: ErrMissing},
		"not executable": {file: "#!/bin/sh\n", mode: 0o644, says: []string{"not executable"}, is: ErrMissing},
		"no interpreter": {file: "#!/nowhere/sh\n", mode: 0o755, says: []string{"no such file"}, is: os.ErrNotExist},
		"no program":     {file: "\x7fELF", mode: 0o755, says: []string{"format"}, is: unix.ENOEXEC},
		"a folder":       {mode: os.ModeDir, is: ErrMissing},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			r := scripted(t, map[string]string{"last": "echo $CNI_COMMAND >>" + log + "; " + ok})
			path := filepath.Join(r.BinDirs[0], "first")
			switch {
			case c.mode.IsDir():
				if err := os.Mkdir(path, 0o755); err != nil {
					t.Fatal(err)
				}
			case c.mode != 0:
				if err := os.WriteFile(path, []byte(c.file), c.mode); err != nil {
					t.Fatal(err)
				}
			}
			_, err := r.Add(t.Context(), chain(t, "1.0.0", "first", "last").Attachment("c1", here, "eth0"))
			if !errors.Is(err, c.is) {
				t.Fatalf("%v, want %v", err, c.is)
			}
			for _, s := range append(c.says, `"first"`, r.BinDirs[0]) {
				if !strings.Contains(err.Error(), s) && !(s == r.BinDirs[0] && c.is != ErrMissing) {
					t.Errorf("%v\ndoes not say %q", err, s)
				}
			}
			if l := lines(t, log); len(l) != 0 {
				t.Errorf("nothing ran, but then %v", l)
			}
		})
	}
}

func TestTimeLimitKillsTheWholeGroup(t *testing.T) {
	dir := t.TempDir()
	pids, log := filepath.Join(dir, "pids"), filepath.Join(dir, "log")
	r := scripted(t, map[string]string{
		"hangs": `echo $CNI_COMMAND >>` + log + "\n" + onAdd(`sleep 1000 & echo $$ $! >`+pids+`; wait`),
	})
	r.Timeout = time.Second
	start := time.Now()
	_, err := r.Add(t.Context(), chain(t, "1.0.0", "hangs").Attachment("c1", here, "eth0"))
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("took %s", took)
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not the deadline", err)
	}
	for _, s := range []string{`ADD network "net": plugin "hangs": stopped`, "limit is 1s", "daemon"} {
		if err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("%v\ndoes not say %q", err, s)
		}
	}
	for _, pid := range lines(t, pids) {
		if !gone(t, pid) {
			t.Errorf("process %s lives on", pid)
		}
	}
	if got := strings.Join(lines(t, log), " "); got != "ADD DEL" {
		t.Errorf("verbs: %s, want a DEL after the ADD", got)
	}
}

// A process that left the group keeps the output open, and cannot be found by its group.
func TestEscapedGrandchildHoldsNothingUp(t *testing.T) {
	setsid, err := exec.LookPath("setsid")
	if err != nil {
		t.Skip("needs setsid (util-linux)")
	}
	for name, end := range map[string]string{"ends well": `echo '{}'`, "hangs": `sleep 1000`, "fails": `exit 1`} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "pid")
			r := scripted(t, map[string]string{
				"forks": onAdd(setsid + ` sh -c 'echo $$ >` + file + `; exec sleep 1000' & while ! [ -s ` + file + ` ]; do :; done; ` + end),
			})
			r.Timeout = 2 * time.Second
			t.Cleanup(func() { endProcess(t, await(t, file)) })
			start := time.Now()
			_, err := r.Add(t.Context(), chain(t, "1.0.0", "forks").Attachment("c1", here, "eth0"))
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
			if (err == nil) != (name == "ends well") {
				t.Error(err)
			}
		})
	}
}

// endProcess kills a process that the test itself started through a plugin.
func endProcess(t *testing.T, pid string) {
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Error(err)
	}
}

func TestBackgroundProcesses(t *testing.T) {
	for name, c := range map[string]struct {
		end   string
		lives bool
	}{
		"stays after a good end":           {`echo '{}'`, true},
		"goes with a plugin that was shot": {`kill -9 $$`, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "pid")
			r := scripted(t, map[string]string{"forks": onAdd(`sleep 1000 >/dev/null 2>&1 </dev/null & echo $! >` + file + `; ` + c.end)})
			_, err := r.Add(t.Context(), chain(t, "1.0.0", "forks").Attachment("c1", here, "eth0"))
			pid := await(t, file)
			if c.lives {
				defer endProcess(t, pid)
				if err != nil {
					t.Error(err)
				}
				if _, err := os.Stat("/proc/" + pid); err != nil {
					t.Errorf("a daemon was killed: %v", err)
				}
				return
			}
			if err == nil || !gone(t, pid) {
				t.Errorf("error %v, and process %s is there", err, pid)
			}
		})
	}
}

func TestCancelKillsAndUndoes(t *testing.T) {
	dir := t.TempDir()
	pid, log := filepath.Join(dir, "pid"), filepath.Join(dir, "log")
	r := scripted(t, map[string]string{
		"first": "echo first $CNI_COMMAND >>" + log + "\n" + ok,
		"hangs": "echo hangs $CNI_COMMAND >>" + log + "\n" + onAdd(`echo $$ >`+pid+`; exec sleep 1000`),
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if b, _ := os.ReadFile(pid); len(b) > 0 {
				break
			}
		}
		cancel()
	}()
	_, err := r.Add(ctx, chain(t, "1.0.0", "first", "hangs").Attachment("c1", here, "eth0"))
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if !gone(t, await(t, pid)) {
		t.Error("the plugin lives on")
	}
	if got := strings.Join(lines(t, log), " "); got != "first ADD hangs ADD hangs DEL first DEL" {
		t.Errorf("ran %s", got)
	}
	os.Remove(log)
	if _, err := r.Add(ctx, chain(t, "1.0.0", "first").Attachment("c2", here, "eth0")); !errors.Is(err, context.Canceled) {
		t.Errorf("ADD when cancelled already: %v", err)
	}
	if l := lines(t, log); len(l) != 0 {
		t.Errorf("ran %v when cancelled already", l)
	}
}

// Somebody installs the plugin at this moment.
func TestBusyProgramIsWaitedFor(t *testing.T) {
	r := scripted(t, map[string]string{"x": ok})
	f, err := os.OpenFile(filepath.Join(r.BinDirs[0], "x"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(250*time.Millisecond, func() { f.Close() })
	if _, err := r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment("c1", here, "eth0")); err != nil {
		t.Error(err)
	}
	stays, err := os.OpenFile(filepath.Join(r.BinDirs[0], "x"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer stays.Close()
	_, err = r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment("c2", here, "eth0"))
	if !errors.Is(err, syscall.ETXTBSY) {
		t.Errorf("a program that stays busy: %v", err)
	}
}

func TestStderrIsPassedOn(t *testing.T) {
	var got strings.Builder
	r := scripted(t, map[string]string{"x": `echo "[debug] $CNI_COMMAND" >&2; ` + ok})
	r.Stderr = &got
	if _, err := r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment("c1", here, "eth0")); err != nil {
		t.Fatal(err)
	}
	if got.String() != "[debug] ADD\n" {
		t.Errorf("passed on %q", got.String())
	}
	got.Reset()
	r = scripted(t, map[string]string{"x": `i=0; while [ $i -lt 80 ]; do printf '%065536d' 0; i=$((i+1)); done >&2; ` + ok})
	r.Stderr = &got
	if _, err := r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment("c1", here, "eth0")); err != nil {
		t.Fatal(err)
	}
	if got.Len() != maxStderr {
		t.Errorf("%d bytes passed on, want %d", got.Len(), maxStderr)
	}
}

// The plugin's host is the caller's thread, also when the caller did nothing to stay on it.
func TestPluginStartsInTheCallersNamespace(t *testing.T) {
	node := testnet.New(t, "node")
	file := filepath.Join(t.TempDir(), "ns")
	r := scripted(t, map[string]string{"x": `readlink /proc/self/ns/net >>` + file + `; ` + ok})
	add := func(id string) error {
		_, err := r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment(id, here, "eth0"))
		return err
	}
	node.Must(func() error { return add("c1") })
	if err := add("c2"); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(node.Path(), &st); err != nil {
		t.Fatal(err)
	}
	outside, err := os.Readlink(here)
	if err != nil {
		t.Fatal(err)
	}
	got := lines(t, file)
	if want := "net:[" + strconv.FormatUint(st.Ino, 10) + "]"; len(got) != 2 || got[0] != want || got[1] != outside {
		t.Errorf("ran in %v, want %s and %s", got, want, outside)
	}
}

func TestPluginDiesWithItsCaller(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	r := scripted(t, map[string]string{"x": onAdd(`echo $$ >` + file + `; exec sleep 1000`)})
	cmd := startCaller(t, r, chain(t, "1.0.0", "x").Attachment("c1", here, "eth0"))
	pid := await(t, file)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if !gone(t, pid) {
		t.Error("the plugin outlived its caller")
	}
}
