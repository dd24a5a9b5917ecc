package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/utils"
)

const (
	multus       = "multus"              // the plugin's type
	multusDir    = "/var/lib/cni/multus" // what it keeps its files in unless cniDir says otherwise
	maxDelegates = 64                    // the default network included; more than a guest has NICs
)

// Delegate is a network that Multus has attached beside its default one.
type Delegate struct {
	Network string
	IfName  string
	Device  Device           // as of Attachment.Device
	Result  *types100.Result // converted and as little checked as that of Runtime.Add; nil where nothing but Device is known
}

// Delegates gives the networks that Multus has attached beside its default one, in the order in which it did. There are
// none unless a plugin of the network is Multus. Multus answers ADD with the result of the default network alone; what
// the others answered is in files that it keeps until DEL. A network whose file cannot be read is an error beside the
// others, and one that made no interface is left out, unless it is known to have a device: some plugins answer nothing for
// one that is with VFIO. infos is where device info is, DeviceInfoDir.
func (a Attachment) Delegates(infos string) ([]Delegate, error) {
	n, err := Parse("of attachment "+printable(a.ContainerID, 64), a.Network)
	if err != nil {
		return nil, err
	}
	var all []Delegate
	var errs []error
	for _, p := range n.list.Plugins {
		if p.Network.Type != multus {
			continue
		}
		some, err := a.delegates(p, infos)
		all, errs = append(all, some...), append(errs, err)
	}
	return all, errors.Join(errs...)
}

func (a Attachment) delegates(p *libcni.PluginConfig, infos string) ([]Delegate, error) {
	var conf struct {
		Dir string `json:"cniDir"`
	}
	if err := json.Unmarshal(p.Bytes, &conf); err != nil {
		return nil, a.errorf("read", "%w", err)
	}
	if err := utils.ValidateContainerID(a.ContainerID); err != nil {
		return nil, a.errorf("read", "container ID: %s", err.Msg)
	}
	dir := cmp.Or(conf.Dir, multusDir)
	// Multus keeps its networks by container, in the order of ADD. The first is the default one.
	type named struct {
		Name string `json:"name"`
	}
	var kept []struct {
		Conf     named
		ConfList named
		IfName   string `json:"ifnameRequest"`
	}
	if err := readJSON(filepath.Join(dir, a.ContainerID), &kept); err != nil {
		return nil, a.errorf("read", "what Multus attached: %w", err)
	}
	if len(kept) > maxDelegates {
		return nil, a.errorf("read", "Multus says that it attached %d networks; at most %d are read", len(kept), maxDelegates)
	}
	var all []Delegate
	var errs []error
	for i, k := range kept {
		if i == 0 {
			continue
		}
		d := Delegate{Network: cmp.Or(k.Conf.Name, k.ConfList.Name), IfName: cmp.Or(k.IfName, fmt.Sprintf("net%d", i))}
		if err := d.read(dir, a.ContainerID, infos); err != nil {
			errs = append(errs, a.errorf("read", "network %q, which Multus attached: %w", printable(d.Network, 64), err))
		}
		made := d.Result != nil && (len(d.Result.Interfaces) > 0 || len(d.Result.IPs) > 0)
		if made || d.Device.Address != "" || d.Device.PF != "" {
			all = append(all, d)
		}
	}
	return all, errors.Join(errs...)
}

// read fills in the result from libcni's cache in dir. Names of files there are ambiguous, so the content has to agree.
func (d *Delegate) read(dir, containerID, infos string) error {
	if err := utils.ValidateNetworkName(d.Network); err != nil {
		return fmt.Errorf("its name: %s", err.Msg)
	}
	if err := utils.ValidateInterfaceName(d.IfName); err != nil {
		return fmt.Errorf("interface name %q: %s", printable(d.IfName, 64), err.Msg)
	}
	file := (&Runtime{CacheDir: dir}).cacheFile(Attachment{Name: d.Network, ContainerID: containerID, IfName: d.IfName})
	var entry struct {
		Kind        string          `json:"kind"`
		ContainerID string          `json:"containerId"`
		IfName      string          `json:"ifName"`
		Network     string          `json:"networkName"`
		Config      json.RawMessage `json:"config"`
		Capability  map[string]any  `json:"capabilityArgs"`
		Result      json.RawMessage `json:"result"`
	}
	if err := readJSON(file, &entry); err != nil {
		return err
	}
	if entry.Kind != libcni.CNICacheV1 || entry.ContainerID != containerID || entry.IfName != d.IfName || entry.Network != d.Network {
		return fmt.Errorf("%s is of another attachment", file)
	}
	given := Attachment{Network: cached(entry.Config), ContainerID: containerID, IfName: d.IfName, CapabilityArgs: entry.Capability}
	d.Device = given.Device(infos)
	checked, err := (&runner{}).result(entry.Result)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	result, err := create.CreateFromBytes(checked)
	if err == nil {
		d.Result, err = types100.NewResultFromResult(result)
	}
	return err
}

// readJSON reads a file of at most maxConfig bytes.
func readJSON(file string, v any) error {
	b, err := readBounded(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}
