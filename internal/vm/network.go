package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
	"github.com/virtlet/virtlet/internal/vfio"
)

// enter makes the VM's network namespace, or joins the one that somebody else configured.
func (v *VM) enter() (string, error) {
	path, own := v.cfg.NetNS, false
	if path == "" {
		path, own = ownNetNS(v.cfg.Name), true
		if netns.Exists(path) {
			// Not in our journal, so not ours to remove at a failure.
			return "", fmt.Errorf("network namespace %s is there already and belongs to no VM in %s: choose another --name, or `ip netns del %s` if nobody uses it",
				path, v.store.Run, filepath.Base(path))
		}
	}
	var inode uint64
	if !own {
		var err error
		if inode, err = foreign(path, v.cfg.Inside); err != nil {
			return "", err
		}
	}
	err := v.record(func(j *Journal) { j.NetNS, j.OwnNetNS, j.Inode, j.Plugins = path, own, inode, v.cfg.Plugins })
	if err != nil {
		return "", err
	}
	v.state.NetNS = path
	if v.before, err = podnet.NodeLinks(); err != nil {
		return "", err
	}
	if own {
		if v.ns, err = netns.Create(filepath.Base(path)); errors.Is(err, netns.ErrExist) {
			// Somebody made it since the look above: it is his, and not to be undone.
			err = errors.Join(err, v.record(func(j *Journal) { j.NetNS, j.OwnNetNS = "", false }))
		}
	} else {
		v.ns, err = netns.Open(path)
	}
	return path, err
}

// ownNetNS is where a VM's own namespace is pinned.
func ownNetNS(name string) string { return filepath.Join(netns.Dir, "virtlet-"+name) }

// foreign checks that a namespace that is to be joined is not the node's own, and gives its inode, by which it is known
// when the path has come to mean another. A supervisor that lives inside cannot tell, and its front end has.
func foreign(path string, inside bool) (uint64, error) {
	var st, node unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("join network namespace %s: %w", path, err)
	}
	if err := unix.Stat("/proc/self/ns/net", &node); err != nil {
		return 0, err
	}
	if here := st.Ino == node.Ino && st.Dev == node.Dev; here && !inside {
		return 0, fmt.Errorf("join network namespace %s: it is the node's own, and a guest would take its network away; make one with `ip netns add`", path)
	}
	return st.Ino, nil
}

// add attaches the namespace to one CNI network.
func (v *VM) add(ctx context.Context, a *cni.Attachment) (string, error) {
	a.ContainerID, a.NetNS = v.id, v.ns.Path()
	if err := v.record(func(j *Journal) { j.Attachments = append(j.Attachments, *a) }); err != nil {
		return "", err
	}
	if a.Name == embeddedName {
		if err := podnet.MendBridge(embeddedBridge); err != nil {
			return "", err
		}
	}
	plugins := cni.Runtime{BinDirs: v.cfg.Plugins.For(a.Name), CacheDir: v.store.cniCache(), Timeout: v.cfg.CNITimeout}
	result, err := plugins.Add(ctx, *a)
	if err != nil {
		var left *cni.UndoError
		if errors.As(err, &left) {
			return "", err // it stays in the journal, to be undone again
		}
		return "", errors.Join(err, v.record(func(j *Journal) { j.Attachments = j.Attachments[:len(j.Attachments)-1] }))
	}
	r := withDevice(nic.Attachment{Network: a.Name, Plugin: a.Plugin, IfName: a.IfName, Result: result}, a.Device(v.cfg.deviceInfos()))
	v.cfg.Results = append(v.cfg.Results, r)
	v.delegates(a)
	var ips []string
	for _, ip := range result.IPs {
		ips = append(ips, ip.Address.String())
	}
	return strings.Join(append([]string{a.IfName}, ips...), " "), nil
}

// delegates adds what the networks have answered that Multus attached and kept to itself. The namespace tells all but their
// order, names and DNS, so an error is no more than a note.
func (v *VM) delegates(a *cni.Attachment) {
	all, err := a.Delegates(v.cfg.deviceInfos())
	if err != nil {
		v.note(fmt.Sprintf("what Multus attached beside its default network is known by the namespace alone, without name servers: %v", err))
	}
	for _, d := range all {
		v.cfg.Results = append(v.cfg.Results, withDevice(nic.Attachment{Network: d.Network, IfName: d.IfName, Result: d.Result}, d.Device))
	}
}

// deviceInfos is where device plugins and CNI plugins tell of devices.
func (c *Config) deviceInfos() string { return cmp.Or(c.DeviceInfos, cni.DeviceInfoDir) }

// withDevice adds what is known of the device of a network's interface.
func withDevice(a nic.Attachment, d cni.Device) nic.Attachment {
	if d.Address == "" && d.PF != "" {
		var err error
		if d.Address, err = vfio.Virtual(d.PF, d.VF); err != nil && !errors.Is(err, os.ErrNotExist) {
			d.Err = errors.Join(d.Err, err)
		}
	}
	a.Device, a.DeviceType = d.Address, d.Type
	if d.Err != nil {
		a.DeviceNote = strings.ReplaceAll(d.Err.Error(), "\n", "; ")
	}
	return a
}

// nodeLinks writes down which links of the node the plugins have made for this VM, to look for them after DEL.
func (v *VM) nodeLinks() error {
	if len(v.cfg.Networks) == 0 {
		return nil // somebody else's plugins
	}
	var named []string
	for _, r := range v.cfg.Results {
		if r.Result == nil {
			continue
		}
		for _, i := range r.Result.Interfaces {
			if i != nil && i.Sandbox == "" {
				named = append(named, i.Name)
			}
		}
	}
	made, err := podnet.Made(v.ns, v.before, named)
	v.journal.NodeLinks = made // written with the record that follows at once
	return err
}

