// Package nic is the pure model of a guest's network: what a CNI result says and what was seen in the
// pod network namespace go in, the list of network interfaces that the guest is to own comes out.
//
// Nothing here touches the machine. A [Snapshot] is plain JSON, so the state of any cluster's namespace can be
// kept as a test case; [Plan] holds the quirks of every CNI plugin in one place.
package nic

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// MAC is an Ethernet address; as text it is lower-case and colon-separated.
type MAC [6]byte

// ParseMAC reads an Ethernet address of six bytes in any form that [net.ParseMAC] takes.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil {
		return MAC{}, err
	}
	if len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("MAC address %q has %d bytes, Ethernet needs 6", s, len(hw))
	}
	return MAC(hw), nil
}

// String gives the form 02:00:5e:10:00:01.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// IsZero says whether m is the unset address.
func (m MAC) IsZero() bool { return m == MAC{} }

// HardwareAddr gives m as the standard library's type; the slice is a copy.
func (m MAC) HardwareAddr() net.HardwareAddr { return net.HardwareAddr(m[:]) }

// Compact gives the twelve hex digits alone, for names.
func (m MAC) Compact() string { return hex.EncodeToString(m[:]) }

// MarshalText implements [encoding.TextMarshaler]; the unset address is empty text.
func (m MAC) MarshalText() ([]byte, error) {
	if m.IsZero() {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	v, err := ParseMAC(string(b))
	if err != nil {
		return err
	}
	*m = v
	return nil
}

// NIC is one network interface of the guest: what the pod's interface of that name had, the guest has.
// The order of a []NIC is the CNI order and the guest's order.
type NIC struct {
	Name    string         `json:"name"`              // the interface's name in the namespace: eth0, net1
	Network string         `json:"network,omitempty"` // the CNI network that made it, where known
	MAC     MAC            `json:"mac"`
	MTU     int            `json:"mtu"` // bytes of payload of one frame, as `ip link` counts
	Addrs   []netip.Prefix `json:"addrs,omitempty"`
	Routes  []Route        `json:"routes,omitempty"` // sorted: on-link before the routes that need them, defaults last
	DNS     DNS            `json:"dns,omitzero"`
	VF      *VF            `json:"vf,omitempty"` // nil: served through a TAP
}

// Gateway gives the next hop of n's default route of the given family (4 or 6), or the zero Addr.
func (n NIC) Gateway(family int) netip.Addr {
	for _, r := range n.Routes {
		if r.IsDefault() && r.Gw.IsValid() && r.Gw.Is4() == (family == 4) {
			return r.Gw
		}
	}
	return netip.Addr{}
}

// HasGateway says whether a route of the given family (4 or 6) leads through a gateway.
func (n NIC) HasGateway(family int) bool {
	return slices.ContainsFunc(n.Routes, func(r Route) bool { return r.Gw.IsValid() && r.Gw.Is4() == (family == 4) })
}

// Route is one route of the guest through its NIC.
type Route struct {
	Dst    netip.Prefix `json:"dst"`              // masked; 0.0.0.0/0 or ::/0 for a default route
	Gw     netip.Addr   `json:"gw,omitzero"`      // unset: the destination is on the link
	Src    netip.Addr   `json:"src,omitzero"`     // preferred source, rarely set
	Metric int          `json:"metric,omitempty"` // as in the namespace; 0 is the kernel's default
	MTU    int          `json:"mtu,omitempty"`    // bytes; 0: the NIC's
}

// IsDefault says whether r catches every destination of its family.
func (r Route) IsDefault() bool { return r.Dst.IsValid() && r.Dst.Bits() == 0 }

// OnLink says whether r needs no gateway.
func (r Route) OnLink() bool { return !r.Gw.IsValid() }

// DNS is the resolver configuration of a NIC.
type DNS struct {
	Servers []netip.Addr `json:"servers,omitempty"`
	Domain  string       `json:"domain,omitempty"`
	Search  []string     `json:"search,omitempty"`
	Options []string     `json:"options,omitempty"` // resolv.conf options, as the CNI result gives them
}

// IsZero says whether d says nothing.
func (d DNS) IsZero() bool {
	return len(d.Servers) == 0 && d.Domain == "" && len(d.Search) == 0 && len(d.Options) == 0
}

// VF is a PCI function that goes to the guest by passthrough: an SR-IOV virtual function, or on purpose another.
type VF struct {
	BDF   string `json:"bdf"`            // PCI address: 0000:01:10.0
	PF    string `json:"pf,omitempty"`   // network device of its physical function; "": it is no virtual function
	Index int    `json:"index"`          // among the virtual functions of PF
	Group int    `json:"group"`          // of the IOMMU; -1: none
	MAC   MAC    `json:"mac,omitzero"`   // that PF has for it; unset: none
	VLAN  int    `json:"vlan,omitempty"` // that PF puts on the guest's frames, where the guest does not see it; 0: none
	// Detached says that it was with VFIO already when it was seen, and so without a network device.
	Detached bool `json:"detached,omitempty"`
}
