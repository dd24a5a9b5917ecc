package dhcp

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// lab is a node with one pod, whose network a guest has, and a server for the guest.
type lab struct {
	node       *testnet.Node
	pod, guest *testnet.Namespace
	veth       string // the host side's name
	port       *podnet.Port
	server     *Server
}

// wish is the datapath that a test wants by its name.
func wish(t testing.TB) podnet.Wish {
	if strings.Contains(t.Name(), "/redirect") {
		return podnet.WishRedirect
	}
	return podnet.WishBridge
}

// onEach runs a test on both datapaths of a veth.
func onEach(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Run("bridge", test)
	t.Run("redirect", test)
}

// attach makes the lab's links; the server is not started.
func attach(t testing.TB, n nic.NIC) *lab {
	t.Helper()
	l := &lab{node: testnet.NewNode(t, netip.MustParsePrefix("198.51.100.1/24"))}
	l.pod, l.veth = l.node.AddPod(t, testnet.PodSpec{Name: n.Name, MAC: n.MAC, MTU: n.MTU, Addrs: n.Addrs})
	snap, err := podnet.Observe(l.pod.NS)
	if err != nil {
		t.Fatal(err)
	}
	ports, err := podnet.Attach(context.Background(), l.pod.NS, snap, []nic.NIC{n}, podnet.Options{Datapath: wish(t)}, func(podnet.Record) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	l.port = ports[0]
	l.guest = testnet.NewGuest(t, n, l.port.Taps[0])
	l.ready()
	return l
}

// ready waits until nothing that is sent is lost.
func (l *lab) ready() {
	for _, n := range []*testnet.Namespace{l.node.Namespace, l.pod, l.guest} {
		n.Ready()
	}
}

// serve is attach with a server that runs.
func serve(t testing.TB, n nic.NIC, hostname string) *lab {
	t.Helper()
	l := attach(t, n)
	lease, notes, ok := NewLease(n, hostname)
	if !ok || len(notes) > 0 {
		t.Fatalf("no lease for %+v, or notes %q", n, notes)
	}
	l.server = &Server{Lease: lease, Conn: l.listen(t)}
	start(t, l.server)
	return l
}

func (l *lab) listen(t testing.TB) net.PacketConn {
	t.Helper()
	conn, err := l.port.Listen(Filter())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// await waits until the server's counters are as wanted.
func (l *lab) await(t testing.TB, what string, ok func(Stats) bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok(l.server.Stats()) {
			return
		}
	}
	t.Fatalf("%s: waited in vain, counters are %+v", what, l.server.Stats())
}

// client starts a DHCP client in the guest. It is killed when the test ends; what it says is logged if the test fails.
func (l *lab) client(t testing.TB, args ...string) *os.Process {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	l.guest.Must(cmd.Start)
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // with the script that it may be running
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(out.String())
		}
	})
	return cmd.Process
}

// script writes a client's script, with $dir set.
func script(t testing.TB, dir, text string) string {
	t.Helper()
	path := filepath.Join(dir, "script")
	if err := os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\ndir=%s\n%s", dir, text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// environment waits for a file that a script has put in place, and gives its lines NAME=VALUE.
func environment(t testing.TB, path string) map[string]string {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		env := map[string]string{}
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			env[name] = strings.Trim(value, "'")
		}
		return env
	}
	t.Fatalf("the client's script has not written %s", path)
	return nil
}

// udhcpcScript keeps what it is given and sets the link up, routes in the order in which they come.
const udhcpcScript = `
event=$1
if [ "$event" = bound ]; then
	ip addr add "$ip/$mask" dev "$interface"
	[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
	set -- $staticroutes
	while [ $# -gt 1 ]; do
		if [ "$2" = 0.0.0.0 ]; then ip route add "$1" dev "$interface" scope link
		else ip route add "$1" via "$2" dev "$interface"; fi || echo "$1 via $2" >>"$dir/failed"
		shift 2
	done
fi
env >"$dir/new" && mv "$dir/new" "$dir/$event"
`

// udhcpc starts busybox's client with further arguments and gives it and what it was told.
func (l *lab) udhcpc(t testing.TB, args ...string) (*os.Process, map[string]string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox for its DHCP client")
	}
	dir := t.TempDir()
	base := []string{busybox, "udhcpc", "-f", "-i", l.port.NIC.Name, "-s", script(t, dir, udhcpcScript)}
	for _, o := range []string{"staticroutes", "mtu", "search", "hostname", "domain", "broadcast"} {
		base = append(base, "-O", o)
	}
	p := l.client(t, append(base, args...)...)
	env := environment(t, filepath.Join(dir, "bound"))
	if _, err := os.Stat(filepath.Join(dir, "failed")); err == nil {
		t.Error("a route could not be added in the order in which it came")
	}
	return p, env
}

