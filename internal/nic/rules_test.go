package nic

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// row is one rule of Plan: attachments and links in, the guest's interfaces as text out.
type row struct {
	name  string
	as    []Attachment
	links []Link
	want  string   // one line for each NIC, see show
	notes []string // a part of each
	err   string   // a part
}

func run(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Helper()
			nics, notes, err := Plan(r.as, Snapshot{Links: r.links})
			if r.err != "" || err != nil {
				wantError(t, err, r.err)
			} else if diff := cmp.Diff(lines(r.want), lines(show(nics))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if len(notes) != len(r.notes) {
				t.Fatalf("notes %q, want %q", notes, r.notes)
			}
			for i, n := range notes {
				if !strings.Contains(n, r.notes[i]) {
					t.Errorf("note %q, want %q", n, r.notes[i])
				}
			}
		})
	}
}

func lines(s string) []string {
	var out []string
	for l := range strings.Lines(s) {
		if l = strings.TrimSpace(l); l != "" {
			out = append(out, l)
		}
	}
	return out
}

// show gives each NIC as a line: name@network mtu: addresses; routes; DNS. MAC addresses follow the name (see eth).
func show(nics []NIC) string {
	var b strings.Builder
	for _, n := range nics {
		fmt.Fprintf(&b, "%s@%s %d:", n.Name, n.Network, n.MTU)
		for _, a := range n.Addrs {
			fmt.Fprintf(&b, " %s", a)
		}
		for _, r := range n.Routes {
			fmt.Fprintf(&b, "; %s", r.Dst)
			if r.Gw.IsValid() {
				fmt.Fprintf(&b, " via %s", r.Gw)
			}
			if r.Src.IsValid() {
				fmt.Fprintf(&b, " src %s", r.Src)
			}
			if r.Metric != 0 {
				fmt.Fprintf(&b, " metric %d", r.Metric)
			}
			if r.MTU != 0 {
				fmt.Fprintf(&b, " mtu %d", r.MTU)
			}
		}
		if d := n.DNS; !d.IsZero() {
			fmt.Fprintf(&b, "; dns %v %q %q %q", d.Servers, d.Domain, d.Search, d.Options)
		}
		if n.VF != nil {
			fmt.Fprintf(&b, "; vf %s", n.VF.BDF)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// cni is one attachment; text is what the plugin printed without the version.
func cni(t testing.TB, network, ifName, text string) Attachment {
	t.Helper()
	if text != "" {
		text = strings.Replace(text, "{", `{"cniVersion":"1.1.0",`, 1)
		text = strings.Replace(text, `",}`, `"}`, 1)
	}
	return Attachment{Network: network, IfName: ifName, Result: result(t, text)}
}

// eth is a veth that is up, with addresses and connected routes as the kernel makes them.
func eth(name string, index int, addrs ...string) Link {
	l := Link{Name: name, Index: index, Kind: "veth", MAC: MAC{2, 0, 0x5e, 0x10, 0, byte(index)}, MTU: 1500, Up: true}
	for _, a := range addrs {
		px := netip.MustParsePrefix(a)
		l.Addrs = append(l.Addrs, Addr{Prefix: px})
		if !px.IsSingleIP() {
			l.Routes = append(l.Routes, KernelRoute{Dst: px.Masked(), Table: tableMain, Protocol: 2, Scope: scopeLink, Type: typeNormal})
		}
	}
	return l
}

// with gives l with more routes, or changed otherwise.
func (l Link) with(change ...func(*Link)) Link {
	l.Addrs, l.Routes = slices.Clone(l.Addrs), slices.Clone(l.Routes)
	for _, c := range change {
		c(&l)
	}
	return l
}

func route(dst, gw string, change ...func(*KernelRoute)) func(*Link) {
	r := KernelRoute{Dst: netip.MustParsePrefix(dst), Table: tableMain, Protocol: 3, Type: typeNormal}
	if gw != "" {
		r.Gw = netip.MustParseAddr(gw)
	}
	for _, c := range change {
		c(&r)
	}
	return func(l *Link) { l.Routes = append(l.Routes, r) }
}

func bare(l *Link) { l.Addrs, l.Routes = nil, nil }

func down(l *Link) { l.Up = false }

func kind(k string) func(*Link) { return func(l *Link) { l.Kind = k } }

func TestPlanOrder(t *testing.T) {
	eth0, net1 := eth("eth0", 2, "10.1.0.5/24"), eth("net1", 3, "10.2.0.5/24")
	const named0 = `{"interfaces":[{"name":"eth0","sandbox":"x"}]}`
	run(t, []row{{
		name:  "attachments before the index, the namespace's other links last and by index",
		as:    []Attachment{cni(t, "b", "net1", `{"interfaces":[{"name":"net1","sandbox":"x"}]}`)},
		links: []Link{eth("net9", 9), net1, eth0},
		want:  "net1@b 1500: 10.2.0.5/24\n eth0@ 1500: 10.1.0.5/24\n net9@ 1500:",
	}, {
		name: "host entries of the pod's names are not the pod's; an entry twice is one interface",
		as: []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"net1"},{"name":"eth0","sandbox":"/proc/7/ns/net"},
			{"name":"eth0","sandbox":"/run/netns/x"},{"name":"ifb0"}]}`)},
		links: []Link{eth0, net1},
		want:  "eth0@a 1500: 10.1.0.5/24\n net1@ 1500: 10.2.0.5/24",
	}, {
		name:  "a sandbox interface that is not there",
		as:    []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth7","sandbox":"x"}]}`)},
		links: []Link{eth0}, err: `network "a": the CNI result names interface "eth7" in the pod`,
	}, {
		name:  "no sandbox anywhere: the link of the interface name asked for",
		as:    []Attachment{cni(t, "b", "net1", `{"interfaces":[{"name":"net1"}]}`)},
		links: []Link{eth0, net1},
		want:  "net1@b 1500: 10.2.0.5/24\n eth0@ 1500: 10.1.0.5/24",
	}, {
		name:  "no interfaces: the link that carries the address",
		as:    []Attachment{cni(t, "b", "eth9", `{"ips":[{"address":"10.2.0.5/24"}]}`)},
		links: []Link{eth0, net1},
		want:  "net1@b 1500: 10.2.0.5/24\n eth0@ 1500: 10.1.0.5/24",
	}, {
		name:  "no interfaces and the address on two links: the one asked for",
		as:    []Attachment{cni(t, "b", "net1", `{"ips":[{"address":"10.1.0.5/24"}]}`)},
		links: []Link{eth0, eth("net1", 3, "10.1.0.5/24")},
		want:  "net1@b 1500: 10.1.0.5/24\n eth0@ 1500: 10.1.0.5/24",
	}, {
		name:  "no result",
		as:    []Attachment{cni(t, "b", "net1", ""), cni(t, "a", "eth0", "")},
		links: []Link{eth0, net1},
		want:  "net1@b 1500: 10.2.0.5/24\n eth0@a 1500: 10.1.0.5/24",
	}, {
		name:  "neither name nor address fits: the only link, and not one that a later result names",
		as:    []Attachment{cni(t, "b", "eth9", `{"ips":[]}`), cni(t, "a", "eth0", named0)},
		links: []Link{eth0, net1},
		want:  "net1@b 1500: 10.2.0.5/24\n eth0@a 1500: 10.1.0.5/24", notes: []string{`network "b" is taken for that of interface "net1"`},
	}, {
		name:  "neither name nor address fits and there are two",
		as:    []Attachment{cni(t, "b", "eth9", `{"ips":[]}`)},
		links: []Link{eth0, net1}, err: `network "b": the CNI plugin was to make interface "eth9" in the pod, but its namespace has no such link (there is: "eth0", "net1")`,
	}, {
		name:  "nothing to go by at all",
		as:    []Attachment{{Network: "b"}},
		links: []Link{eth0, net1},
		want:  "eth0@ 1500: 10.1.0.5/24\n net1@ 1500: 10.2.0.5/24", notes: []string{`network "b": its CNI result is left out`},
	}, {
		name:  "two networks of one interface",
		as:    []Attachment{cni(t, "a", "eth0", named0), cni(t, "b", "eth0", named0)},
		links: []Link{eth0},
		want:  "eth0@a 1500: 10.1.0.5/24", notes: []string{`network "b": interface "eth0" is that of network "a" already`},
	}, {
		name:  "null entries",
		as:    []Attachment{cni(t, "a", "eth0", `{"interfaces":[null],"ips":[null],"routes":[null]}`)},
		links: []Link{eth0},
		want:  "eth0@a 1500: 10.1.0.5/24", notes: []string{"entry 0 of ips", "entry 0 of routes"},
	}})
}

