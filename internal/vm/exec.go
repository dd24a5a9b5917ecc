package vm

import (
	"context"
	"errors"
	"fmt"

	"github.com/virtlet/virtlet/internal/agent"
)

// Programs in the guest, through the agent that the guest may have, and what else is asked of a guest that runs.

// Command is a program to run in a guest, Exec one that runs, and ExecResult its end.
type (
	Command    = agent.Command
	Exec       = agent.Exec
	ExecResult = agent.Result
)

// MaxInput is how many bytes a program in the guest may be given as its standard input.
const MaxInput = agent.MaxInput

// ErrNoAgent says that nothing in the guest listens.
var ErrNoAgent = errors.New("no QEMU guest agent runs in the guest: programs are run there through it (Debian's package is qemu-guest-agent)")

// ErrAgentClosed says that the guest has ended meanwhile, ErrGivenUp that a program was killed and has not ended.
var (
	ErrAgentClosed = agent.ErrClosed
	ErrGivenUp     = agent.ErrGivenUp
)

// ErrAgentRefused says that the guest's agent has answered that it does not run a program: there may be none of that name.
var ErrAgentRefused = agent.ErrRefused

// CheckAgent gives [ErrNoAgent] when nothing in the guest listens at the moment: many guests have no agent, and none has it
// before it has booted.
func (g *Guest) CheckAgent(ctx context.Context) error {
	open, err := g.monitor.AgentOpen(ctx)
	if err == nil && !open {
		err = ErrNoAgent
	}
	return err
}

// Exec starts a program in the guest. It ends with the guest, at the latest.
func (g *Guest) Exec(ctx context.Context, cmd Command) (*Exec, error) {
	if err := g.CheckAgent(ctx); err != nil {
		return nil, err
	}
	return g.agent.Exec(ctx, cmd)
}

// minGuestMemory is what is left to a guest at least, in MiB: below, a kernel has hardly a chance to give it back.
const minGuestMemory = 64

// SetMemory asks the guest to make do with less memory than it was booted with, or gives it back: MiB, of which none is
// more than it has and none less than it needs. A guest without the driver (virtio_balloon) takes no notice. What it has
// been asked for is given back.
func (g *Guest) SetMemory(ctx context.Context, mib int64) (int64, error) {
	if g.fixed {
		return g.memory, nil
	}
	mib = min(max(mib, minGuestMemory), g.memory)
	if err := g.monitor.SetMemory(ctx, mib<<20); err != nil {
		return 0, fmt.Errorf("set the guest's memory to %d MiB: %w", mib, err)
	}
	return mib, nil
}
