package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtlet/virtlet/internal/vm"
)

func (a *app) psCmd() *cobra.Command {
	var quiet bool
	cmd := a.withJSON(&cobra.Command{
		Use: "ps", Short: "List VMs", Aliases: []string{"list", "ls"}, Args: args(cobra.NoArgs),
		Long: `Lists VMs. States:
  starting, running, stopped
  dead      its supervisor was killed; virtlet gc cleans up
  stopped (undo failed)  something of it is left, inspect says what; virtlet gc tries again`,
		Example: "  virtlet ps\n  virtlet ps -q | xargs virtlet stop",
		RunE: func(*cobra.Command, []string) error {
			all, err := a.store.List()
			if err != nil && all == nil {
				return err
			}
			switch {
			case a.json:
				if all == nil {
					all = []vm.State{}
				}
				if perr := a.printJSON(all); perr != nil {
					return perr
				}
			case quiet:
				for _, st := range all {
					fmt.Fprintln(a.out, st.Config.Name)
				}
			default:
				if perr := printTable(a.out, all); perr != nil {
					return perr
				}
			}
			return err
		},
	})
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	return cmd
}

func printTable(out io.Writer, all []vm.State) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tSTATE\tIPS\tUPTIME\tNETWORK\tPORTS")
	for _, st := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", st.Config.Name, state(st), or(strings.Join(ips(st), ",")), or(uptime(st)),
			or(strings.Join(networks(st), ",")), or(strings.Join(ports(st), ",")))
	}
	return w.Flush()
}

func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func state(st vm.State) string {
	if st.Left != "" {
		return fmt.Sprintf("%s (undo failed)", st.Status)
	}
	if st.Exit != nil && st.Exit.Reason != vm.Shutdown {
		return fmt.Sprintf("%s (%s)", st.Status, st.Exit.Reason)
	}
	return string(st.Status)
}

func ips(st vm.State) []string {
	if st.Status != vm.Running {
		return nil
	}
	var all []string
	for _, a := range st.Told() {
		all = append(all, a.String())
	}
	return all
}

func uptime(st vm.State) string {
	if st.Status != vm.Running {
		return ""
	}
	return time.Since(st.Started).Truncate(time.Second).String()
}

func networks(st vm.State) []string {
	var all []string
	for _, n := range st.Config.Networks {
		all = append(all, n.Name)
	}
	if st.Config.NetNS != "" {
		all = append(all, st.Config.NetNS)
	}
	return all
}

func ports(st vm.State) []string {
	published, _ := st.Config.Published() // that is of a state of another make
	var all []string
	for _, p := range published {
		all = append(all, p.String())
	}
	return all
}

func (a *app) inspectCmd() *cobra.Command {
	var rules, check, snapshot bool
	cmd := a.withJSON(&cobra.Command{
		Use: "inspect [--rules | --check | --snapshot] NAME", Short: "Show all that is known of a VM", Args: args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.vmNames,
		Long: `Shows a VM's configuration, what its networks answered, its NICs and how they are joined, its leases, what was dropped and
why, and QEMU's command line. With --check it asks the CNI plugins of a running VM instead whether all is as they made it
(CNI CHECK), and looks at the joins to the guest. Plugins miss the MAC and the addresses that the guest has; that is told
apart from what is wrong, for which the exit code is 1.

With --snapshot it writes the network alone, as JSON, for a bug report: as it was when the plugins had configured it and
virtlet had not changed it yet, also of a VM that has stopped; while the VM runs, with the node's links that lead to it. In it are
  the names of networks, plugins and links; MAC and IP addresses, routes and network settings (sysctls) of the VM's
  namespace and of those links of the node; name servers and search domains of the CNI result
Not in it are
  plugin configurations (tokens, keys, kubeconfig, addresses of datastores), arguments of the plugins, published ports, the
  names of the VM and of the node, images, user-data, SSH keys
Rename what your networks' names and search domains give away.`,
		Example: "  virtlet inspect web\n  virtlet inspect --rules web\n  virtlet inspect --check web\n  virtlet inspect --snapshot web >web-network.json\n  virtlet inspect --json web | jq '.counters[].dropped'",
		RunE: func(cmd *cobra.Command, names []string) error {
			switch {
			case check && rules, check && snapshot, rules && snapshot:
				return usage(cmd, errors.New("--rules, --check and --snapshot each show something else: choose one"))
			case check:
				return a.checkNetworks(cmd.Context(), names[0])
			case snapshot:
				return a.writeSnapshot(names[0])
			}
			st, err := a.store.Get(names[0])
			if err != nil {
				return err
			}
			var counters []vm.Counters
			if st.Status == vm.Running {
				counters, err = a.store.Counters(names[0])
			}
			if a.json {
				err = errors.Join(err, a.printJSON(struct {
					vm.State
					Counters []vm.Counters `json:"counters,omitempty"`
				}{st, counters}))
			} else {
				err = errors.Join(err, printState(a.out, st, counters, rules))
			}
			if errors.Is(err, vm.ErrStopped) || errors.Is(err, vm.ErrNotFound) {
				return nil // it has ended meanwhile
			}
			return err
		},
	})
	cmd.Flags().BoolVar(&rules, "rules", false, "show the filters too: what they look for, and how often they found it")
	cmd.Flags().BoolVar(&check, "check", false, "ask the CNI plugins whether all is as they made it (CNI CHECK)")
	cmd.Flags().BoolVar(&snapshot, "snapshot", false, "write the network as its plugins left it, as JSON, for a bug report or a test")
	return cmd
}