func TestPlanAddresses(t *testing.T) {
	const two = `{"interfaces":[{"name":"host0"},{"name":"eth0","sandbox":"x"},{"name":"eth1","sandbox":"x"}],"ips":[{"address":"10.3.0.5/24","interface":%s}]}`
	at := func(index string) []Attachment { return []Attachment{cni(t, "a", "eth1", fmt.Sprintf(two, index))} }
	only := func(ips string) []Attachment {
		return []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[`+ips+`]}`)}
	}
	empty := []Link{eth("eth0", 2), eth("eth1", 3)}
	mine := []Link{eth("eth0", 2, "10.3.0.5/24"), eth("eth1", 3)}
	peer := func(p string) func(*Link) { return func(l *Link) { l.Addrs[0].Peer = netip.MustParsePrefix(p) } }
	kernel := func(r *KernelRoute) { r.Protocol = 2 }
	off := func(l *Link) { l.Routes, l.Addrs[0].Flags = nil, 0x280 } // IFA_F_NOPREFIXROUTE | IFA_F_PERMANENT
	run(t, []row{
		{name: "index", as: at("1"), links: empty, want: "eth0@a 1500: 10.3.0.5/24\n eth1@a 1500:"},
		{name: "index null", as: at("null"), links: empty, want: "eth0@a 1500:\n eth1@a 1500: 10.3.0.5/24"},
		{name: "index -1", as: at("-1"), links: empty, want: "eth0@a 1500:\n eth1@a 1500: 10.3.0.5/24"},
		{name: "index 7", as: at("7"), links: empty, want: "eth0@a 1500:\n eth1@a 1500: 10.3.0.5/24"},
		{name: "index of a host interface", as: at("0"), links: empty, want: "eth0@a 1500:\n eth1@a 1500: 10.3.0.5/24"},
		{name: "null, and on a link", as: at("null"), links: mine, want: "eth0@a 1500: 10.3.0.5/24\n eth1@a 1500:"},
		{name: "wrong, and on a link", as: at("2"), links: mine, want: "eth0@a 1500: 10.3.0.5/24\n eth1@a 1500:", notes: []string{`gives 10.3.0.5 to interface "eth1", but "eth0" has it`}},
		{
			name: "nobody's", links: empty, want: "eth0@a 1500:\n eth1@a 1500:", notes: []string{"the address 10.3.0.5/24 of the CNI result is ignored: nothing says"},
			as: []Attachment{cni(t, "a", "x", fmt.Sprintf(two, "9"))},
		},
		{name: "no interfaces and an index", as: []Attachment{cni(t, "a", "eth0", `{"ips":[{"address":"10.3.0.5/24","interface":0}]}`)}, links: empty, want: "eth0@a 1500: 10.3.0.5/24\n eth1@ 1500:"},
		{name: "order kept, each once, link-local of IPv6 alone left out", links: []Link{eth("eth0", 2, "10.3.0.9/24", "10.3.0.5/24", "169.254.7.7/16", "10.3.0.9/24", "2001:db8::5/64", "fe80::5/64")}, want: "eth0@ 1500: 10.3.0.9/24 10.3.0.5/24 169.254.7.7/16 2001:db8::5/64"},
		{name: "namespace and result agree", as: only(`{"address":"10.3.0.5/24"},{"address":"10.3.0.5/24"}`), links: mine[:1], want: "eth0@a 1500: 10.3.0.5/24"},
		{name: "result twice", as: only(`{"address":"10.3.0.5/24"},{"address":"10.3.0.5/24"}`), links: empty[:1], want: "eth0@a 1500: 10.3.0.5/24"},
		{name: "namespace wins", as: only(`{"address":"10.9.0.5/24"}`), links: mine[:1], want: "eth0@a 1500: 10.3.0.5/24", notes: []string{"the address 10.9.0.5/24 of the CNI result is ignored: interface \"eth0\" has other IPv4"}},
		{name: "namespace wins on the prefix length", as: only(`{"address":"10.3.0.5/16"}`), links: mine[:1], want: "eth0@a 1500: 10.3.0.5/24", notes: []string{"with another prefix length"}},
		{name: "a family that the link has none of", as: only(`{"address":"2001:db8::5/64"}`), links: mine[:1], want: "eth0@a 1500: 10.3.0.5/24 2001:db8::5/64"},
		{name: "a link-local address is none of IPv6", as: only(`{"address":"2001:db8::5/64"}`), links: []Link{eth("eth0", 2, "fe80::1/64")}, want: "eth0@a 1500: 2001:db8::5/64"},
		{name: "link-local in the result", as: only(`{"address":"fe80::77/64"}`), links: empty[:1], want: "eth0@a 1500:", notes: []string{"link-local address fe80::77/64"}},
		{name: "IPv4 as IPv6", as: only(`{"address":"::ffff:10.3.0.5/120"}`), links: empty[:1], want: "eth0@a 1500: 10.3.0.5/24"},
		{
			name: "unfit", as: only(`{"address":"0.0.0.0/8"},{"address":"ff02::1/64"},{"address":"127.0.0.1/8"},{"address":"10.3.0.5/0"}`), links: empty[:1], want: "eth0@a 1500:",
			notes: []string{"0.0.0.0/8 of the CNI result is ignored: it is unspecified", "it is a multicast address", "it is a loopback address", "its prefix is every network"},
		},
		{name: "prefix not on the link", links: []Link{mine[0].with(off)}, want: "eth0@ 1500: 10.3.0.5/32", notes: []string{"gets 10.3.0.5/24 as 10.3.0.5/32"}},
		{name: "prefix put on the link by hand", links: []Link{mine[0].with(off, route("10.3.0.0/24", ""))}, want: "eth0@ 1500: 10.3.0.5/24"},
		{name: "prefix on the link and by a gateway", links: []Link{mine[0].with(route("10.3.0.0/24", "10.3.0.1"))}, want: "eth0@ 1500: 10.3.0.5/24; 10.3.0.0/24 via 10.3.0.1"},
		{name: "connected route gone", links: []Link{mine[0].with(func(l *Link) { l.Routes = nil })}, want: "eth0@ 1500: 10.3.0.5/24"},
		{name: "peer", links: []Link{eth("eth0", 2, "10.3.0.5/32").with(peer("10.3.0.1/32"), route("10.3.0.1/32", "", kernel))}, want: "eth0@ 1500: 10.3.0.5/32; 10.3.0.1/32"},
		{
			name: "peer of another network", links: []Link{mine[0].with(func(l *Link) { l.Routes = nil }, peer("10.4.0.1/24"), route("10.4.0.0/24", "", kernel))},
			want: "eth0@ 1500: 10.3.0.5/32; 10.4.0.0/24", notes: []string{"as 10.3.0.5/32"},
		},
	})
}

func TestPlanRoutes(t *testing.T) {
	eth0, net1 := eth("eth0", 2, "10.1.0.5/24", "2001:db8:1::5/64"), eth("net1", 3, "10.2.0.5/24")
	src := func(s string) func(*KernelRoute) { return func(r *KernelRoute) { r.Src = netip.MustParseAddr(s) } }
	run(t, []row{{
		name: "on-link first, defaults last, the rest as it was",
		links: []Link{eth0.with(route("0.0.0.0/0", "10.1.0.1"), route("10.9.0.0/16", "169.254.1.1"), route("10.8.0.0/16", "10.1.0.2"),
			route("::/0", "fe80::1"), route("169.254.1.1/32", ""), route("10.9.0.0/16", "169.254.1.1"))},
		want: "eth0@ 1500: 10.1.0.5/24 2001:db8:1::5/64; 169.254.1.1/32; 10.9.0.0/16 via 169.254.1.1; 10.8.0.0/16 via 10.1.0.2; 0.0.0.0/0 via 10.1.0.1; ::/0 via fe80::1",
	}, {
		name: "metric, MTU and source",
		links: []Link{eth("eth0", 2, "10.1.0.5/24", "10.1.0.6/24").with(
			route("0.0.0.0/0", "10.1.0.1", func(r *KernelRoute) { r.Metric, r.MTU = 100, 1400 }),
			route("0.0.0.0/0", "10.1.0.2", func(r *KernelRoute) { r.Metric, r.MTU = 200, 1500 }),
			route("10.7.0.0/16", "10.1.0.1", src("10.1.0.5")), route("10.8.0.0/16", "10.1.0.1", src("10.1.0.6")),
			route("10.9.0.0/16", "10.1.0.1", src("192.0.2.1"), func(r *KernelRoute) { r.Metric = -1 }))},
		want: "eth0@ 1500: 10.1.0.5/24 10.1.0.6/24; 10.7.0.0/16 via 10.1.0.1; 10.8.0.0/16 via 10.1.0.1 src 10.1.0.6; 10.9.0.0/16 via 10.1.0.1; " +
			"0.0.0.0/0 via 10.1.0.1 metric 100 mtu 1400; 0.0.0.0/0 via 10.1.0.2 metric 200",
		notes: []string{"the source address 192.0.2.1", "the metric -1"},
	}, {
		name: "left out",
		links: []Link{eth0.with(
			route("10.9.0.0/16", "10.1.0.1", func(r *KernelRoute) { r.Table = 100 }), route("0.0.0.0/0", "10.1.0.1", func(r *KernelRoute) { r.Table = 100 }),
			route("10.8.0.0/16", "", func(r *KernelRoute) { r.Type = 7 }), // RTN_UNREACHABLE
			route("::/0", "fe80::1", func(r *KernelRoute) { r.Protocol = protocolRA }), route("2001:db8:2::/64", "", func(r *KernelRoute) { r.Protocol = protocolRA }),
			route("fe80::/64", ""), route("ff00::/8", ""), route("224.0.0.0/4", ""),
			route("10.7.0.0/16", "10.1.0.1", func(r *KernelRoute) { r.Table, r.AdvMSS = 0, 1360 }))},
		want:  "eth0@ 1500: 10.1.0.5/24 2001:db8:1::5/64; 10.7.0.0/16 via 10.1.0.1",
		notes: []string{"rule-based routing is not carried over: table 100", "it is of type 7", "router advertisement", "advertised MSS of 1360"},
	}, {
		name:  "a gateway that nothing puts on the link",
		links: []Link{eth("eth0", 2, "10.1.0.5/32").with(route("0.0.0.0/0", "192.0.2.1", func(r *KernelRoute) { r.Flags, r.Metric = 4, 7 }))}, // RTNH_F_ONLINK
		want:  "eth0@ 1500: 10.1.0.5/32; 192.0.2.1/32 metric 7; 0.0.0.0/0 via 192.0.2.1 metric 7",
	}, {
		name:  "gateways that cannot be",
		links: []Link{eth0.with(route("0.0.0.0/0", "fe80::1"), route("10.9.0.0/16", "10.1.0.5"), route("10.8.0.0/16", "224.0.0.1"), route("10.1.0.9/32", "10.1.0.9"))},
		want:  "eth0@ 1500: 10.1.0.5/24 2001:db8:1::5/64; 10.1.0.9/32",
		notes: []string{"fe80::1 cannot be its gateway", "10.1.0.5 cannot", "224.0.0.1 cannot"},
	}, {
		name: "of the result, by its gateways and host bits masked; the second interface gets no default route",
		as: []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth0","sandbox":"x"},{"name":"net1","sandbox":"x"}],
			"ips":[{"address":"10.2.0.5/24","gateway":"10.2.0.1","interface":1},{"address":"10.1.0.5/24","gateway":"10.1.0.1","interface":0}],
			"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.9.8.7/16","gw":"10.2.0.9","mtu":1300,"priority":5,"advmss":1200},{"dst":"10.8.0.0/16","scope":253},{"dst":"10.2.0.0/24"},{"dst":"ff00::/8"},
			{"dst":"10.7.0.0/16","table":100}]}`)},
		links: []Link{eth0, net1},
		want: "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64; 10.8.0.0/16; 0.0.0.0/0 via 10.1.0.1\n" +
			"net1@a 1500: 10.2.0.5/24; 10.9.0.0/16 via 10.2.0.9 metric 5 mtu 1300",
		notes: []string{"advertised MSS of 1200", "the route to 10.7.0.0/16 is for table 100"},
	}, {
		name: "of the result, without gateway: that of the namespace's default route",
		as:   []Attachment{cni(t, "a", "eth0", `{"routes":[{"dst":"10.9.0.0/16"},{"dst":"0.0.0.0/0","gw":"0.0.0.0"}]}`)}, links: []Link{eth0.with(route("0.0.0.0/0", "10.1.0.1"))},
		want: "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64; 10.9.0.0/16 via 10.1.0.1; 0.0.0.0/0 via 10.1.0.1",
	}, {
		name: "of the result, by the interface whose gateway it names; the first gateway where none is named",
		as: []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth0","sandbox":"x"},{"name":"net1","sandbox":"x"}],
			"ips":[{"address":"10.1.0.5/32","gateway":"192.0.2.1","interface":0},{"address":"10.1.0.6/32","gateway":"192.0.2.9","interface":0},{"address":"10.2.0.5/32","gateway":"192.0.2.2","interface":1}],
			"routes":[{"dst":"10.9.0.0/16","gw":"192.0.2.2"},{"dst":"10.8.0.0/16"}]}`)},
		links: []Link{eth0.with(bare), net1.with(bare)},
		want: "eth0@a 1500: 10.1.0.5/32 10.1.0.6/32; 192.0.2.1/32; 10.8.0.0/16 via 192.0.2.1\n" +
			"net1@a 1500: 10.2.0.5/32; 192.0.2.2/32; 10.9.0.0/16 via 192.0.2.2",
	}, {
		name: "of the result, of no use",
		as: []Attachment{cni(t, "b", "net1", `{"ips":[{"address":"10.2.0.5/24","gateway":"fe80::1"}],
			"routes":[{"dst":"10.9.0.0/16"},{"dst":"::/0","gw":"2001:db8::1"},{"dst":"10.8.0.0/16","gw":"fe80::1"},{"dst":"10.7.0.0/16","gw":"10.2.0.5"}]}`)}, links: []Link{net1},
		want: "net1@b 1500: 10.2.0.5/24",
		notes: []string{
			"the gateway fe80::1", "route of the CNI result to 10.9.0.0/16 is ignored", "to ::/0 is ignored",
			"fe80::1 cannot be its gateway", "10.2.0.5 cannot be its gateway",
		},
	}, {
		name: "two results with a default route and a silent namespace: the first in CNI order",
		as: []Attachment{
			cni(t, "a", "eth0", `{"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1"}],"routes":[{"dst":"0.0.0.0/0"}]}`),
			cni(t, "b", "net1", `{"ips":[{"address":"10.2.0.5/24"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.2.0.1"}]}`),
		},
		links: []Link{eth0.with(bare), net1.with(bare)},
		want:  "eth0@a 1500: 10.1.0.5/24; 0.0.0.0/0 via 10.1.0.1\n net1@b 1500: 10.2.0.5/24", notes: []string{"by 10.2.0.1 is ignored"},
	}})
}

