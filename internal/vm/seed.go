package vm

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/virtlet/virtlet/internal/cloudinit"
	"github.com/virtlet/virtlet/internal/nic"
)

// Values of [Config].Seed, NetworkConfig and GuestNetwork beside those of package cloudinit.
const (
	noSeed        = "none"
	networkDHCP   = "dhcp"
	networkStatic = "static"
)

// checkSeed finds what of the seed's settings cannot be, or not together.
func (c *Config) checkSeed(bad func(bool, string, ...any)) {
	kinds := []string{"", string(cloudinit.NoCloud), string(cloudinit.ConfigDrive), noSeed}
	versions := []string{"", string(cloudinit.V1), string(cloudinit.V2), string(cloudinit.InUserData), string(cloudinit.NoNetwork)}
	bad(!slices.Contains(kinds, c.Seed), "seed %q: use nocloud, configdrive or none", c.Seed)
	bad(!slices.Contains(versions, c.NetworkConfig), "network-config %q: use v1, v2, user-data or none", c.NetworkConfig)
	bad(!slices.Contains([]string{"", networkDHCP, networkStatic}, c.GuestNetwork), "guest-network %q: use dhcp or static", c.GuestNetwork)
	bad(c.Seed == noSeed && (c.UserData != nil || c.SSHKeys != nil || c.InstanceID != ""),
		"--seed none: --user-data, --ssh-key and --instance-id need a seed: leave them out, or choose nocloud or configdrive")
	carries := c.version() != cloudinit.NoNetwork
	bad(!carries && c.GuestNetwork == networkStatic, "--guest-network static: the seed carries it: leave --seed none and --network-config none out")
	bad(c.Seed == noSeed && c.NetworkConfig != "" && c.NetworkConfig != string(cloudinit.NoNetwork), "--network-config %s needs a seed", c.NetworkConfig)
	bad(c.Seed == string(cloudinit.ConfigDrive) && c.version() == cloudinit.V2,
		"--network-config v2: a ConfigDrive carries version 1 (as network_data.json): use --seed nocloud, or --network-config v1")
	if c.InstanceID != "" {
		err := cloudinit.CheckInstanceID(c.InstanceID)
		bad(err != nil, "%w", err)
	}
}

// kind gives the kind of seed that the guest gets, "" for none. A kernel that is booted by itself, with nothing that
// only cloud-init reads, gets one when it is asked for.
func (c *Config) kind() cloudinit.Kind {
	switch {
	case c.Seed == noSeed:
		return ""
	case c.Seed != "":
		return cloudinit.Kind(c.Seed)
	case c.Image == nil && !c.Root && c.UserData == nil && c.SSHKeys == nil && c.InstanceID == "" && c.NetworkConfig == "" && c.GuestNetwork == "":
		return ""
	}
	return cloudinit.NoCloud
}

// version says how the seed carries the network configuration.
func (c *Config) version() cloudinit.Version {
	if c.kind() == "" {
		return cloudinit.NoNetwork
	}
	return cmp.Or(cloudinit.Version(c.NetworkConfig), cloudinit.V1)
}

// instance gives the instance ID. A disk that outlives its VM keeps its own, or cloud-init would take every boot for the
// first one of a new machine: new host keys, user-data run again. It is of the disk's path as it was given, not of the
// VM's name, which may be another each time, nor of the path's target: /dev/disk/by-id stays when sda becomes sdb.
func (c *Config) instance(run string) string {
	if c.InstanceID != "" {
		return c.InstanceID
	}
	if !c.Root {
		return run
	}
	h := sha256.Sum256([]byte(c.Disks[0].Path))
	return "root-" + hex.EncodeToString(h[:8])
}

// leased gives a NIC as our DHCP server tells it: without the further IPv4 addresses, for which DHCP has no place, where
// cloud-init carries them.
func (c *Config) leased(n nic.NIC) nic.NIC {
	if c.version() == cloudinit.NoNetwork {
		return n
	}
	seen := false
	n.Addrs = slices.DeleteFunc(slices.Clone(n.Addrs), func(a netip.Prefix) bool {
		further := a.Addr().Is4() && seen
		seen = seen || a.Addr().Is4()
		return further
	})
	return n
}

