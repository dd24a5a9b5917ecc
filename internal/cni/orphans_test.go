package cni

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func TestEndOrphans(t *testing.T) {
	start := func(id string) *exec.Cmd {
		cmd := exec.Command("sleep", "100")
		cmd.Env = append(os.Environ(), "A=b", "CNI_CONTAINERID="+id, "CNI_COMMAND=ADD")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	orphan, other := start("c-orphan"), start("c-orphan-2")
	defer other.Process.Kill()
	ended := make(chan error, 1)
	go func() { ended <- orphan.Wait() }()
	if err := EndOrphans("c-orphan"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("the orphan ended by %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the orphan lives")
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("another container's plugin: %v", err)
	}
	for range 2 {
		if err := EndOrphans("c-orphan"); err != nil {
			t.Error(err)
		}
	}
	if err := EndOrphans(""); err != nil {
		t.Error(err)
	}
}