func TestPlanGatewayAlone(t *testing.T) {
	a := cni(t, "a", "eth0", `{"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1"},{"address":"2001:db8:1::5/64","gateway":"fe80::1"}]}`)
	b := cni(t, "b", "net1", `{"ips":[{"address":"10.2.0.5/24","gateway":"10.2.0.1"}]}`)
	lo := cni(t, "lo", "lo", `{"interfaces":[{"name":"lo","sandbox":"x"}],"ips":[{"address":"127.0.0.1/8"}]}`)
	plain, net1 := eth("eth0", 2, "10.1.0.5/24", "2001:db8:1::5/64"), eth("net1", 3)
	run(t, []row{
		{name: "an isolated network", as: []Attachment{a}, links: []Link{plain}, want: "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64"},
		{name: "all is left to us", as: []Attachment{lo, a}, links: []Link{eth("eth0", 2)}, want: "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64; 0.0.0.0/0 via 10.1.0.1; ::/0 via fe80::1"},
		{
			name: "a family is left to us", as: []Attachment{a}, links: []Link{eth("eth0", 2, "10.1.0.5/24")},
			want: "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64; ::/0 via fe80::1",
		},
		{
			name: "a family that only router advertisements speak of", as: []Attachment{a}, notes: []string{"router advertisement"},
			links: []Link{eth("eth0", 2, "10.1.0.5/24").with(route("::/0", "fe80::9", func(r *KernelRoute) { r.Protocol = protocolRA }))},
			want:  "eth0@a 1500: 10.1.0.5/24 2001:db8:1::5/64; ::/0 via fe80::1",
		},
		{
			name: "policy routing", as: []Attachment{b}, links: []Link{net1.with(route("0.0.0.0/0", "10.2.0.1", func(r *KernelRoute) { r.Table = 100 }))},
			want: "net1@b 1500: 10.2.0.5/24", notes: []string{"table 100"},
		},
		{
			name: "a secondary network", as: []Attachment{cni(t, "a", "eth0", `{}`), b}, links: []Link{eth("eth0", 2), net1},
			want: "eth0@a 1500:\n net1@b 1500: 10.2.0.5/24",
		},
		{
			name: "a result with other routes", links: []Link{eth("eth0", 2)}, want: "eth0@a 1500: 10.1.0.5/24; 10.9.0.0/16 via 10.1.0.1",
			as: []Attachment{cni(t, "a", "eth0", `{"ips":[{"address":"10.1.0.5/24","gateway":"10.1.0.1"}],"routes":[{"dst":"10.9.0.0/16"}]}`)},
		},
	})
}

