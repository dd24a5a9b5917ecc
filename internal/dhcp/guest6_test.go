package dhcp

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// lab6 is a node that is the gateway of one pod, whose network a guest has, and a server for the guest.
type lab6 struct {
	*lab
	server *Server6
	stop   func()
}

// far is an address of the node that no link of a pod has: a guest reaches it by its router alone.
var far = netip.MustParseAddr("2001:db8:ffff::1")

// serve6 makes the links of a lab, whose node reflects what the pod sends, as hairpinMode does, and runs a server, which
// repeats itself at that interval. The gateways are addresses of the node.
func serve6(t testing.TB, n nic.NIC, interval time.Duration, gateways ...string) *lab6 {
	t.Helper()
	node := testnet.NewNode(t, prefixes(gateways...)...)
	node.MustRun("ip", "addr", "add", far.String()+"/128", "dev", "lo")
	l := &lab6{lab: &lab{node: node}}
	l.pod, l.veth = node.AddPod(t, testnet.PodSpec{Name: n.Name, MAC: n.MAC, MTU: n.MTU, Addrs: n.Addrs, Hairpin: true})
	snap, err := podnet.Observe(l.pod.NS)
	if err != nil {
		t.Fatal(err)
	}
	lease, notes, ok := NewLease6(n, "vm-1")
	if !ok || len(notes) > 0 {
		t.Fatalf("no lease for %+v, or notes %q", n, notes)
	}
	o := podnet.Options{Datapath: wish(t), Policies: map[string]podnet.Policy{n.Name: {Own: lease.Own()}}}
	ports, err := podnet.Attach(t.Context(), l.pod.NS, snap, []nic.NIC{n}, o, func(podnet.Record) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	l.port = ports[0]
	conn, err := l.port.Listen(lease.Filter())
	if err != nil {
		t.Fatal(err)
	}
	up, err := l.port.Uplink()
	if err != nil {
		t.Fatal(err)
	}
	l.server = &Server6{Lease: lease, Conn: conn, Uplink: up, Interval: interval}
	l.guest = testnet.NewGuest(t, n, l.port.Taps[0])
	l.ready()
	stop := start(t, l.server)
	l.stop = func() {
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	return l
}

// eventually waits for what a guest does in its own time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: waited in vain", what)
}

func (l *lab6) routes() string { return l.guest.MustRun("ip", "-6", "route", "show") }

// reaches waits until the guest reaches an address.
func (l *lab6) reaches(t testing.TB, a netip.Addr) {
	t.Helper()
	eventually(t, "the guest reaches "+a.String(), func() bool {
		_, err := l.guest.Run("ping", "-6", "-c", "1", "-W", "1", a.String())
		return err == nil
	})
}

// inside says whether a frame is one that nobody but the guest and its server may see: router discovery and DHCPv6 of
// one of them, anything with an address of the server's, or about one. The node has a router discovery of its own.
func (l *lab6) inside(p gopacket.Packet) bool {
	own := l.server.Lease.serverMAC()
	ours := testnet.From(l.port.NIC.MAC.HardwareAddr())(p) || testnet.From(own.HardwareAddr())(p)
	if ours && (testnet.UDPPort(546)(p) || testnet.UDPPort(547)(p) || p.Layer(layers.LayerTypeICMPv6RouterAdvertisement) != nil ||
		p.Layer(layers.LayerTypeICMPv6RouterSolicitation) != nil) {
		return true
	}
	return slices.ContainsFunc(l.server.Lease.Own(), func(a netip.Addr) bool { return bytes.Contains(p.Data(), a.AsSlice()) })
}

// The guest's own kernel finds its router by the advertisement and, without knowing it, the real gateway's MAC; and
// finds the gateway again after that has changed.
func TestKernelFindsTheGateway(t *testing.T) { onEach(t, testKernelFindsTheGateway) }

func testKernelFindsTheGateway(t *testing.T) {
	n := nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("2001:db8::2/64"),
		Routes: routes("2001:db8:1::/64", "::/0 via 2001:db8::1"),
	}
	l := serve6(t, n, time.Second, "2001:db8::1/64")
	outside := testnet.NewCapture(t, l.node.Namespace, l.veth)
	// One of its own: a bridge goes on answering on the MACs of its ports, of which it borrows one otherwise.
	l.node.MustRun("ip", "link", "set", testnet.Bridge, "address", "02:aa:00:00:00:00")
	// The guest probes a neighbour after half a minute: too long for a test.
	l.guest.Sysctl("ipv6/neigh/eth0/base_reachable_time_ms", "1000")
	l.guest.Sysctl("ipv6/neigh/eth0/delay_first_probe_time", "1")
	l.guest.MustRun("ip", "link", "set", "eth0", "mtu", "1500") // of which the advertisement knows better
	l.guest.MustRun("ip", "addr", "add", "2001:db8::2/128", "dev", "eth0", "nodad")
	router := l.server.Lease.Routers[0].Source.String()
	eventually(t, "default route", func() bool { return strings.Contains(l.routes(), "default via "+router) })
	for _, want := range []string{"2001:db8::/64 dev eth0 proto kernel", "2001:db8:1::/64 dev eth0 proto kernel"} {
		if !strings.Contains(l.routes(), want) {
			t.Errorf("no %q among the routes:\n%s", want, l.routes())
		}
	}
	eventually(t, "MTU", func() bool { return l.guest.MustRun("cat", "/proc/sys/net/ipv6/conf/eth0/mtu") == "1450" })
	l.reaches(t, far)
	neighbour := func() string { return l.guest.MustRun("ip", "-6", "neigh", "show", router, "dev", "eth0") }
	bridge := func() string {
		link, err := l.node.Link().LinkByName(testnet.Bridge)
		if err != nil {
			t.Fatal(err)
		}
		return link.Attrs().HardwareAddr.String()
	}
	if got := neighbour(); !strings.Contains(got, bridge()) || !strings.Contains(got, "router") {
		t.Errorf("the guest's router is %q, the gateway's MAC is %s", got, bridge())
	}
	if s := l.server.Stats(); s.GatewayAsks == 0 || s.GatewayTells == 0 || s.Unsent+s.Malformed != 0 {
		t.Errorf("counters: %+v", s)
	}

	// In silence the guest finds out by its probes.
	l.node.MustRun("ip", "link", "set", testnet.Bridge, "address", "02:aa:00:00:00:01")
	l.reaches(t, far)
	if got := neighbour(); !strings.Contains(got, bridge()) {
		t.Errorf("the guest's router is %q, the gateway's MAC is now %s", got, bridge())
	}
	// With a word of the gateway's it does not need them.
	l.node.Sysctl("ipv6/conf/"+testnet.Bridge+"/ndisc_notify", "1")
	l.node.MustRun("ip", "link", "set", testnet.Bridge, "address", "02:aa:00:00:00:02")
	eventually(t, "the gateway's word", func() bool { return strings.Contains(neighbour(), bridge()) })
	l.reaches(t, far)
	if len(outside.Match(testnet.From(mac.HardwareAddr()))) == 0 {
		t.Error("the capture saw nothing of the guest")
	}
	if leaked := outside.Match(l.inside); len(leaked) > 0 {
		t.Errorf("on the node's side:\n%s", testnet.Dump(leaked))
	}

	l.stop()
	eventually(t, "the guest gives its router up", func() bool { return !strings.Contains(l.routes(), "default") })
}

