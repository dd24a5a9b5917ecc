package cni

import (
	"bytes"
	"context"
	"encoding/json"
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
	"time"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

const (
	maxStdout = 4 << 20         // a result; real ones are some KiB
	maxStderr = 1 << 20         // of one call, passed on to Runtime.Stderr
	maxQuote  = 4 << 10         // of what a plugin printed, kept for an error
	waitDelay = 2 * time.Second // for pipes that a plugin's own children hold after its end
)

// ErrMissing says that no searched directory has a plugin.
var ErrMissing = errors.New("plugin is missing")

// errTooMuch says that a plugin printed more than maxStdout bytes.
var errTooMuch = fmt.Errorf("it printed more than %d bytes", maxStdout)

// PluginError is the failure of one plugin. Err holds what the plugin reported, a *types.Error, if it did; the
// context's error if the plugin was killed; [ErrMissing]; an *exec.ExitError or what the kernel said otherwise.
type PluginError struct {
	Network string
	Verb    string // ADD, DEL, CHECK, GC or STATUS
	Plugin  string // the type, which is the program's name
	Stderr  string // the end of what it printed there; control characters are escaped
	Err     error
}

func (e *PluginError) Error() string {
	s := fmt.Sprintf("%s network %q: plugin %q: %v", e.Verb, e.Network, e.Plugin, e.Err)
	var te *types.Error
	if errors.As(e.Err, &te) {
		s += fmt.Sprintf(" (code %d)", te.Code)
		if te.Code == types.ErrTryAgainLater {
			s += "; try again later"
		}
	}
	if e.Stderr != "" {
		s += fmt.Sprintf("; standard error: %s", e.Stderr)
	}
	return s
}

// Unwrap gives the cause.
func (e *PluginError) Unwrap() error { return e.Err }

// runner is libcni's way to run plugins for one verb on one network. A plugin is a child of the calling thread: it
// starts in that thread's network namespace, which stands for the host, and dies with that thread.
type runner struct {
	version.PluginDecoder
	network, verb string
	version       string        // of the configuration
	each          time.Duration // limit of one plugin; 0: only the context's
	stderr        io.Writer
	started       bool // a plugin has run, so there may be something to undo
}

// FindInPath gives the program of a plugin.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	path, err := find(plugin, dirs)
	if err != nil {
		return "", &PluginError{Network: r.network, Verb: r.verb, Plugin: plugin, Err: err}
	}
	return path, nil
}

// ExecPlugin runs a plugin until it ends, ctx is done, or it prints too much, and gives its standard output.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	// Pdeathsig is sent when the thread that forked ends, and the namespace to fork in is this thread's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if r.each > 0 {
		var cancel context.CancelFunc
		ctx, cancel = withLimit(ctx, r.each)
		defer cancel()
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	stdout := &head{full: func() { stop(errTooMuch) }}
	stderr := &tail{next: r.stderr}
	// Somebody who installs or updates the plugin at this moment has it open for writing. There is no event to wait
	// for.
	const tries, pause = 10, 100 * time.Millisecond
	var err error
	for try := range tries {
		cmd := command(ctx, path, environ)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
		if err = cmd.Start(); err == nil {
			r.started = true
			err = wait(cmd)
		}
		if !errors.Is(err, syscall.ETXTBSY) || try == tries-1 || !sleep(ctx, pause) {
			break
		}
	}
	out := stdout.buf.Bytes()
	if err != nil {
		err = explain(ctx, err, out)
	} else if r.verb == "ADD" {
		out, err = r.result(out)
	}
	if err != nil {
		return nil, &PluginError{
			Network: r.network, Verb: r.verb, Plugin: filepath.Base(path), Stderr: printable(string(stderr.buf), maxQuote), Err: err,
		}
	}
	return out, nil
}

// command is the program with a process group of its own, so that all of it can be killed, and the terminal's Ctrl-C
// reaches it through ctx only.
func command(ctx context.Context, path string, environ []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environ
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }
	cmd.WaitDelay = waitDelay
	return cmd
}

// wait is cmd.Wait that also ends the children of a plugin that was killed, by us or by anybody: an IPAM plugin that
// goes on alone could take an address after the DEL that was to free it.
func wait(cmd *exec.Cmd) error {
	pid := cmd.Process.Pid
	var info unix.Siginfo
	for {
		// WNOWAIT leaves the process there, so that nothing else can have its number when the group is killed.
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	const exited = 1 // CLD_EXITED of <asm-generic/siginfo.h>; the others mean a signal
	if info.Code != exited {
		_ = killGroup(pid) // only its own zombie may be left in it
	}
	err := cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		// It ended well and a process that it left holds its output; all that it printed itself has been read.
		return nil
	}
	return err
}

