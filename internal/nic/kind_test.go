package nic

import (
	"fmt"
	"testing"
)

func mode(m string) func(*Link)   { return func(l *Link) { l.Mode = m } }
func master(m string) func(*Link) { return func(l *Link) { l.Master = m } }

// Kinds that are served in some modes, or for some reasons, and not in others.
func TestPlanKinds(t *testing.T) {
	of := func(name string, index int, k, m string) Link {
		return eth(name, index, "10.1.0.5/24").with(kind(k), mode(m))
	}
	inUse := func(l *Link) { l.InUse = true }
	const served = "eth0@a 1500: 10.1.0.5/24"
	as := []Attachment{cni(t, "a", "eth0", "")}
	as[0].Plugin = "some"
	var rows []row
	for _, m := range []string{"private", "vepa", "bridge", "passthru", "source", ""} {
		rows = append(rows, row{name: "macvlan " + m, as: as, links: []Link{of("eth0", 2, "macvlan", m)}, want: served})
	}
	for _, c := range []struct{ kind, mode, err string }{
		{"ipvlan", "l3", `which has Ethernet for a guest in mode l2 alone: set "mode": "l2"`},
		{"ipvlan", "l3s", "which has Ethernet for a guest in mode l2 alone"},
		{"tun", "tun", "which carries packets without Ethernet: make it a TAP"},
		{"macvtap", "", "whose frames go to a character device and not to the namespace: use the CNI plugin macvlan"},
		{"ipvtap", "", "whose frames go to a character device"},
		{"netkit", "l3", "which has Ethernet for a guest in mode l2 alone: let its CNI plugin make a veth"},
		{"wireguard", "", "which no guest can be joined to: use"},
	} {
		how := ""
		if c.mode != "" {
			how = fmt.Sprintf(" in mode %q", c.mode)
		}
		rows = append(rows, row{
			name: c.kind + " " + c.mode, as: as, links: []Link{of("eth0", 2, c.kind, c.mode)},
			err: fmt.Sprintf(`network "a" (plugin "some"): interface "eth0" is of kind %q%s, %s`, c.kind, how, c.err),
		}, row{
			name: "idle " + c.kind + " " + c.mode, links: []Link{eth("eth0", 2), eth("net1", 3).with(kind(c.kind), mode(c.mode), down)},
			want: "eth0@ 1500:", notes: []string{fmt.Sprintf(`interface "net1" is left out: it is a %q%s, down`, c.kind, how)},
		})
	}
	tap := of("eth0", 4, "tun", "tap")
	bridge, port := eth("br0", 2, "10.9.0.1/24").with(kind("bridge")), eth("up0", 3).with(master("br0"))
	run(t, append(rows, []row{
		{name: "netkit l2", as: as, links: []Link{of("eth0", 2, "netkit", "l2")}, want: served},
		{name: "ipvlan l2", as: as, links: []Link{of("eth0", 2, "ipvlan", "l2")}, want: served},
		{name: "TAP", as: as, links: []Link{tap}, want: served},
		{name: "TAP that somebody holds", links: []Link{tap.with(inUse)}, err: `interface "eth0" (no CNI result names it) is of kind "tun" in mode "tap", which a program holds open`},
		{
			name: "TAP of a bridge, which leads out by a veth", as: as, links: []Link{bridge, port, tap.with(master("br0"))}, want: served,
			notes: []string{`interface "br0" is left to the namespace: it leads to the guest's "eth0"`, `interface "up0" is left to the namespace`},
		},
		{
			name: "two TAPs of a bridge", links: []Link{bridge, of("tap1", 3, "tun", "tap").with(master("br0")), tap.with(master("br0"))},
			want: "tap1@ 1500: 10.1.0.5/24\n eth0@ 1500: 10.1.0.5/24", notes: []string{`"br0" is left`},
		},
		{name: "veth of a TAP's bridge that a network names", as: []Attachment{cni(t, "b", "up0", "")}, links: []Link{bridge, port, tap.with(master("br0"))}, err: `network "b": interface "up0" is a port of "br0" already`},
		{name: "TAP of another VM", links: []Link{bridge, port, tap.with(master("br0"), inUse)}, err: `interface "br0" (no CNI result names it) is of kind "bridge"`},
		{name: "TAP of something else", links: []Link{eth("vrf0", 2).with(kind("vrf"), down), tap.with(master("vrf0"))}, notes: []string{`"vrf0" is left out`}, err: `is a port of "vrf0" already`},
		{name: "macvlan of a bridge", links: []Link{bridge.with(down, func(l *Link) { l.Addrs = nil }), of("eth0", 3, "macvlan", "bridge").with(master("br0"))}, notes: []string{`"br0" is left out`}, err: `is a port of "br0" already`},
	}...))
}
