package pci_test

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/virtlet/virtlet/internal/pci"
	"github.com/virtlet/virtlet/internal/testpci"
)

// Layouts after the kernel's documentation (Documentation/ABI/testing/sysfs-bus-pci) and drivers' habits: igb has its VFs
// on another bus number and every other function of it, ixgbe likewise, i40e from function 2 on, mlx5 on the PF's own
// bus with representors, and a root port may have a domain of its own (VMD).
var (
	drivers = []string{"igb", "igbvf", "ixgbe", "ixgbevf", "i40e", "iavf", "mlx5_core", "nvme", "pcieport", pci.VFIO, "mlx5_vfio_pci"}

	igb = []testpci.Device{
		{BDF: "0000:01:00.0", Driver: "igb", Total: 7, Group: 14, Net: []testpci.Net{{Name: "enp1s0"}}},
		{BDF: "0000:01:10.0", Driver: "igbvf", PF: "0000:01:00.0", Index: 0, Group: 15, Net: []testpci.Net{{Name: "enp1s0v0"}}},
		{BDF: "0000:01:10.2", Driver: "igbvf", PF: "0000:01:00.0", Index: 1, Group: 16, Net: []testpci.Net{{Name: "enp1s0v1"}}},
	}
	ixgbe = []testpci.Device{
		{BDF: "0000:05:00.1", Driver: "ixgbe", Total: 63, Group: 21, Net: []testpci.Net{{Name: "eno2"}}},
		{BDF: "0000:05:10.1", Driver: "ixgbevf", PF: "0000:05:00.1", Index: 0, Group: 22},
		{BDF: "0000:05:13.7", Driver: "ixgbevf", PF: "0000:05:00.1", Index: 11, Group: 23},
	}
	i40e = []testpci.Device{
		{BDF: "10000:81:00.0", Driver: "i40e", Total: 64, Group: 30, Net: []testpci.Net{{Name: "ens1f0"}}},
		{BDF: "10000:81:02.0", Driver: "iavf", PF: "10000:81:00.0", Index: 0, Group: 31},
		{BDF: "10000:81:02.1", Driver: pci.VFIO, PF: "10000:81:00.0", Index: 1, Group: 32},
	}
	mlx5 = []testpci.Device{
		{BDF: "0001:03:00.0", Driver: "mlx5_core", Total: 8, Group: 40, Net: []testpci.Net{{Name: "enP1p3s0f0_0", Port: "pf0vf0"}, {Name: "enP1p3s0f0np0", Port: "p0"}}},
		{BDF: "0001:03:00.2", Driver: "mlx5_core", PF: "0001:03:00.0", Index: 0, Group: 41, Net: []testpci.Net{{Name: "enP1p3s0f0v0"}}},
		{BDF: "0001:03:00.3", Driver: "mlx5_vfio_pci", PF: "0001:03:00.0", Index: 1, Group: 42},
	}
)

func machine(t testing.TB) *testpci.Tree {
	var all []testpci.Device
	for _, card := range [][]testpci.Device{igb, ixgbe, i40e, mlx5} {
		all = append(all, card...)
	}
	return testpci.New(t, drivers, all...).IOMMU()
}

func TestFunction(t *testing.T) {
	m := machine(t)
	tests := []struct {
		want pci.Function
		net  string
		vfio bool
	}{
		{pci.Function{BDF: "0000:01:00.0", Driver: "igb", Group: 14, TotalVFs: 7, NumVFs: 2}, "enp1s0", false},
		{pci.Function{BDF: "0000:01:10.0", Driver: "igbvf", PF: "0000:01:00.0", Index: 0, Group: 15}, "enp1s0v0", false},
		{pci.Function{BDF: "0000:01:10.2", Driver: "igbvf", PF: "0000:01:00.0", Index: 1, Group: 16}, "enp1s0v1", false},
		{pci.Function{BDF: "0000:05:13.7", Driver: "ixgbevf", PF: "0000:05:00.1", Index: 11, Group: 23}, "", false},
		{pci.Function{BDF: "10000:81:02.1", Driver: pci.VFIO, PF: "10000:81:00.0", Index: 1, Group: 32}, "", true},
		{pci.Function{BDF: "0001:03:00.0", Driver: "mlx5_core", Group: 40, TotalVFs: 8, NumVFs: 2}, "enP1p3s0f0np0", false}, // not the representor
		{pci.Function{BDF: "0001:03:00.3", Driver: "mlx5_vfio_pci", PF: "0001:03:00.0", Index: 1, Group: 42}, "", true},
	}
	for _, tt := range tests {
		tt.want.Class = 0x020000
		f, err := m.FS.Function(tt.want.BDF)
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(tt.want, f, cmpopts.IgnoreUnexported(pci.Function{})); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if net, err := m.FS.Netdev(tt.want.BDF); net != tt.net || err != nil {
			t.Errorf("%s: network device %q, %v, want %q", tt.want.BDF, net, err, tt.net)
		}
		if f.WithVFIO() != tt.vfio {
			t.Errorf("%s: with VFIO: %t", tt.want.BDF, f.WithVFIO())
		}
	}
	all, err := m.FS.All()
	if err != nil || len(all) != 12 {
		t.Errorf("%d functions, %v", len(all), err)
	}
	if _, err := m.FS.Function("0000:09:00.0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a function that is not there: %v", err)
	}
	// What a plugin names is no path.
	for _, bad := range []string{"", "..", "0000:01:10.0/../../..", "0000:01:10.8", "01:10.0"} {
		if _, err := m.FS.Function(bad); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("address %q: %v", bad, err)
		}
	}
	if all, err := (pci.FS{Root: t.TempDir()}).All(); len(all) > 0 || err != nil {
		t.Errorf("a machine without PCI: %v, %v", all, err)
	}
}

