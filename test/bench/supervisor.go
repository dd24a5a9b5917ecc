package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// supervisors are how many VMs of each datapath run at once while their memory is read.
const supervisors = 3

// supervisorRest is how long they then have nothing to do.
const supervisorRest = 3 * time.Second

// supervisorMemory is the memory of VMs that have nothing to do, in MiB: of the bench's own guest little is needed.
const supervisorMemory = 192

// supervised is what the processes of `virtlet run` and their QEMUs have, of a datapath, in bytes.
type supervised struct {
	Datapath string  `json:"datapath"`
	RSS      spread  `json:"rss"`     // of a supervisor
	Largest  float64 `json:"largest"` // of them
	PSS      spread  `json:"pss"`     // its part where pages are shared with other processes
	QEMU     spread  `json:"qemu"`    // resident, the guest's memory and TCG's code included
}

// supervisor is a running `virtlet run` with a guest that boots.
type supervisor struct {
	datapath string
	name     string
	pid      int
	booted   chan struct{} // closed when the guest's shell has its prompt
	ended    chan error
}

// measureSupervisors boots VMs by the real command, all at once, and reads what their processes have at rest.
func measureSupervisors(o options, say func(string, ...any)) (all []supervised, err error) {
	dir, err := os.MkdirTemp("", "virtlet-bench-")
	if err != nil {
		return nil, err
	}
	var running []*supervisor
	defer func() {
		for _, s := range running {
			err = errors.Join(err, s.end())
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	line, err := writeNetwork(o, dir)
	if err != nil {
		return nil, err
	}
	for _, w := range timedWays() {
		for i := range supervisors {
			s := &supervisor{datapath: w.name, name: fmt.Sprintf("%s-%d", w.wish, i), booted: make(chan struct{}), ended: make(chan error, 1)}
			if err := s.start(o, dir, string(w.wish), line); err != nil {
				return nil, fmt.Errorf("start %s: %w", s.name, err)
			}
			running = append(running, s)
		}
	}
	for _, s := range running {
		select {
		case <-s.booted:
		case err := <-s.ended:
			return nil, fmt.Errorf("%s has ended: %w", s.name, err)
		case <-time.After(guestPatience):
			return nil, fmt.Errorf("%s has not booted within %s", s.name, guestPatience)
		}
	}
	time.Sleep(supervisorRest)
	for _, w := range timedWays() {
		c, err := supervisedBy(w.name, dir, running)
		if err != nil {
			return nil, err
		}
		say("%d supervisors, %s: %.1f MB resident, %.1f in proportion; QEMU %.0f MB", supervisors, w.name, c.RSS.Median/1e6, c.PSS.Median/1e6, c.QEMU.Median/1e6)
		all = append(all, c)
	}
	return all, nil
}

// supervisedBy reads the memory of the supervisors of a datapath.
func supervisedBy(datapath, dir string, running []*supervisor) (supervised, error) {
	c := supervised{Datapath: datapath}
	var rss, pss, qemus []float64
	for _, s := range running {
		if s.datapath != datapath {
			continue
		}
		own, err := residentOf(fmt.Sprint(s.pid))
		if err != nil {
			return c, err
		}
		pid, err := s.qemu(dir)
		if err != nil {
			return c, err
		}
		qemu, err := residentOf(fmt.Sprint(pid))
		if err != nil {
			return c, err
		}
		rss, pss, qemus = append(rss, float64(own.RSS)), append(pss, float64(own.PSS)), append(qemus, float64(qemu.RSS))
		c.Largest = max(c.Largest, float64(own.RSS))
	}
	c.RSS, c.PSS, c.QEMU = newSpread(rss), newSpread(pss), newSpread(qemus)
	return c, nil
}

// network is a CNI network of the bench's own, in its own namespace.
const network = `{"cniVersion": "1.0.0", "name": "bench", "plugins": [{"type": "bridge", "bridge": "bench0",
	"isGateway": true, "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "198.51.100.0/24"}]]}}]}`

// writeNetwork makes the network's configuration, for all of them, and gives the command line of the guest's kernel.
func writeNetwork(o options, dir string) (line string, err error) {
	b, err := os.ReadFile(filepath.Join(o.guest, "cmdline"))
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, "net.d"), 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "net.d", "bench.conflist"), fmt.Appendf(nil, network, filepath.Join(dir, "ipam")), 0o644)
	}
	return strings.TrimSpace(string(b)), err
}

// start runs the command, as a user would.
func (s *supervisor) start(o options, dir, datapath, line string) error {
	cmd := exec.Command(o.virtlet, "--run-dir", filepath.Join(dir, "run"), "--data-dir", filepath.Join(dir, "data"),
		"run", "--rm", "--name", s.name, "--accel", "tcg", "--memory", fmt.Sprint(supervisorMemory), "--datapath", datapath,
		"--cni-conf-dir", filepath.Join(dir, "net.d"), "--cni-bin-dir", o.plugins,
		"--kernel", filepath.Join(o.guest, "vmlinuz"), "--initrd", filepath.Join(o.guest, "initrd"), "--append", line)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &awaited{text: prompt, seen: func() { close(s.booted) }}, &said
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL} // and QEMU ends with it
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the death signal is that of the thread, which ends with this
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if err := cmd.Wait(); err != nil {
			s.ended <- fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
		}
		close(s.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	s.pid = cmd.Process.Pid
	return nil
}

// qemu gives the process of the VM's QEMU.
func (s *supervisor) qemu(dir string) (int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "run", s.name, "state.json"))
	if err != nil {
		return 0, err
	}
	var st struct{ QEMU struct{ PID int } }
	if err := json.Unmarshal(b, &st); err != nil || st.QEMU.PID == 0 {
		return 0, fmt.Errorf("%s: its state names no QEMU: %w", s.name, err)
	}
	return st.QEMU.PID, nil
}

// end has the supervisor kill its guest and clean up.
func (s *supervisor) end() error {
	_ = unix.Kill(s.pid, unix.SIGQUIT) // one that has ended is waited for all the same
	select {
	case <-s.ended: // how is said by what it leaves
		return nil
	case <-time.After(guestPatience):
		return fmt.Errorf("%s (process %d) does not end", s.name, s.pid)
	}
}

// awaited is a writer that waits for a text, and calls seen once.
type awaited struct {
	text string
	seen func()
	last []byte
	once sync.Once
}

func (a *awaited) Write(b []byte) (int, error) {
	a.last = append(a.last, b...)
	if bytes.Contains(a.last, []byte(a.text)) {
		a.once.Do(a.seen)
	}
	a.last = a.last[max(0, len(a.last)-len(a.text)):]
	return len(b), nil
}
