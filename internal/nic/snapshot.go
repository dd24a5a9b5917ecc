package nic

import "net/netip"

// Snapshot is what was seen in a pod network namespace before virtlet changed anything in it: enough to plan the
// guest's interfaces, and enough to put every link back exactly as it was. It holds nothing secret.
type Snapshot struct {
	Links   []Link            `json:"links"`             // by interface index; the loopback is left out
	VFs     []VF              `json:"vfs,omitempty"`     // the PCI functions that Functions has named
	Sysctls map[string]string `json:"sysctls,omitempty"` // of the namespace itself, those that virtlet changes, by path below /proc/sys/net
}

// Link gives the link of that name, or nil.
func (s *Snapshot) Link(name string) *Link {
	for i := range s.Links {
		if s.Links[i].Name == name {
			return &s.Links[i]
		}
	}
	return nil
}

// Link is one network device of the namespace.
type Link struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	Kind  string `json:"kind"` // rtnetlink's IFLA_INFO_KIND: veth, macvlan, tun ...; "device" for a hardware device
	// Mode says what a link of its kind does, in ip-link(8)'s words. macvlan: private, vepa, bridge, passthru, source;
	// ipvlan: l2, l3, l3s; tun: tap, tun; netkit: l2, l3.
	Mode string `json:"mode,omitempty"`
	MAC  MAC    `json:"mac"`
	MTU  int    `json:"mtu"`
	Up   bool   `json:"up"`
	// Alias is ip-link(8)'s. host-device keeps there what a device was called on the node, and needs it for its DEL.
	Alias string `json:"alias,omitempty"`

	AllMulti   bool `json:"allMulti,omitempty"`   // it takes every multicast frame: somebody set IFF_ALLMULTI
	MultiQueue bool `json:"multiQueue,omitempty"` // of a TAP: it takes several queues, and no other descriptor
	InUse      bool `json:"inUse,omitempty"`      // of a TAP: a process is known to hold it open
	Away       bool `json:"away,omitempty"`       // of a veth: its other end is in another namespace

	Master string `json:"master,omitempty"` // the bridge that the link is a port of
	// ParentBus and ParentDev are rtnetlink's IFLA_PARENT_DEV_BUS_NAME and IFLA_PARENT_DEV_NAME: "pci", "0000:01:10.0".
	ParentBus string            `json:"parentBus,omitempty"`
	ParentDev string            `json:"parentDev,omitempty"`
	Addrs     []Addr            `json:"addrs,omitempty"`
	Routes    []KernelRoute     `json:"routes,omitempty"`
	Sysctls   map[string]string `json:"sysctls,omitempty"` // those that virtlet changes, by path below /proc/sys/net
}

// Addr is one address as the kernel keeps it.
type Addr struct {
	Prefix    netip.Prefix `json:"prefix"` // with host bits: 10.1.0.5/24
	Peer      netip.Prefix `json:"peer,omitzero"`
	Broadcast netip.Addr   `json:"broadcast,omitzero"`
	Label     string       `json:"label,omitempty"`
	Scope     int          `json:"scope,omitempty"`     // RT_SCOPE_*
	Flags     int          `json:"flags,omitempty"`     // IFA_F_*
	ValidLft  uint32       `json:"validLft,omitempty"`  // seconds; 0: for ever
	PrefLft   uint32       `json:"preferLft,omitempty"` // seconds; 0: for ever
}

// KernelRoute is one unicast route as the kernel keeps it. Routes that the kernel makes by itself (local, broadcast,
// multicast; connected ones come back with their address) are not in a snapshot, but connected ones are:
// their protocol is RTPROT_KERNEL. A route with several next hops is as many KernelRoutes, each with its Weight, on the
// links that the hops lead out by.
type KernelRoute struct {
	Dst      netip.Prefix `json:"dst"`
	Gw       netip.Addr   `json:"gw,omitzero"`      // of IPv6 also where Dst is of IPv4 (RTA_VIA)
	Weight   int          `json:"weight,omitempty"` // share of this next hop among several, from 1; 0: it is the only one
	Src      netip.Addr   `json:"src,omitzero"`
	Table    int          `json:"table,omitempty"`    // RT_TABLE_*; 0 stands for main (254)
	Protocol int          `json:"protocol,omitempty"` // RTPROT_*
	Scope    int          `json:"scope,omitempty"`    // RT_SCOPE_*
	Type     int          `json:"type,omitempty"`     // RTN_*; 0 stands for unicast (1)
	Flags    int          `json:"flags,omitempty"`    // RTNH_F_*: onlink is 4
	Metric   int          `json:"metric,omitempty"`
	MTU      int          `json:"mtu,omitempty"`
	AdvMSS   int          `json:"advMSS,omitempty"`
}
