package cloudinit

import (
	"net/netip"

	"github.com/virtlet/virtlet/internal/nic"
)

// netConfigV1 is network configuration version 1:
// https://docs.cloud-init.io/en/latest/reference/network-config-format-v1.html.
type netConfigV1 struct {
	Version int          `json:"version"`
	Config  []physicalV1 `json:"config"`
}

type physicalV1 struct {
	Type     string     `json:"type"`
	Name     string     `json:"name"`
	MAC      string     `json:"mac_address"`
	MTU      int        `json:"mtu"`
	AcceptRA *bool      `json:"accept-ra,omitempty"`
	Subnets  []subnetV1 `json:"subnets"`
}

type subnetV1 struct {
	Type    string    `json:"type"`
	Address string    `json:"address,omitempty"`
	Gateway string    `json:"gateway,omitempty"`
	Metric  int       `json:"metric,omitempty"`
	DNS     []string  `json:"dns_nameservers,omitempty"`
	Search  []string  `json:"dns_search,omitempty"`
	Routes  []routeV1 `json:"routes,omitempty"`
}

type routeV1 struct {
	Destination string `json:"destination"`
	Gateway     string `json:"gateway"`
	Metric      int    `json:"metric,omitempty"`
}

func (n Network) v1() netConfigV1 {
	c := netConfigV1{Version: 1, Config: []physicalV1{}}
	for _, l := range n.links {
		c.Config = append(c.Config, physicalV1{
			Type: "physical", Name: l.name, MAC: l.mac.String(), MTU: l.mtu, AcceptRA: l.acceptRA(), Subnets: l.subnetsV1(),
		})
	}
	return c
}

// acceptRA is only ever false or unset: what an image does with advertisements by default is right otherwise.
func (l *link) acceptRA() *bool {
	if !l.ignoreRA {
		return nil
	}
	return new(bool)
}

func (l *link) subnetsV1() (subnets []subnetV1) {
	if l.dhcp4 {
		subnets = append(subnets, subnetV1{Type: "dhcp4", Metric: l.metric})
	}
	if l.dhcp6 {
		subnets = append(subnets, subnetV1{Type: "dhcp6", Metric: l.metric})
	}
	if len(subnets)+len(l.addrs) == 0 {
		return []subnetV1{{Type: "manual"}} // up, with its MTU, and nothing more
	}
	fixed := make([]subnetV1, len(l.addrs))
	for i, a := range l.addrs {
		fixed[i] = subnetV1{Type: "static", Address: a.String()}
		if a.Addr().Is6() {
			fixed[i].Type = "static6"
		}
	}
	if len(fixed) > 0 {
		fixed[0].DNS, fixed[0].Search = strs(l.servers), l.search
	}
	gateways := map[bool]bool{} // by family
	for _, r := range l.routes {
		is4 := r.Dst.Addr().Is4()
		s := &fixed[l.home(r)]
		// ifupdown knows gateways; for any other route cloud-init has it call route(8), which is often not there.
		if r.IsDefault() && r.Metric == 0 && !gateways[is4] {
			s.Gateway, gateways[is4] = r.Gw.String(), true
			continue
		}
		s.Routes = append(s.Routes, routeV1{Destination: r.Dst.String(), Gateway: r.Gw.String(), Metric: r.Metric})
	}
	return append(subnets, fixed...)
}

// netConfigV2 is network configuration version 2, the form of netplan:
// https://docs.cloud-init.io/en/latest/reference/network-config-format-v2.html.
type netConfigV2 struct {
	Version   int                   `json:"version"`
	Ethernets map[string]ethernetV2 `json:"ethernets"`
}

type ethernetV2 struct {
	Match       matchV2      `json:"match"`
	SetName     string       `json:"set-name"`
	MTU         int          `json:"mtu"`
	DHCP4       bool         `json:"dhcp4,omitempty"`
	DHCP6       bool         `json:"dhcp6,omitempty"`
	Overrides4  *overridesV2 `json:"dhcp4-overrides,omitempty"`
	Overrides6  *overridesV2 `json:"dhcp6-overrides,omitempty"`
	AcceptRA    *bool        `json:"accept-ra,omitempty"`
	Addresses   []string     `json:"addresses,omitempty"`
	Routes      []routeV2    `json:"routes,omitempty"`
	Nameservers *dnsV2       `json:"nameservers,omitempty"`
}

type matchV2 struct {
	MAC string `json:"macaddress"`
}

type overridesV2 struct {
	RouteMetric int `json:"route-metric"`
}

type routeV2 struct {
	To     string `json:"to"`
	Via    string `json:"via"`
	OnLink bool   `json:"on-link,omitempty"`
	From   string `json:"from,omitempty"`
	Metric int    `json:"metric,omitempty"`
	MTU    int    `json:"mtu,omitempty"`
}

type dnsV2 struct {
	Addresses []string `json:"addresses,omitempty"`
	Search    []string `json:"search,omitempty"`
}

func (n Network) v2() netConfigV2 {
	c := netConfigV2{Version: 2, Ethernets: map[string]ethernetV2{}}
	for _, l := range n.links {
		e := ethernetV2{
			Match: matchV2{MAC: l.mac.String()}, SetName: l.name, MTU: l.mtu, DHCP4: l.dhcp4, DHCP6: l.dhcp6,
			AcceptRA: l.acceptRA(), Addresses: strs(l.addrs),
		}
		if l.metric != 0 { // networkd wants both to be the same
			o := &overridesV2{RouteMetric: l.metric}
			if l.dhcp4 {
				e.Overrides4 = o
			}
			if l.dhcp6 {
				e.Overrides6 = o
			}
		}
		for _, r := range l.routes {
			e.Routes = append(e.Routes, l.routeV2(r))
		}
		if len(l.servers)+len(l.search) > 0 {
			e.Nameservers = &dnsV2{Addresses: strs(l.servers), Search: l.search}
		}
		c.Ethernets[l.name] = e
	}
	return c
}

func (l *link) routeV2(r nic.Route) routeV2 {
	v := routeV2{To: r.Dst.String(), Via: r.Gw.String(), OnLink: l.onLink(r), Metric: r.Metric, MTU: r.MTU}
	if r.OnLink() {
		// The unspecified address is no gateway to netplan, networkd, NetworkManager and the kernel. "scope: link" says
		// the same, but cloud-init's other renderers fail as a whole without a "via".
		v.Via, v.OnLink = unspecified(r.Dst).String(), false
	}
	if r.Src.IsValid() {
		v.From = r.Src.String()
	}
	return v
}

func unspecified(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
