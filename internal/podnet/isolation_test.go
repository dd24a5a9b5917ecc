package podnet

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// cluster is the MAC that the tests' own frames come from, and stands for a host of the cluster network.
var cluster = nic.MAC{0x02, 0xc1, 0x05, 0x7e, 0, 1}

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// pack makes a frame of the layers. Lengths and checksums are filled in.
func pack(t testing.TB, all ...gopacket.SerializableLayer) []byte {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func ether(from, to net.HardwareAddr, kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: from, DstMAC: to, EthernetType: kind}
}

// source is the IPv4 address that a MAC of the tests goes with: the guest's, or the gateway's.
func source(from net.HardwareAddr) net.IP {
	if bytes.Equal(from, mac[:]) {
		return ip4.Addr().AsSlice()
	}
	return gw4.Addr().AsSlice()
}

// question is an ARP request for an address, as a frame from one MAC to another.
func question(t testing.TB, from, to net.HardwareAddr, addr string) []byte {
	return pack(t, ether(from, to, layers.EthernetTypeARP), &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: from, SourceProtAddress: source(from),
		DstHwAddress: make([]byte, 6), DstProtAddress: netip.MustParseAddr(addr).AsSlice(),
	})
}

// echo is an IPv4 echo request.
func echo(t testing.TB, to net.HardwareAddr, addr string) []byte {
	return pack(t, ether(cluster.HardwareAddr(), to, layers.EthernetTypeIPv4),
		&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolICMPv4, SrcIP: gw4.Addr().AsSlice(), DstIP: net.ParseIP(addr).To4()},
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0), Id: 1, Seq: 1})
}

// icmp6 is a message to an IPv6 multicast group.
func icmp6(t testing.TB, group string, kind uint8, body gopacket.SerializableLayer) []byte {
	to := net.ParseIP(group)
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP("fe80::c1"), DstIP: to}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	mac := net.HardwareAddr{0x33, 0x33, to[12], to[13], to[14], to[15]} // RFC 2464, section 7
	return pack(t, ether(cluster.HardwareAddr(), mac, layers.EthernetTypeIPv6), ip, icmp, body)
}

func solicitation(target string) *layers.ICMPv6NeighborSolicitation {
	return &layers.ICMPv6NeighborSolicitation{TargetAddress: net.ParseIP(target)}
}

// provocations are frames from the cluster that a host would answer.
func provocations(t testing.TB, own net.HardwareAddr) map[string][]byte {
	from := cluster.HardwareAddr()
	bridges := net.HardwareAddr{0x01, 0x80, 0xc2, 0, 0, 0x0e} // IEEE 802.1D: a bridge passes it to the port's own stack
	return map[string][]byte{
		"ARP for the pod":                   question(t, from, broadcast, "198.51.100.2"),
		"ARP for another link's address":    question(t, from, broadcast, "203.0.113.5"),
		"the same to the veth's MAC":        question(t, from, own, "203.0.113.5"),
		"the same to bridges":               question(t, from, bridges, "203.0.113.5"),
		"ARP for the DHCP server":           question(t, from, broadcast, "169.254.0.67"),
		"ARP for a link-local address":      question(t, from, broadcast, "169.254.1.1"),
		"ARP for the loopback":              question(t, from, broadcast, "127.0.0.1"),
		"ping of the loopback, to the veth": echo(t, own, "127.0.0.1"),
		"ping of the guest's localhost":     echo(t, own, localHost4.String()),
		"ND for the guest's localhost":      icmp6(t, "ff02::1:fffe:43", layers.ICMPv6TypeNeighborSolicitation, solicitation(localHost6.String())),
		"ping of the pod, to the veth":      echo(t, own, "198.51.100.2"),
		"ping of another link, to the veth": echo(t, own, "203.0.113.5"),
		"ping of all hosts":                 echo(t, net.HardwareAddr{0x01, 0, 0x5e, 0, 0, 1}, "224.0.0.1"),
		"ping of all":                       echo(t, broadcast, "255.255.255.255"),
		"ping of all IPv6 nodes":            icmp6(t, "ff02::1", layers.ICMPv6TypeEchoRequest, &layers.ICMPv6Echo{Identifier: 1}),
		"ND for the pod":                    icmp6(t, "ff02::1:ff00:2", layers.ICMPv6TypeNeighborSolicitation, solicitation("2001:db8:100::2")),
		"ND for its link-local address":     icmp6(t, "ff02::1:ff33:4455", layers.ICMPv6TypeNeighborSolicitation, solicitation("fe80::11:22ff:fe33:4455")),
		"router solicitation":               icmp6(t, "ff02::2", layers.ICMPv6TypeRouterSolicitation, &layers.ICMPv6RouterSolicitation{}),
		"MLD query":                         icmp6(t, "ff02::1", layers.ICMPv6TypeMLDv1MulticastListenerQueryMessage, gopacket.Payload(make([]byte, 20))),
	}
}