func TestPlanLinks(t *testing.T) {
	eth0 := eth("eth0", 2)
	other := func(name, k string) Link { return eth(name, 3).with(kind(k), down) }
	pci := func(bdf string) func(*Link) {
		return func(l *Link) { l.Kind, l.ParentBus, l.ParentDev, l.MTU = "device", "pci", bdf, 65535 }
	}
	mtu := func(n int) func(*Link) { return func(l *Link) { l.MTU = n } }
	mac := func(m MAC) func(*Link) { return func(l *Link) { l.MAC = m } }
	var rows []row
	for _, k := range []string{"macvtap", "ipvtap", "ipvlan", "vlan", "tun", "bridge", "dummy", "device", "netkit", "ipoib", "sit", ""} {
		l := other("net1", k)
		rows = append(rows, row{
			name: k + " that is up", links: []Link{eth0, l.with(func(l *Link) { l.Up = true })}, err: fmt.Sprintf(`interface "net1" (no CNI result names it) is of kind %q`, k),
		}, row{
			name: k + " with an address", links: []Link{eth0, eth("net1", 3, "10.1.0.5/24").with(kind(k), down)}, err: fmt.Sprintf("is of kind %q", k),
		}, row{
			name: k + " of a network", links: []Link{eth0, l}, as: []Attachment{cni(t, "b", "net1", "")}, err: fmt.Sprintf(`network "b": interface "net1" is of kind %q`, k),
		})
		if k != "sit" {
			rows = append(rows, row{name: k + " that is idle", links: []Link{eth0, l}, want: "eth0@ 1500:", notes: []string{`interface "net1" is left out`}})
		}
	}
	for k := range fallbackKinds {
		rows = append(rows, row{name: k + " of the kernel", links: []Link{eth0, other("fb0", k)}, want: "eth0@ 1500:"})
	}
	run(t, append(rows, []row{
		{name: "a veth that is down", links: []Link{eth0.with(down)}, want: "eth0@ 1500:"},
		{name: "a port of a bridge", links: []Link{eth0.with(func(l *Link) { l.Master = "vltbr0" })}, err: `is a port of "vltbr0" already`},
		{name: "a PCI function, its MTU no matter of a TAP's", links: []Link{eth0.with(pci("0000:01:10.0"))}, want: "eth0@ 65535:; vf 0000:01:10.0"},
		{name: "no PCI address", links: []Link{eth0.with(pci("../0000:01:10.0"))}, err: "has no PCI address"},
		{name: "no MAC", links: []Link{eth0.with(mac(MAC{}))}, err: `interface "eth0" has no Ethernet address`},
		{name: "no MAC, of a network", as: []Attachment{cni(t, "a", "eth0", "")}, links: []Link{eth0.with(mac(MAC{}))}, err: `network "a": interface "eth0" has no`},
		{name: "a group's MAC", links: []Link{eth0.with(mac(MAC{1, 0, 0x5e, 0, 0, 1}))}, err: "has the multicast address 01:00:5e:00:00:01"},
		{name: "MTU of a TAP", links: []Link{eth0.with(mtu(MaxTapMTU))}, want: "eth0@ 65521:"},
		{name: "MTU beyond a TAP", links: []Link{eth0.with(mtu(MaxTapMTU + 1))}, want: "eth0@ 65521:", notes: []string{"lowered to 65521"}},
		{name: "no MTU", links: []Link{eth0.with(mtu(67))}, err: "has an MTU of 67 bytes"},
		{name: "MTU too small for IPv6", links: []Link{eth("eth0", 2, "2001:db8::5/64").with(mtu(1279))}, want: "eth0@ 1279: 2001:db8::5/64", notes: []string{"IPv6 needs an MTU of at least 1280"}},
		{name: "MTU too small for IPv6 and none of it", links: []Link{eth("eth0", 2, "10.1.0.5/24").with(mtu(1279))}, want: "eth0@ 1279: 10.1.0.5/24"},
		{
			name: "a result that describes the link otherwise", links: []Link{eth0}, want: "eth0@a 1500:", notes: []string{`has 02:00:5e:10:00:02: the link's`, "an MTU of 9000, the link has 1500", `the MAC "a\nb"`},
			as: []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth0","mac":"02-AA-00-00-00-01","mtu":9000,"sandbox":"x"},{"name":"eth0","mac":"a\nb","sandbox":"x"}]}`)},
		},
		{name: "nothing", err: "has only its loopback"},
		{name: "nothing of use", links: []Link{other("sit0", "sit")}, err: `"sit0"`},
	}...))
	if _, _, err := Plan(nil, Snapshot{}); !errors.Is(err, ErrNoInterface) {
		t.Errorf("error %v, want ErrNoInterface", err)
	}
}

