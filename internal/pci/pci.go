// Package pci knows PCI functions by sysfs: which network devices are virtual functions (VFs) of which physical function
// (PF), which driver and IOMMU group they have, and how to give one to another driver and back.
//
// All of it is below the root of an [FS], so that a test can have a tree of its own. Nothing is kept in memory: every
// method reads what is there now. [FS.Function] and [FS.Passable] change nothing; [FS.Bind] gives a function a driver,
// whatever it has, and may be called again; [FS.Open] gives what QEMU needs of one that is with VFIO, and the caller
// closes it.
//
// A function is bound by its own driver_override, never by new_id: that would catch every function of the same make
// that is without a driver, also one that another pod is about to get. It is probed explicitly, as SR-IOV
// operators switch the probing of VFs off (sriov_drivers_autoprobe); without an override none would be probed then.
package pci

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// FS is where sysfs and /dev are.
type FS struct {
	Root string // "" is "/"
	// Written is called after every write to a file of the tree, which is given without the root. The test that has made
	// the tree plays the kernel there; on a machine it is nil.
	Written func(file, value string)
}

// VFIO is the driver by which a program gets a function.
const VFIO = "vfio-pci"

// NoGroup is the IOMMU group of a function that has none.
const NoGroup = -1

// Function is a PCI function as it was seen.
type Function struct {
	BDF      string // its address: domain:bus:device.function
	Class    uint32 // base class, subclass, programming interface
	Driver   string // "" where there is none
	Override string // the only driver that it may have; "": any
	PF       string // the address of the physical function that it is a VF of; "": it is none's
	Index    int    // among the VFs of PF
	Group    int    // of the IOMMU
	TotalVFs int    // that it can have; 0: it is no PF with SR-IOV
	NumVFs   int    // that it has
	noIOMMU  bool   // its group is one of VFIO's unsafe mode
}

// IsNetwork says whether the function is a network controller.
func (f *Function) IsNetwork() bool { return f.Class>>16 == classNetwork }

// WithVFIO says whether the function is with VFIO already: by the common driver, or by one for its make.
func (f *Function) WithVFIO() bool { return isVFIO(f.Driver) }

func isVFIO(driver string) bool {
	// mlx5_vfio_pci, nvgrace-gpu-vfio-pci ...
	return strings.HasSuffix(strings.ReplaceAll(driver, "_", "-"), VFIO)
}

// Base classes, and the class of a bridge to another PCI bus (linux/pci_ids.h).
const (
	classNetwork = 0x02
	classBridge  = 0x0604
)

// address is how the kernel prints one. Some root ports make domains of more than four digits.
var address = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

func (s FS) path(elem ...string) string {
	return filepath.Join(append([]string{"/", s.Root}, elem...)...)
}

const (
	devices = "sys/bus/pci/devices"
	drivers = "sys/bus/pci/drivers"
	groups  = "sys/kernel/iommu_groups"
)

func (s FS) device(bdf string, file ...string) string {
	return s.path(append([]string{devices, bdf}, file...)...)
}

// Function reads what there is to know of the function at an address. The error of one that is not there is
// [fs.ErrNotExist].
func (s FS) Function(bdf string) (Function, error) {
	fail := func(err error) (Function, error) { return Function{}, fmt.Errorf("read PCI function %s: %w", bdf, err) }
	if !address.MatchString(bdf) {
		return Function{}, fmt.Errorf("read PCI function %q: it is no address such as 0000:01:10.0", bdf)
	}
	class, err := s.read(s.device(bdf, "class"))
	if err != nil {
		return fail(err)
	}
	n, err := strconv.ParseUint(class, 0, 32)
	if err != nil {
		return fail(err)
	}
	f := Function{BDF: bdf, Class: uint32(n), Group: NoGroup}
	if f.Driver, err = s.link(s.device(bdf, "driver")); err != nil {
		return fail(err)
	}
	if f.Override, err = s.read(s.device(bdf, "driver_override")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if f.Override == "(null)" { // the kernel's print of none
		f.Override = ""
	}
	if f.PF, err = s.link(s.device(bdf, "physfn")); err != nil {
		return fail(err)
	}
	if f.PF != "" {
		if f.Index, err = s.index(f.PF, bdf); err != nil {
			return fail(err)
		}
	}
	f.TotalVFs, f.NumVFs = s.number(s.device(bdf, "sriov_totalvfs")), s.number(s.device(bdf, "sriov_numvfs"))
	group, err := s.link(s.device(bdf, "iommu_group"))
	if err != nil || group == "" {
		return f, err
	}
	if f.Group, err = strconv.Atoi(group); err != nil {
		return fail(fmt.Errorf("IOMMU group %q: %w", group, err))
	}
	name, _ := s.read(s.path(groups, group, "name")) // most have none
	f.noIOMMU = name == "vfio-noiommu"
	return f, nil
}

// index finds which VF of its PF a function is.
func (s FS) index(pf, bdf string) (int, error) {
	const prefix = "virtfn"
	entries, err := os.ReadDir(s.device(pf))
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), prefix)
		if !ok {
			continue
		}
		if to, err := s.link(s.device(pf, e.Name())); err == nil && to == bdf {
			return strconv.Atoi(number)
		}
	}
	return 0, fmt.Errorf("its physical function %s does not list it: it is about to be removed", pf)
}

