package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// NetworkCheck is what CHECK of one CNI attachment came to.
type NetworkCheck struct {
	Network string        `json:"network"`
	IfName  string        `json:"ifName"`
	Plugins []PluginCheck `json:"plugins,omitempty"`
	Skipped string        `json:"skipped,omitempty"` // why no plugin was asked
}

// PluginCheck is what one plugin has against the attachment as it is now.
type PluginCheck struct {
	Plugin string `json:"plugin"`
	Error  string `json:"error,omitempty"` // empty: nothing
	// Moved says that it misses no more than what the guest has: the interface's MAC, addresses and routes.
	Moved bool `json:"moved,omitempty"`
}

// CheckNetworks runs CNI CHECK for every attachment of a running VM, and looks whether its interfaces are joined to the
// guest as they were at its start. It changes nothing. The error joins what is wrong; that a plugin misses what the guest
// has is not. [ErrStopped] when the VM does not run.
func (s Store) CheckNetworks(ctx context.Context, name string) ([]NetworkCheck, error) {
	st, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	var j Journal
	if err := readJSON(s.data(name, "journal.json"), &j); err != nil || st.Status != Running || j.Network == nil {
		return nil, fmt.Errorf("check the networks of VM %q: %w", name, ErrStopped)
	}
	ns, err := netns.Open(j.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	errs := []error{podnet.Check(ns, *j.Network)}
	var checks []NetworkCheck
	for _, a := range j.Attachments {
		c := NetworkCheck{Network: a.Name, IfName: a.IfName}
		runtime := cni.Runtime{BinDirs: j.Plugins.For(a.Name), CacheDir: s.cniCache(), Timeout: st.Config.CNITimeout}
		verdicts, err := runtime.CheckEach(ctx, a, func(r *types100.Result) { afterTheMove(r, *j.Network) })
		switch {
		case errors.Is(err, cni.ErrUnsupported):
			c.Skipped = "the network's CNI version has no CHECK; it came with 0.4.0"
		case err != nil:
			errs = append(errs, err)
		case len(verdicts) == 0:
			c.Skipped = "the network's configuration switches CHECK off"
		}
		for _, v := range verdicts {
			p := PluginCheck{Plugin: v.Plugin}
			if v.Err != nil {
				p.Error, p.Moved = v.Err.Error(), v.Moved || namesTheMove(v.Err.Error(), *j.Network)
			}
			if v.Err != nil && !p.Moved {
				errs = append(errs, v.Err)
			}
			c.Plugins = append(c.Plugins, p)
		}
		checks = append(checks, c)
	}
	return checks, errors.Join(errs...)
}

// afterTheMove makes of the result of ADD what is left of it in the namespace while the guest has the rest.
func afterTheMove(r *types100.Result, rec podnet.Record) {
	for _, j := range rec.Joins {
		link := rec.Snapshot.Link(j.Link)
		if link == nil || j.KeepsAddrs {
			continue
		}
		for _, f := range r.Interfaces {
			if f != nil && f.Sandbox != "" && f.Name == j.Link && !j.Own.IsZero() {
				f.Mac = j.Own.String()
			}
		}
		var left []*types100.IPConfig
		for _, ip := range r.IPs {
			if ip != nil && !has(link, ip) {
				left = append(left, ip)
			}
		}
		if len(left) < len(r.IPs) {
			r.IPs, r.Routes = left, nil
		}
	}
}

// has says whether the link had the address before the guest.
func has(link *nic.Link, ip *types100.IPConfig) bool {
	for _, a := range link.Addrs {
		if ip.Address.IP.Equal(a.Prefix.Addr().AsSlice()) {
			return true
		}
	}
	return false
}

// namesTheMove says whether a plugin complains of a MAC that has moved. Some know it from their configuration, whatever
// the result says.
func namesTheMove(complaint string, rec podnet.Record) bool {
	complaint = strings.ToLower(complaint)
	for _, j := range rec.Joins {
		link := rec.Snapshot.Link(j.Link)
		if link != nil && !j.Own.IsZero() && (strings.Contains(complaint, link.MAC.String()) || strings.Contains(complaint, j.Own.String())) {
			return true
		}
	}
	for _, h := range rec.VFs { // of a function there is nothing left in the namespace
		if strings.Contains(complaint, strings.ToLower(h.NIC)) || strings.Contains(complaint, h.MAC.String()) {
			return true
		}
	}
	return false
}
