package pci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// Why a function cannot be given to a guest.
var (
	ErrNoIOMMU    = errors.New("no IOMMU keeps its memory accesses apart")
	ErrUnsafe     = errors.New("VFIO is in its mode without an IOMMU")
	ErrNoVFIO     = errors.New("the kernel has no driver " + VFIO)
	ErrShared     = errors.New("its IOMMU group is shared")
	ErrNotVirtual = errors.New("it is no SR-IOV virtual function")
	ErrInUse      = errors.New("it is in use")
	ErrNotNetwork = errors.New("it is no network controller")
)

// Passable says why a function cannot be given to a guest, and what to do about it; nil if it can. with has the addresses
// that go to the same guest; physical permits a function that is not a VF.
func (s FS) Passable(f Function, with []string, physical bool) error {
	fail := func(why error, do string, a ...any) error {
		return fmt.Errorf("pass on PCI function %s: %w: %s", f.BDF, why, fmt.Sprintf(do, a...))
	}
	switch {
	case !f.IsNetwork():
		return fail(ErrNotNetwork, "its class is %#06x; correct the CNI plugin that named it", f.Class)
	case f.PF == "" && f.TotalVFs > 0 && !physical:
		return fail(ErrNotVirtual, "it is a physical function with up to %d of them; use one of these, or give the whole card with --allow-physical", f.TotalVFs)
	case f.PF == "" && !physical:
		return fail(ErrNotVirtual, "use a CNI plugin that hands out VFs, or give the whole card with --allow-physical")
	case f.NumVFs > 0:
		return fail(ErrInUse, "%d virtual functions would go with it; give it none first: echo 0 >/sys/bus/pci/devices/%s/sriov_numvfs", f.NumVFs, f.BDF)
	case f.noIOMMU:
		return fail(ErrUnsafe, "a guest could overwrite the node's memory; switch the IOMMU on (VT-d or AMD-Vi in the firmware, intel_iommu=on on the kernel's command line), and enable_unsafe_noiommu_mode off")
	case f.Group == NoGroup && s.HasIOMMU():
		return fail(ErrNoIOMMU, "the IOMMU does not serve this function; move the card to another slot")
	case f.Group == NoGroup:
		return fail(ErrNoIOMMU, "switch it on: VT-d or AMD-Vi in the firmware, and intel_iommu=on on the kernel's command line of an Intel machine")
	case !f.WithVFIO() && !s.HasDriver(VFIO):
		return fail(ErrNoVFIO, "modprobe %s (CONFIG_VFIO_PCI), and have it loaded at boot", VFIO)
	}
	members, err := s.members(f.Group)
	if err != nil {
		return fmt.Errorf("pass on PCI function %s: %w", f.BDF, err)
	}
	// The kernel refuses a group of which a driver of its own has any function (iommu_group_claim_dma_owner), but for
	// those that make no memory accesses.
	var others []string
	for _, m := range members {
		if m.BDF != f.BDF && !slices.Contains(with, m.BDF) && m.Driver != "" && !m.WithVFIO() && m.Driver != "pci-stub" && m.Class>>8 != classBridge {
			others = append(others, fmt.Sprintf("%s (%s)", m.BDF, m.Driver))
		}
	}
	if len(others) > 0 {
		return fail(ErrShared, "group %d has also %s, which would go to the guest; unbind them, or move the card to a slot of its own (one whose ports have ACS)", f.Group, strings.Join(others, ", "))
	}
	return nil
}

// Override says which driver alone the function may have; "": any that fits.
func (s FS) Override(bdf, driver string) error {
	// The kernel clears it at an empty line.
	if err := s.write(s.device(bdf, "driver_override"), driver+"\n"); err != nil {
		return fmt.Errorf("set driver_override of %s to %q: %w", bdf, driver, err)
	}
	return nil
}

// Bind gives the function to the driver: it overrides the choice, takes it from the driver that it has, and probes. Where
// it has that driver, nothing but the override is changed. A program that holds a function with VFIO open keeps
// Bind waiting: see InUse.
func (s FS) Bind(bdf, driver string) error {
	f, err := s.Function(bdf)
	if err != nil {
		return err
	}
	if f.Override != driver {
		if err := s.Override(bdf, driver); err != nil {
			return err
		}
	}
	if f.Driver == driver {
		return nil
	}
	if err := s.unbind(f); err != nil {
		return err
	}
	if err := s.write(s.path("sys/bus/pci/drivers_probe"), bdf); err != nil {
		return fmt.Errorf("probe %s for driver %s: %w", bdf, driver, err)
	}
	now, err := s.link(s.device(bdf, "driver"))
	if err == nil && now != driver {
		err = fmt.Errorf("it has %q; the kernel's log says why (dmesg)", now)
	}
	if err != nil {
		return fmt.Errorf("bind %s to driver %s: %w", bdf, driver, err)
	}
	return nil
}

func (s FS) unbind(f Function) error {
	if f.Driver == "" {
		return nil
	}
	err := s.write(s.path(drivers, f.Driver, "unbind"), f.BDF)
	// Gone on its own meanwhile, with its driver or alone.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoDevice) {
		return fmt.Errorf("take %s from driver %s: %w", f.BDF, f.Driver, err)
	}
	return nil
}

// Nodes are the device files by which a program uses functions that are with VFIO.
type Nodes struct {
	Group  string // of the IOMMU group
	Device string // of the function itself; "": the kernel has none
	IOMMU  string // to go with Device; likewise
}

// Nodes gives the device files of a function that is with VFIO.
func (s FS) Nodes(f Function) Nodes {
	n := Nodes{Group: s.path("dev/vfio", fmt.Sprint(f.Group))}
	entries, _ := os.ReadDir(s.device(f.BDF, "vfio-dev")) // CONFIG_VFIO_DEVICE_CDEV, Linux 6.6
	iommu := s.path("dev/iommu")
	if _, err := os.Stat(iommu); err != nil || len(entries) != 1 {
		return n
	}
	if dev := s.path("dev/vfio/devices", entries[0].Name()); exists(dev) {
		n.Device, n.IOMMU = dev, iommu
	}
	return n
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}
