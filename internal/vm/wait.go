package vm

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"time"
)

// Reason is why a VM ended.
type Reason string

// Reasons of an end.
const (
	Shutdown Reason = "shutdown" // the guest powered itself off, asked to or not
	Panicked Reason = "panic"    // the guest's kernel panicked and said so
	Killed   Reason = "killed"   // the user ended QEMU without waiting for the guest
	Failed   Reason = "qemu"     // QEMU ended by itself
)

// Exit is the end of a VM.
type Exit struct {
	Reason Reason `json:"reason"`
	Detail string `json:"detail,omitempty"`
}

// Err is nil after a clean shutdown.
func (e Exit) Err() error {
	if e.Reason == Shutdown {
		return nil
	}
	return &e
}

// Error says how the VM ended.
func (e *Exit) Error() string {
	switch e.Reason {
	case Panicked:
		return "the guest panicked: its console has the reason (virtlet logs)"
	case Killed:
		return "the VM was killed"
	}
	return "QEMU ended unexpectedly: " + e.Detail
}

// Wait blocks until the guest has ended and all that Start did is undone. The Exit is the guest's end; the error is
// what could not be undone, which `virtlet gc` tries again.
func (v *VM) Wait() (Exit, error) {
	<-v.done
	return v.exit, v.err
}

// pressAgain is how long a guest may take no notice of its power button before it is pressed again: a guest that still
// boots does not hear it, one that powers down is not disturbed.
const pressAgain = 5 * time.Second

// Powerdown presses the guest's power button (ACPI), again and again until the guest has ended, and does not wait.
// Whether and when the guest obeys is its own affair; a QEMU that hangs does not hear it, and Kill ends that too.
func (g *Guest) Powerdown() { g.asked.Do(func() { close(g.powerdown) }) }

// keepPressing presses the power button again and again, once it has been pressed, until the guest has ended.
func (v *VM) keepPressing() {
	select {
	case <-v.proc.Done():
		return
	case <-v.powerdown:
	}
	again := time.NewTicker(pressAgain)
	defer again.Stop()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), pressAgain)
		if err := v.monitor.Powerdown(ctx); err != nil && v.cfg.Log != nil {
			v.cfg.Log.Warn("press the power button", "vm", v.cfg.Name, "err", err)
		}
		cancel()
		select {
		case <-v.proc.Done():
			return
		case <-again.C:
		}
	}
}

// Kill ends QEMU at once; the guest has no say.
func (g *Guest) Kill() error {
	g.killed.Store(true)
	return g.proc.Kill()
}

// supervise waits for the end of QEMU, undoes everything and writes the last state.
func (v *VM) supervise() {
	defer close(v.done)
	v.exit = v.attend()
	v.err = v.stopServing()
	left, err := v.store.undo(context.Background(), v.cfg.Name, false)
	v.err = errors.Join(v.err, err, v.dropDisk(), v.closing.Wait())
	v.note(left...)
	for _, l := range left {
		if v.cfg.Log != nil {
			v.cfg.Log.Warn(l, "vm", v.cfg.Name)
		}
	}
	if v.cfg.Remove && v.err == nil { // with the lock held: the name passes on at once
		v.err = errors.Join(v.store.erase(v.cfg.Name), v.lock.release())
		return
	}
	v.state.Status, v.state.Finished, v.state.Exit, v.state.QEMU = Stopped, time.Now(), &v.exit, Process{}
	if v.err != nil {
		v.state.Left = v.err.Error()
	}
	v.err = errors.Join(v.err, v.store.writeLast(v.state), v.lock.release())
}

// attend waits for the end of QEMU, and presses its power button meanwhile, once somebody has asked for that.
func (v *VM) attend() Exit {
	var button sync.WaitGroup
	button.Go(v.keepPressing)
	defer button.Wait()
	return v.awaitEnd()
}

// awaitEnd listens to QEMU until it ends, and works out why it did.
func (v *VM) awaitEnd() Exit {
	end := Exit{Reason: Failed}
	for e := range v.monitor.Events() {
		switch e.Name {
		case "GUEST_PANICKED":
			end.Reason = Panicked
		case "SHUTDOWN":
			var s struct {
				Guest  bool   `json:"guest"`
				Reason string `json:"reason"` // QEMU's ShutdownCause
			}
			if json.Unmarshal(e.Data, &s) == nil && end.Reason != Panicked && s.Reason == "guest-shutdown" {
				end.Reason = Shutdown
			}
		}
	}
	p := v.proc.Wait()
	switch {
	case v.killed.Load():
		return Exit{Reason: Killed}
	case end.Reason == Failed:
		end.Detail = p.String()
	case end.Reason == Shutdown && p.Err() != nil:
		return Exit{Reason: Failed, Detail: p.String()}
	}
	return end
}