// With a link-local gateway, as Calico's, the guest asks the gateway itself. The address is a host's, a /128.
func TestKernelWithALinkLocalGateway(t *testing.T) { onEach(t, testKernelWithALinkLocalGateway) }

func testKernelWithALinkLocalGateway(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1440, Addrs: prefixes("2001:db8::2/128"), Routes: routes("::/0 via fe80::ecee:eeff:feee:eeee")}
	l := serve6(t, n, time.Second, "fe80::ecee:eeff:feee:eeee/64")
	l.node.MustRun("ip", "route", "add", "2001:db8::2/128", "dev", testnet.Bridge)
	l.guest.MustRun("ip", "addr", "add", "2001:db8::2/128", "dev", "eth0", "nodad")
	eventually(t, "default route", func() bool { return strings.Contains(l.routes(), "default via fe80::ecee:eeff:feee:eeee") })
	l.reaches(t, far)
	if s := l.server.Stats(); s.GatewayAsks+s.GatewayTells != 0 {
		t.Errorf("the server stood between guest and gateway: %+v", s)
	}
}

// A guest that starts later asks, and is answered at once.
func TestKernelSolicitsARouter(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("2001:db8::2/64"), Routes: routes("::/0 via 2001:db8::1")}
	l := serve6(t, n, 0, "2001:db8::1/64")
	l.guest.MustRun("ip", "link", "set", "eth0", "down")
	eventually(t, "unsolicited advertisement", func() bool { return l.server.Stats().RouterAdverts > 0 })
	asked := l.server.Stats().RouterSolicits
	l.guest.MustRun("ip", "link", "set", "eth0", "up")
	eventually(t, "router solicitation", func() bool { return l.server.Stats().RouterSolicits > asked })
	eventually(t, "default route", func() bool { return strings.Contains(l.routes(), "default via ") })
}

