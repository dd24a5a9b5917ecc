package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtlet/virtlet/internal/vm"
)

// sshError is why ssh could not be run. The code is what ssh gives where it finds no connection: the others are those
// of the command in the guest.
type sshError struct{ error }

func (e sshError) Unwrap() error { return e.error }

func (a *app) sshCmd() *cobra.Command {
	r := vm.SSHRequest{Timeout: 3 * time.Minute}
	cmd := &cobra.Command{
		Use: "ssh [flags] NAME [-- COMMAND...]", Short: "Log in to a VM by SSH", ValidArgsFunction: a.vmNames,
		Long: `Finds the guest's address, waits until its SSH server answers, and runs the system's ssh from the network namespace that
virtlet run was called in. The host key that the guest shows first is kept with the VM, and goes with it.

The exit code is that of COMMAND, or 255 when there was no connection; 2 is also wrong usage.`,
		Example: `  virtlet ssh web
  virtlet ssh web -- systemctl status nginx
  virtlet ssh -l root -i ~/.ssh/id_ed25519 web -- cat /etc/shadow >shadow
  virtlet ssh -o LocalForward='8080 localhost:80' web`,
		Args: func(cmd *cobra.Command, words []string) error {
			names := cmd.ArgsLenAtDash()
			if names < 0 {
				names = len(words)
			}
			switch {
			case names == 0:
				return usage(cmd, errors.New("no VM is named"))
			case names > 1:
				return usage(cmd, fmt.Errorf("put -- before the command: %s %s -- %s", cmd.CommandPath(), words[0], words[1]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, words []string) error {
			if r.Timeout <= 0 {
				return usage(cmd, errors.New("--timeout 0: use more than no time"))
			}
			r.Command = words[1:]
			err := a.store.SSH(cmd.Context(), words[0], r, func(text string) { fmt.Fprintln(a.err, "virtlet:", text) })
			if wrong := new(vm.ConfigError); errors.As(err, &wrong) {
				return usage(cmd, err)
			}
			return sshError{err}
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&r.User, "user", "l", "", "log in as this user (default: --ssh-user of virtlet run)")
	f.StringArrayVarP(&r.Identities, "identity", "i", nil, "private key file; repeatable (default: those beside --ssh-key of virtlet run)")
	f.StringVar(&r.Address, "address", "", "connect to this address of the guest (default: those that its networks gave)")
	f.IntVarP(&r.Port, "port", "p", 22, "connect to this port")
	f.Var((*seconds)(&r.Timeout), "timeout", "how long the port may take to answer: 90s, 5m; a number alone is seconds")
	f.StringVar(&r.NetNS, "netns", "", "connect from the network namespace at this path")
	f.StringArrayVarP(&r.Options, "option", "o", nil, "option of ssh_config(5); repeatable")
	return cmd
}
