package cloudinit

import (
	"fmt"
	"net"
	"net/netip"
)

// networkData is OpenStack's network_data.json, the network configuration of a ConfigDrive:
// https://docs.openstack.org/nova/latest/user/metadata.html. cloud-init turns it into version 1. Three keys are
// cloud-init's own, and others ignore them: a link's name, a route's metric, and a network's search domains.
type networkData struct {
	Links    []linkData    `json:"links"`
	Networks []netData     `json:"networks"`
	Services []serviceData `json:"services"`
}

type linkData struct {
	ID   string `json:"id"`
	Type string `json:"type"`
	MAC  string `json:"ethernet_mac_address"`
	MTU  int    `json:"mtu"`
	Name string `json:"name"`
}

type netData struct {
	ID      string        `json:"id"`
	Type    string        `json:"type"`
	Link    string        `json:"link"`
	Address string        `json:"ip_address,omitempty"`
	Netmask string        `json:"netmask,omitempty"`
	Metric  int           `json:"metric,omitempty"`
	DNS     []string      `json:"dns_nameservers,omitempty"`
	Search  []string      `json:"dns_search,omitempty"`
	Routes  []routeData   `json:"routes,omitempty"`
	Service []serviceData `json:"services,omitempty"`
}

type routeData struct {
	Network string `json:"network"`
	Netmask string `json:"netmask"`
	Gateway string `json:"gateway"`
	Metric  int    `json:"metric,omitempty"`
}

type serviceData struct {
	Type    string `json:"type"`
	Address string `json:"address"`
}

func (n Network) networkData() networkData {
	d := networkData{Links: []linkData{}, Networks: []netData{}, Services: []serviceData{}}
	for _, l := range n.links {
		d.Links = append(d.Links, linkData{ID: l.name, Type: "phy", MAC: l.mac.String(), MTU: l.mtu, Name: l.name})
		add := func(n netData) {
			n.ID, n.Link = fmt.Sprintf("network%d", len(d.Networks)), l.name
			d.Networks = append(d.Networks, n)
		}
		if l.dhcp4 {
			add(netData{Type: "ipv4_dhcp", Metric: l.metric})
		}
		if l.dhcp6 {
			add(netData{Type: "ipv6_dhcp", Metric: l.metric})
		}
		for i, a := range l.addrs {
			n := netData{Type: "ipv4", Address: a.Addr().String(), Netmask: netmask(a)}
			if a.Addr().Is6() {
				n.Type = "ipv6"
			}
			if i == 0 {
				n.DNS, n.Search = strs(l.servers), l.search
				for _, s := range l.servers {
					n.Service = append(n.Service, serviceData{Type: "dns", Address: s.String()})
				}
			}
			for _, r := range l.routes {
				if l.home(r) == i {
					n.Routes = append(n.Routes, routeData{
						Network: r.Dst.Addr().String(), Netmask: netmask(r.Dst), Gateway: r.Gw.String(), Metric: r.Metric,
					})
				}
			}
			add(n)
		}
	}
	return d
}

// netmask gives the mask of a prefix in the form of an address.
func netmask(p netip.Prefix) string {
	return net.IP(net.CIDRMask(p.Bits(), p.Addr().BitLen())).String()
}