func TestPlanResolver(t *testing.T) {
	long := strings.Repeat("a", 64)
	dns := func(text string) []Attachment {
		return []Attachment{cni(t, "a", "eth0", `{"interfaces":[{"name":"eth0","sandbox":"x"},{"name":"eth1","sandbox":"x"}],"dns":`+text+`}`)}
	}
	links := []Link{eth("eth0", 2), eth("eth1", 3)}
	run(t, []row{{
		name: "to the first interface, each once", links: links,
		as:   dns(`{"nameservers":["10.0.0.53","::ffff:10.0.0.53","2001:db8::53"],"domain":"a_b.example.","search":["x.example","x.example."],"options":["ndots:5"]}`),
		want: "eth0@a 1500:; dns [10.0.0.53 2001:db8::53] \"a_b.example\" [\"x.example\"] [\"ndots:5\"]\n eth1@a 1500:",
	}, {
		name: "dropped", links: links, want: "eth0@a 1500:\n eth1@a 1500:",
		as: dns(`{"nameservers":["dns.example","fe80::1%eth0","127.0.0.53","0.0.0.0","ff02::fb"],"domain":"a b","search":["","a..b","` + long + `.example","é.example","` + strings.Repeat("a.", 128) + `"],
			"options":["","a\nnameserver 192.0.2.1","` + strings.Repeat("x", 256) + `"]}`),
		notes: []string{
			`server "dns.example"`, "its zone means nothing", "the guest's loopback", "it is unspecified", "it is a multicast", `domain "a b"`, `search domain ""`,
			`"a..b"`, "aaa...", `"é.example"`, `search domain "a.a.`, "empty or too long", "control characters", "empty or too long",
		},
	}, {
		name: "at most so many", links: links[:1], notes: []string{"has 33 DNS options: the first 32 are taken"},
		as:   []Attachment{cni(t, "a", "eth0", `{"dns":{"options":["a"`+strings.Repeat(`,"a"`, maxDNS)+`]}}`)},
		want: `eth0@a 1500:; dns [] "" [] ["a"]`,
	}})
}

func TestPlanBounds(t *testing.T) {
	long := func(n int) Attachment {
		return cni(t, "a", "eth0", `{"routes":[{"dst":"0.0.0.0/0"}`+strings.Repeat(`,null`, n-1)+`]}`)
	}
	run(t, []row{{name: "too many entries", as: []Attachment{long(maxEntries + 1)}, links: []Link{eth("eth0", 2)}, err: "a list of 1025 entries"}})
	_, notes, err := Plan([]Attachment{long(maxEntries)}, Snapshot{Links: []Link{eth("eth0", 2)}})
	if err != nil || len(notes) != maxNotes+1 || notes[maxNotes] != "960 more notes are not listed" {
		t.Errorf("%d notes, the last %q, error %v", len(notes), notes[len(notes)-1], err)
	}
}