var netDNS6 = nic.DNS{
	Servers: []netip.Addr{netip.MustParseAddr("2001:db8::53"), netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8:53::53")},
	Search:  []string{"default.svc.cluster.example", "cluster.example"},
}

// named is a MAC whose end, which the client takes for an identity, is text: it cannot read quotes in its own files.
var named = nic.MAC{2, 0x11, 'n', 'i', 'c', '0'}

func TestDhclient6(t *testing.T) {
	dhclient, err := exec.LookPath("dhclient")
	if err != nil {
		t.Skip("needs ISC's DHCP client (Debian: isc-dhcp-client)")
	}
	n := nic.NIC{
		Name: "eth0", MAC: named, MTU: 1500, Addrs: prefixes("2001:db8::2/64", "2001:db8:2::2/128"), Routes: routes("::/0 via 2001:db8::1"), DNS: netDNS6,
	}
	l := serve6(t, n, time.Second, "2001:db8::1/64")
	outside := testnet.NewCapture(t, l.node.Namespace, l.veth)
	l.settled(t)
	dir := t.TempDir()
	// The address that the client had in its former life is another's by now.
	conf := "request dhcp6.name-servers, dhcp6.domain-search, dhcp6.fqdn;\nsend fqdn.fqdn \"guest\";\n"
	write(t, filepath.Join(dir, "conf"), conf)
	lease := `default-duid "\000\003\000\001\002\021nic0";
lease6 {
  interface "eth0";
  ia-na 6e:69:63:30 {
    starts 1700000000;
    renew 3600;
    rebind 5400;
    iaaddr 2001:db8::77 {
      starts 1700000000;
      preferred-life 4294967295;
      max-life 4294967295;
    }
  }
  option dhcp6.client-id 0:3:0:1:2:11:6e:69:63:30;
  option dhcp6.server-id 0:3:0:1:42:11:6e:69:63:30;
}
`
	write(t, filepath.Join(dir, "leases"), lease)
	args := []string{
		dhclient, "-6", "-1", "-cf", filepath.Join(dir, "conf"), "-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"),
		"-sf", script(t, dir, `[ "$reason" != BOUND6 ] || ip addr add "$new_ip6_address/$new_ip6_prefixlen" dev eth0
env >"$dir/new" && mv "$dir/new" "$dir/$reason-$new_ip6_address"`),
	}
	l.client(t, append(args, "-d", "eth0")...)
	env := environment(t, filepath.Join(dir, "BOUND6-2001:db8::2"))
	expect(t, env, map[string]string{
		"new_ip6_address": "2001:db8::2", "new_dhcp6_name_servers": "2001:db8::53 2001:db8:53::53",
		"new_dhcp6_domain_search": "default.svc.cluster.example. cluster.example.", "new_max_life": "86400", "new_renew": "43200", "new_rebind": "69120",
	})
	environment(t, filepath.Join(dir, "BOUND6-2001:db8:2::2"))
	l.reaches(t, far)
	if s := l.server.Stats(); s.Solicits == 0 || s.Requests == 0 || s.Malformed+s.Unsent != 0 {
		t.Errorf("counters: %+v", s)
	}
	l.guest.MustRun(args[0], append(args[1:], "-d", "-r", "eth0")...)
	// The client does not wait for an answer; when it has ended the responder may still be reading.
	eventually(t, "the release is counted", func() bool { return l.server.Stats().Releases == 1 })
	if leaked := outside.Match(l.inside); len(leaked) > 0 {
		t.Errorf("on the node's side:\n%s", testnet.Dump(leaked))
	}
}

