package dhcp

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/nic"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// onLink reads prefixes; one with "auto" is for addresses that the guest makes.
func onLink(s ...string) (out []Prefix6) {
	for _, p := range s {
		p, auto := strings.CutSuffix(p, " auto")
		out = append(out, Prefix6{Prefix: netip.MustParsePrefix(p), Auto: auto})
	}
	return out
}

// router reads a gateway, and says what stands for it.
func router(gw string, isDefault bool, routes ...string) Router6 {
	r := Router6{Gateway: netip.MustParseAddr(gw), Source: netip.MustParseAddr(gw), Default: isDefault}
	if !r.Gateway.IsLinkLocalUnicast() {
		r.Source = linkLocal(r.Gateway.AsSlice())
	}
	if len(routes) > 0 {
		r.Routes = prefixes(routes...)
	}
	return r
}

var lease6Cases = map[string]struct {
	nic      nic.NIC
	hostname string
	want     Lease6 // MAC, MTU, Server and Duration are filled in
	notes    []string
	silent   bool
}{
	"bridge plugin": {
		nic: nic.NIC{
			Addrs: prefixes("198.51.100.2/24", "2001:db8::2/64"), Routes: routes("0.0.0.0/0 via 198.51.100.1", "::/0 via 2001:db8::1"), DNS: netDNS6,
		},
		hostname: "vm-1",
		want: Lease6{
			Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::/64"), Routers: []Router6{router("2001:db8::1", true)}, Hostname: "vm-1",
			DNS: nic.DNS{Servers: addrs("2001:db8::53", "2001:db8:53::53"), Search: netDNS6.Search},
		},
	},
	"Calico": {
		nic:  nic.NIC{Addrs: prefixes("2001:db8::2/128"), Routes: routes("::/0 via fe80::ecee:eeff:feee:eeee")},
		want: Lease6{Addrs: addrs("2001:db8::2"), Routers: []Router6{router("fe80::ecee:eeff:feee:eeee", true)}},
	},
	"ptp: the gateway is on the link, its network is not": {
		nic:  nic.NIC{Addrs: prefixes("2001:db8::2/128"), Routes: routes("2001:db8::1/128", "2001:db8::/64 via 2001:db8::1", "::/0 via 2001:db8::1")},
		want: Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::1/128"), Routers: []Router6{router("2001:db8::1", true, "2001:db8::/64")}},
	},
	"address made of the MAC": {
		nic:  nic.NIC{Addrs: prefixes("2001:db8::11:22ff:fe33:4455/64", "2001:db8:1::11:22ff:fe33:4455/80")},
		want: Lease6{Addrs: addrs("2001:db8::11:22ff:fe33:4455", "2001:db8:1::11:22ff:fe33:4455"), Prefixes: onLink("2001:db8::/64 auto", "2001:db8:1:0:11::/80")},
	},
	"several routers, the default one last": {
		nic: nic.NIC{
			Addrs:  prefixes("2001:db8::2/64", "2001:db8::3/64"),
			Routes: routes("2001:db8::/64", "2001:db8:5::/64", "2001:db8:9::/48 via 2001:db8::9", "2001:db8:a::/48 via 2001:db8::9", "2001:db8:8::/48 via fe80::8", "::/0 via 2001:db8::1"),
		},
		want: Lease6{
			Addrs: addrs("2001:db8::2", "2001:db8::3"), Prefixes: onLink("2001:db8::/64", "2001:db8:5::/64"),
			Routers: []Router6{router("2001:db8::1", true), router("2001:db8::9", false, "2001:db8:9::/48", "2001:db8:a::/48"), router("fe80::8", false, "2001:db8:8::/48")},
		},
	},
	"the least metric counts": {
		nic:   nic.NIC{Addrs: prefixes("2001:db8::2/64"), Routes: []nic.Route{metric(route("::/0 via 2001:db8::9"), 2048), metric(route("::/0 via 2001:db8::1"), 1024)}},
		want:  Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::/64"), Routers: []Router6{router("2001:db8::1", true)}},
		notes: []string{"eth0: a router advertisement carries one route to ::/0, the one with metric 2048 is left out"},
	},
	"the guest is its own gateway": {
		nic:   nic.NIC{Addrs: prefixes("2001:db8::2/64"), Routes: routes("::/0 via 2001:db8::2")},
		want:  Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::/64")},
		notes: []string{"eth0: the route to ::/0 is left out of router advertisements: 2001:db8::2 cannot be its router"},
	},
	"MTU of a route": {
		nic:   nic.NIC{Addrs: prefixes("2001:db8::2/64"), Routes: []nic.Route{{Dst: netip.MustParsePrefix("::/0"), Gw: netip.MustParseAddr("2001:db8::1"), MTU: 1400}}},
		want:  Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::/64"), Routers: []Router6{router("2001:db8::1", true)}},
		notes: []string{"eth0: router advertisements carry no MTU of a route, the 1400 of the one to ::/0 is left out"},
	},
	"default route on the link": {
		nic:  nic.NIC{Addrs: prefixes("2001:db8::2/128"), Routes: routes("::/0")},
		want: Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("::/0")},
	},
	"what every host has": {
		nic:  nic.NIC{Addrs: prefixes("fe80::2/64", "2001:db8::2/64"), Routes: routes("fe80::/64", "ff00::/8")},
		want: Lease6{Addrs: addrs("2001:db8::2"), Prefixes: onLink("2001:db8::/64")},
	},
	"bad names": {
		nic:      nic.NIC{Addrs: prefixes("2001:db8::2/128"), DNS: nic.DNS{Domain: "a.example.", Search: []string{"b..example"}, Options: []string{"ndots:5"}}},
		hostname: "-vm",
		want:     Lease6{Addrs: addrs("2001:db8::2"), DNS: nic.DNS{Domain: "a.example"}},
		notes: []string{
			`eth0: search domain "b..example" is no valid name, it is left out of DHCP`,
			`eth0: DHCP carries no resolver options, ["ndots:5"] are left out: set them in the guest, by user-data`,
			`eth0: host name "-vm" is no valid name (RFC 1123), it is left out of DHCP`,
		},
	},
	"an MTU without IPv6": {
		nic: nic.NIC{MTU: 1279, Addrs: prefixes("2001:db8::2/64")}, silent: true,
		notes: []string{"eth0: its MTU of 1279 is less than IPv6 needs (1280), so the guest gets no IPv6"},
	},
	"IPv4 only": {nic: nic.NIC{Addrs: prefixes("198.51.100.2/24")}, silent: true},
	"VF":        {nic: nic.NIC{Addrs: prefixes("2001:db8::2/64"), VF: &nic.VF{BDF: "0000:01:10.0"}}, silent: true},
}

