package dhcp

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"

	"github.com/virtlet/virtlet/internal/nic"
)

var (
	mac    = nic.MAC{0x02, 0x11, 0x22, 0x33, 0x44, 0x55}
	netips = cmp.Options{
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	}
)

// route reads "DST" or "DST via GW".
func route(s string) nic.Route {
	dst, gw, via := strings.Cut(s, " via ")
	r := nic.Route{Dst: netip.MustParsePrefix(dst)}
	if via {
		r.Gw = netip.MustParseAddr(gw)
	}
	return r
}

func routes(s ...string) (out []nic.Route) {
	for _, r := range s {
		out = append(out, route(r))
	}
	return out
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func metric(r nic.Route, m int) nic.Route { r.Metric = m; return r }

// longLabel is one byte longer than a part of a name may be.
var longLabel = strings.Repeat("a", maxLabel+1)

var leaseCases = map[string]struct {
	nic      nic.NIC
	hostname string
	want     Lease // MAC, MTU and Duration are filled in
	notes    []string
	silent   bool
}{
	"bridge plugin": {
		nic:      nic.NIC{Addrs: prefixes("198.51.100.2/24", "2001:db8::2/64"), Routes: routes("0.0.0.0/0 via 198.51.100.1", "::/0 via 2001:db8::1")},
		hostname: "vm-1",
		want: Lease{
			Addr: netip.MustParsePrefix("198.51.100.2/24"), Server: netip.MustParseAddr("198.51.100.1"), Router: netip.MustParseAddr("198.51.100.1"),
			Routes: routes("0.0.0.0/0 via 198.51.100.1"), Hostname: "vm-1",
		},
	},
	"Flannel: the connected route is the mask's": {
		nic: nic.NIC{Addrs: prefixes("10.244.71.2/24"), Routes: routes("10.244.71.0/24", "10.244.0.0/16 via 10.244.71.1", "0.0.0.0/0 via 10.244.71.1")},
		want: Lease{
			Addr: netip.MustParsePrefix("10.244.71.2/24"), Server: netip.MustParseAddr("10.244.71.1"), Router: netip.MustParseAddr("10.244.71.1"),
			Routes: routes("10.244.0.0/16 via 10.244.71.1", "0.0.0.0/0 via 10.244.71.1"),
		},
	},
	"Calico": {
		nic: nic.NIC{Addrs: prefixes("10.10.192.128/32"), Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1")},
		want: Lease{
			Addr: netip.MustParsePrefix("10.10.192.128/32"), Server: netip.MustParseAddr("169.254.1.1"), Router: netip.MustParseAddr("169.254.1.1"),
			Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1"),
		},
	},
	"gateway by the onlink flag, routes in disorder": {
		nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 172.16.0.1", "192.0.2.0/24 via 172.16.0.1", "203.0.113.0/28")},
		want: Lease{
			Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: netip.MustParseAddr("172.16.0.1"), Router: netip.MustParseAddr("172.16.0.1"),
			Routes: routes("203.0.113.0/28", "172.16.0.1/32", "192.0.2.0/24 via 172.16.0.1", "0.0.0.0/0 via 172.16.0.1"),
		},
	},
	"ptp": {
		nic: nic.NIC{Addrs: prefixes("10.55.0.2/24"), Routes: routes("10.55.0.1/32", "10.55.0.0/24 via 10.55.0.1", "0.0.0.0/0 via 10.55.0.1")},
		want: Lease{
			Addr: netip.MustParsePrefix("10.55.0.2/24"), Server: netip.MustParseAddr("10.55.0.1"), Router: netip.MustParseAddr("10.55.0.1"),
			Routes: routes("10.55.0.1/32", "10.55.0.0/24 via 10.55.0.1", "0.0.0.0/0 via 10.55.0.1"),
		},
	},
	"second network: its gateway serves, but is no router": {
		nic: nic.NIC{Addrs: prefixes("10.88.0.5/24"), Routes: routes("10.99.0.0/16 via 10.88.0.1")},
		want: Lease{
			Addr: netip.MustParsePrefix("10.88.0.5/24"), Server: netip.MustParseAddr("10.88.0.1"), Routes: routes("10.99.0.0/16 via 10.88.0.1"),
		},
	},
	"no gateway": {
		nic:  nic.NIC{Addrs: prefixes("10.77.0.2/24")},
		want: Lease{Addr: netip.MustParsePrefix("10.77.0.2/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32")},
	},
	"default route on the link": {
		nic:  nic.NIC{Addrs: prefixes("10.77.0.2/32"), Routes: routes("0.0.0.0/0")},
		want: Lease{Addr: netip.MustParsePrefix("10.77.0.2/32"), Server: linkLocalServer, Routes: routes("0.0.0.0/0")},
	},
	"gateway 0.0.0.0": {
		nic:  nic.NIC{Addrs: prefixes("10.77.0.2/24"), Routes: routes("10.99.0.0/16 via 0.0.0.0")},
		want: Lease{Addr: netip.MustParsePrefix("10.77.0.2/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32", "10.99.0.0/16")},
	},
	"the guest is its own gateway": {
		nic:  nic.NIC{Addrs: prefixes("10.77.0.2/24"), Routes: routes("10.99.0.0/16 via 10.77.0.2")},
		want: Lease{Addr: netip.MustParsePrefix("10.77.0.2/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32", "10.99.0.0/16 via 10.77.0.2")},
	},
	"two default routes": {
		nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), Routes: []nic.Route{metric(route("0.0.0.0/0 via 10.1.0.9"), 200), metric(route("0.0.0.0/0 via 10.1.0.1"), 100)}},
		want: Lease{
			Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: netip.MustParseAddr("10.1.0.1"), Router: netip.MustParseAddr("10.1.0.1"),
			Routes: routes("0.0.0.0/0 via 10.1.0.1"),
		},
		notes: []string{"metric 200"},
	},
	"route MTU": {
		nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), Routes: []nic.Route{{Dst: netip.MustParsePrefix("10.2.0.0/16"), Gw: netip.MustParseAddr("10.1.0.1"), MTU: 1200}}},
		want: Lease{
			Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: netip.MustParseAddr("10.1.0.1"), Routes: routes("10.2.0.0/16 via 10.1.0.1"),
		},
		notes: []string{"1200"},
	},
	"more addresses than DHCP carries": {
		nic:   nic.NIC{Addrs: prefixes("2001:db8::2/64", "10.1.0.5/24", "10.1.0.6/24", "203.0.113.9/28")},
		want:  Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32")},
		notes: []string{"10.1.0.6/24", "203.0.113.9/28"},
	},
	"resolver": {
		nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), DNS: nic.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("2001:db8::53"), netip.MustParseAddr("10.96.0.10")},
			Domain:  "lab.example.", Search: []string{"default.svc.cluster.local", "bad..name", "_tcp.example.", ".", longLabel + ".example", "-a.example", "$(reboot)"},
			Options: []string{"ndots:5"},
		}},
		want: Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32"), DNS: nic.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Domain: "lab.example", Search: []string{"default.svc.cluster.local", "_tcp.example"},
		}},
		notes: []string{`"bad..name"`, `search domain ""`, longLabel, `"-a.example"`, `"$(reboot)"`, `"ndots:5"`},
	},
	"bad domain":         {nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), DNS: nic.DNS{Domain: "a b"}}, want: Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32")}, notes: []string{`"a b"`}},
	"bad host name":      {nic: nic.NIC{Addrs: prefixes("10.1.0.5/24")}, hostname: "vm_1", want: Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32")}, notes: []string{`host name "vm_1"`}},
	"too long host name": {nic: nic.NIC{Addrs: prefixes("10.1.0.5/24")}, hostname: longLabel, want: Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32")}, notes: []string{longLabel}},
	"qualified host name": {
		nic: nic.NIC{Addrs: prefixes("10.1.0.5/24")}, hostname: "vm.lab.example",
		want: Lease{Addr: netip.MustParsePrefix("10.1.0.5/24"), Server: linkLocalServer, Routes: routes("169.254.0.67/32"), Hostname: "vm.lab.example"},
	},
	"IPv6 only":    {nic: nic.NIC{Addrs: prefixes("2001:db8::2/64")}, silent: true},
	"no addresses": {silent: true},
	"VF":           {nic: nic.NIC{Addrs: prefixes("10.1.0.5/24"), VF: &nic.VF{BDF: "0000:01:10.0"}}, silent: true},
}

func TestNewLease(t *testing.T) {
	for name, c := range leaseCases {
		t.Run(name, func(t *testing.T) {
			c.nic.Name, c.nic.MAC, c.nic.MTU = "net1", mac, 1450
			got, notes, ok := NewLease(c.nic, c.hostname)
			if ok == c.silent {
				t.Fatalf("ok = %v", ok)
			}
			if c.silent {
				return
			}
			c.want.MAC, c.want.MTU, c.want.Duration = mac, 1450, 24*time.Hour
			if d := cmp.Diff(c.want, got, netips); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if len(notes) != len(c.notes) {
				t.Errorf("notes %q, want ones with %q", notes, c.notes)
			}
			for i, n := range notes {
				if !strings.HasPrefix(n, "net1: ") || i < len(c.notes) && !strings.Contains(n, c.notes[i]) {
					t.Errorf("note %q, want one with %q", n, c.notes)
				}
			}
			if err := got.check(); err != nil {
				t.Error(err)
			}
			b, err := json.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			var back Lease
			if err := json.Unmarshal(b, &back); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(got, back, netips); d != "" {
				t.Errorf("through JSON:\n%s", d)
			}
		})
	}
}

// A planner's slices are its own.
func TestNewLeaseLeavesTheNICAlone(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 172.16.0.1", "203.0.113.0/28")}
	before := slices.Clone(n.Routes)
	NewLease(n, "")
	if d := cmp.Diff(before, n.Routes, netips); d != "" {
		t.Error(d)
	}
}

func TestNewLeaseNotesWhatDoesNotFit(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("10.1.0.5/24"), Routes: routes("0.0.0.0/0 via 10.1.0.1")}
	for i := range 60 {
		n.Routes = append(n.Routes, nic.Route{Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(i), 0}), 24), Gw: netip.MustParseAddr("10.1.0.1")})
	}
	_, notes, _ := NewLease(n, "")
	if len(notes) != 1 || !strings.Contains(notes[0], "[121]") {
		t.Errorf("notes %q, want one about option 121", notes)
	}
}