// attach plans the guest's NICs from what the networks said and what is in the namespace, and joins each to a TAP.
func (v *VM) attach(ctx context.Context) (string, error) {
	snap, err := podnet.Observe(v.ns)
	if err != nil {
		return "", err
	}
	if snap.VFs, err = vfio.Functions(nic.Functions(v.cfg.Results, snap.Links)); err != nil {
		return "", err
	}
	nics, notes, err := nic.Plan(v.cfg.Results, snap)
	v.note(notes...)
	if err != nil {
		return "", err
	}
	if err := errors.Join(v.nodeLinks(), v.keepRecording(snap, nics, notes)); err != nil {
		return "", err
	}
	if v.cfg.Pod != "" && len(v.cfg.DNS) > 0 {
		for i := range nics { // what a pod's resolvers are has been decided with what its networks say in mind
			nics[i].DNS = nic.DNS{}
		}
	}
	// With the default route, if any: networkd makes a route to a server where it is told of it, and mostly it is beyond.
	told := max(0, slices.IndexFunc(nics, func(n nic.NIC) bool { return slices.ContainsFunc(n.Routes, nic.Route.IsDefault) }))
	if err := addDNS(&nics[told].DNS, v.cfg.DNS, v.cfg.Search); err != nil {
		return "", err
	}
	o, err := v.options(ctx, nics)
	if err != nil {
		return "", err
	}
	for _, n := range nics {
		s := v.server(n)
		v.servers = append(v.servers, s)
		o.Policies[n.Name] = s.policy(&v.cfg)
	}
	v.ports, err = podnet.Attach(ctx, v.ns, snap, nics, o, func(r podnet.Record) error {
		return v.record(func(j *Journal) { j.Network = &r })
	})
	if err != nil {
		return "", err
	}
	v.state.NICs = nics
	for _, r := range v.cfg.Results {
		v.state.Results = append(v.state.Results, Result{Network: r.Network, IfName: r.IfName, Result: r.Result})
	}
	var words, lacks []string
	for _, p := range v.ports {
		if l := p.Join.Lacks; l != "" && !slices.Contains(lacks, l) {
			lacks = append(lacks, l)
			v.note(fmt.Sprintf("%s is joined to the guest by %s (%s): %s", p.NIC.Name, p.Join.Datapath, p.Join.Engine, l))
		}
		st := PortState{Join: p.Join, Queues: len(p.Taps), Vhost: len(p.Vhost) > 0}
		if p.VF != nil {
			st.Passed = cmp.Or(p.VF.Group, "iommufd")
			words = append(words, fmt.Sprintf("%s %s PCI %s", p.NIC.Name, p.NIC.MAC, p.VF.BDF))
		}
		v.state.Ports = append(v.state.Ports, st)
		if p.VF != nil {
			continue
		}
		words = append(words, fmt.Sprintf("%s %s mtu %d", p.NIC.Name, p.NIC.MAC, p.NIC.MTU))
	}
	if v.cfg.Localhost && !slices.ContainsFunc(v.ports, func(p *podnet.Port) bool { return len(p.Join.Localhost) > 0 }) {
		v.note("localhost of the namespace does not lead to the guest, so port-forward will not: its first NIC is a PCI function, or no NIC has an address")
	}
	return strings.Join(words, ", "), nil
}

// options says how the NICs are to be attached, but for the policies.
func (v *VM) options(ctx context.Context, nics []nic.NIC) (podnet.Options, error) {
	o := podnet.Options{
		Queues: v.cfg.queues(), Vhost: true, Policies: map[string]podnet.Policy{},
		Datapath: podnet.Wish(v.cfg.Datapath), Localhost: v.cfg.Localhost,
		PCI: vfio.Options{UID: unprivileged(v.id), AllowPhysical: v.cfg.AllowPhysical},
	}
	var err error
	if slices.ContainsFunc(nics, func(n nic.NIC) bool { return n.VF != nil }) {
		var binary string // a pod's guest is not known yet
		if binary, err = qemu.Find(v.cfg.QEMU, arch); err == nil {
			o.PCI.IOMMUFD, err = qemu.TakesVFIODescriptors(ctx, binary)
		}
	}
	return o, err
}

func (v *VM) log(nic string) *slog.Logger {
	if v.cfg.Log == nil {
		return nil
	}
	return v.cfg.Log.With("vm", v.cfg.Name, "nic", nic)
}

// addDNS completes what the networks say about name resolution: their servers come first, then the user's, and only
// where neither names one the node's own. Nothing is invented.
func addDNS(d *nic.DNS, servers, search []string) error {
	for _, s := range servers {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return fmt.Errorf("dns: %w", err)
		}
		d.Servers = append(d.Servers, a)
	}
	d.Search = append(d.Search, search...)
	if len(d.Servers) > 0 {
		return nil
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the node's resolvers: %w", err)
	}
	node := parseResolvConf(string(b))
	d.Servers = node.Servers
	if len(d.Search) == 0 {
		d.Search = node.Search
	}
	return nil
}

// parseResolvConf reads resolv.conf(5). Loopback resolvers are left out: the guest has a loopback of its own.
func parseResolvConf(text string) nic.DNS {
	var d nic.DNS
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil && !a.IsLoopback() && a.Zone() == "" {
				d.Servers = append(d.Servers, a.Unmap())
			}
		case "search", "domain": // the last one wins
			d.Search = f[1:]
		}
	}
	return d
}
