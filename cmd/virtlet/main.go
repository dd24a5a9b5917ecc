// Command virtlet runs virtual machines on container networks. It is glue: each subcommand reads its flags, calls
// package vm, and prints what comes back. Exit codes are in [exitCode].
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// version is set by the build.
var version = "dev"

// app is what every subcommand shares: the flags of the root and the streams.
type app struct {
	store    vm.Store
	json     bool
	out, err io.Writer
}

func main() {
	out := &checkedWriter{w: os.Stdout}
	a := &app{out: out, err: os.Stderr}
	err := a.root().Execute()
	if err == nil && out.err != nil && !errors.Is(out.err, unix.EPIPE) { // `virtlet run ... | head`: it was enough
		err = fmt.Errorf("write standard output: %w", out.err)
	}
	if ended := guestExit(0); err != nil && !errors.As(err, &ended) {
		fmt.Fprintln(a.err, "virtlet:", indent(err.Error()))
	}
	os.Exit(exitCode(err))
}

// checkedWriter remembers the first error, so that output that went nowhere is not called a success.
type checkedWriter struct {
	w   io.Writer
	err error
}

func (c *checkedWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	if c.err == nil {
		c.err = err
	}
	return n, err
}

// Exit codes beside 0. Those of a guest's end are for `virtlet run` without -d.
const (
	exitError    = 1 // it did not work; the message says why
	exitUsage    = 2 // the command line is wrong
	exitPanicked = 3 // the guest panicked
	exitQEMU     = 4 // QEMU ended by itself
	exitKilled   = 5 // the guest was killed by the user

	exitUnconnected = 255 // of `virtlet ssh`, as of ssh, and of `virtlet exec`: there was no connection
)

const exitHelp = `Exit codes:
  0  done; the guest shut down in order
  1  error: the message on standard error says what, where and what to do
  2  wrong usage: a flag, an argument or a value
  3  the guest panicked and said so (pvpanic)
  4  QEMU ended unexpectedly
  5  the guest was killed by the user`

func exitCode(err error) int {
	var usage usageError
	var wrong *vm.ConfigError
	var end *vm.Exit
	var remote *supervisorError
	var unconnected sshError
	var ended guestExit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &ended):
		return int(ended)
	case errors.As(err, &unconnected):
		return exitUnconnected
	case errors.As(err, &remote):
		return remote.code
	case errors.As(err, &usage), errors.As(err, &wrong):
		return exitUsage
	case errors.As(err, &end):
		return map[vm.Reason]int{vm.Panicked: exitPanicked, vm.Killed: exitKilled, vm.Failed: exitQEMU}[end.Reason]
	}
	return exitError
}

// usageError is a wrong command line.
type usageError struct{ error }

func usage(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return usageError{fmt.Errorf("%w\nsee: %s --help", err, cmd.CommandPath())}
}

// args makes usage errors of what a cobra validator finds.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error { return usage(cmd, check(cmd, a)) }
}

// indent keeps the further lines of an error apart from what a shell prints.
func indent(s string) string { return strings.ReplaceAll(s, "\n", "\n  ") }

func (a *app) root() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "virtlet",
		Version: version,
		Short:   "Run virtual machines on container networks",
		Long: `virtlet runs a QEMU guest in a network namespace that CNI plugins configure. The guest owns the pod's MAC and IP
addresses, its routes, DNS and MTU, at layer 2 and without NAT.

` + exitHelp,
		Example: `  virtlet run disk.qcow2                         a VM on the first network of /etc/cni/net.d, or on the embedded one
  virtlet run -d --name web -p 8080:80 disk.qcow2  in the background, its port 80 published
  virtlet ps; virtlet console web; virtlet stop web; virtlet rm web`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	cmd.SetFlagErrorFunc(usage)
	f := cmd.PersistentFlags()
	f.StringVar(&a.store.Run, "run-dir", "/run/virtlet", "where VMs keep state and sockets")
	f.StringVar(&a.store.Data, "data-dir", "/var/lib/virtlet", "where VMs keep locks, disks, logs and journals")
	cmd.PersistentPreRunE = func(*cobra.Command, []string) (err error) {
		// They are handed on to a supervisor that works elsewhere.
		for _, dir := range []*string{&a.store.Run, &a.store.Data} {
			if *dir, err = filepath.Abs(*dir); err != nil {
				return err
			}
		}
		return nil
	}
	cmd.AddCommand(a.runCmd(), a.superviseCmd(), a.psCmd(), a.inspectCmd(), a.logsCmd(), a.consoleCmd(), a.sshCmd(), a.execCmd(),
		a.stopCmd(), a.rmCmd(), a.gcCmd(), a.checkCmd(), a.nodeCmd(), a.versionCmd())
	strict(cmd)
	return cmd
}

// strict makes cobra's own commands refuse what they do not know.
func strict(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion":
			c.Args = args(cobra.NoArgs)
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		case "help":
			c.Run = nil
			c.RunE = func(c *cobra.Command, names []string) error {
				about, rest, err := root.Find(names)
				if err != nil || len(rest) > 0 {
					return usage(root, fmt.Errorf("unknown command %q", strings.Join(names, " ")))
				}
				return about.Help()
			}
		}
	}
}

// withJSON adds the flag that makes a subcommand speak to machines.
func (a *app) withJSON(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// vmNames completes the names of VMs.
func (a *app) vmNames(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	all, _ := a.store.List()
	var names []string
	for _, st := range all {
		names = append(names, st.Config.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// pluginDirs are where CNI plugins are looked for: where the user says, or where runtimes keep them and where ours are.
func pluginDirs(asked []string) vm.Plugins {
	if len(asked) > 0 {
		for i, dir := range asked {
			if abs, err := filepath.Abs(dir); err == nil { // it fails without a working directory alone
				asked[i] = abs
			}
		}
		return vm.Plugins{Dirs: asked}
	}
	p := vm.Plugins{Dirs: []string{"/opt/cni/bin", "/usr/lib/cni"}}
	if self, err := os.Executable(); err == nil {
		bin := filepath.Dir(self)
		p.Own = []string{filepath.Join(bin, "cni"), filepath.Join(bin, "..", "libexec", "virtlet", "cni")}
	}
	return p
}

func (a *app) versionCmd() *cobra.Command {
	return a.withJSON(&cobra.Command{
		Use: "version", Short: "Print the version", Args: args(cobra.NoArgs),
		Example: "  virtlet version",
		RunE: func(*cobra.Command, []string) error {
			if a.json {
				return a.printJSON(map[string]string{"version": version})
			}
			_, err := fmt.Fprintln(a.out, "virtlet", version)
			return err
		},
	})
}