func TestServeableLease(t *testing.T) {
	good, _, _ := NewLease(nic.NIC{MAC: mac, Addrs: prefixes("10.1.0.5/24")}, "")
	for want, spoil := range map[string]func(*Lease){
		"no MAC":               func(l *Lease) { l.MAC = nic.MAC{} },
		"no IPv4 address":      func(l *Lease) { l.Addr = netip.MustParsePrefix("2001:db8::2/64") },
		"no IPv4 server":       func(l *Lease) { l.Server = netip.Addr{} },
		"less than a second":   func(l *Lease) { l.Duration = 0 },
		"no IPv4 address but ": func(l *Lease) { l.Addr = netip.Prefix{} },
	} {
		l := good
		spoil(&l)
		if err := l.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("check: %v, want %q", err, want)
		}
	}
}

func TestAppendNames(t *testing.T) {
	cases := []struct {
		names []string
		want  string // \x.. as on the wire
	}{
		{nil, ""},
		{[]string{"example"}, "\x07example\x00"},
		{[]string{"a.example", "b.example"}, "\x01a\x07example\x00\x01b\xc0\x02"},
		// The third could point into the second, which ends in a pointer itself; it points past it.
		{[]string{"a.example", "x.b.example", "y.x.b.example"}, "\x01a\x07example\x00\x01x\x01b\xc0\x02\x01y\x01x\x01b\xc0\x02"},
		{[]string{"ns.svc.cluster.local", "svc.cluster.local", "cluster.local"}, "\x02ns\x03svc\x07cluster\x05local\x00\xc0\x03\xc0\x07"},
		{[]string{"example", "example"}, "\x07example\x00\xc0\x00"},
	}
	for _, c := range cases {
		got := appendNames([]byte("before"), c.names)
		if want := append([]byte("before"), c.want...); !bytes.Equal(got, want) {
			t.Errorf("%q: %q, want %q", c.names, got, want)
		}
		// The library's decoder is somebody else's.
		labels, err := rfc1035label.FromBytes([]byte(c.want))
		if err != nil || !slices.Equal(labels.Labels, c.names) {
			t.Errorf("%q decodes to %q, %v", c.names, labels, err)
		}
	}
}

