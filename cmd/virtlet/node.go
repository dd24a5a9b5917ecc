package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/node"
)

// nodeTimeout bounds an installation with the restart of the container manager.
const nodeTimeout = 3 * time.Minute

func (a *app) nodeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "node", Short: "Make this machine a node for pods that are VMs", Args: args(cobra.NoArgs),
		Long: `Installs the containerd shim on a node of Kubernetes and tells containerd or CRI-O of the handler "virtlet", checks a node, and takes
all of it back. docs/kubernetes.md says the rest.`,
		Example: "  virtlet node install --restart\n  virtlet node check\n  virtlet node uninstall --restart",
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.nodeInstallCmd(), a.nodeUninstallCmd(), a.nodeCheckCmd())
	return cmd
}

// nodeFlags adds what all commands of a node have.
func (a *app) nodeFlags(cmd *cobra.Command, n *node.Node) *cobra.Command {
	n.Version = version
	f := cmd.Flags()
	f.StringVar(&n.Root, "root", "/", "the node's root directory, mounted somewhere")
	f.StringVar(&n.BinDir, "bin-dir", node.DefaultBinDir, "where the programs go, on the node")
	f.StringVar((*string)(&n.Manager), "manager", string(node.Auto), "the kubelet's container manager: auto, containerd, crio")
	f.StringVar(&n.Config, "config", "", "its configuration, on the node (default: where it usually is)")
	return a.withJSON(cmd)
}

// nodeArgs verifies the flags.
func nodeArgs(cmd *cobra.Command, n *node.Node) error {
	switch n.Manager {
	case node.Auto, node.Containerd, node.CRIO:
	default:
		return usage(cmd, fmt.Errorf("--manager %q: use auto, containerd or crio", n.Manager))
	}
	if !filepath.IsAbs(n.BinDir) || n.Config != "" && !filepath.IsAbs(n.Config) {
		return usage(cmd, fmt.Errorf("--bin-dir and --config are absolute paths on the node"))
	}
	var err error
	n.Root, err = filepath.Abs(n.Root)
	return err
}

func (a *app) nodeInstallCmd() *cobra.Command {
	var n node.Node
	cmd := a.nodeFlags(&cobra.Command{
		Use: "install", Short: "Install the shim, and tell the container manager of it", Args: args(cobra.NoArgs),
		Long: `Copies virtlet and containerd-shim-virtlet-v2 to the node and adds the handler "virtlet" to the configuration of containerd (a
file of its own where containerd 2.x imports such files, else a block at the end of config.toml) or CRI-O (a file of its own).
May be called again at any time: to upgrade, or to finish one that was killed. What it does not understand it refuses, and says
what to write by hand. The container manager reads its configuration when it starts: --restart has systemd restart it, which pods
survive.`,
		Example: "  virtlet node install --dry-run\n  virtlet node install --restart",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := nodeArgs(cmd, &n); err != nil {
				return err
			}
			if n.From == "" {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				n.From = filepath.Dir(self)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), nodeTimeout)
			defer cancel()
			rep, err := n.Install(ctx)
			return a.printReport(n, rep, err)
		},
	}, &n)
	f := cmd.Flags()
	f.StringVar(&n.From, "from", "", "the directory with the programs (default: where this one is)")
	f.StringVar(&n.Owner, "owner", "", "who installs, such as a pod's UID: the one before no longer uninstalls")
	f.BoolVar(&n.DryRun, "dry-run", false, "only show what would change")
	f.BoolVar(&n.Restart, "restart", false, "restart the container manager if its configuration has changed")
	return cmd
}

func (a *app) nodeUninstallCmd() *cobra.Command {
	var n node.Node
	var wait bool
	cmd := a.nodeFlags(&cobra.Command{
		Use: "uninstall", Short: "Take back what install did", Args: args(cobra.NoArgs),
		Long: `Removes what install has put there, and its block of config.toml: that file is byte for byte what it was. Refuses while VMs
of pods run. Programs and files that somebody else has changed since stay.`,
		Example: "  virtlet node uninstall --restart",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := nodeArgs(cmd, &n); err != nil {
				return err
			}
			if wait {
				end, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
				<-end.Done()
				stop()
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), nodeTimeout)
			defer cancel()
			rep, err := n.Uninstall(ctx)
			return a.printReport(n, rep, err)
		},
	}, &n)
	f := cmd.Flags()
	f.StringVar(&n.Owner, "owner", "", "do nothing if another owner has installed last")
	f.BoolVar(&n.DryRun, "dry-run", false, "only show what would change")
	f.BoolVar(&n.Restart, "restart", false, "restart the container manager if its configuration has changed")
	f.BoolVarP(&n.Force, "force", "f", false, "although VMs of pods run")
	f.BoolVar(&wait, "on-sigterm", false, "wait for SIGTERM first: for the installer's pod, which ends so")
	return cmd
}

func (a *app) nodeCheckCmd() *cobra.Command {
	var n node.Node
	return a.nodeFlags(&cobra.Command{
		Use: "check", Short: "Check whether pods can be VMs on this node", Args: args(cobra.NoArgs),
		Long: `Looks for QEMU where containerd finds it, at acceleration, devices and the kernel, at the container manager's configuration, and asks the
one that runs whether it has the handler. Each line is ok, warn or fail, with what to do. Exit code 0: nothing fails. 1: something
does. 2: wrong usage.`,
		Example: "  virtlet node check",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := nodeArgs(cmd, &n); err != nil {
				return err
			}
			all, err := n.Check(cmd.Context())
			if err != nil {
				return err
			}
			return a.printFindings(all)
		},
	}, &n)
}

// printReport shows what was done, also before an error.
func (a *app) printReport(n node.Node, rep node.Report, err error) error {
	if a.json {
		if err != nil && rep.Changes == nil {
			return err
		}
		if perr := a.printJSON(rep); perr != nil {
			return perr
		}
		return err
	}
	would := map[bool]string{true: "would "}[n.DryRun]
	for _, c := range rep.Changes {
		size := ""
		if c.Size > 0 {
			size = fmt.Sprintf(" (%.1f MB)", float64(c.Size)/1e6)
		}
		fmt.Fprintf(a.out, "%s%s %s%s\n%s", would, c.Do, c.Path, size, c.Diff)
	}
	for _, note := range rep.Notes {
		fmt.Fprintln(a.out, "note:", note)
	}
	switch {
	case err != nil:
	case rep.Restarted:
		fmt.Fprintf(a.out, "restarted %s\n", rep.Manager)
	case rep.Restart != "":
		fmt.Fprintf(a.out, "to be restarted: systemctl restart %s\n", strings.TrimSuffix(rep.Restart, ".service"))
	case len(rep.Changes) == 0:
		fmt.Fprintln(a.out, "nothing to do")
	}
	return err
}