// The namespace's own stack says nothing, on its own or when asked, to the cluster or to the guest.
func TestNamespaceIsSilent(t *testing.T) {
	for name, c := range map[string]struct {
		guest bool
		Options
	}{
		"with a guest": {guest: true}, "nobody at the TAP": {}, "localhost leads to the guest": {true, Options{Localhost: true}},
	} {
		t.Run(name, func(t *testing.T) {
			forEveryJoin(t, func(t *testing.T, kind string) { testNamespaceIsSilent(t, kind, c.guest, c.Options) })
		})
	}
}

func testNamespaceIsSilent(t *testing.T, kind string, withGuest bool, o Options) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, host := addPodOf(t, kind, node, dualStack())
	// A link that stays the namespace's: its address must not be answered for on eth0.
	node.AddLink(t, pod, testnet.PodSpec{Name: "net1", NoPort: true, Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")}})
	quiet(t, pod)
	before := observe(t, pod)
	a := attachEth0(t, pod, before, o)
	wire := testnet.NewCapture(t, node.Namespace, host) // not before: the pod itself may have spoken until now
	tap := testnet.NewCapture(t, pod, a.rec.Joins[0].Tap)
	allowed := map[nic.MAC]bool{cluster: true}
	for _, l := range observe(t, node.Namespace).Links {
		allowed[l.MAC] = true
	}
	if withGuest {
		guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
		guest.Configure(a.nics[0])
		allowed[mac] = true
	}
	awaitForwarding(t, node, host, tap)
	for _, frame := range provocations(t, a.rec.Joins[0].Own.HardwareAddr()) {
		node.Send(host, frame)
	}
	for _, addr := range []netip.Addr{ip4.Addr(), ip6.Addr()} {
		if got := node.Ping(addr); got != withGuest {
			t.Errorf("ping of %s answered: %v, want %v", addr, got, withGuest)
		}
	}
	// What has the guest's MAC has come from the TAP: where the link keeps that MAC, the namespace would use it too.
	stranger := func(p gopacket.Packet) bool {
		e, ok := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		return !ok || !allowed[nic.MAC(e.SrcMAC)] || nic.MAC(e.SrcMAC) == mac && len(tap.Match(has(p.Data()))) == 0
	}
	// Long enough for delayed answers: MLD reports and router solicitations come within a second or so
	// (RFC 3810, section 9.3; RFC 4861, section 10).
	wire.Await(2500*time.Millisecond, stranger)
	for where, c := range map[string]*testnet.Capture{"cluster": wire, "guest": tap} {
		got := slices.DeleteFunc(c.Match(stranger), func(p gopacket.Packet) bool {
			return testnet.From(mac.HardwareAddr())(p) && tap.Await(time.Second, has(p.Data())) // the other capture may be slower
		})
		if len(got) > 0 {
			t.Errorf("%d frames of the namespace's own toward the %s:\n%s", len(got), where, testnet.Dump(got))
		}
	}
	if len(wire.Frames()) == 0 || len(tap.Frames()) == 0 {
		t.Error("the captures heard nothing at all")
	}
	// The same question is answered when the namespace is not silenced: the test can fail.
	join := a.rec.Joins[0]
	switch join.Datapath {
	case Bridged:
		pod.Sysctl("ipv4/conf/"+join.Bridge+"/arp_ignore", "0")
	case Redirected:
		loseRules(t, pod, join)
		pod.Sysctl("ipv4/conf/eth0/arp_ignore", "0")
	case AsItIs:
		return // what answers there is the bridge of the TAP's maker
	}
	node.Send(host, question(t, cluster.HardwareAddr(), broadcast, "203.0.113.5"))
	if !wire.Await(patience, stranger) {
		t.Error("a namespace with arp_ignore off does not answer: the test proves nothing")
	}
}

// loseRules takes away the rules of the link, so that it is the namespace's own again.
func loseRules(t *testing.T, pod *testnet.Namespace, j Join) {
	t.Helper()
	if j.engine() == Nftables {
		pod.MustRun("nft", "delete", "table", "netdev", table.Name)
		return
	}
	k := &kernel{h: pod.Link()}
	pod.Must(func() error {
		index, err := ioctlLink(j.Link)
		if err != nil {
			return err
		}
		return k.removePrograms(index, j.hooksAt(j.Link)...)
	})
}

// attachEth0 attaches that NIC alone.
func attachEth0(t testing.TB, pod *testnet.Namespace, before nic.Snapshot, o Options) attached {
	t.Helper()
	not := func(n nic.NIC) bool { return n.Name != "eth0" }
	a := attached{before: before, nics: slices.DeleteFunc(plainNICs(before), not)}
	var err error
	a.ports, err = Attach(t.Context(), pod.NS, before, a.nics, optionsFor(pod, o), func(r Record) error { a.rec = r; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A hairpin port of the plugin's bridge sends every broadcast of the guest back.
// (What it makes of a TAP's bridge is not ours: that one may learn the guest's MAC where it is not.)
func TestHairpin(t *testing.T) {
	for _, kind := range slices.DeleteFunc(slices.Clone(linkKinds), func(k string) bool { return k == "tap" }) {
		t.Run(kind, func(t *testing.T) { t.Parallel(); testHairpin(t, kind) })
	}
}

func testHairpin(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	spec := dualStack()
	spec.Hairpin = true
	pod, host := addPodOf(t, kind, node, spec)
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	wire, inside := testnet.NewCapture(t, node.Namespace, host), testnet.NewCapture(t, guest, "eth0")
	awaitForwarding(t, node, host, inside)
	// The plugin's bridge forwards to its ports when the link watch has seen them up.
	if !guest.Ping(gw4.Addr()) {
		t.Fatal("guest does not reach the gateway")
	}
	mark := []byte("a broadcast of the guest's own")
	guest.Send("eth0", datagram{src: 9, dst: 9}.frame(t, mac.HardwareAddr(), mark))
	marked := has(mark)
	reflected := func() int { return len(wire.Match(marked)) }
	for end := time.Now().Add(patience); reflected() < 2 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	if n := reflected(); n != 2 {
		t.Fatalf("%d copies on the wire, want the frame and its reflection", n)
	}
	for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
		if !guest.Ping(to) {
			t.Errorf("guest does not reach %s", to)
		}
	}
	if n := len(inside.Match(marked)); n != 1 { // the capture hears it leave
		t.Errorf("the guest has seen its broadcast %d times", n)
	}
	// A guest that does not know its own probes (RFC 7527) takes a reflected one for another host's.
	guest.Sysctl("ipv6/conf/all/enhanced_dad", "0")
	guest.Sysctl("ipv6/conf/eth0/enhanced_dad", "0")
	detect := func(addr string) string {
		guest.MustRun("ip", "addr", "add", addr, "dev", "eth0")
		var out string
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			out = guest.MustRun("ip", "-6", "addr", "show", "to", addr)
			if strings.Contains(out, "dadfailed") || !strings.Contains(out, "tentative") {
				break
			}
		}
		return out
	}
	if out := detect("2001:db8:100::77/128"); strings.Contains(out, "tentative") {
		t.Errorf("duplicate address detection failed: %s", out)
	}
	if kind != "veth" {
		return // without the rules nothing is redirected, and so nothing comes back
	}
	pod.MustRun("nft", "flush", "chain", "netdev", table.Name, "from-eth0")
	if out := detect("2001:db8:100::78/128"); !strings.Contains(out, "dadfailed") {
		t.Errorf("without the rule the address is fine too, so the test proves nothing: %s", out)
	}
}

// has accepts frames with those bytes.
func has(b []byte) func(gopacket.Packet) bool {
	return func(p gopacket.Packet) bool { return bytes.Contains(p.Data(), b) }
}

// datagram is a UDP datagram in the making.
type datagram struct {
	src, dst layers.UDPPort
	to       net.HardwareAddr
	tags     []uint16 // of VLANs, outermost first; above 0xfff for a service tag
	options  bool     // the IP header has some
	frag     uint16   // offset in units of 8 bytes
	more     bool
}

const serviceTag = 0x1000

func (d datagram) frame(t testing.TB, from net.HardwareAddr, body []byte) []byte {
	t.Helper()
	kind := layers.EthernetTypeIPv4
	var all []gopacket.SerializableLayer
	for i := len(d.tags) - 1; i >= 0; i-- {
		all = append([]gopacket.SerializableLayer{&layers.Dot1Q{VLANIdentifier: d.tags[i] & 0xfff, Type: kind}}, all...)
		if kind = layers.EthernetTypeDot1Q; d.tags[i]&serviceTag != 0 {
			kind = layers.EthernetTypeQinQ
		}
	}
	to := d.to
	if to == nil {
		to = broadcast
	}
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, FragOffset: d.frag,
		SrcIP: source(from), DstIP: net.IPv4bcast.To4(),
	}
	if d.options {
		ip.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}} // no operation
	}
	if d.more {
		ip.Flags = layers.IPv4MoreFragments
	}
	udp := make([]byte, 8, 8+len(body)) // no checksum: of a fragment, it would be of the whole
	binary.BigEndian.PutUint16(udp[0:], uint16(d.src))
	binary.BigEndian.PutUint16(udp[2:], uint16(d.dst))
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(body)))
	all = append([]gopacket.SerializableLayer{ether(from, to, kind)}, all...)
	return pack(t, append(all, ip, gopacket.Payload(append(udp, body...)))...)
}