func TestPassable(t *testing.T) {
	pf, vf := igb[0], igb[1]
	with := func(d testpci.Device, change func(*testpci.Device)) testpci.Device {
		change(&d)
		return d
	}
	beside := func(bdf, driver string, class uint32) testpci.Device {
		return testpci.Device{BDF: bdf, Driver: driver, Class: class, Group: vf.Group}
	}
	plain := func(ds ...testpci.Device) func(testing.TB) *testpci.Tree {
		return func(t testing.TB) *testpci.Tree { return testpci.New(t, drivers, ds...).IOMMU() }
	}
	tests := []struct {
		name     string
		machine  func(testing.TB) *testpci.Tree
		bdf      string
		with     []string
		physical bool
		want     error
		says     []string
	}{
		{"a VF alone in its group", plain(pf, vf), vf.BDF, nil, false, nil, nil},
		{
			"beside bridges, functions of VFIO and those without driver", plain(pf, vf,
				beside("0000:00:1c.0", "pcieport", 0x060400), beside("0000:01:10.4", pci.VFIO, 0), beside("0000:01:10.6", "mlx5_vfio_pci", 0), beside("0000:01:11.0", "", 0)),
			vf.BDF, nil, false, nil, nil,
		},
		{
			"group shared", plain(pf, vf, beside("0000:02:00.0", "nvme", 0x010802), beside("0000:01:10.4", "igbvf", 0)),
			vf.BDF, nil, false, pci.ErrShared,
			[]string{"group 15", "0000:01:10.4 (igbvf), 0000:02:00.0 (nvme)", "ACS"},
		},
		{
			"group shared with what goes to the same guest", plain(pf, vf, beside("0000:01:10.4", "igbvf", 0)),
			vf.BDF,
			[]string{"0000:01:10.0", "0000:01:10.4"},
			false, nil, nil,
		},
		{"IOMMU off", func(t testing.TB) *testpci.Tree {
			return testpci.New(t, drivers, pf, with(vf, func(d *testpci.Device) { d.Group = 0 }))
		}, vf.BDF, nil, false, pci.ErrNoIOMMU, []string{"intel_iommu=on", "firmware"}},
		{"not behind the IOMMU", plain(pf, with(vf, func(d *testpci.Device) { d.Group = 0 })), vf.BDF, nil, false, pci.ErrNoIOMMU, []string{"another slot"}},
		{
			"only the unsafe mode", func(t testing.TB) *testpci.Tree { return testpci.New(t, drivers, pf, vf).NoIOMMU(vf.Group) },
			vf.BDF, nil, false, pci.ErrUnsafe,
			[]string{"enable_unsafe_noiommu_mode"},
		},
		{
			"no vfio-pci", func(t testing.TB) *testpci.Tree { return testpci.New(t, []string{"igb", "igbvf"}, pf, vf).IOMMU() },
			vf.BDF, nil, false, pci.ErrNoVFIO,
			[]string{"modprobe vfio-pci"},
		},
		{"a PF", plain(pf, vf), pf.BDF, nil, false, pci.ErrNotVirtual, []string{"up to 7", "--allow-physical"}},
		{"a PF on purpose", plain(pf), pf.BDF, nil, true, nil, nil},
		{"a PF on purpose, which has VFs", plain(pf, vf), pf.BDF, nil, true, pci.ErrInUse, []string{"1 virtual functions", "sriov_numvfs"}},
		{"a NIC without SR-IOV", plain(with(pf, func(d *testpci.Device) { d.Total = 0 })), pf.BDF, nil, false, pci.ErrNotVirtual, []string{"--allow-physical"}},
		{"a disk that a plugin named", plain(beside("0000:02:00.0", pci.VFIO, 0x010802)), "0000:02:00.0", nil, true, pci.ErrNotNetwork, []string{"0x010802"}},
		{"with VFIO already, without the common driver", func(t testing.TB) *testpci.Tree {
			return testpci.New(t, []string{"mlx5_core", "mlx5_vfio_pci"}, mlx5[0], mlx5[2]).IOMMU()
		}, mlx5[2].BDF, nil, false, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.machine(t)
			f, err := m.FS.Function(tt.bdf)
			if err != nil {
				t.Fatal(err)
			}
			err = m.FS.Passable(f, tt.with, tt.physical)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
		})
	}
}

