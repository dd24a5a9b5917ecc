package main

import (
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Another process gets a CPU that this one then leaves alone, and undo gives all back.
func TestApart(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	cpus := func(pid int) (set unix.CPUSet) {
		if err := unix.SchedGetaffinity(pid, &set); err != nil {
			t.Fatal(err)
		}
		return set
	}
	before := cpus(os.Getpid())
	other := exec.Command("sh", "-c", "while :; do :; done")
	other.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	pid := other.Process.Pid
	undo, err := apart([]int{pid})
	if err != nil {
		t.Fatal(err)
	}
	theirs := cpus(pid)
	for _, id := range []int{os.Getpid(), unix.Gettid()} {
		ours := cpus(id)
		if theirs.Count() != 1 || ours.Count() != before.Count()-1 {
			t.Errorf("they have %d CPUs, and thread %d of ours %d of %d", theirs.Count(), id, ours.Count(), before.Count())
		}
		for i := range 1024 {
			if theirs.IsSet(i) && ours.IsSet(i) {
				t.Errorf("both have CPU %d", i)
			}
		}
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if after := cpus(unix.Gettid()); after != before {
		t.Errorf("%d CPUs after, %d before", after.Count(), before.Count())
	}
	// Its time goes on while it runs.
	first, err := cpuTimeOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		now, err := cpuTimeOf(pid)
		if err != nil {
			t.Fatal(err)
		}
		if now > first {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it has run for %s since its begin", now)
		}
	}
}
