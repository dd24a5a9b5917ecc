package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/virtlet/virtlet/internal/vm"
)

func (a *app) logsCmd() *cobra.Command {
	var follow bool
	lines := -1
	cmd := &cobra.Command{
		Use: "logs [-f] [-n LINES] NAME", Short: "Show what a VM's console has said", Args: args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.vmNames,
		Example:           "  virtlet logs web\n  virtlet logs -n 20 -f web",
		RunE: func(cmd *cobra.Command, names []string) error {
			if cmd.Flags().Changed("tail") && lines < 0 {
				return usage(cmd, fmt.Errorf("--tail %d: use 0 or more lines", lines))
			}
			return a.store.CopyLog(a.out, names[0], lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the VM ends")
	cmd.Flags().IntVarP(&lines, "tail", "n", lines, "the last LINES only (default: all)")
	cmd.Flags().Lookup("tail").DefValue = "0" // -1 would say nothing to a reader of the help
	return cmd
}

// detachKey is Ctrl-], as of telnet and virsh: no shell and few programs use it.
const detachKey = 0x1d

func (a *app) consoleCmd() *cobra.Command {
	return &cobra.Command{
		Use: "console NAME", Short: "Attach to a VM's serial console", Args: args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.vmNames,
		Long:              "Attaches the terminal to the VM's serial console. Ctrl-] detaches; the VM runs on. Press Enter to see a prompt.",
		Example:           "  virtlet console web\n  echo poweroff | virtlet console web",
		RunE: func(_ *cobra.Command, names []string) error {
			conn, err := a.store.Attach(names[0])
			if err != nil {
				return err
			}
			defer conn.Close()
			if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
				fmt.Fprintf(a.err, "attached to %s; Ctrl-] detaches\n", names[0])
				old, err := term.MakeRaw(fd)
				if err != nil {
					return err
				}
				defer func() { _ = term.Restore(fd, old); fmt.Fprintln(a.err) }()
			}
			typed := make(chan error, 1)
			go func() { typed <- copyTyped(conn, os.Stdin) }()
			said := make(chan error, 1)
			go func() { _, err := io.Copy(a.out, conn); said <- err }()
			select {
			case err := <-said:
				return err
			case err := <-typed:
				if !errors.Is(err, io.EOF) {
					return err // nil: the detach key
				}
				return <-said // standard input was a pipe or a file: the guest's answer is wanted still
			}
		},
	}
}

// copyTyped sends what is typed to the guest: nil when the detach key ended it, [io.EOF] at the end of input.
func copyTyped(guest io.Writer, in io.Reader) error {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		text, _, detached := bytes.Cut(buf[:n], []byte{detachKey})
		if _, err := guest.Write(text); err != nil {
			return err
		}
		if detached {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (a *app) stopCmd() *cobra.Command {
	grace := 30 * time.Second
	cmd := &cobra.Command{
		Use: "stop [-t SECONDS] NAME...", Short: "Power VMs down", Args: args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.vmNames,
		Long:              "Presses the guest's power button (ACPI) and waits; a guest that has not ended in time is killed. One that has stopped stays as it is.",
		Example:           "  virtlet stop web\n  virtlet stop -t 5s web db",
		RunE: func(cmd *cobra.Command, names []string) error {
			return each(names, func(name string) error {
				killed, err := a.store.Stop(cmd.Context(), name, grace)
				switch {
				case err != nil || !killed:
				case grace == 0:
					fmt.Fprintf(a.err, "virtlet: %s was killed\n", name)
				default:
					fmt.Fprintf(a.err, "virtlet: %s did not power down within %s and was killed\n", name, grace)
				}
				return err
			})
		},
	}
	cmd.Flags().VarP((*seconds)(&grace), "time", "t", "how long the guest may take: 90s, 2m; a number alone is seconds; 0 kills it at once")
	return cmd
}

func (a *app) rmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm [-f] NAME...", Short: "Remove VMs that have ended", Args: args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.vmNames,
		Example:           "  virtlet rm web\n  virtlet rm -f web",
		RunE: func(cmd *cobra.Command, names []string) error {
			return each(names, func(name string) error { return a.store.Remove(cmd.Context(), name, force) })
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill a running VM first, and clean up after a killed supervisor")
	return cmd
}

// each does one thing for every name and gives all errors.
func each(names []string, do func(string) error) error {
	var errs []error
	for _, name := range names {
		errs = append(errs, do(name))
	}
	return errors.Join(errs...)
}

// seconds is a duration flag that takes a number alone as seconds, as `docker stop -t` does.
type seconds time.Duration

func (s *seconds) String() string { return time.Duration(*s).String() }
func (s *seconds) Type() string   { return "duration" }

func (s *seconds) Set(text string) error {
	d, err := time.ParseDuration(text)
	if err != nil {
		d, err = time.ParseDuration(text + "s")
	}
	if err != nil || d < 0 {
		return errors.New("use 90s, 2m or a number of seconds")
	}
	*s = seconds(d)
	return nil
}

func (a *app) gcCmd() *cobra.Command {
	var o vm.CleanOptions
	var plugins []string
	cmd := a.withJSON(&cobra.Command{
		Use: "gc", Short: "Remove what killed runs left behind", Args: args(cobra.NoArgs),
		Long:    "Finds VMs whose supervisor was killed and removes their QEMU, network namespace, CNI attachments, sockets and disks. VMs that run or have stopped in order stay. What a CNI plugin fails to undo is tried again by the next gc, unless --force forgets it.",
		Example: "  virtlet gc --dry-run\n  virtlet gc\n  virtlet gc --force",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Plugins = pluginDirs(plugins)
			found, err := a.store.Clean(cmd.Context(), o)
			if a.json {
				if found == nil {
					found = []vm.Leftover{}
				}
				return errors.Join(a.printJSON(found), err)
			}
			for _, l := range found {
				verb := "removed"
				if o.DryRun {
					verb = "would remove"
				}
				if err != nil {
					verb = "found"
				}
				fmt.Fprintf(a.out, "%s: %s%s\n", verb, of(l.VM), l.What)
			}
			return err
		},
	})
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only say what would be removed")
	cmd.Flags().BoolVarP(&o.Force, "force", "f", false, "forget attachments whose plugin fails to undo them; what it holds may stay")
	cmd.Flags().StringArrayVar(&plugins, "cni-bin-dir", nil, "CNI plugins; repeatable")
	return cmd
}

func of(name string) string {
	if name == "" {
		return ""
	}
	return name + ": "
}

func (a *app) checkCmd() *cobra.Command {
	var r vm.CheckRequest
	var plugins []string
	cmd := a.withJSON(&cobra.Command{
		Use: "check", Short: "Check whether this machine can run VMs", Args: args(cobra.NoArgs),
		Long:    "Looks at privileges, QEMU, acceleration, devices, the kernel's networking and CNI. Each line is ok, warn or fail, with what to do. Exit code 1 when one fails.",
		Example: "  virtlet check",
		RunE: func(cmd *cobra.Command, _ []string) error {
			r.Store, r.Plugins = a.store, pluginDirs(plugins)
			return a.printFindings(vm.Check(cmd.Context(), r))
		},
	})
	cmd.Flags().StringVar(&r.ConfDir, "cni-conf-dir", vm.DefaultConfDir, "CNI configurations")
	cmd.Flags().StringArrayVar(&plugins, "cni-bin-dir", nil, "CNI plugins; repeatable")
	cmd.Flags().StringVar(&r.QEMU, "qemu", "", "QEMU program")
	return cmd
}

// printFindings shows what a check has found. That something fails is the error.
func (a *app) printFindings(all []vm.Finding) error {
	failed := 0
	for _, f := range all {
		if f.Level == vm.Fail {
			failed++
		}
		if a.json {
			continue
		}
		fmt.Fprintf(a.out, "%-4s  %s: %s\n", f.Level, f.What, strings.ReplaceAll(f.Is, "\n", "\n      "))
		if f.Do != "" {
			fmt.Fprintf(a.out, "      -> %s\n", f.Do)
		}
	}
	if a.json {
		if err := a.printJSON(all); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("checks failed: %d", failed)
	}
	return nil
}