func expect(t testing.TB, env, want map[string]string) {
	t.Helper()
	for name, v := range want {
		if env[name] != v {
			t.Errorf("the guest was told %s=%q, want %q", name, env[name], v)
		}
	}
}

func dhcpFrames(p gopacket.Packet) bool { return testnet.UDPPort(67)(p) || testnet.UDPPort(68)(p) }

// renewed has udhcpc renew, and checks that it did by unicast.
func (l *lab) renewed(t testing.TB, p *os.Process) {
	t.Helper()
	tap := testnet.NewCapture(t, l.pod, l.port.Join.Tap)
	acks := l.server.Stats().Acks
	if err := p.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	l.await(t, "renewal", func(s Stats) bool { return s.Acks > acks })
	unicast := func(p gopacket.Packet) bool {
		ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		return ok && testnet.UDPPort(67)(p) && ip.DstIP.String() == l.server.Lease.Server.String()
	}
	if !tap.Await(5*time.Second, unicast) {
		t.Errorf("no renewal by unicast to %s:\n%s", l.server.Lease.Server, testnet.Dump(tap.Match(dhcpFrames)))
	}
}

func TestUdhcpc(t *testing.T) { onEach(t, testUdhcpc) }

func testUdhcpc(t *testing.T) {
	n := nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("198.51.100.2/24"),
		Routes: routes("203.0.113.0/28", "192.0.2.0/25 via 203.0.113.9", "0.0.0.0/0 via 198.51.100.1"),
		DNS: nic.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("198.51.100.53"), netip.MustParseAddr("192.0.2.53")},
			Search:  []string{"default.svc.cluster.example", "svc.cluster.example", "cluster.example"},
		},
	}
	l := serve(t, n, "vm-1")
	outside := testnet.NewCapture(t, l.node.Namespace, l.veth)
	p, env := l.udhcpc(t)
	expect(t, env, map[string]string{
		"ip": "198.51.100.2", "mask": "24", "subnet": "255.255.255.0", "broadcast": "198.51.100.255", "router": "198.51.100.1",
		"staticroutes": "203.0.113.0/28 0.0.0.0 192.0.2.0/25 203.0.113.9 0.0.0.0/0 198.51.100.1", "mtu": "1450",
		"dns": "198.51.100.53 192.0.2.53", "domain": "default.svc.cluster.example",
		"search": "default.svc.cluster.example svc.cluster.example cluster.example", "hostname": "vm-1",
		"lease": "86400", "serverid": "198.51.100.1",
	})
	if s := l.server.Stats(); s.Offers != 1 || s.Acks != 1 || s.Ignored+s.Malformed+s.BadChecksum+s.Unsent != 0 {
		t.Errorf("counters of one exchange: %+v", s)
	}
	if !l.guest.Ping(netip.MustParseAddr("198.51.100.1")) {
		t.Error("the guest does not reach its gateway")
	}
	l.renewed(t, p)
	if own := l.server.Lease.serverMAC(); l.port.Join.Bridge != "" && own != l.port.Join.Own {
		t.Errorf("replies come from %s; what the guest sends there would leave the bridge, unlike what it sends to %s", own, l.port.Join.Own)
	}
	// All of that went past the capture's end of the veth, but for DHCP.
	if len(outside.Match(testnet.From(mac.HardwareAddr()))) == 0 {
		t.Error("the capture saw nothing of the guest")
	}
	if leaked := outside.Match(dhcpFrames); len(leaked) > 0 {
		t.Errorf("DHCP on the node's side:\n%s", testnet.Dump(leaked))
	}
}

// A /32 with its gateway outside, as Calico gives.
func TestUdhcpcCalico(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1440, Addrs: prefixes("198.51.100.2/32"), Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1")}
	l := serve(t, n, "")
	l.node.MustRun("ip", "addr", "add", "169.254.1.1/32", "dev", testnet.Bridge)
	p, env := l.udhcpc(t)
	expect(t, env, map[string]string{
		"ip": "198.51.100.2", "mask": "32", "router": "169.254.1.1", "staticroutes": "169.254.1.1/32 0.0.0.0 0.0.0.0/0 169.254.1.1", "mtu": "1440",
		"dns": "", "search": "", "hostname": "", "broadcast": "",
	})
	if !l.guest.Ping(netip.MustParseAddr("198.51.100.1")) {
		t.Error("the guest does not reach the node by its default route")
	}
	l.renewed(t, p)
}

