package nic

import (
	"encoding/json"
	"net/netip"
)

// Recording is the network of one pod as a file: what the plugins answered, what the namespace was like, what was found
// around it on the node, and what Plan made of that. A file of testdata is one; put there, a user's state is a test.
//
// It holds addresses, MACs, names of networks, plugins and links, and the resolvers of a CNI result. It has no place for
// anything that may be secret: configurations of plugins, arguments of a call, names of machines.
type Recording struct {
	About       string   `json:"about"`
	Attachments []Answer `json:"attachments"`
	Snapshot    Snapshot `json:"snapshot"`
	// NoTxChecksum are links of the namespace that leave no checksum to the hardware (ethtool -K LINK tx off).
	NoTxChecksum []string `json:"noTxChecksum,omitempty"`
	Host         *Host    `json:"host,omitempty"`
	Want         Want     `json:"want,omitzero"`
	WantErr      string   `json:"wantErr,omitempty"` // part of Plan's error
}

// Answer is what the plugins of one network answered to ADD.
type Answer struct {
	Network string          `json:"network"`
	IfName  string          `json:"ifName"`
	Device  string          `json:"device,omitempty"` // as of Attachment
	Type    string          `json:"deviceType,omitempty"`
	Plugins []string        `json:"plugins,omitempty"` // their types, in the order of the chain
	Result  json.RawMessage `json:"result,omitempty"`  // as the last plugin printed it, of any CNI version; left out where only the namespace is known
}

// Want is what Plan makes of a recording.
type Want struct {
	NICs  []NIC    `json:"nics"`
	Notes []string `json:"notes,omitempty"`
}

// Host is the node's side of a pod's links, as far as it was found.
type Host struct {
	Links   []HostLink        `json:"links"`
	Sysctls map[string]string `json:"sysctls,omitempty"` // of the node, by path below /proc/sys/net
}

// HostLink is a link of the node that belongs to a pod: the other end of its veth, what its macvlan is on, or the bridge
// that one of those is a port of.
type HostLink struct {
	Link
	PodLink    string      `json:"podLink,omitempty"` // the pod's link that it is the other end of, or under
	Hairpin    bool        `json:"hairpin,omitempty"` // of a bridge's port: frames may go out where they came in
	NoLearning bool        `json:"noLearning,omitempty"`
	Neighbours []Neighbour `json:"neighbours,omitempty"` // those that somebody has written, not what was learnt
}

// Neighbour is an entry of a neighbour table that does not age.
type Neighbour struct {
	IP    netip.Addr `json:"ip"`
	MAC   MAC        `json:"mac,omitzero"`
	Proxy bool       `json:"proxy,omitempty"` // the link answers for the address
}