// Far names cannot be pointed at.
func TestAppendNamesFar(t *testing.T) {
	var names []string
	for i := range 400 {
		names = append(names, strings.Repeat(string(rune('a'+i%26)), 50)+"."+string(rune('a'+i/26))+".example")
	}
	names = append(names, names[398], names[399])
	labels, err := rfc1035label.FromBytes(appendNames(nil, names))
	if err != nil || !slices.Equal(labels.Labels, names) {
		t.Errorf("%v, %d names of %d", err, len(labels.Labels), len(names))
	}
}

// fuzzNIC makes a NIC of bytes: one says how many of a kind follow.
func fuzzNIC(b []byte) nic.NIC {
	next := func(n int) []byte {
		out := make([]byte, n)
		b = b[copy(out, b):]
		return out
	}
	addr := func() (a netip.Addr) {
		switch next(1)[0] % 8 {
		case 0: // unset
		case 1:
			a = netip.AddrFrom16([16]byte(next(16)))
		case 2:
			a = netip.AddrFrom16([16]byte(append(make([]byte, 10), append([]byte{0xff, 0xff}, next(4)...)...)))
		default:
			a = netip.AddrFrom4([4]byte(next(4)))
		}
		return a
	}
	text := func() string { return string(next(int(next(1)[0]))) }
	many := func(do func()) {
		for range next(1)[0] % 64 {
			do()
		}
	}
	n := nic.NIC{Name: "eth0", MAC: nic.MAC(next(6)), MTU: int(int32(binary.BigEndian.Uint32(next(4))))}
	many(func() { n.Addrs = append(n.Addrs, netip.PrefixFrom(addr(), int(next(1)[0]))) })
	many(func() {
		r := nic.Route{Dst: netip.PrefixFrom(addr(), int(next(1)[0])), Gw: addr()}
		v := next(2)
		r.Metric, r.MTU = int(v[0]), int(v[1])<<4
		n.Routes = append(n.Routes, r)
	})
	many(func() { n.DNS.Servers = append(n.DNS.Servers, addr()) })
	many(func() { n.DNS.Search = append(n.DNS.Search, text()) })
	n.DNS.Domain = text()
	return n
}