// interfaces says what of each NIC the guest asks for and what it is told. No DHCP of ours reaches a VF.
func (v *VM) interfaces() (all []cloudinit.Interface) {
	for i, n := range v.state.NICs {
		in := cloudinit.Interface{NIC: n}
		s, c := v.servers[i], &v.cfg
		six := slices.ContainsFunc(n.Addrs, func(a netip.Prefix) bool { return a.Addr().Is6() })
		if n.VF == nil && c.GuestNetwork != networkStatic {
			in.DHCP4 = s.v4 != nil || c.ExternalDHCP
			in.DHCP6 = s.v6 != nil && !s.v6.NoDHCP || c.ExternalDHCP && (six || c.ExternalRA)
		}
		in.IgnoreRA = n.VF == nil && !c.ExternalRA
		all = append(all, in)
	}
	return all
}

// Told gives the addresses that the guest has been told of, by DHCP or by cloud-init, IPv4 first: not all that the
// plugins planned need to be among them.
func (s State) Told() (all []netip.Addr) {
	add := func(a netip.Addr) {
		if !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	for _, l := range s.Leases {
		add(l.Addr.Addr())
	}
	for _, l := range s.Leases6 {
		for _, a := range l.Addrs {
			add(a)
		}
	}
	if s.Config.version() != cloudinit.NoNetwork {
		for _, n := range s.NICs {
			for _, a := range n.Addrs {
				add(a.Addr())
			}
		}
	}
	slices.SortStableFunc(all, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return all
}

// makeSeed writes the cloud-init seed.
func (v *VM) makeSeed() (string, error) {
	kind, version := v.cfg.kind(), v.cfg.version()
	if version == cloudinit.NoNetwork {
		for _, n := range v.state.NICs {
			if n.VF != nil {
				v.note(fmt.Sprintf("%s: nothing tells the guest its addresses: DHCP does not reach a VF, and no cloud-init seed carries them", n.Name))
			}
		}
	}
	if err := v.makeVolumes(); err != nil {
		return "", err
	}
	if kind == "" {
		return "none", nil
	}
	seed := cloudinit.Seed{
		Kind: kind, InstanceID: v.cfg.instance(v.id), Hostname: v.cfg.Hostname, SSHKeys: v.cfg.SSHKeys, UserData: v.cfg.UserData,
		EveryBoot: v.cfg.Root, Mounts: v.cfg.Volumes.Mounts,
	}
	for _, d := range v.cfg.Disks {
		if d.Mount != "" {
			seed.Scratch = append(seed.Scratch, cloudinit.Scratch{Serial: d.Serial, Path: d.Mount})
		}
	}
	if version != cloudinit.NoNetwork {
		network, notes, err := cloudinit.NewNetwork(version, v.interfaces())
		v.note(notes...)
		if errors.Is(err, cloudinit.ErrOnLink) {
			err = fmt.Errorf("%w: use --guest-network dhcp, or --network-config v2 for images with netplan or systemd-networkd", err)
		}
		if err != nil {
			return "", err
		}
		seed.Network = network
	}
	var iso bytes.Buffer
	if err := seed.WriteISO(&iso); err != nil {
		return "", err
	}
	f, err := os.OpenFile(v.store.data(v.cfg.Name, "seed.iso"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("write cloud-init seed: %w", err)
	}
	if _, err := iso.WriteTo(f); err != nil {
		f.Close()
		return "", fmt.Errorf("write cloud-init seed: %w", err)
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("write cloud-init seed: %w", err)
	}
	v.media.seed, err = os.Open(f.Name())
	v.state.InstanceID = seed.InstanceID
	return fmt.Sprintf("%s, instance %s, network %s", kind, seed.InstanceID, version), err
}