// writeSnapshot writes the network of a VM as a file, as far as it is known.
func (a *app) writeSnapshot(name string) error {
	r, err := a.store.Recording(name)
	if r.About == "" {
		return err
	}
	return errors.Join(a.printJSON(r), err)
}

// checkNetworks shows what every plugin has to say. What is wrong is the error.
func (a *app) checkNetworks(ctx context.Context, name string) error {
	checks, err := a.store.CheckNetworks(ctx, name)
	if errors.Is(err, vm.ErrStopped) || errors.Is(err, vm.ErrNotFound) {
		return err
	}
	if a.json {
		if checks == nil {
			checks = []vm.NetworkCheck{}
		}
		return errors.Join(err, a.printJSON(checks))
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, c := range checks {
		if c.Skipped != "" {
			fmt.Fprintf(w, "%s\t%s\t-\tnot checked: %s\n", c.Network, c.IfName, c.Skipped)
		}
		for _, p := range c.Plugins {
			verdict := "in order"
			switch {
			case p.Moved:
				verdict = "in order; it misses what the guest has: " + p.Error
			case p.Error != "":
				verdict = "wrong: " + p.Error
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", c.Network, c.IfName, p.Plugin, verdict)
		}
	}
	if len(checks) == 0 {
		fmt.Fprintln(w, "-\t-\t-\tnot checked: somebody else has configured the namespace")
	}
	if err == nil {
		fmt.Fprintln(w, "-\t-\tvirtlet\tin order: the guest is joined as it was")
	}
	return errors.Join(err, w.Flush())
}

func printState(out io.Writer, st vm.State, counters []vm.Counters, rules bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(key, format string, a ...any) { fmt.Fprintf(w, "%s\t%s\n", key, fmt.Sprintf(format, a...)) }
	c := st.Config
	row("name", "%s", c.Name)
	row("state", "%s", state(st))
	if up := uptime(st); up != "" {
		row("uptime", "%s", up)
	}
	row("created", "%s", st.Created.Format(time.RFC3339))
	row("size", "%s, %d MiB", count(c.CPUs, "CPU"), c.Memory)
	if c.Image != nil {
		row("image", "%s", c.Image.Path)
	}
	for i, d := range c.Disks {
		row("disk", "%s%s%s", d.Path, map[bool]string{true: ", read-only"}[d.ReadOnly], map[bool]string{true: ", the root disk"}[c.Root && i == 0])
	}
	if c.Kernel != "" {
		row("kernel", "%s", c.Kernel)
	}
	if st.InstanceID != "" {
		row("cloud-init", "instance %s", st.InstanceID)
	}
	row("supervisor", "pid %d", st.Supervisor.PID)
	if st.QEMU.PID != 0 {
		row("qemu", "pid %d, %s", st.QEMU.PID, st.Accel)
	}
	row("namespace", "%s", st.NetNS)
	for _, p := range ports(st) {
		row("publish", "%s", p)
	}
	for _, r := range st.Results {
		b, err := json.Marshal(r.Result)
		if err != nil {
			return err
		}
		row("cni "+r.IfName, "network %s: %s", r.Network, b)
	}
	for i, n := range st.NICs {
		row("nic "+n.Name, "%s mtu %d%s", n.MAC, n.MTU, network(n.Network))
		for _, p := range n.Addrs {
			row("", "address %s", p)
		}
		for _, r := range n.Routes {
			if r.OnLink() {
				row("", "route %s on link", r.Dst)
			} else {
				row("", "route %s via %s", r.Dst, r.Gw)
			}
		}
		for _, s := range n.DNS.Servers {
			row("", "dns %s", s)
		}
		if i < len(st.Ports) {
			p := st.Ports[i]
			if n.VF != nil {
				row("", "%s", function(*n.VF, p))
				continue
			}
			vhost := "no vhost-net"
			if p.Vhost {
				vhost = "vhost-net"
			}
			row("", "TAP %s, %s, %s, %s", p.Tap, datapath(p), count(p.Queues, "queue"), vhost)
			if len(p.Localhost) > 0 {
				row("", "localhost of the namespace leads to %s", join(p.Localhost))
			}
		}
	}
	for _, l := range st.Leases {
		row("lease", "%s to %s for %s, server %s", l.Addr, l.MAC, l.Duration, l.Server)
	}
	for _, l := range st.Leases6 {
		row("lease", "%s to %s for %s", join(l.Addrs), l.MAC, l.Duration)
		for _, r := range l.Routers {
			row("router", "%s for the guest: %s", r.Source, r.Gateway)
		}
	}
	for _, c := range counters {
		printCounters(row, c, rules)
	}
	for _, n := range st.Notes {
		row("note", "%s", n)
	}
	if st.Exit != nil {
		row("end", "%s", strings.TrimSpace(fmt.Sprintf("%s %s", st.Exit.Reason, st.Exit.Detail)))
	}
	if st.Left != "" {
		row("left", "%s", strings.ReplaceAll(st.Left, "\n", "; "))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(out, st.Command)
	return err
}

// printCounters shows what was dropped; with rules also what would be.
func printCounters(row func(string, string, ...any), c vm.Counters, rules bool) {
	for _, why := range slices.Sorted(maps.Keys(c.Dropped)) {
		if d := c.Dropped[why]; d.Packets > 0 {
			row("dropped", "%s: %s, %d bytes (%s)", c.NIC, count(int(d.Packets), "frame"), d.Bytes, why)
		}
	}
	if !rules {
		return
	}
	for _, r := range c.Rules {
		match := cmp.Or(r.Match, "every frame")
		switch {
		case r.Reason != "":
			row("rule", "%s: %s: %s, %s (%s)", r.Hook, match, r.Action, count(int(r.Packets), "frame"), r.Reason)
		case r.To != "":
			row("rule", "%s: %s: %s to %s", r.Hook, match, r.Action, r.To)
		default:
			row("rule", "%s: %s: %s", r.Hook, match, r.Action)
		}
	}
}

// function says which PCI function a NIC is.
func function(f vm.VF, p vm.PortState) string {
	what := fmt.Sprintf("PCI %s", f.BDF)
	if f.PF != "" {
		what += fmt.Sprintf(", VF %d of %s", f.Index, f.PF)
	}
	if f.VLAN != 0 {
		what += fmt.Sprintf(", VLAN %d", f.VLAN)
	}
	return fmt.Sprintf("%s, IOMMU group %d, by %s", what, f.Group, p.Passed)
}

// datapath says how a NIC's TAP is joined to its link.
func datapath(p vm.PortState) string {
	how, why := fmt.Sprintf("%s to and from %s by %s", p.Datapath, p.Link, cmp.Or(string(p.Engine), "nftables")), ""
	switch {
	case p.Tap == p.Link:
		how = "as it was made"
	case p.Bridge != "":
		how = "bridge " + p.Bridge
	}
	if p.Why != "" {
		why = " (" + p.Why + ")"
	}
	return how + why
}

func join[T fmt.Stringer](all []T) string {
	var words []string
	for _, a := range all {
		words = append(words, a.String())
	}
	return strings.Join(words, ", ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func network(name string) string {
	if name == "" {
		return ""
	}
	return " on network " + name
}