// settled waits until the guest's link-local address may be used: clients send from it.
func (l *lab6) settled(t testing.TB) {
	t.Helper()
	eventually(t, "link-local address", func() bool {
		out := l.guest.MustRun("ip", "-6", "addr", "show", "dev", l.port.NIC.Name, "scope", "link")
		return strings.Contains(out, "inet6") && !strings.Contains(out, "tentative")
	})
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDhcpcd6(t *testing.T) {
	dhcpcd, err := exec.LookPath("dhcpcd")
	if err != nil {
		t.Skip("needs dhcpcd (Debian: dhcpcd-base)")
	}
	n := nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("2001:db8::2/64"),
		Routes: routes("2001:db8:9::/48 via 2001:db8::9", "::/0 via 2001:db8::1"), DNS: netDNS6,
	}
	l := serve6(t, n, 0, "2001:db8::1/64")
	outside := testnet.NewCapture(t, l.node.Namespace, l.veth)
	dir := t.TempDir()
	conf := "allowinterfaces eth0\nipv6only\noption dhcp6_rapid_commit, dhcp6_name_servers, dhcp6_domain_search\n"
	write(t, filepath.Join(dir, "conf"), conf)
	hook := script(t, dir, `env >"$dir/new" && mv "$dir/new" "$dir/$reason"`)
	// It keeps files in places that it does not let be chosen: it gets its own.
	p := l.client(t, "unshare", "--mount", "sh", "-c", `mount -t tmpfs none /run && mount -t tmpfs none /var/lib/dhcpcd && exec "$@"`, "sh",
		dhcpcd, "-6", "-B", "-d", "-f", filepath.Join(dir, "conf"), "-c", hook, "eth0")
	expect(t, environment(t, filepath.Join(dir, "BOUND6")), map[string]string{
		"new_dhcp6_ia_na1_ia_addr1": "2001:db8::2", "new_dhcp6_ia_na1_ia_addr1_pltime": "86400", "new_dhcp6_ia_na1_ia_addr1_vltime": "86400",
		"new_dhcp6_ia_na1_t1": "43200", "new_dhcp6_ia_na1_t2": "69120", "new_dhcp6_name_servers": "2001:db8::53 2001:db8:53::53",
		"new_dhcp6_domain_search": "default.svc.cluster.example cluster.example",
	})
	lease := l.server.Lease
	expect(t, environment(t, filepath.Join(dir, "ROUTERADVERT")), map[string]string{
		"nd1_from": lease.Routers[0].Source.String(), "nd1_flags": "MO", "nd1_lifetime": "9000", "nd1_mtu": "1450",
		"nd1_prefix_information1_prefix": "2001:db8::", "nd1_prefix_information1_length": "64", "nd1_prefix_information1_flags": "L",
		"nd1_rdnss1_servers": "2001:db8::53 2001:db8:53::53", "nd1_dnssl1_search": "default.svc.cluster.example cluster.example",
		"nd2_from": lease.Routers[1].Source.String(), "nd2_lifetime": "0",
	})
	l.reaches(t, far)
	if s := l.server.Stats(); s.Solicits != 1 || s.Requests != 0 || s.Replies == 0 {
		t.Errorf("no rapid commit: %+v", s)
	}
	for _, step := range []struct {
		what   string
		signal os.Signal
		seen   func(s Stats6) uint64
	}{
		{"renewal", unix.SIGUSR1, func(s Stats6) uint64 { return s.Renews }},
		{"rebinding, and confirmation of a new start", unix.SIGHUP, func(s Stats6) uint64 { return min(s.Rebinds, s.Confirms) }},
	} {
		before, told := step.seen(l.server.Stats()), time.Time{}
		eventually(t, step.what, func() bool {
			if time.Since(told) > 5*time.Second { // it does not hear every signal while it is busy
				_, told = p.Signal(step.signal), time.Now()
			}
			return step.seen(l.server.Stats()) > before
		})
	}
	if s := l.server.Stats(); s.Ignored+s.Malformed+s.Unsent != 0 {
		t.Errorf("counters: %+v", s)
	}
	if leaked := outside.Match(l.inside); len(leaked) > 0 {
		t.Errorf("on the node's side:\n%s", testnet.Dump(leaked))
	}
}