// Whatever a plugin and a namespace say of a NIC, its lease is one that can be served, and makes sense to a client.
func FuzzNewLease(f *testing.F) {
	// MAC, MTU, one address of 24 bits, two routes: a host on the link and the default through it.
	plain := "\x02\x11\x22\x33\x44\x55" + "\x00\x00\x05\xdc" + "\x01\x04\xc6\x33\x64\x02\x18" +
		"\x02\x04\xa9\xfe\x01\x01\x20\x00\x00\x00" + "\x04\x00\x00\x00\x00\x00\x04\xa9\xfe\x01\x01\x00\x00"
	f.Add([]byte(plain), "vm-1")
	f.Add([]byte(plain+"\x02\x04\x0a\x60\x00\x0a\x01"+strings.Repeat("\x20", 16)+"\x02\x09a.example\x07example\x03lab"), "")
	f.Add([]byte("\x02\x11\x22\x33\x44\x55\xff\xff\xff\xff\x02\x02\x7f\x00\x00\x01\x20\x04\x0a\x00\x00\x01\xff"), strings.Repeat("x.", 120))
	f.Fuzz(func(t *testing.T, b []byte, hostname string) {
		checkLease(t, fuzzNIC(b), hostname)
	})
}

// checkLease holds what is true of every NIC's lease.
func checkLease(t *testing.T, n nic.NIC, hostname string) {
	t.Helper()
	l, notes, ok := NewLease(n, hostname)
	for _, note := range notes {
		if !strings.HasPrefix(note, n.Name+": ") {
			t.Errorf("note %q", note)
		}
	}
	if !ok {
		return
	}
	if err := l.check(); (err != nil) != n.MAC.IsZero() {
		t.Errorf("check: %v", err)
	}
	if l.Server.IsUnspecified() || l.Server == l.Addr.Addr() {
		t.Errorf("server identifier %s", l.Server)
	}
	checkRoutes(t, l)
	if l.Hostname != "" && l.Hostname != hostname || slices.ContainsFunc(l.DNS.Servers, func(a netip.Addr) bool { return !a.Is4() }) ||
		slices.ContainsFunc(append(l.DNS.Search, l.Hostname, l.DNS.Domain), func(s string) bool { return strings.ContainsAny(s, "\x00\n $'\"`\\/;&|") }) {
		t.Errorf("names: %+v", l)
	}
	all := opt{optRequestList, "\x01\x03\x06\x0c\x0f\x1a\x1c\x77\x79\xf9"}
	for _, opts := range [][]opt{nil, {all}, {all, {optMaxSize, "\xff\xff"}}} {
		req := request(dhcpv4.MessageTypeDiscover, opts...)
		req.ClientHWAddr = n.MAC.HardwareAddr()
		frame, why := answer(t, l, req)
		if why == tooBig && l.MTU < minBOOTP+ipUDPLen {
			continue
		}
		if why != "" {
			t.Fatalf("silence: %s", why)
		}
		if _, _, m := decode(t, frame); m.YourIPAddr.String() != l.Addr.Addr().String() || l.MTU > minMaxSize && len(frame)-etherHdrLen > l.MTU {
			t.Errorf("%d bytes: %s", len(frame), m.Summary())
		}
	}
}

// checkRoutes checks that a client which adds the routes one by one always knows the way to the next gateway.
func checkRoutes(t *testing.T, l Lease) {
	t.Helper()
	for i, r := range l.Routes {
		if !r.Dst.IsValid() || !r.Dst.Addr().Is4() || r.Dst != r.Dst.Masked() {
			t.Errorf("route to %s", r.Dst)
		}
		if slices.ContainsFunc(l.Routes[:i], func(o nic.Route) bool { return o.Dst == r.Dst || o.IsDefault() }) {
			t.Errorf("route %+v is doubled, or after the default: %+v", r, l.Routes)
		}
		if !r.OnLink() && !l.Addr.Masked().Contains(r.Gw) &&
			!slices.ContainsFunc(l.Routes[:i], func(o nic.Route) bool { return o.OnLink() && o.Dst.Contains(r.Gw) }) {
			t.Errorf("route %+v: no way to its gateway before it: %+v", r, l.Routes)
		}
	}
	if l.Router.IsValid() && !slices.ContainsFunc(l.Routes, func(r nic.Route) bool { return r.IsDefault() && r.Gw == l.Router }) {
		t.Errorf("router %s has no default route: %+v", l.Router, l.Routes)
	}
}
