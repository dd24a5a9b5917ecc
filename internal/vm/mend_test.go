package vm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/testnet"
)

// end kills a VM, waits for its end, and fails on what could not be undone.
func end(t *testing.T, v *VM) {
	t.Helper()
	if err := v.Kill(); err != nil {
		t.Error(err)
	}
	if e, err := v.Wait(); err != nil || e.Reason != Killed {
		t.Errorf("end %+v, %v", e, err)
	}
}

func TestRemovedAtItsEnd(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "brief")
	cfg.Remove = true
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	end(t, v)
	if _, err := s.Get("brief"); !errors.Is(err, ErrNotFound) {
		t.Errorf("state after the end: %v", err)
	}
	nothingLeft(t, s, before)
}

// What could not be undone at the end is known, seen, and undone by gc, which leaves the logs where they are.
func TestUndoFailsAtTheEnd(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "sticky")
	cfg.Remove = true // but not with something left
	mark := filepath.Join(t.TempDir(), "ready")
	scripted(t, &cfg, "firewall", `[ $CNI_COMMAND = ADD ] || [ -e `+mark+` ] || { echo '{"code":100,"msg":"datastore down"}'; exit 1; }
exec `+testnet.Plugins(t)+`/firewall`)
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	v.Kill()
	if _, err := v.Wait(); err == nil || !strings.Contains(err.Error(), "datastore down") {
		t.Errorf("the end hides that a plugin failed: %v", err)
	}
	st, err := s.Get("sticky")
	if err != nil || st.Status != Stopped || !strings.Contains(st.Left, "datastore down") {
		t.Errorf("state %s, left %q, %v", st.Status, st.Left, err)
	}
	if err := s.Remove(context.Background(), "sticky", false); err == nil || !strings.Contains(err.Error(), "virtlet gc") {
		t.Errorf("rm: %v", err)
	}
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) == 0 {
		t.Errorf("gc: %v, %v", found, err)
	}
	if st, err := s.Get("sticky"); err != nil || st.Status != Stopped || st.Left != "" {
		t.Errorf("after gc: %s, left %q, %v", st.Status, st.Left, err)
	}
	if _, err := os.Stat(s.data("sticky", consoleLog)); err != nil {
		t.Errorf("gc took the log of a VM that has stopped: %v", err)
	}
	if found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) > 0 {
		t.Errorf("second gc: %v, %v", found, err)
	}
	if err := s.Remove(context.Background(), "sticky", false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}

// Who looks with another --run-dir sees that the VM lives all the same.
func TestCleanWithAnotherRunDirectory(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "lives")
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	other := Store{Run: s.Run + "-other", Data: s.Data}
	if found, err := other.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) > 0 {
		t.Errorf("gc: %v, %v", found, err)
	}
	if err := other.Remove(context.Background(), "lives", false); !errors.Is(err, ErrRunning) {
		t.Errorf("rm: %v", err)
	}
	if st, err := s.Get("lives"); err != nil || st.Status != Running || !netns.Exists(st.NetNS) {
		t.Errorf("state %s, %v", st.Status, err)
	}
	end(t, v)
}