func TestNewLease6(t *testing.T) {
	for name, c := range lease6Cases {
		t.Run(name, func(t *testing.T) {
			c.nic.Name, c.nic.MAC = "eth0", mac
			if c.nic.MTU == 0 {
				c.nic.MTU = 1500
			}
			got, notes, ok := NewLease6(c.nic, c.hostname)
			if ok == c.silent || !slices.Equal(notes, c.notes) {
				t.Errorf("ok is %v, notes are %q\nwant %q", ok, notes, c.notes)
			}
			if !ok {
				return
			}
			c.want.MAC, c.want.MTU, c.want.Server, c.want.Duration = mac, 1500, linkLocal(mac[:]), LeaseTime
			if d := cmp.Diff(c.want, got, netips); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if err := got.check(); err != nil {
				t.Error(err)
			}
			b, err := json.Marshal(got)
			var back Lease6
			if err != nil || json.Unmarshal(b, &back) != nil || cmp.Diff(got, back, netips) != "" {
				t.Errorf("JSON loses something: %s, %v", b, err)
			}
		})
	}
}

func TestLease6Bounds(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500}
	for i := range 20 {
		n.Addrs = append(n.Addrs, netip.MustParsePrefix(fmt.Sprintf("2001:db8::%x/128", i+2)))
		n.Routes = append(n.Routes, route(fmt.Sprintf("2001:db8:%x::/48 via 2001:db8::1:%x", i+1, i)))
	}
	l, notes, ok := NewLease6(n, "")
	if !ok || len(l.Addrs) != maxAddrs6 || len(l.Routers) != maxRouters || len(notes) != 8 {
		t.Errorf("%d addresses, %d routers, notes %q", len(l.Addrs), len(l.Routers), notes)
	}
	if got := len(l.Own()); got != 1+maxRouters {
		t.Errorf("%d addresses of our own", got)
	}
	if len(l.Filter()) == 0 {
		t.Error("no filter")
	}
}

// The addresses of our own are the same for ever: guests keep them while supervisors change.
func TestOwn(t *testing.T) {
	l := full6()
	want := addrs("fe80::795c:8ed0:6fc5:ab1f", "fe80::e5a0:d26c:6ef2:2116", "fe80::54a3:a5c:c71b:4ff8")
	if got := l.Own(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for _, a := range l.Own() {
		if !a.IsLinkLocalUnicast() || a.As16()[8]&2 != 0 {
			t.Errorf("%s is not a local link-local address", a)
		}
	}
}

func TestLease6Check(t *testing.T) {
	for name, edit := range map[string]func(l *Lease6){
		"MAC":      func(l *Lease6) { l.MAC = nic.MAC{} },
		"address":  func(l *Lease6) { l.Addrs = nil },
		"IPv6":     func(l *Lease6) { l.Addrs = addrs("::ffff:198.51.100.2") },
		"server":   func(l *Lease6) { l.Server = guest6 },
		"MTU":      func(l *Lease6) { l.MTU = 1279 },
		"second":   func(l *Lease6) { l.Duration = 1 },
		"routers":  func(l *Lease6) { l.Routers = slices.Repeat(l.Routers, 6) },
		"known as": func(l *Lease6) { l.Routers[0].Source = l.Routers[0].Gateway },
		"prefix":   func(l *Lease6) { l.Prefixes[0].Prefix = netip.MustParsePrefix("198.51.100.0/24") },
	} {
		l := full6()
		edit(&l)
		if err := l.check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
