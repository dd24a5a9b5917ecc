package pods

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/test/guest"
)

// exec is `kubectl exec POD -- COMMAND`, and an exec probe.
func (p *pod) exec(id string, timeout int64, command ...string) (*cri.ExecSyncResponse, error) {
	return p.runtime.ExecSync(p.limit(), &cri.ExecSyncRequest{ContainerId: id, Cmd: command, Timeout: timeout})
}

// shell runs a line in the guest that ends with 0, and gives what it printed.
func (p *pod) shell(id, line string) string {
	p.t.Helper()
	r, err := p.exec(id, 0, "sh", "-c", line)
	if err != nil || r.ExitCode != 0 {
		p.t.Fatalf("%s: %v, %v", line, r, err)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// withAgent starts the guest's agent by its console, and waits until it answers.
func (p *pod) withAgent(id string) {
	p.t.Helper()
	p.attach(id, guest.Agent+"; echo agent-$((40+2))", "agent-42")
	p.eventually("the guest's agent answers", func() bool {
		r, err := p.exec(id, 0, "true")
		return err == nil && r.ExitCode == 0
	})
}

// Programs run in the guest through its agent, if it has one, and exec probes are such programs.
func TestExec(t *testing.T) {
	n := newNode(t)
	n.images(guest.Extra(t))
	before := n.state()
	p, err := n.runPod("web", nil)
	if err != nil {
		t.Fatal(err)
	}
	id := p.start("vm")
	p.report()
	if _, err := p.exec(id, 0, "true"); err == nil || !strings.Contains(err.Error(), "no QEMU guest agent runs") || !strings.Contains(err.Error(), "kubectl attach") {
		t.Errorf("without an agent: %v", err)
	}
	p.withAgent(id)

	r, err := p.exec(id, 0, "sh", "-c", "echo said; echo complained >&2; exit 3")
	if err != nil || r.ExitCode != 3 || string(r.Stdout) != "said\n" || string(r.Stderr) != "complained\n" {
		t.Errorf("got %v, %v", r, err)
	}
	if got := p.shell(id, "hostname; echo $PATH"); !strings.HasPrefix(got, "web\n/usr/local/sbin:") {
		t.Errorf("it runs in the guest, with the container's environment: %q", got)
	}
	if r, err := p.exec(id, 0, "no-such-program"); err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("a program that is not there: %v, %v", r, err)
	}
	if r, err := p.exec(id, 0, "sh", "-c", "kill -TERM $$"); err != nil || r.ExitCode != 128+15 {
		t.Errorf("a program that a signal ends: %v, %v", r, err)
	}
	if r, err := p.exec(id, 0, "sh", "-c", "yes | head -c 3000000"); err != nil || !bytes.Equal(r.Stdout, bytes.Repeat([]byte("y\n"), 1500000)) {
		t.Errorf("3 MB of output: %d bytes, %v", len(r.GetStdout()), err)
	}

	// A probe that takes too long is killed, in the guest.
	_, err = p.exec(id, 2, "sleep", "1234")
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a probe that takes too long: %v", err)
	}
	if left := p.shell(id, "ps | grep -c '[s]leep 1234' || true"); left != "0" {
		t.Errorf("%s of it goes on in the guest", left)
	}
	p.pipes(id)

	// An agent that ends and is started anew; what was said to the one before is forgotten.
	p.attach(id, "while kill $(cat /run/qemu-ga.pid) 2>/dev/null; do sleep 1; done; echo gone-$((40+2))", "gone-42")
	var said error
	defer func() { t.Logf("exec without an agent has said: %v", said) }()
	p.eventually("exec says that there is no agent", func() bool {
		_, said = p.exec(id, 0, "true")
		return said != nil && strings.Contains(said.Error(), "no QEMU guest agent runs")
	})
	p.withAgent(id)
	if got := p.shell(id, "echo $((40+2))"); got != "42" {
		t.Errorf("after another start of the agent: %q", got)
	}
	p.balloons(id)

	// The guest ends under a program.
	ended := make(chan *cri.ExecSyncResponse, 1)
	go func() {
		r, err := p.exec(id, 0, "sh", "-c", "touch /run/here; sleep 1234")
		if err != nil {
			t.Error("a program whose guest ends: ", err)
		}
		ended <- r
	}()
	p.eventually("the program runs", func() bool { return p.shell(id, "ls /run | grep -c here || true") == "1" })
	if _, err := n.runtime.StopContainer(n.limit(), &cri.StopContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	select {
	case r := <-ended:
		if r.GetExitCode() != 128+9 {
			t.Errorf("a program whose guest ends: %v", r)
		}
	case <-time.After(patience):
		t.Error("a program outlives its guest")
	}
	p.remove(before)
}

// pipes runs a program with input, which it has wholly.
func (p *pod) pipes(id string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	fifos := filepath.Join(p.dir, "fifos")
	if err := os.MkdirAll(fifos, 0o755); err != nil {
		p.t.Fatal(err)
	}
	input := bytes.Repeat([]byte("0123456789\n"), 20000)
	cmd := exec.CommandContext(ctx, p.bin+"/ctr", "-a", p.root("/run/containerd/containerd.sock"), "-n", "k8s.io",
		"tasks", "exec", "--exec-id", "piped", "--fifo-dir", fifos, id, "sh", "-c", "wc -c; exit 4")
	cmd.Stdin = bytes.NewReader(input)
	var said strings.Builder // containerd 2.4 warns there of cgroup v1
	cmd.Stderr = &said
	out, err := cmd.Output()
	if strings.TrimSpace(string(out)) != fmt.Sprint(len(input)) || cmd.ProcessState.ExitCode() != 4 {
		p.t.Errorf("a program with input: %q, %v, %s", out, err, &said)
	}
}

// balloons takes memory from the guest, and gives it back.
func (p *pod) balloons(id string) {
	p.t.Helper()
	free := func() (kib int) {
		_, err := fmt.Sscan(p.shell(id, "sed -n 's/^MemFree: *//p' /proc/meminfo"), &kib)
		if err != nil {
			p.t.Fatal(err)
		}
		return kib
	}
	update := func(mib int64) {
		p.t.Helper()
		_, err := p.runtime.UpdateContainerResources(p.limit(), &cri.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: mib << 20},
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
	const taken = 64 << 10 // KiB
	was := free()
	update(128) // of 192
	p.eventually("the guest gives memory", func() bool { return free() < was-taken/2 })
	low := free()
	update(1 << 20)
	p.eventually("the guest gets memory back, as much as it had", func() bool { return free() > low+taken/2 })
}
