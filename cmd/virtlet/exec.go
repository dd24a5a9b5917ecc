package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/virtlet/virtlet/internal/vm"
)

// guestExit is the end of a program in a guest, which has said itself what it has to say.
type guestExit int

func (e guestExit) Error() string { return fmt.Sprintf("the command ended with %d", int(e)) }

func (a *app) execCmd() *cobra.Command {
	var input bool
	cmd := &cobra.Command{
		Use: "exec [-i] NAME -- COMMAND...", Short: "Run a command in a VM by its guest agent", ValidArgsFunction: a.vmNames,
		Long: `Runs COMMAND in the guest through the QEMU guest agent (the package qemu-guest-agent of most distributions), without a network
and a key. There is no terminal: virtlet ssh and virtlet console have one. It runs as the agent does, mostly as root; its
output comes when it has ended.

The exit code is that of COMMAND, 128 and more when a signal ended it, or 255 when it could not be run; 2 is also wrong usage.`,
		Example: `  virtlet exec web -- uname -r
  virtlet exec -i web -- tee /etc/motd <motd
  virtlet exec web -- sh -c 'ip addr; ip route'`,
		Args: func(cmd *cobra.Command, words []string) error {
			switch names := cmd.ArgsLenAtDash(); {
			case len(words) == 0:
				return usage(cmd, errors.New("no VM is named"))
			case names != 1 || len(words) == 1:
				return usage(cmd, errors.New("name one VM, and a command after --"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, words []string) error {
			c := vm.Command{Args: words[1:]}
			if input {
				var err error
				if c.Input, err = io.ReadAll(io.LimitReader(os.Stdin, vm.MaxInput+1)); err != nil {
					return fmt.Errorf("read standard input: %w", err)
				}
			}
			r, err := a.store.Exec(cmd.Context(), words[0], c)
			if err != nil {
				return sshError{err}
			}
			_, _ = a.out.Write(r.Stdout)
			_, _ = a.err.Write(r.Stderr)
			if r.Truncated {
				fmt.Fprintln(a.err, "virtlet: the guest agent has not kept all of the output")
			}
			const signalled = 128 // as shells say it
			switch {
			case r.Signal != 0:
				return guestExit(signalled + r.Signal)
			case r.Code != 0:
				return guestExit(r.Code)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&input, "stdin", "i", false, "give COMMAND the standard input, which is read to its end first")
	return cmd
}