func killGroup(pid int) error {
	if err := unix.Kill(-pid, unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
		return err
	}
	return os.ErrProcessDone
}

// explain makes the reason out of how a plugin ended and what it printed. err is what Start or Wait gave.
func explain(ctx context.Context, err error, stdout []byte) error {
	if ctx.Err() != nil {
		return fmt.Errorf("stopped: %w", context.Cause(ctx))
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("run it: %w", err)
	}
	var te types.Error
	if json.Unmarshal(stdout, &te) == nil && (te.Msg != "" || te.Code != 0) {
		te.Msg, te.Details = printable(te.Msg, maxQuote), printable(te.Details, maxQuote)
		return &te
	}
	return fmt.Errorf("%w and %s", err, quoted(stdout))
}

// result checks what ADD printed and fills in a missing version, which stands for the configuration's. libcni takes
// nearly anything.
func (r *runner) result(out []byte) ([]byte, error) {
	unusable := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("its result cannot be used: %w; it %s", err, quoted(out))
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(out, &raw); err != nil {
		return unusable(err)
	}
	if raw == nil {
		raw = map[string]json.RawMessage{} // null: a plugin without anything to say
	}
	var v string
	if err := json.Unmarshal(raw["cniVersion"], &v); raw["cniVersion"] != nil && err != nil {
		return unusable(fmt.Errorf("field \"cniVersion\": %w", err))
	}
	if v == "" {
		v = r.version
		raw["cniVersion"], _ = json.Marshal(v)
	}
	if !slices.Contains(versions, v) {
		return unusable(fmt.Errorf("CNI version %q is none of %s", printable(v, 64), strings.Join(versions, ", ")))
	}
	for _, key := range []string{"interfaces", "ips", "routes"} {
		var list []json.RawMessage
		if err := json.Unmarshal(raw[key], &list); raw[key] != nil && err != nil {
			return unusable(fmt.Errorf("field %q: %w", key, err))
		}
		if slices.ContainsFunc(list, func(m json.RawMessage) bool { return string(m) == "null" }) {
			return unusable(fmt.Errorf("field %q has a null entry", key)) // would be a nil pointer in every reader
		}
	}
	fixed, err := json.Marshal(raw)
	if err == nil {
		_, err = create.Create(v, fixed)
	}
	if err != nil {
		return unusable(err)
	}
	return fixed, nil
}

// find gives the program of a plugin, or an ErrMissing that names the searched directories.
func find(plugin string, dirs []string) (string, error) {
	var errs []string
	for _, d := range dirs {
		path := filepath.Join(d, plugin)
		st, err := os.Stat(path)
		if err != nil || !st.Mode().IsRegular() {
			continue
		}
		if st.Mode()&0o111 != 0 {
			return path, nil
		}
		errs = append(errs, path+" is not executable")
	}
	searched := "no directory to search was given"
	if len(dirs) > 0 {
		searched = "searched " + strings.Join(dirs, ", ") + "; install it there"
	}
	return "", fmt.Errorf("%w: %s", ErrMissing, strings.Join(append(errs, searched), "; "))
}

// withLimit is a context that ends after d and says so.
func withLimit(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	cause := fmt.Errorf("%w: its time limit is %s; look after the network's daemon if it has one, or give more time", context.DeadlineExceeded, d)
	return context.WithTimeoutCause(ctx, d, cause)
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// head keeps the first maxStdout bytes and calls full when there are more.
type head struct {
	buf  bytes.Buffer
	full func()
}

func (h *head) Write(p []byte) (int, error) {
	if h.buf.Len()+len(p) > maxStdout {
		h.full()
		return 0, errTooMuch
	}
	return h.buf.Write(p)
}

// tail keeps the last maxQuote bytes and passes the first maxStderr on.
type tail struct {
	buf    []byte
	next   io.Writer
	passed int
}

func (t *tail) Write(p []byte) (int, error) {
	if n := min(len(p), maxStderr-t.passed); t.next != nil && n > 0 {
		t.passed += n
		_, _ = t.next.Write(p[:n]) // a lost message is no reason to fail the plugin
	}
	t.buf = append(t.buf, p...)
	t.buf = t.buf[max(0, len(t.buf)-maxQuote):]
	return len(p), nil
}

func quoted(out []byte) string {
	if len(bytes.TrimSpace(out)) == 0 {
		return "printed nothing"
	}
	return "printed: " + printable(string(out[:min(len(out), maxQuote+1)]), maxQuote)
}

// printable is s without line ends around it, cut to max bytes, with all that could steer a terminal escaped.
func printable(s string, max int) string {
	s = strings.TrimSpace(s)
	var b strings.Builder
	for _, r := range s {
		if b.Len() >= max {
			return b.String() + "..."
		}
		if r == unicode.ReplacementChar || r != ' ' && !unicode.IsPrint(r) {
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