func TestDirectoriesThatCannotBeUsed(t *testing.T) {
	s := testStore(t)
	same := Store{Run: s.Data, Data: s.Data}
	var wrong *ConfigError
	if _, err := same.create("web"); !errors.As(err, &wrong) {
		t.Errorf("one directory for both: %v", err)
	}
	if err := os.MkdirAll(s.run("web"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.create("web"); err == nil || !strings.Contains(err.Error(), s.run("web")) {
		t.Errorf("somebody else's run directory: %v", err)
	}
	if _, err := os.Stat(s.run("web")); err != nil {
		t.Errorf("it was removed: %v", err)
	}
	if names, err := s.names(); err != nil || len(names) > 0 {
		t.Errorf("left: %v, %v", names, err)
	}
}

// killed makes a VM whose supervisor was killed while it ran.
func killed(t *testing.T, s Store, cfg Config) {
	t.Helper()
	cmd := supervisor(t, order{Store: s, Config: cfg})
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

func TestUnreadableJournal(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "torn")
	before := machineState(t, s)
	killed(t, s, cfg)
	if err := os.WriteFile(s.data("torn", "journal.json"), []byte(`{"netns":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err == nil || !strings.Contains(err.Error(), "virtlet rm -f torn") {
		t.Errorf("gc: %v, want one that says what to do", err)
	}
	if st, err := s.Get("torn"); err != nil || st.Status != Dead {
		t.Errorf("after gc: %s, %v", st.Status, err)
	}
	if err := s.Remove(context.Background(), "torn", true); err == nil || !strings.Contains(err.Error(), "without its journal") {
		t.Errorf("rm -f: %v, want one that says what may be left", err)
	}
	if found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) > 0 && found[0].VM != "" {
		t.Errorf("gc of what is cached: %v, %v", found, err)
	}
	nothingLeft(t, s, before)
}

// One file of libcni's cache that cannot be read keeps gc from nothing else.
func TestUnreadableCache(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "dead")
	before := machineState(t, s)
	killed(t, s, cfg)
	bad := filepath.Join(s.cniCache(), "results", "virtlet-0000000000000000-eth0")
	if err := os.WriteFile(bad, []byte(`{"kind":`), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins})
	if err == nil || !strings.Contains(err.Error(), filepath.Base(bad)) {
		t.Errorf("gc: %v, want one that names the file", err)
	}
	if !slices.ContainsFunc(found, func(l Leftover) bool { return l.VM == "dead" }) {
		t.Errorf("found %v", found)
	}
	if _, err := s.Get("dead"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the dead VM is still there: %v", err)
	}
	if err := os.Remove(bad); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s, before)
}

// The ports of a dead VM are mapped until somebody cleans up.
func TestPortsOfADeadVM(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "dead")
	cfg.Networks[0].CapabilityArgs["portMappings"] = []PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	before := machineState(t, s)
	killed(t, s, cfg)
	next := cfg
	next.Name = "next"
	if v, err := Start(context.Background(), s, next, nil); err == nil {
		end(t, v)
		t.Error("two VMs have one port")
	} else if !strings.Contains(err.Error(), `"dead"`) {
		t.Errorf("start: %v", err)
	}
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil {
		t.Error(err)
	}
	v, err := Start(context.Background(), s, next, nil)
	if err != nil {
		t.Fatal(err)
	}
	end(t, v)
	if err := s.Remove(context.Background(), "next", false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}

// A namespace that was somebody's is put back even when its path has gone meanwhile.
func TestPathOfTheNamespaceIsGone(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "pathless")
	pod := testnet.New(t, "lent")
	pod.MustRun("sh", "-c", "ip link set lo up; ip link add eth0 type veth peer name far; ip addr add 198.51.100.2/24 dev eth0; ip link set far up; ip link set eth0 up")
	was := pod.MustRun("ip", "-4", "-o", "addr")
	cfg.Networks, cfg.NetNS = nil, pod.Path()
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if during := pod.MustRun("ip", "-4", "-o", "addr"); during == was {
		t.Errorf("the namespace kept its address:\n%s", during)
	}
	if err := netns.Remove(pod.Path()); err != nil {
		t.Fatal(err)
	}
	end(t, v)
	if now := pod.MustRun("ip", "-4", "-o", "addr"); now != was {
		t.Errorf("before:\n%s\nafter:\n%s", was, now)
	}
}

// A QEMU that hangs does not hear the power button, and nobody waits for it longer than asked.
func TestPowerButtonOfAHangingQEMU(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "hangs")
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(v.proc.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	pressed := make(chan struct{})
	go func() { v.Powerdown(); v.Powerdown(); close(pressed) }()
	select {
	case <-pressed:
	case <-time.After(30 * time.Second):
		t.Error("Powerdown waits for a QEMU that hangs")
	}
	end(t, v)
}

// A bridge plugin that was killed in the midst of ADD may leave a bridge without a MAC, on which it would fail ever after.
func TestBridgeWithoutMAC(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "bridge")
	exec.Command("ip", "link", "del", embeddedBridge).Run() // another test's
	for _, args := range []string{
		"link add " + embeddedBridge + " type bridge", "link add port0 type veth peer name port1",
		"link set port0 master " + embeddedBridge, "link del port0",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	if out, _ := exec.Command("ip", "-br", "link", "show", "dev", embeddedBridge).Output(); !strings.Contains(string(out), "00:00:00:00:00:00") {
		t.Fatalf("the bridge has a MAC: %s", out)
	}
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	end(t, v)
	if err := s.Remove(context.Background(), cfg.Name, false); err != nil {
		t.Error(err)
	}
}
