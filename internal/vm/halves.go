package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
)

// The halves of Start, for a front end that is told of the network first and of the guest later, and that starts a guest
// again in the same network (docs/decisions/0010-shim.md).

// ErrBusy says that a VM has a guest already.
var ErrBusy = errors.New("the VM has a guest already")

// Prepare takes the name and the network of a VM, and serves them: all that a guest finds, and no guest. Of cfg the CPUs
// decide how many queues the NICs have; what the guest boots from may be missing. On an error nothing is left. The
// caller calls Close.
func Prepare(ctx context.Context, s Store, cfg Config, progress Progress) (*VM, error) {
	v, err := newVM(s, cfg, false, progress)
	if err != nil {
		return nil, err
	}
	err = v.prepare(ctx)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, errors.Join(err, v.abandon(ctx), v.Closed())
	}
	return v, nil
}

func (v *VM) prepare(ctx context.Context) error {
	if err := v.step("state", v.claim); err != nil {
		return err
	}
	if err := v.connect(ctx); err != nil {
		return err
	}
	if err := v.step("dhcp", v.answer); err != nil {
		return err
	}
	v.state.Status = Idle
	return v.save()
}

// Config gives the VM's configuration, for the caller of Boot to complete.
func (v *VM) Config() Config { return v.cfg.clone() }

// NICs gives what the guest has, and is told of, as its network.
func (v *VM) NICs() []nic.NIC { return v.state.NICs }

// Boot starts a guest on the network that Prepare made, and returns when QEMU runs it. cfg is what Config gave with the
// guest filled in; its name and network are not looked at again. On an error, or when ctx ends first, nothing of the
// guest is left, and Boot may be called again, as it may after a guest has ended. One call at a time.
func (v *VM) Boot(ctx context.Context, cfg Config) (*Guest, error) {
	if v.proc != nil {
		select {
		case <-v.ended:
		default:
			return nil, ErrBusy
		}
	}
	cfg = cfg.clone()
	if err := cfg.check(true); err != nil {
		return nil, err
	}
	v.cfg, v.Guest = cfg, newGuest()
	err := v.boot(ctx)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		err = errors.Join(err, v.forget(v.Guest))
		v.Guest = newGuest()
		return nil, err
	}
	g := v.Guest
	go func() {
		defer close(g.ended)
		g.end = v.attend()
		g.left = v.forget(g)
	}()
	return g, nil
}

func (v *VM) boot(ctx context.Context) error {
	if err := v.step("image", v.openMedia); err != nil {
		return err
	}
	if err := v.step("disk", func() (string, error) { return v.makeDisk(ctx) }); err != nil {
		return err
	}
	if err := v.step("seed", v.makeSeed); err != nil {
		return err
	}
	if err := v.renewPorts(); err != nil {
		return err
	}
	if err := v.step("qemu", v.startQEMU); err != nil {
		return err
	}
	return v.step("guest", func() (string, error) { return v.awaitQEMU(ctx) })
}

// renewPorts makes ports that had a guest fit for another.
func (v *VM) renewPorts() error {
	if v.used {
		for _, p := range v.ports {
			if err := p.Renew(); err != nil {
				return err
			}
		}
	}
	v.used = true
	return nil
}

// forget undoes what Boot did for a guest that has ended or did not come to run.
func (v *VM) forget(g *Guest) error {
	err := errors.Join(g.close(), v.dropDisk(), v.record(func(j *Journal) { j.QEMU = nil }))
	v.state.Status, v.state.QEMU, v.state.Command, v.state.Started = Idle, Process{}, "", time.Time{}
	return errors.Join(err, v.save())
}

// Close ends the guest, if there is one, without asking it, and undoes everything. What could not be undone is the error,
// and stays recorded for `virtlet gc`. Nobody calls Boot meanwhile or after. With [Config.NetNSEnds] CNI DEL may follow at once,
// and the caller calls Closed too.
func (v *VM) Close() error {
	if v.proc != nil {
		if err := v.Kill(); err != nil {
			return fmt.Errorf("end VM %s: %w", v.cfg.Name, err)
		}
		v.Guest.Wait()
	}
	v.Guest = newGuest()
	return v.abandon(context.Background())
}

// Closed waits, after Close, until the kernel has taken the TAPs away. That is tens of milliseconds, for which Close waits only
// where the namespace stays.
func (v *VM) Closed() error { return v.closing.Wait() }

// Wait blocks until a guest that Boot started has ended. The Exit is its end; the error is what of its own could not be
// undone.
func (g *Guest) Wait() (Exit, error) {
	<-g.ended
	return g.end, g.left
}

// PID gives QEMU's process id.
func (g *Guest) PID() int { return g.proc.PID() }

// Pause stops the guest's CPUs, and Resume lets them go on.
func (g *Guest) Pause(ctx context.Context) error { return g.monitor.Stop(ctx) }

// Resume lets the guest's CPUs go on.
func (g *Guest) Resume(ctx context.Context) error { return g.monitor.Cont(ctx) }
