package cloudinit

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// netCase is the NICs of a guest.
type netCase struct {
	interfaces []Interface
	refusesV1  bool // it needs on-link routes
}

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addrs(all ...string) (a []netip.Addr) {
	for _, s := range all {
		a = append(a, netip.MustParseAddr(s))
	}
	return a
}

// routes reads "DST [via GW] [metric N] [mtu N] [src A]".
func routes(all ...string) (rs []nic.Route) {
	for _, s := range all {
		f := strings.Fields(s)
		r := nic.Route{Dst: netip.MustParsePrefix(f[0])}
		for i := 1; i+1 < len(f); i += 2 {
			switch f[i] {
			case "via":
				r.Gw = netip.MustParseAddr(f[i+1])
			case "src":
				r.Src = netip.MustParseAddr(f[i+1])
			case "metric":
				fmt.Sscan(f[i+1], &r.Metric)
			case "mtu":
				fmt.Sscan(f[i+1], &r.MTU)
			}
		}
		rs = append(rs, r)
	}
	return rs
}

func mac(i byte) nic.MAC { return nic.MAC{2, 0, 0, 0, 0, i} }

// static gives NICs that are configured without DHCP, in this order.
func static(nics ...nic.NIC) (all []Interface) {
	for i, n := range nics {
		n.MAC = mac(byte(i + 1))
		if n.Name == "" {
			n.Name = fmt.Sprintf("eth%d", i)
		}
		if n.MTU == 0 {
			n.MTU = 1500
		}
		all = append(all, Interface{NIC: n, IgnoreRA: n.VF == nil})
	}
	return all
}

// dhcp makes the i-th NIC one that has a DHCP server for these families.
func dhcp(all []Interface, i int, four, six bool) []Interface {
	all[i].DHCP4, all[i].DHCP6 = four, six
	return all
}

var (
	dns  = nic.DNS{Servers: addrs("10.96.0.10", "fd00:96::a"), Search: []string{"default.svc.cluster.local", "svc.cluster.local"}}
	many = func() (d nic.DNS) {
		d.Servers = addrs("10.96.0.10")
		for i := range 32 {
			d.Search = append(d.Search, fmt.Sprintf("namespace-%02d.svc.cluster-%02d.example", i, i))
		}
		return d
	}()
	plain = nic.NIC{
		MTU: 1450, Addrs: prefixes("10.244.1.5/24", "fd00:244:1::5/64"), DNS: dns,
		Routes: routes("10.244.0.0/16 via 10.244.1.1", "fd00:244::/48 via fd00:244:1::1 metric 1024", "0.0.0.0/0 via 10.244.1.1", "::/0 via fd00:244:1::1 metric 1024"),
	}
	calico = nic.NIC{
		MTU: 1440, Addrs: prefixes("10.10.192.128/32", "fd00:10::9380:634f:1c91:e300/128"), DNS: dns,
		Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1", "::/0 via fe80::ecee:eeff:feee:eeee metric 1024"),
	}
	ptp = nic.NIC{
		Addrs: prefixes("10.55.0.2/32", "2001:db8:55::2/128"), DNS: nic.DNS{Servers: addrs("198.51.100.53")},
		Routes: routes("10.55.0.1/32", "2001:db8:55::1/128 metric 1024", "10.55.0.0/24 via 10.55.0.1", "2001:db8:55::/64 via 2001:db8:55::1 metric 1024",
			"0.0.0.0/0 via 10.55.0.1", "::/0 via 2001:db8:55::1 metric 1024"),
	}
	weave = nic.NIC{MTU: 1376, Addrs: prefixes("10.32.0.1/12"), Routes: routes("0.0.0.0/0 via 10.32.0.2"), DNS: nic.DNS{Servers: addrs("10.96.0.10"), Domain: "weave.local"}}
	vf    = nic.NIC{
		Name: "net1", MTU: 9000, VF: &nic.VF{BDF: "0000:01:10.0"}, Addrs: prefixes("192.0.2.9/25", "2001:db8:2::9/64"),
		Routes: routes("198.51.100.0/24 via 192.0.2.1", "2001:db8:8::/48 via fe80::1 metric 1024"),
	}
)

// netCases are the networks that the real cloud-init renders.
var netCases = map[string]netCase{
	"plain-dual": {interfaces: static(plain)},
	"ipv6-only": {interfaces: static(nic.NIC{
		Addrs: prefixes("2001:db8::5/64"), Routes: routes("::/0 via 2001:db8::1 metric 1024"), DNS: nic.DNS{Servers: addrs("2001:db8::53")},
	})},
	"calico-dual":   {interfaces: static(calico), refusesV1: true},
	"calico-dhcp":   {interfaces: dhcp(static(calico), 0, true, true)},
	"ptp":           {interfaces: static(ptp), refusesV1: true},
	"on-link-route": {interfaces: static(nic.NIC{Addrs: prefixes("198.51.100.2/24"), Routes: routes("203.0.113.0/28", "198.51.100.1/32", "0.0.0.0/0 via 198.51.100.1")}), refusesV1: true},
	"weave":         {interfaces: static(weave)},
	"several-addresses": {interfaces: static(nic.NIC{
		Addrs:  prefixes("10.1.0.5/24", "10.2.0.5/24", "10.1.0.6/24", "2001:db8:1::5/64", "2001:db8:2::5/64"),
		Routes: routes("10.3.0.0/16 via 10.2.0.1", "2001:db8:3::/48 via 2001:db8:2::1", "0.0.0.0/0 via 10.1.0.1", "::/0 via 2001:db8:1::1"), DNS: dns,
	})},
	"several-addresses-dhcp": {interfaces: dhcp(static(nic.NIC{
		Addrs: prefixes("10.1.0.5/24", "10.2.0.5/24", "2001:db8:1::5/64", "2001:db8:1::6/64"), Routes: routes("0.0.0.0/0 via 10.1.0.1"), DNS: dns,
	}), 0, true, true)},
	"two-with-metrics": {interfaces: static(
		nic.NIC{Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 10.1.0.1"), DNS: dns},
		nic.NIC{
			Addrs: prefixes("10.2.0.5/24", "fd00:2::5/64"), DNS: nic.DNS{Servers: addrs("10.2.0.53")},
			Routes: routes("10.9.0.0/16 via 10.2.0.1 metric 50", "0.0.0.0/0 via 10.2.0.1 metric 200", "::/0 via fd00:2::1 metric 2048"),
		})},
	"layer-2":        {interfaces: static(weave, nic.NIC{MTU: 1400})},
	"vf-beside-dhcp": {interfaces: dhcp(static(plain, vf), 0, true, true)},
	"ipv4-dhcp":      {interfaces: dhcp(static(weave), 0, true, false)},
	"largest-mtu":    {interfaces: static(nic.NIC{MTU: 65521, Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 10.1.0.1"), DNS: dns})},
	"many-search-domains": {interfaces: static(nic.NIC{
		Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 10.1.0.1"), DNS: many,
	})},
}