// The kernel's filter on a real TAP: from the guest, and on the way to it.
func TestFilter6(t *testing.T) {
	l := attach(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("2001:db8::2/64")})
	l.guest.Sysctl("ipv6/conf/eth0/disable_ipv6", "1") // it would speak itself
	lease := full6()
	conn, err := l.port.Listen(lease.Filter())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ours, second := lease.Routers[0].Source, lease.Routers[1].Source
	dhcp := datagram6(t, allServers, request6(1, iaNA(1)).ToBytes())
	rs, ns := routerSolicit(t, guestLocal, nil), solicit(t, guestLocal, ours, nic.MAC{})
	na := tell(t, guest6, gateway6, 0x60, linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC))
	tag := func(frame []byte) []byte { return slices.Insert(slices.Clone(frame), 12, 0x81, 0x00, 0x00, 0x05) }
	type given struct {
		name  string
		frame []byte
		heard bool
	}
	fromGuest := []given{
		{"DHCPv6", dhcp, true},
		{"DHCPv6 by unicast", datagram6(t, lease.Server, request6(3, serverID(0), iaNA(1)).ToBytes()), true},
		{"DHCPv6 with a bad checksum", alter(dhcp, 60, dhcp[60]+1), true},
		{"DHCPv6 in a tag", tag(dhcp), false},
		{"to another port", alter(dhcp, 57, 0x24), false},
		{"TCP", alter(dhcp, 20, 6), false},
		{"a fragment", alter(dhcp, 20, 44), false},
		{"IPv4", alter(alter(dhcp, 12, 0x08), 13, 0x00), false},
		{"router solicitation", rs, true},
		{"router advertisement", alter(rs, 54, typeRouterAdvert), false},
		{"router solicitation in a tag", tag(rs), false},
		{"for our address", ns, true},
		{"for our second address", solicit(t, guest6, second, gatewayMAC), true},
		{"for the server", solicit(t, guest6, lease.Server, nic.MAC{}), false},
		{"for the gateway", solicit(t, guest6, gateway6, nic.MAC{}), false},
		{"for the link-local gateway", solicit(t, guest6, lease.Routers[2].Source, nic.MAC{}), false},
		{"for a similar address", alter(ns, 62, 0xfd), false},
		{"for another similar address", alter(ns, 77, ns[77]+1), false},
		{"short", ns[:70], false},
		{"the guest plays the gateway", na, false},
		{"echo", icmp(t, mac, gatewayMAC, guest6, ours, 128, &layers.ICMPv6Echo{}), false},
	}
	toGuest := []given{
		{"the gateway's answer", na, true},
		{"the gateway's word to all", tell(t, allNodes, gateway6, 0x20, nil), true},
		{"the second router's answer", tell(t, guest6, netip.MustParseAddr("2001:db8::9"), 0x60, nil), true},
		{"a neighbour's answer", tell(t, guest6, netip.MustParseAddr("2001:db8::77"), 0x60, nil), false},
		{"an answer about our address", tell(t, guest6, ours, 0x60, nil), false},
		{"the link-local gateway's answer", tell(t, guest6, lease.Routers[2].Gateway, 0x60, nil), false},
		{"the gateway's answer in a tag", tag(na), false},
		{"a question for our address", alter(ns, 11, 0x77), false},
		{"a stranger's router solicitation", alter(rs, 11, 0x77), false},
		{"a stranger's DHCPv6", alter(dhcp, 11, 0x77), false},
	}
	for side, given := range map[string][]given{"guest": fromGuest, "cluster": toGuest} {
		send, last := func(frame []byte) { l.guest.Send("eth0", frame) }, alter(rs, len(rs)-1, 0x99)
		if side == "cluster" {
			send, last = func(frame []byte) { l.node.Send(l.veth, frame) }, tell(t, allNodes, gateway6, 0xe0, nil)
		}
		for _, g := range given {
			send(g.frame)
		}
		send(last)
		conn.SetReadDeadline(time.Now().Add(15 * time.Second))
		var heard, want []string
		buf := make([]byte, 2048)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				t.Fatalf("%s: %v; heard %q", side, err, heard)
			}
			if bytes.Equal(buf[:n], last) {
				break
			}
			name := "unknown frame"
			for _, g := range given {
				if bytes.Equal(g.frame, buf[:n]) {
					name = g.name
				}
			}
			heard = append(heard, name)
		}
		for _, g := range given {
			if g.heard {
				want = append(want, g.name)
			}
		}
		if !slices.Equal(heard, want) {
			t.Errorf("%s: heard %q\nwant  %q", side, heard, want)
		}
	}
}

// An uplink hears nothing, and what it sends looks like the guest's.
func TestUplink(t *testing.T) { onEach(t, testUplink) }

func testUplink(t *testing.T) {
	l := attach(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("2001:db8::2/64")})
	up, err := l.port.Uplink()
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	outside, tap := testnet.NewCapture(t, l.node.Namespace, l.veth), testnet.NewCapture(t, l.pod, l.port.Join.Tap)
	frame := solicit(t, guest6, gateway6, nic.MAC{})
	if n, err := up.Write(frame); n != len(frame) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	same := func(p gopacket.Packet) bool { return bytes.Equal(p.Data(), frame) }
	if !outside.Await(10*time.Second, same) {
		t.Error("the frame did not arrive")
	}
	if len(tap.Match(same)) > 0 {
		t.Error("the guest got its own frame")
	}
	if _, err := up.Write(frame[:5]); err == nil {
		t.Error("sent five bytes")
	}
}