// All gives every network controller, by address. One that goes meanwhile is left out.
func (s FS) All() ([]Function, error) {
	entries, err := os.ReadDir(s.path(devices)) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list PCI functions: %w", err)
	}
	var all []Function
	for _, e := range entries {
		f, err := s.Function(e.Name())
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return all, err
		case f.IsNetwork():
			all = append(all, f)
		}
	}
	return all, nil
}

// representor is the port name of a device that stands for a VF or a subfunction on the switch of its card
// (Documentation/networking/representors.rst). It has the PF as its PCI device, and is not the PF's own.
var representor = regexp.MustCompile(`^(c\d+)?pf\d+(vf|sf)\d+$`)

// Netdev gives the name of the network device of a function, of those that the reader's sysfs shows: in the network
// namespace where it was mounted. "" if there is none.
func (s FS) Netdev(bdf string) (string, error) {
	entries, err := os.ReadDir(s.device(bdf, "net")) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("find the network device of %s: %w", bdf, err)
	}
	for _, e := range entries {
		port, _ := s.read(s.device(bdf, "net", e.Name(), "phys_port_name")) // EOPNOTSUPP of most drivers
		if !representor.MatchString(port) {
			return e.Name(), nil
		}
	}
	return "", nil
}

// Virtual gives the address of a VF by the network device of its PF, of those that the reader's sysfs shows, and its number
// there. The error of one that is not there is [fs.ErrNotExist].
func (s FS) Virtual(netdev string, number int) (string, error) {
	fail := func(err error) (string, error) { return "", fmt.Errorf("find VF %d of %q: %w", number, netdev, err) }
	if netdev == "" || netdev == "." || netdev == ".." || strings.ContainsAny(netdev, "/\x00") {
		return fail(errors.New("that is no name of a network device"))
	}
	to, err := os.Readlink(s.path("sys/class/net", netdev, "device", fmt.Sprintf("virtfn%d", number)))
	if err != nil {
		return fail(err)
	}
	return filepath.Base(to), nil
}

// HasDriver says whether the kernel has a PCI driver of that name now; it may have a module of it that is not loaded.
func (s FS) HasDriver(name string) bool {
	_, err := os.Stat(s.path(drivers, name))
	return err == nil
}

// HasIOMMU says whether the kernel runs any IOMMU.
func (s FS) HasIOMMU() bool {
	entries, err := os.ReadDir(s.path("sys/class/iommu"))
	return err == nil && len(entries) > 0
}

// members gives the functions of a group.
func (s FS) members(group int) ([]Function, error) {
	entries, err := os.ReadDir(s.path(groups, strconv.Itoa(group), "devices"))
	if err != nil {
		return nil, fmt.Errorf("list IOMMU group %d: %w", group, err)
	}
	var all []Function
	for _, e := range entries {
		if !address.MatchString(e.Name()) {
			continue // of a platform bus
		}
		f, err := s.Function(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	return all, nil
}

func (s FS) read(file string) (string, error) {
	b, err := os.ReadFile(file)
	return strings.TrimSpace(string(b)), err
}

func (s FS) number(file string) int {
	text, _ := s.read(file) // absent: 0
	n, _ := strconv.Atoi(text)
	return n
}

// link gives the last element of where a symbolic link leads; "" if there is none.
func (s FS) link(file string) (string, error) {
	to, err := os.Readlink(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return filepath.Base(to), nil
}

// write writes to a file that is there: in sysfs none can be made.
func (s FS) write(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err := cmp.Or(err, f.Close()); err != nil {
		return err
	}
	if s.Written != nil {
		s.Written(strings.TrimPrefix(file, s.path()), strings.TrimSpace(value))
	}
	return nil
}
