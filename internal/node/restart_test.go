package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// systemd is the one method of systemd that is used, behind a real bus (org.freedesktop.systemd1(5)).
type systemd struct {
	conn      *godbus.Conn
	result    string // how jobs end
	restarted chan string
}

const managerPath, job = godbus.ObjectPath("/org/freedesktop/systemd1"), godbus.ObjectPath("/org/freedesktop/systemd1/job/1")

// RestartUnit is called by the bus.
func (s *systemd) RestartUnit(unit, mode string) (godbus.ObjectPath, *godbus.Error) {
	if mode != "replace" || !strings.HasSuffix(unit, ".service") {
		return "", godbus.MakeFailedError(fmt.Errorf("unit %q, mode %q", unit, mode))
	}
	s.restarted <- unit
	time.AfterFunc(20*time.Millisecond, func() { // the answer comes first
		_ = s.conn.Emit(managerPath, "org.freedesktop.systemd1.Manager.JobRemoved", uint32(1), job, unit, s.result)
	})
	return job, nil
}

// Subscribe is called by those who want to hear of jobs.
func (s *systemd) Subscribe() *godbus.Error { return nil }

// startSystemd starts a bus at the place where a node has it, with a systemd on it.
func startSystemd(t *testing.T, root, result string) *systemd {
	t.Helper()
	daemon, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("needs a bus: ", err)
	}
	socket := filepath.Join(root, systemdSockets[0])
	write(t, filepath.Join(root, "bus.conf"), `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=`+socket+`</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>`, 0o644)
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	bus := exec.Command(daemon, "--config-file="+filepath.Join(root, "bus.conf"), "--nofork", "--nopidfile")
	bus.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := bus.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = bus.Process.Kill()
		_ = bus.Wait()
	})
	s := &systemd{result: result, restarted: make(chan string, 1)}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if s.conn, err = dialSystemd(t.Context(), socket, true); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { s.conn.Close() })
	if err := s.conn.Export(s, managerPath, "org.freedesktop.systemd1.Manager"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.conn.RequestName("org.freedesktop.systemd1", godbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	return s
}

// systemd restarts the unit; what it does not do is said, with the command.
func TestRestart(t *testing.T) {
	needRoot(t)
	for _, result := range []string{"done", "failed"} {
		root := t.TempDir()
		s := startSystemd(t, root, result)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := restartUnit(ctx, root, "containerd.service")
		if unit := <-s.restarted; unit != "containerd.service" {
			t.Errorf("restarted %q", unit)
		}
		if result == "done" && err != nil || result == "failed" && (err == nil || !strings.Contains(err.Error(), `"failed"`)) {
			t.Errorf("systemd says %q: %v", result, err)
		}
	}
	if err := restartUnit(t.Context(), t.TempDir(), "crio.service"); err == nil || !strings.Contains(err.Error(), "systemctl restart crio") {
		t.Errorf("without systemd: %v", err)
	}
	if err := restartUnit(t.Context(), "/", "k3s.service or k3s-agent.service"); err == nil || !strings.Contains(err.Error(), "restart it yourself") {
		t.Errorf("k3s: %v", err)
	}
}
