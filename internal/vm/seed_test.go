package vm

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cloudinit"
	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/nic"
)

func TestSeedKinds(t *testing.T) {
	tests := map[string]struct {
		cfg     Config
		kind    cloudinit.Kind
		version cloudinit.Version
	}{
		"image":                  {Config{Image: &Disk{}}, cloudinit.NoCloud, cloudinit.V1},
		"root disk":              {Config{Root: true}, cloudinit.NoCloud, cloudinit.V1},
		"kernel alone":           {Config{Kernel: "k"}, "", cloudinit.NoNetwork},
		"kernel and keys":        {Config{Kernel: "k", SSHKeys: []string{"x"}}, cloudinit.NoCloud, cloudinit.V1},
		"kernel, asked for":      {Config{Kernel: "k", Seed: "configdrive"}, cloudinit.ConfigDrive, cloudinit.V1},
		"kernel, fixed":          {Config{Kernel: "k", GuestNetwork: "static"}, cloudinit.NoCloud, cloudinit.V1},
		"none":                   {Config{Image: &Disk{}, Seed: "none"}, "", cloudinit.NoNetwork},
		"no network":             {Config{Image: &Disk{}, NetworkConfig: "none"}, cloudinit.NoCloud, cloudinit.NoNetwork},
		"version 2":              {Config{Image: &Disk{}, NetworkConfig: "v2"}, cloudinit.NoCloud, cloudinit.V2},
		"user-data on the drive": {Config{Root: true, Seed: "configdrive", NetworkConfig: "user-data"}, cloudinit.ConfigDrive, cloudinit.InUserData},
	}
	for name, tt := range tests {
		if k, v := tt.cfg.kind(), tt.cfg.version(); k != tt.kind || v != tt.version {
			t.Errorf("%s: %q, %q", name, k, v)
		}
	}
}

func TestInstance(t *testing.T) {
	root := Config{Root: true, Disks: []Disk{{Path: "/dev/disk/by-id/a"}}}
	other := Config{Root: true, Disks: []Disk{{Path: "/dev/disk/by-id/b"}}}
	if a := root.instance("1"); a != root.instance("2") || a == other.instance("1") || cloudinit.CheckInstanceID(a) != nil {
		t.Errorf("root disks: %q, %q", a, other.instance("1"))
	}
	if got := (&Config{}).instance("run"); got != "run" {
		t.Error(got)
	}
	root.InstanceID = "mine"
	if got := root.instance("run"); got != "mine" {
		t.Error(got)
	}
}

// Whatever an address is told by, it is told, and a note says which is not.
func TestFurtherAddresses(t *testing.T) {
	var addrs []netip.Prefix
	for _, a := range []string{"10.1.0.5/24", "2001:db8::5/64", "10.1.0.6/24", "2001:db8::6/64"} {
		addrs = append(addrs, netip.MustParsePrefix(a))
	}
	n := nic.NIC{Name: "eth0", MAC: nic.MAC{2, 0, 0, 0, 0, 1}, MTU: 1500, Addrs: addrs}
	for carried, cfg := range map[bool]Config{true: {Image: &Disk{}}, false: {Image: &Disk{}, NetworkConfig: "none"}} {
		_, notes, _ := dhcp.NewLease(cfg.leased(n), "vm")
		if noted := slices.ContainsFunc(notes, func(s string) bool { return strings.Contains(s, "10.1.0.6") }); noted == carried {
			t.Errorf("carried by cloud-init: %t, notes %q", carried, notes)
		}
	}
	if len(n.Addrs) != 4 || n.Addrs[2] != addrs[2] {
		t.Error("the NIC was changed")
	}
}

// A VF and a NIC with fixed addresses ask nobody; with external servers a NIC asks them.
func TestInterfaces(t *testing.T) {
	both := []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24"), netip.MustParsePrefix("2001:db8::5/64")}
	tests := map[string]struct {
		cfg             Config
		nic             nic.NIC
		four, six, noRA bool
	}{
		"veth":           {Config{}, nic.NIC{Addrs: both}, true, true, true},
		"IPv4 alone":     {Config{}, nic.NIC{Addrs: both[:1]}, true, false, true},
		"layer 2":        {Config{}, nic.NIC{}, false, false, true},
		"fixed":          {Config{GuestNetwork: "static"}, nic.NIC{Addrs: both}, false, false, true},
		"VF":             {Config{}, nic.NIC{Addrs: both, VF: &nic.VF{}}, false, false, false},
		"external":       {Config{ExternalDHCP: true, ExternalRA: true}, nic.NIC{}, true, true, false},
		"external DHCP":  {Config{ExternalDHCP: true}, nic.NIC{Addrs: both[:1]}, true, false, true},
		"external, a VF": {Config{ExternalDHCP: true}, nic.NIC{Addrs: both, VF: &nic.VF{}}, false, false, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.nic.Name, tt.nic.MAC, tt.nic.MTU = "eth0", nic.MAC{2, 0, 0, 0, 0, 1}, 1500
			v := &VM{cfg: tt.cfg}
			v.state.NICs, v.servers = []nic.NIC{tt.nic}, []server{v.server(tt.nic)}
			got := v.interfaces()[0]
			if got.DHCP4 != tt.four || got.DHCP6 != tt.six || got.IgnoreRA != tt.noRA {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestTold(t *testing.T) {
	n := nic.NIC{Addrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::5/64"), netip.MustParsePrefix("10.1.0.5/24"), netip.MustParsePrefix("10.1.0.6/24")}}
	st := State{Config: Config{Image: &Disk{}}, NICs: []nic.NIC{n}, Leases: []dhcp.Lease{{Addr: n.Addrs[1]}}}
	words := func() (s string) {
		for _, a := range st.Told() {
			s += a.String() + " "
		}
		return s
	}
	if got := words(); got != "10.1.0.5 10.1.0.6 2001:db8::5 " {
		t.Error(got)
	}
	st.Config.NetworkConfig = "none"
	if got := words(); got != "10.1.0.5 " {
		t.Error(got)
	}
}
