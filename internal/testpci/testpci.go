// Package testpci makes trees of sysfs and /dev for tests of hand-overs, and plays the kernel in them: what is written
// to a driver's unbind, to drivers_probe and to driver_override has the effect that it has on a machine.
package testpci

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/pci"
)

// Device is a PCI function as a machine has it at boot.
type Device struct {
	BDF    string
	Class  uint32 // 0: an Ethernet controller
	Driver string // bound, and probed when nothing overrides it
	PF     string // of a VF
	Index  int    // of a VF
	Total  int    // VFs that a PF can have
	Group  int    // of the IOMMU; 0: none
	Net    []Net  // while Driver has it
}

// Net is a network device as the class shows it.
type Net struct{ Name, Port string }

// Tree is a machine.
type Tree struct {
	FS pci.FS
	// Bound is called when a driver has got a device, and Unbound when it has lost it.
	Bound, Unbound func(bdf, driver string)
	Refuses        string // a driver that takes no device

	t       testing.TB
	root    string
	devices map[string]Device
}

// New makes a machine with drivers and devices; VFs follow their PF.
func New(t testing.TB, drivers []string, devices ...Device) *Tree {
	t.Helper()
	root := t.TempDir()
	nop := func(string, string) {}
	m := &Tree{t: t, root: root, devices: map[string]Device{}, Bound: nop, Unbound: nop}
	m.FS = pci.FS{Root: root, Written: m.written}
	m.file("sys/bus/pci/drivers_probe", "")
	for _, d := range drivers {
		m.file("sys/bus/pci/drivers/"+d+"/unbind", "")
	}
	for _, d := range devices {
		m.add(d)
	}
	return m
}

// IOMMU lets the machine have one that is running.
func (m *Tree) IOMMU() *Tree {
	m.file("sys/class/iommu/dmar0/name", "dmar0")
	m.file("dev/vfio/vfio", "")
	return m
}

// Cdev lets the machine have the device files of iommufd, of the functions that are bound from now on.
func (m *Tree) Cdev() *Tree {
	m.file("dev/iommu", "")
	return m
}

// NoIOMMU marks a group as one of VFIO's unsafe mode.
func (m *Tree) NoIOMMU(group int) *Tree {
	m.file(fmt.Sprintf("sys/kernel/iommu_groups/%d/name", group), "vfio-noiommu")
	return m
}

// Driver gives a device's driver.
func (m *Tree) Driver(bdf string) string {
	to, _ := os.Readlink(m.at("sys/bus/pci/devices", bdf, "driver"))
	return filepath.Base(to)
}

func (m *Tree) add(d Device) {
	m.t.Helper()
	if d.Class == 0 {
		d.Class = 0x020000
	}
	m.devices[d.BDF] = d
	dir := "sys/bus/pci/devices/" + d.BDF
	m.file(dir+"/class", fmt.Sprintf("0x%06x", d.Class))
	m.file(dir+"/driver_override", "(null)")
	if d.Total > 0 {
		m.file(dir+"/sriov_totalvfs", strconv.Itoa(d.Total))
		m.file(dir+"/sriov_numvfs", "0")
		m.file(dir+"/sriov_drivers_autoprobe", "0") // as operators leave it
	}
	if d.PF != "" {
		m.link("../"+d.PF, dir+"/physfn")
		m.link("../"+d.BDF, fmt.Sprintf("sys/bus/pci/devices/%s/virtfn%d", d.PF, d.Index))
		n, _ := os.ReadFile(m.at("sys/bus/pci/devices", d.PF, "sriov_numvfs"))
		have, _ := strconv.Atoi(strings.TrimSpace(string(n)))
		m.file(fmt.Sprintf("sys/bus/pci/devices/%s/sriov_numvfs", d.PF), strconv.Itoa(have+1))
	}
	if d.Group != 0 {
		m.link(fmt.Sprintf("../../../../kernel/iommu_groups/%d", d.Group), dir+"/iommu_group")
		m.link("../../../../bus/pci/devices/"+d.BDF, fmt.Sprintf("sys/kernel/iommu_groups/%d/devices/%s", d.Group, d.BDF))
	}
	if d.Driver != "" {
		m.bind(d.BDF, d.Driver)
	}
}

// written does what the kernel does.
func (m *Tree) written(file, value string) {
	dir, name := path.Split(strings.TrimPrefix(file, "/"))
	switch name {
	case "unbind":
		m.Unbind(value)
	case "driver_override":
		if value == "" {
			m.file(dir+name, "(null)")
		}
	case "drivers_probe":
		d := m.devices[value]
		driver := d.Driver
		if d.PF != "" {
			driver = "" // sriov_drivers_autoprobe is off, which this heeds too (the kernel's pci_device_can_probe)
		}
		if o, _ := os.ReadFile(m.at("sys/bus/pci/devices", value, "driver_override")); strings.TrimSpace(string(o)) != "(null)" {
			driver = strings.TrimSpace(string(o))
		}
		_, err := os.Stat(m.at("sys/bus/pci/drivers", driver))
		if m.Driver(value) == "." && err == nil && driver != m.Refuses {
			m.bind(value, driver)
		}
	}
}

func (m *Tree) bind(bdf, driver string) {
	d, dir := m.devices[bdf], "sys/bus/pci/devices/"+bdf
	m.link("../../../../bus/pci/drivers/"+driver, dir+"/driver")
	switch {
	case strings.Contains(driver, "vfio"):
		m.file(fmt.Sprintf("dev/vfio/%d", d.Group), "")
		if _, err := os.Stat(m.at("dev/iommu")); err == nil {
			m.file(dir+"/vfio-dev/vfio0/dev", "")
			m.file("dev/vfio/devices/vfio0", "")
		}
	case driver == d.Driver:
		for _, n := range d.Net {
			m.file(dir+"/net/"+n.Name+"/phys_port_name", n.Port)
			m.link("../..", dir+"/net/"+n.Name+"/device")
			m.again("../../bus/pci/devices/"+bdf+"/net/"+n.Name, "sys/class/net/"+n.Name)
		}
	}
	m.Bound(bdf, driver)
}

// Unbind takes a device from its driver.
func (m *Tree) Unbind(bdf string) {
	driver, dir := m.Driver(bdf), m.at("sys/bus/pci/devices", bdf)
	gone := []string{filepath.Join(dir, "driver"), filepath.Join(dir, "net"), filepath.Join(dir, "vfio-dev")}
	if strings.Contains(driver, "vfio") {
		gone = append(gone, m.at("dev/vfio", strconv.Itoa(m.devices[bdf].Group)))
	}
	for _, g := range gone {
		if err := os.RemoveAll(g); err != nil {
			m.t.Error(err)
		}
	}
	m.Unbound(bdf, driver)
}

func (m *Tree) at(elem ...string) string { return filepath.Join(append([]string{m.root}, elem...)...) }

func (m *Tree) file(name, text string) {
	m.t.Helper()
	at := m.at(name)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(at, []byte(text+"\n"), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// again is link of what may be there.
func (m *Tree) again(to, name string) {
	m.t.Helper()
	if err := os.Remove(m.at(name)); err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	m.link(to, name)
}

func (m *Tree) link(to, name string) {
	m.t.Helper()
	at := m.at(name)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(to, at); err != nil {
		m.t.Fatal(err)
	}
}
