package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// run runs a program of the node as it would run there, and gives what it prints.
func (t *tree) run(ctx context.Context, program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + strings.Join(servicePath, ":")}
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	if t.Root != "/" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: t.Root}
	}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr[:min(len(exit.Stderr), 500)])))
	}
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", strings.Join(append([]string{program}, args...), " "), err)
	}
	return out, nil
}

var versionRE = regexp.MustCompile(`\bv?([0-9]+\.[0-9]+(?:\.[0-9]+)*)`)

// version asks a program of the node for its version, such as "7.2.22".
func (t *tree) version(ctx context.Context, program string) (string, error) {
	out, err := t.run(ctx, program, "--version")
	if err != nil {
		return "", err
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it said %q", program, out[:min(len(out), 200)])
	}
	return string(m[1]), nil
}

// tryOut asks the node's containerd what it makes of a configuration that is about to be changed: it has to have all the
// handlers that it had, the same default, and ours. The note says why it was not asked.
func (t *tree) tryOut(ctx context.Context, f found, p planned) (note string, err error) {
	i := slices.IndexFunc(p.steps, func(s step) bool { return s.path == f.config && s.before != nil && s.after != nil })
	if f.manager != Containerd || i < 0 {
		return "", nil
	}
	if f.program == "" {
		return "containerd was not asked whether it takes the configuration, as the program was not found", nil
	}
	had, err := t.dump(ctx, f.program, f.config)
	if err != nil {
		return fmt.Sprintf("containerd was not asked whether it takes the configuration: %v", err), nil
	}
	const candidate = stateDir + "/candidate.toml"
	if err := t.mkdirAll(stateDir); err != nil {
		return "", err
	}
	if err := t.root.WriteFile(rel(candidate), p.steps[i].after, 0o600); err != nil {
		return "", err
	}
	has, err := t.dump(ctx, f.program, candidate)
	if err := errors.Join(err, t.root.Remove(rel(candidate))); err != nil {
		return "", fmt.Errorf("ask containerd whether it takes the configuration: %w", err)
	}
	want := slices.Sorted(maps.Keys(had.runtimes()))
	if !slices.Contains(want, Handler) {
		want = append(want, Handler)
		slices.Sort(want)
	}
	const key = "default_runtime_name"
	before, after := table(had.all, "plugins", had.plugin(), "containerd")[key], table(has.all, "plugins", has.plugin(), "containerd")[key]
	if got := slices.Sorted(maps.Keys(has.runtimes())); !slices.Equal(got, want) || before != after {
		return "", fmt.Errorf("configure %s: containerd would have the handlers %q (default %v), and not %q (default %v): nothing was changed; add the handler yourself", f.config, got, after, want, before)
	}
	return "", nil
}

// dump gives a configuration as containerd understands it.
func (t *tree) dump(ctx context.Context, program, config string) (containerdConfig, error) {
	out, err := t.run(ctx, program, "--config", config, "config", "dump")
	if err != nil {
		return containerdConfig{}, err
	}
	return parseContainerd(out)
}

// The sockets of systemd: its bus, and its own, which only root may use and which needs no bus.
var systemdSockets = []string{"/run/dbus/system_bus_socket", "/run/systemd/private"}

// restartUnit has systemd restart a unit, and waits until it has.
func restartUnit(ctx context.Context, root, unit string) error {
	fail := func(err error) error {
		return fmt.Errorf("restart %s: %w: restart it yourself (systemctl restart %s)", unit, err, strings.TrimSuffix(unit, ".service"))
	}
	if strings.Contains(unit, " ") {
		return fail(errors.New("that would restart more than the container manager"))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var errs []error
	for i, socket := range systemdSockets {
		conn, err := dbus.NewConnection(func() (*godbus.Conn, error) { return dialSystemd(ctx, filepath.Join(root, socket), i == 0) })
		if err != nil {
			errs = append(errs, fmt.Errorf("connect to systemd by %s: %w", socket, err))
			continue
		}
		defer conn.Close()
		result := make(chan string, 1)
		if _, err = conn.RestartUnitContext(ctx, unit, "replace", result); err != nil {
			errs = append(errs, err)
			var e godbus.Error
			if errors.As(err, &e) && e.Name == "org.freedesktop.DBus.Error.AccessDenied" { // by AppArmor, on the bus
				continue
			}
			break
		}
		select {
		case r := <-result:
			if r != "done" { // org.freedesktop.systemd1(5), JobRemoved
				return fail(fmt.Errorf("systemd says %q", r))
			}
			return nil
		case <-ctx.Done():
			return fail(ctx.Err())
		}
	}
	return fail(errors.Join(errs...))
}

func dialSystemd(ctx context.Context, socket string, bus bool) (*godbus.Conn, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, err
	}
	conn, err := godbus.Dial("unix:path="+godbus.EscapeBusAddressValue(socket), godbus.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	err = conn.Auth([]godbus.Auth{godbus.AuthExternal(strconv.Itoa(os.Getuid()))})
	if err == nil && bus {
		err = conn.Hello()
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// serving is a container manager that runs.
type serving struct {
	name, version string
	handlers      []string // nil: it does not tell
	shim          string   // the path of our handler's; "": it does not tell, or it is the one in its PATH
}

// has says whether our handler is in use, with a shim, as far as it tells.
func (s serving) has(shim string) bool {
	return slices.Contains(s.handlers, Handler) && (s.shim == "" || s.shim == shim)
}

// ask asks the manager that listens on a socket of the node by CRI, as the kubelet does.
func (t *tree) ask(ctx context.Context, socket string) (serving, error) {
	conn, err := grpc.NewClient("unix://"+t.host(socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return serving{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := cri.NewRuntimeServiceClient(conn)
	v, err := client.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return serving{}, err
	}
	s := serving{name: v.RuntimeName, version: v.RuntimeVersion}
	st, err := client.Status(ctx, &cri.StatusRequest{Verbose: true})
	if err != nil {
		return s, err
	}
	for _, h := range st.RuntimeHandlers { // containerd 2.x, CRI-O 1.31
		s.handlers = append(s.handlers, h.Name)
	}
	var config struct { // containerd, also before
		Containerd struct {
			Runtimes map[string]struct {
				Path string `json:"runtimePath"`
			} `json:"runtimes"`
		} `json:"containerd"`
	}
	if text := st.Info["config"]; json.Unmarshal([]byte(text), &config) == nil && len(config.Containerd.Runtimes) > 0 {
		s.shim = config.Containerd.Runtimes[Handler].Path
		if s.handlers == nil {
			s.handlers = slices.Sorted(maps.Keys(config.Containerd.Runtimes))
		}
	}
	return s, nil
}

// awaitHandler waits until the manager that was restarted answers, with the handler or without.
func (t *tree) awaitHandler(ctx context.Context, m Manager, want bool) error {
	socket := containerds[len(containerds)-1].socket
	if m == CRIO {
		socket = crio.socket
	}
	for {
		s, err := t.ask(ctx, socket)
		switch {
		case err == nil && (s.handlers == nil || slices.Contains(s.handlers, Handler) == want):
			return nil
		case err == nil:
			err = fmt.Errorf("it has the handlers %q", s.handlers)
		}
		select {
		case <-time.After(200 * time.Millisecond): // there is nothing to be told by
		case <-ctx.Done():
			return fmt.Errorf("await %s after its restart: %w: look into its journal (journalctl -u %s)", m, err, m)
		}
	}
}
