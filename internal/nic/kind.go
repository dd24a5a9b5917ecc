package nic

import "fmt"

const busPCI = "pci" // the kernel's name of the bus in IFLA_PARENT_DEV_BUS_NAME

// Kinds and modes that a guest can be joined to, and some that it cannot.
const (
	kindVeth    = "veth"
	kindMacvlan = "macvlan"
	kindIPvlan  = "ipvlan"
	kindTun     = "tun"
	kindNetkit  = "netkit"

	modeTap = "tap"
	modeL2  = "l2"
)

// refused says why no guest can be given l, and what to do; "" if one can: through a TAP, or a PCI function by
// passthrough.
func (l *Link) refused() string {
	const use = "use a CNI plugin that makes a veth or a macvlan (bridge, ptp, macvlan, Calico, Flannel ...) or remove the interface from the pod"
	switch {
	case l.ParentBus == busPCI, l.Kind == kindVeth, l.Kind == kindMacvlan:
		return ""
	case (l.Kind == kindIPvlan || l.Kind == kindNetkit) && l.Mode == modeL2:
		return ""
	case l.Kind == kindIPvlan:
		return `which has Ethernet for a guest in mode l2 alone: set "mode": "l2" in its CNI configuration, or use macvlan`
	case l.isTap() && l.InUse:
		return "which a program holds open: another VM uses the namespace, or a program in the pod the TAP; stop that first (`virtlet gc` cleans up after killed VMs)"
	case l.isTap():
		return ""
	case l.Kind == kindTun && l.Mode == "":
		return "of which the kernel does not say whether it is a TAP: " + use
	case l.Kind == kindTun:
		return "which carries packets without Ethernet: make it a TAP (`ip tuntap add mode tap`, or the CNI plugin tap)"
	case l.Kind == "macvtap" || l.Kind == "ipvtap":
		return "whose frames go to a character device and not to the namespace: use the CNI plugin macvlan, to which a guest is joined without one"
	case l.Kind == kindNetkit:
		return "which has Ethernet for a guest in mode l2 alone: let its CNI plugin make a veth (Cilium: datapath mode veth)"
	}
	return "which no guest can be joined to: " + use
}

// served says whether a guest can be given l.
func served(l *Link) bool { return l.refused() == "" }

func (l *Link) isTap() bool { return l.Kind == kindTun && l.Mode == modeTap }

// what names the kind of l, fit to be shown.
func (l *Link) what() string {
	if l.Mode == "" {
		return quote(l.Kind)
	}
	return fmt.Sprintf("%s in mode %s", quote(l.Kind), quote(l.Mode))
}

// behind gives the TAP for a guest that l, a bridge or another port of it, leads to; "" if there is none.
func (p *planner) behind(l *Link) string {
	bridge := l
	if l.Master != "" {
		bridge = p.link(l.Master)
	}
	if bridge == nil || bridge.Kind != "bridge" || l.isTap() {
		return ""
	}
	for _, tap := range p.links {
		if tap.isTap() && served(tap) && tap.Master == bridge.Name {
			return tap.Name
		}
	}
	return ""
}

// plugin names the plugin of a network in a message, where it is known.
func (c *claim) plugin() string {
	if c.Plugin == "" {
		return ""
	}
	return fmt.Sprintf(" (plugin %s)", quote(c.Plugin))
}