// awaitForwarding waits until frames from the cluster arrive where the capture is: a bridge port begins to forward when the
// kernel's link watch has seen it, soon after Attach.
func awaitForwarding(t testing.TB, node *testnet.Node, host string, at *testnet.Capture) {
	t.Helper()
	mark := []byte("the first datagram that passes")
	for end := time.Now().Add(patience); !at.Await(50*time.Millisecond, has(mark)); {
		if time.Now().After(end) {
			t.Fatal("no datagram passes")
		}
		node.Send(host, datagram{src: 9, dst: 9}.frame(t, cluster.HardwareAddr(), mark))
	}
}

func TestDHCPStaysApart(t *testing.T) { forLinkKinds(t, testDHCPStaysApart) }

func testDHCPStaysApart(t *testing.T, kind string) {
	offer, discover := datagram{src: 67, dst: 68}, datagram{src: 68, dst: 67}
	with := func(d datagram, change func(*datagram)) datagram { change(&d); return d }
	tagged := func(d datagram, tags ...uint16) datagram { d.tags = tags; return d }
	inward := map[string]struct {
		datagram
		passes bool
	}{
		"OFFER":                              {offer, false},
		"OFFER to the guest's MAC":           {with(offer, func(d *datagram) { d.to = mac.HardwareAddr() }), false},
		"OFFER from a relay's port":          {datagram{src: 6767, dst: 68}, false},
		"OFFER with IP options":              {with(offer, func(d *datagram) { d.options = true }), false},
		"OFFER, first fragment":              {with(offer, func(d *datagram) { d.more, d.to = true, mac.HardwareAddr() }), false},
		"OFFER, a later fragment":            {with(offer, func(d *datagram) { d.frag, d.to = 4, mac.HardwareAddr() }), true},
		"OFFER with a priority":              {tagged(offer, 0), false},
		"OFFER with a priority, service tag": {tagged(offer, serviceTag), false},
		"OFFER with two priorities":          {tagged(offer, 0, 0), false},
		"OFFER with two kinds of priority":   {tagged(offer, serviceTag, 0), false},
		"the other way":                      {tagged(offer, 0, serviceTag), false},
		"OFFER with three priorities":        {tagged(offer, 0, 0, 0), false},
		"VLAN 7 in VLAN 5":                   {tagged(offer, 5, 7), true},
		"another datagram":                   {datagram{src: 67, dst: 6868}, true},
		"another datagram with a priority":   {tagged(datagram{src: 53, dst: 5353}, 0), true},
		"DISCOVER":                           {discover, true}, // the guest may be a server, if it likes
	}
	outward := map[string]struct {
		datagram
		passes bool
	}{
		"DISCOVER":                  {discover, false},
		"DISCOVER with a priority":  {tagged(discover, 0), false},
		"DISCOVER with IP options":  {with(discover, func(d *datagram) { d.options = true }), false},
		"DISCOVER, first fragment":  {with(discover, func(d *datagram) { d.more = true }), false},
		"renewal, unicast":          {with(discover, func(d *datagram) { d.to = cluster.HardwareAddr() }), false},
		"from a port of its own":    {datagram{src: 4711, dst: 67}, false},
		"another datagram":          {datagram{src: 68, dst: 6767}, true},
		"another one with a VLAN 5": {tagged(datagram{src: 53, dst: 5353}, 5), true},
	}
	node := testnet.NewNode(t, gw4, gw6)
	pod, host := addPodOf(t, kind, node, dualStack())
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	responder := testnet.NewCapture(t, pod, a.rec.Joins[0].Tap) // hears what dhcp's socket hears
	wire, inside := testnet.NewCapture(t, node.Namespace, host), testnet.NewCapture(t, guest, "eth0")

	awaitForwarding(t, node, host, inside)
	// arrives says whether a frame does; one that passes for sure shows when to stop waiting. Two processors may swap the
	// two, so it waits a moment longer.
	serial := uint32(0)
	arrives := func(t *testing.T, d datagram, want bool, from *testnet.Namespace, at *testnet.Capture) (bool, []byte) {
		link, src := "eth0", mac
		if from == node.Namespace {
			link, src = host, cluster
		}
		serial++
		mark := binary.BigEndian.AppendUint32([]byte("mark"), serial)
		fence := binary.BigEndian.AppendUint32([]byte("fence"), serial)
		from.Send(link, d.frame(t, src.HardwareAddr(), mark))
		from.Send(link, datagram{src: 9, dst: 9}.frame(t, src.HardwareAddr(), fence))
		if !at.Await(patience, has(fence)) {
			t.Fatal("an ordinary datagram is lost")
		}
		wait := 50 * time.Millisecond
		if want {
			wait = patience
		}
		return at.Await(wait, has(mark)), mark
	}
	for name, c := range inward {
		t.Run("cluster to guest/"+name, func(t *testing.T) {
			if got, _ := arrives(t, c.datagram, c.passes, node.Namespace, inside); got != c.passes {
				t.Errorf("reaches the guest: %v, want %v", got, c.passes)
			}
		})
	}
	for name, c := range outward {
		t.Run("guest to cluster/"+name, func(t *testing.T) {
			got, mark := arrives(t, c.datagram, c.passes, guest, wire)
			if got != c.passes {
				t.Errorf("reaches the cluster: %v, want %v", got, c.passes)
			}
			if !responder.Await(patience, has(mark)) {
				t.Error("a socket on the TAP has not heard it")
			}
		})
	}
	// Nobody answered the cluster's DISCOVER.
	answer := func(p gopacket.Packet) bool {
		return testnet.UDPPort(67)(p) && !testnet.From(cluster.HardwareAddr())(p)
	}
	if got := wire.Match(answer); len(got) > 0 {
		t.Errorf("DHCP on the cluster's side:\n%s", testnet.Dump(got))
	}
}

// Without a gateway the guest's DHCP server has a link-local address. The question for it ends at the TAP; others pass.
func TestServersAddressStaysInside(t *testing.T) { forLinkKinds(t, testServersAddressStaysInside) }

func testServersAddressStaysInside(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4)
	spec := dualStack()
	spec.Routes = nil
	pod, host := addPodOf(t, kind, node, spec)
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	wire := testnet.NewCapture(t, node.Namespace, host)
	awaitForwarding(t, node, host, testnet.NewCapture(t, guest, "eth0"))
	asksFor := func(addr string) func(gopacket.Packet) bool {
		return func(p gopacket.Packet) bool {
			arp, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP)
			return ok && net.IP(arp.DstProtAddress).String() == addr
		}
	}
	for _, addr := range []string{"169.254.0.67", "169.254.0.68"} {
		guest.Send("eth0", question(t, mac.HardwareAddr(), broadcast, addr))
	}
	if !wire.Await(patience, asksFor("169.254.0.68")) {
		t.Error("the guest's other questions are lost")
	}
	if wire.Await(50*time.Millisecond, asksFor("169.254.0.67")) {
		t.Error("the cluster hears the guest ask for its DHCP server")
	}
}