func TestBind(t *testing.T) {
	m := machine(t)
	var seen []string
	m.Bound = func(bdf, driver string) { seen = append(seen, bdf+" to "+driver) }
	m.Unbound = func(bdf, driver string) { seen = append(seen, bdf+" from "+driver) }
	const vf = "0000:01:10.2"
	bind := func(driver string, want ...string) {
		t.Helper()
		seen = nil
		if err := m.FS.Bind(vf, driver); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, seen, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if f, err := m.FS.Function(vf); f.Driver != driver || f.Override != driver || err != nil {
			t.Errorf("bound: %+v, %v", f, err)
		}
	}
	bind(pci.VFIO, vf+" from igbvf", vf+" to vfio-pci")
	bind(pci.VFIO) // again: nothing to do
	bind("igbvf", vf+" from vfio-pci", vf+" to igbvf")
	if err := m.FS.Override(vf, ""); err != nil {
		t.Error(err)
	}
	if f, err := m.FS.Function(vf); f.Override != "" || f.Driver != "igbvf" || err != nil {
		t.Errorf("without override: %+v, %v", f, err)
	}
	m.Unbind(vf) // as left by somebody who was killed
	bind(pci.VFIO, vf+" to vfio-pci")

	m.Refuses = "igbvf"
	if err := m.FS.Bind(vf, "igbvf"); err == nil || !strings.Contains(err.Error(), "dmesg") {
		t.Errorf("a driver that takes none: %v", err)
	}
	if err := m.FS.Bind("0000:09:00.0", pci.VFIO); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a function that is not there: %v", err)
	}
}

func TestNodes(t *testing.T) {
	m := machine(t)
	f, err := m.FS.Function("10000:81:02.1")
	if err != nil {
		t.Fatal(err)
	}
	if n := m.FS.Nodes(f); n != (pci.Nodes{Group: m.FS.Root + "/dev/vfio/32"}) {
		t.Errorf("a kernel without iommufd: %+v", n)
	}
	was, err := m.FS.Owner(f.Group)
	if err != nil || was == nil || was.Mode != 0o600 {
		t.Fatalf("owner %+v, %v", was, err)
	}
	if os.Geteuid() == 0 {
		mine := pci.Owner{UID: 0x70000001, GID: 0x70000002, Mode: 0o640}
		for _, o := range []pci.Owner{mine, *was} {
			if err := m.FS.Own(f.Group, o); err != nil {
				t.Error(err)
			}
			if now, err := m.FS.Owner(f.Group); *now != o || err != nil {
				t.Errorf("owner %+v, %v, want %+v", now, err, o)
			}
		}
	}
	// The file of a group is there while VFIO has one of its functions.
	if o, err := m.FS.Owner(15); o != nil || err != nil {
		t.Errorf("owner of what is not there: %+v, %v", o, err)
	}
	if err := m.FS.Own(15, *was); err != nil {
		t.Error(err)
	}
	if busy, err := m.FS.InUse(15); busy || err != nil {
		t.Errorf("in use: %t, %v", busy, err)
	}

	m.Cdev()
	if err := m.FS.Bind("0000:01:10.0", pci.VFIO); err != nil {
		t.Fatal(err)
	}
	if f, err = m.FS.Function("0000:01:10.0"); err != nil {
		t.Fatal(err)
	}
	root := m.FS.Root
	if n := m.FS.Nodes(f); n != (pci.Nodes{Group: root + "/dev/vfio/15", Device: root + "/dev/vfio/devices/vfio0", IOMMU: root + "/dev/iommu"}) {
		t.Errorf("a kernel with iommufd: %+v", n)
	}
}

func TestVirtual(t *testing.T) {
	m := machine(t)
	for _, tt := range []struct {
		pf     string
		number int
		want   string // an address, or part of the error
	}{
		{"enp1s0", 1, "0000:01:10.2"},
		{"eno2", 11, "0000:05:13.7"},
		{"ens1f0", 1, "10000:81:02.1"},
		{"enp1s0", 2, "no such file"},
		{"eth7", 0, "no such file"},
		{"../../bus/pci/devices/0000:01:00.0/net/enp1s0", 0, "no name"},
		{"..", 0, "no name"},
	} {
		got, err := m.FS.Virtual(tt.pf, tt.number)
		if err != nil {
			got = err.Error()
		}
		if got != tt.want && (err == nil || !strings.Contains(got, tt.want)) {
			t.Errorf("VF %d of %s: %s, want %s", tt.number, tt.pf, got, tt.want)
		}
	}
}