// Without a gateway the server identifier is link-local, and the guest's renewal still reaches it, by ARP.
func TestUdhcpcWithoutGateway(t *testing.T) {
	l := serve(t, nic.NIC{Name: "net1", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")}, "")
	p, env := l.udhcpc(t)
	expect(t, env, map[string]string{"ip": "198.51.100.2", "router": "", "staticroutes": "169.254.0.67/32 0.0.0.0", "serverid": "169.254.0.67"})
	l.renewed(t, p)
	if l.server.Stats().ARPs == 0 {
		t.Error("the guest did not ask for the server's MAC")
	}
}

// A client that would like another address is offered the right one, and takes it; broadcast replies arrive, too.
func TestUdhcpcWantsAnotherAddress(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24"), Routes: routes("0.0.0.0/0 via 198.51.100.1")}
	l := serve(t, n, "")
	_, env := l.udhcpc(t, "-r", "198.51.100.77", "-B", "-x", "0x3d:0102030405")
	expect(t, env, map[string]string{"ip": "198.51.100.2", "router": "198.51.100.1"})
}

func TestDhclient(t *testing.T) {
	dhclient, err := exec.LookPath("dhclient")
	if err != nil {
		t.Skip("needs ISC's DHCP client (Debian: isc-dhcp-client)")
	}
	n := nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1440, Addrs: prefixes("198.51.100.2/32"), Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1"),
		DNS: nic.DNS{Servers: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, Search: []string{"a.example", "example"}},
	}
	l := serve(t, n, "vm-1")
	dir := t.TempDir()
	conf := `option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, domain-search, host-name, interface-mtu, rfc3442-classless-static-routes;
`
	// The client comes with a lease of its former life, and asks for that address without discovery.
	lease := `lease {
  interface "eth0";
  fixed-address 198.51.100.77;
  option subnet-mask 255.255.255.0;
  option dhcp-server-identifier 198.51.100.1;
  expire never;
}
`
	if err := os.WriteFile(filepath.Join(dir, "leases"), []byte(lease), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	l.client(t, dhclient, "-4", "-1", "-d", "-cf", filepath.Join(dir, "conf"), "-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"),
		"-sf", script(t, dir, `env >"$dir/new" && mv "$dir/new" "$dir/$reason"`), "eth0")
	expect(t, environment(t, filepath.Join(dir, "BOUND")), map[string]string{
		"new_ip_address": "198.51.100.2", "new_subnet_mask": "255.255.255.255", "new_routers": "169.254.1.1", "new_interface_mtu": "1440",
		"new_rfc3442_classless_static_routes": "32 169 254 1 1 0 0 0 0 0 169 254 1 1", "new_domain_name_servers": "192.0.2.53",
		"new_domain_search": "a.example. example.", "new_host_name": "vm-1", "new_dhcp_server_identifier": "169.254.1.1",
	})
	if s := l.server.Stats(); s.Naks != 1 || s.Acks != 1 {
		t.Errorf("want the old address refused and the new one given: %+v", s)
	}
}

// Nobody on the cluster's side is answered, whatever MAC he claims.
func TestClusterIsNotAnswered(t *testing.T) { onEach(t, testClusterIsNotAnswered) }

func testClusterIsNotAnswered(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")}
	l := serve(t, n, "")
	outside, inside := testnet.NewCapture(t, l.node.Namespace, l.veth), testnet.NewCapture(t, l.guest, "eth0")
	stranger := nic.MAC{2, 0, 0, 0, 0, 0x77}
	var sent [][]byte
	for _, chaddr := range []nic.MAC{mac, stranger} {
		frame := broadcast(t, with(request(dhcpv4.MessageTypeDiscover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = chaddr.HardwareAddr(); m.SetBroadcast() }))
		copy(frame[6:], stranger[:])
		sent = append(sent, frame)
	}
	sent = append(sent, arpFor(t, stranger, linkLocalServer.AsSlice()))
	for _, frame := range sent {
		l.node.Send(l.veth, frame)
	}
	// They went past the server's TAP: the guest has them. Then comes one of its own, so that the server has dealt with
	// all that came before.
	if !inside.Await(5*time.Second, func(gopacket.Packet) bool {
		return len(inside.Match(testnet.From(stranger.HardwareAddr()))) == len(sent)
	}) {
		t.Fatalf("the frames did not pass the TAP:\n%s", testnet.Dump(inside.Frames()))
	}
	l.guest.Send("eth0", broadcast(t, request(dhcpv4.MessageTypeDiscover)))
	l.await(t, "the guest's DISCOVER", func(s Stats) bool { return s.Offers == 1 })
	if s := l.server.Stats(); s != (Stats{Discovers: 1, Offers: 1}) {
		t.Errorf("the server heard the cluster: %+v", s)
	}
	own := l.server.Lease.serverMAC()
	if answers := outside.Match(testnet.From(own.HardwareAddr())); len(answers) > 0 {
		t.Errorf("answers on the node's side:\n%s", testnet.Dump(answers))
	}
}

// The kernel's filter on a real TAP.
func TestFilter(t *testing.T) {
	l := attach(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")})
	conn := l.listen(t)
	defer conn.Close()
	discover := broadcast(t, request(dhcpv4.MessageTypeDiscover))
	edit := func(change func(b []byte)) []byte { b := slices.Clone(discover); change(b); return b }
	be := binary.BigEndian
	tagged := slices.Insert(slices.Clone(discover), 12, 0x81, 0x00, 0x00, 0x05)
	withOptions := serialize(t, &layers.Ethernet{SrcMAC: mac.HardwareAddr(), DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeIPv4},
		&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: guestIP, DstIP: gatewayIP, Options: []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}}},
		gopacket.Payload(discover[etherHdrLen+ipHeaderLen:]))
	reply := arpFor(t, mac, linkLocalServer.AsSlice())
	reply[21] = arpReply
	cases := []struct {
		name  string
		frame []byte
		heard bool
	}{
		{"DISCOVER", discover, true},
		{"to the gateway's MAC", edit(func(b []byte) { copy(b, "\x02\x00\x00\x00\x00\x99") }), true},
		{"with IP options", withOptions, true},
		{"with a bad UDP checksum", edit(func(b []byte) { b[40]++ }), true},
		{"tagged", tagged, false},
		{"to another port", edit(func(b []byte) { be.PutUint16(b[36:], 68) }), false},
		{"from port 67", edit(func(b []byte) { be.PutUint16(b[34:], 67); be.PutUint16(b[36:], 53) }), false},
		{"TCP", edit(func(b []byte) { b[23] = 6 }), false},
		{"first fragment", edit(func(b []byte) { be.PutUint16(b[20:], 0x2000) }), false},
		{"later fragment", edit(func(b []byte) { be.PutUint16(b[20:], 0x0010) }), false},
		{"IPv6", edit(func(b []byte) { be.PutUint16(b[12:], 0x86dd) }), false},
		{"short", discover[:36], false},
		{"ARP for the server", arpFor(t, mac, linkLocalServer.AsSlice()), true},
		{"ARP for the gateway", arpFor(t, mac, gatewayIP), false},
		{"ARP answer", reply, false},
	}
	last := edit(func(b []byte) { b[len(b)-1] = 0x99 })
	for _, c := range cases {
		l.guest.Send("eth0", c.frame)
	}
	l.guest.Send("eth0", last)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	var heard []string
	buf := make([]byte, 2048)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			t.Fatalf("%v; heard %q", err, heard)
		}
		if string(buf[:n]) == string(last) {
			break
		}
		name := "unknown frame"
		for _, c := range cases {
			if string(c.frame) == string(buf[:n]) {
				name = c.name
			}
		}
		heard = append(heard, name)
	}
	var want []string
	for _, c := range cases {
		if c.heard {
			want = append(want, c.name)
		}
	}
	if !slices.Equal(heard, want) {
		t.Errorf("heard %q\nwant  %q", heard, want)
	}
}

// The TAP's end is an error unless it was asked for.
func TestServerOnARemovedTap(t *testing.T) {
	l := attach(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")})
	lease, _, _ := NewLease(l.port.NIC, "")
	s := &Server{Lease: lease, Conn: l.listen(t)}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	l.pod.MustRun("ip", "link", "del", l.port.Join.Tap)
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "TAP") {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run goes on without a TAP")
	}
}
