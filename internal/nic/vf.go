package nic

import (
	"fmt"
	"regexp"
	"slices"
)

// pciAddress is how the kernel prints a PCI address: domain, bus, device, function. Some root ports make domains of
// more than four digits.
var pciAddress = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// linkName is what the kernel takes for the name of a network device.
var linkName = regexp.MustCompile(`^[^/:\s\x00-\x1f\x7f]{1,15}$`)

// Functions gives the addresses of the PCI functions that links of the namespace are, and that attachments name: what
// Snapshot.VFs is to tell about. None is there twice.
func Functions(as []Attachment, links []Link) []string {
	var all []string
	add := func(bdf string) {
		if pciAddress.MatchString(bdf) && !slices.Contains(all, bdf) {
			all = append(all, bdf)
		}
	}
	for _, l := range links {
		if l.ParentBus == busPCI {
			add(l.ParentDev)
		}
	}
	for _, a := range as {
		for _, d := range a.devices() {
			add(d.bdf)
		}
	}
	return all
}

// device is a PCI function that an attachment names, and what it says of it.
type device struct {
	bdf, name, mac string
	mtu            int
}

// devices gives the functions of the pod's interfaces in the result (pciID, CNI 1.1), or else the one that the network
// was given.
func (a *Attachment) devices() []device {
	var all []device
	given := device{bdf: a.Device, name: a.IfName}
	if a.Result != nil {
		for _, f := range a.Result.Interfaces {
			switch {
			case f == nil || f.Sandbox == "" || len(all) == maxEntries:
			case f.PciID != "":
				all = append(all, device{f.PciID, f.Name, f.Mac, f.Mtu})
			case f.Name == a.IfName || f.Name == "":
				given.mac, given.mtu = f.Mac, f.Mtu
			}
		}
	}
	if len(all) == 0 && a.Device != "" {
		all = append(all, given)
	}
	for i := range all {
		if all[i].name == "" {
			all[i].name = a.IfName
		}
	}
	return all
}

// devices refuses what no guest can be given, by the name that device info has for it, and tells what was of no use.
func (p *planner) devices(as []Attachment) error {
	for _, a := range as {
		if a.DeviceNote != "" {
			p.note("network %s: what tells of the device of interface %s is not used: %s", quote(a.Network), quote(a.IfName), a.DeviceNote)
		}
		if a.DeviceType != "" && a.DeviceType != busPCI {
			return fmt.Errorf("network %s: interface %s is of type %s, as its device info says, which no guest can be joined to: give the pod a virtual function (a pool of the device plugin of deviceType netdevice or vfio-pci, without vdpaType), or a network that makes a veth or a macvlan",
				quote(a.Network), quote(a.IfName), quote(a.DeviceType))
		}
	}
	return nil
}

// detached stands a link for every function that an attachment names, and that has none as it is with VFIO already: the
// pools of device plugins for DPDK, and the SR-IOV plugins' mode for it. All that is known of it is the result's, but
// for what its PF has set.
func (p *planner) detached(as []Attachment) {
	const ethernetMTU = 1500
	for _, a := range as {
		for _, d := range a.devices() {
			vf := p.vf(d.bdf)
			has := slices.ContainsFunc(p.links, func(l *Link) bool { return l.ParentBus == busPCI && l.ParentDev == d.bdf })
			if vf == nil || !vf.Detached || has || p.link(d.name) != nil || d.name == loopback || !linkName.MatchString(d.name) {
				continue // what is missing is found to be so by its name
			}
			l := &Link{Name: d.name, Kind: "device", Up: true, MAC: vf.MAC, MTU: d.mtu, ParentBus: busPCI, ParentDev: d.bdf}
			if mac, err := ParseMAC(d.mac); err == nil {
				l.MAC = mac
			}
			if l.MTU == 0 {
				l.MTU = ethernetMTU
				p.note("network %s: interface %s gets an MTU of %d bytes: nothing says another", quote(a.Network), quote(d.name), l.MTU)
			}
			p.links = append(p.links, l)
		}
	}
}

func (p *planner) vf(bdf string) *VF {
	for i := range p.vfs {
		if p.vfs[i].BDF == bdf {
			return &p.vfs[i]
		}
	}
	return nil
}
