package podnet

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// withLoopback is dualStack's pod as container managers make it.
func withLoopback(t *testing.T, kind string, node *testnet.Node, spec testnet.PodSpec) (pod *testnet.Namespace, host string) {
	t.Helper()
	pod, host = addPodOf(t, kind, node, spec)
	pod.MustRun("ip", "link", "set", "lo", "up")
	return pod, host
}

// callees gives a port on which the guest sends back what it gets, and a way to learn who called.
func callees(t *testing.T, guest *testnet.Namespace) (port uint16, callers func() map[netip.Addr]int) {
	t.Helper()
	var l net.Listener
	guest.Must(func() (err error) { l, err = net.Listen("tcp", ":0"); return err })
	seen := make(chan netip.Addr, 100)
	var all errgroup.Group
	all.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				return nil
			}
			seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone("")
			all.Go(func() error {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience))
				_, err := io.Copy(c, c)
				return err
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		if err := all.Wait(); err != nil {
			t.Error(err)
		}
	})
	return uint16(l.Addr().(*net.TCPAddr).Port), func() map[netip.Addr]int {
		got := map[netip.Addr]int{}
		for len(seen) > 0 {
			got[<-seen]++
		}
		return got
	}
}

// call connects to an address from inside the namespace.
func call(pod *testnet.Namespace, to netip.Addr, port uint16) (conn net.Conn, err error) {
	err = pod.Do(func() error {
		d := net.Dialer{Timeout: patience} // opens the socket on this thread, as the address is no name
		conn, err = d.Dial("tcp", netip.AddrPortFrom(to, port).String())
		return err
	})
	return conn, err
}

// echoes sends that many bytes, and wants them back.
func echoes(conn net.Conn, size int) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	data := make([]byte, size)
	for i, random := 0, rand.New(rand.NewPCG(1, uint64(size))); i < size; i++ {
		data[i] = byte(random.Uint32())
	}
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err = errors.Join(err, <-sent); err == nil && !slices.Equal(got, data) {
		err = fmt.Errorf("%d of %d bytes came back, or other ones", len(got), size)
	}
	return err
}

var localhosts = map[netip.Addr]netip.Addr{inet4.localhost: localHost4, inet6.localhost: localHost6} // and whom the guest sees

func TestLocalhost(t *testing.T) { forEveryJoin(t, testLocalhost) }

func testLocalhost(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, host := withLoopback(t, kind, node, dualStack())
	// As strict as a node may be.
	pod.Sysctl("ipv4/conf/all/rp_filter", "1")
	pod.Sysctl("ipv4/conf/lo/rp_filter", "1")
	a := attach(t, pod, Options{Localhost: true, Queues: 2})
	guest := newBigGuest(t, a.nics[0], a.ports[0])
	guest.Configure(a.nics[0])
	if !guest.Ping(gw4.Addr()) || !guest.Ping(gw6.Addr()) {
		t.Fatal("the guest does not reach the node")
	}
	wire := testnet.NewCapture(t, node.Namespace, host)
	quiet(t, guest.Namespace)
	before := losses(t, pod, a.rec.Joins)
	port, callers := callees(t, guest.Namespace)
	for local, stranger := range localhosts {
		const calls = 4
		var all errgroup.Group
		for range calls {
			conn, err := call(pod, local, port)
			if err != nil {
				t.Fatal(err)
			}
			all.Go(func() error { return echoes(conn, 1e6) })
		}
		if err := all.Wait(); err != nil {
			t.Errorf("%s: %v", local, err)
		}
		if d := cmp.Diff(map[string]int{stranger.String(): calls}, texts(callers())); d != "" {
			t.Errorf("who called %s, as the guest sees it (-want +got):\n%s", local, d)
		}
		if _, err := call(pod, local, 1); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a closed port of %s: %v, want refused", local, err)
		}
	}
	got := losses(t, pod, a.rec.Joins)
	for _, why := range []Reason{GuestRS, OwnStack} { // which come in their own time
		delete(got, why)
		delete(before, why)
	}
	if !cmp.Equal(got, before) {
		t.Errorf("dropped: %v, before %v", got, before)
	}
	// The guest's own network is what it was, and the node has heard no more than that.
	testnet.Transfer(t, guest.Namespace, node.Namespace, gw4.Addr(), 1e6)
	testnet.Transfer(t, node.Namespace, guest.Namespace, ip6.Addr(), 1e6)
	heard := wire.Match(func(p gopacket.Packet) bool {
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		return ok && (uint16(tcp.SrcPort) == port || uint16(tcp.DstPort) == port) || names(p)
	})
	if len(heard) > 0 {
		t.Errorf("%d frames on the node's side:\n%s", len(heard), testnet.Dump(heard))
	}
	if len(wire.Frames()) == 0 {
		t.Error("the capture has heard nothing at all")
	}
}

// names says whether a frame has an address of localhost as the guest sees it, in whatever place.
func names(p gopacket.Packet) bool {
	return has(localHost4.AsSlice())(p) || has(localHost6.AsSlice())(p)
}

func texts(m map[netip.Addr]int) map[string]int {
	out := map[string]int{}
	for a, n := range m {
		out[a.String()] = n
	}
	return out
}

// A guest finds its way back whatever its routes are.
func TestLocalhostRoutes(t *testing.T) {
	for name, c := range map[string]struct {
		commands []string // in the guest, that has its addresses and routes
		asks     bool     // it asks for the MAC of 169.254.0.67
	}{
		"by the gateway":                  {commands: []string{"ip neigh show"}},
		"link-local addresses on link":    {[]string{"ip route add 169.254.0.0/16 dev eth0"}, true},
		"an address on link, no gateway":  {[]string{"ip route del default", "ip -6 route del default", "ip route add 169.254.0.67 dev eth0"}, true},
		"by the other NIC":                {commands: []string{"ip route replace default via 203.0.113.1", "ping -c 1 -w 10 203.0.113.1"}},
		"link-local ones, by the other":   {[]string{"ip route del default", "ip route add 169.254.0.0/16 dev net1 src 198.51.100.2"}, true},
		"asks again and again, and knows": {[]string{"ip route add 169.254.0.0/16 dev eth0", "sysctl -qw net.ipv4.neigh.eth0.base_reachable_time_ms=100 net.ipv6.neigh.eth0.base_reachable_time_ms=100 net.ipv4.neigh.eth0.delay_first_probe_time=0 net.ipv6.neigh.eth0.delay_first_probe_time=0"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				node := testnet.NewNode(t, gw4, gw6, netip.MustParsePrefix("203.0.113.1/24"))
				pod, host := withLoopback(t, kind, node, dualStack())
				node.AddLink(t, pod, testnet.PodSpec{Name: "net1", Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")}})
				ready(pod)
				a := attachInOrder(t, pod, Options{Localhost: true})
				guest := testnet.New(t, "guest")
				guest.Sysctl("ipv4/conf/all/rp_filter", "0")
				guest.Sysctl("ipv4/conf/default/rp_filter", "0")
				for i, n := range a.nics {
					guest.Plug(n, a.ports[i].Taps[0])
					guest.Configure(n)
				}
				for _, command := range c.commands {
					guest.MustRun("sh", "-c", command)
				}
				wire, tap := testnet.NewCapture(t, node.Namespace, host), testnet.NewCapture(t, pod, a.rec.Joins[0].Tap)
				port, callers := callees(t, guest)
				for local, stranger := range localhosts {
					conn, err := call(pod, local, port)
					if err == nil {
						err = echoes(conn, 1e5)
					}
					if got := callers(); err != nil || got[stranger] != 1 {
						t.Errorf("%s: %v; callers %v", local, err, got)
					}
				}
				if wire.Await(50*time.Millisecond, names) {
					t.Errorf("on the node's side:\n%s", testnet.Dump(wire.Match(names)))
				}
				if out := guest.MustRun("ip", "neigh"); c.asks != strings.Contains(out, localHost4.String()) || !strings.Contains(out, localHost6.String()) {
					t.Errorf("the guest knows %q", out)
				}
				// The answer for IPv6 was a rule's: the guest's kernel has found its checksum right.
				if !tap.Await(patience, func(p gopacket.Packet) bool {
					na, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
					return ok && na.TargetAddress.Equal(localHost6.AsSlice())
				}) {
					t.Error("no neighbour advertisement")
				}
			})
		})
	}
}

// attachInOrder attaches eth0 before net1.
func attachInOrder(t *testing.T, pod *testnet.Namespace, o Options) (a attached) {
	t.Helper()
	a.before = observe(t, pod)
	a.nics = plainNICs(a.before)
	slices.SortFunc(a.nics, func(a, b nic.NIC) int { return strings.Compare(a.Name, b.Name) })
	var err error
	a.ports, err = Attach(t.Context(), pod.NS, a.before, a.nics, optionsFor(pod, o), func(r Record) error { a.rec = r; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A guest with one family is called by that one; the other is refused at once, and the caller tries the next.
func TestLocalhostOfOneFamily(t *testing.T) {
	for name, c := range map[string]struct {
		addr           netip.Prefix
		route          netlink.Route
		serves, refuse netip.Addr
	}{
		"IPv4": {ip4, testnet.Via("0.0.0.0/0", gw4.Addr().String()), inet4.localhost, inet6.localhost},
		"IPv6": {ip6, testnet.Via("::/0", gw6.Addr().String()), inet6.localhost, inet4.localhost},
	} {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				node := testnet.NewNode(t, gw4, gw6)
				pod, _ := withLoopback(t, kind, node, testnet.PodSpec{MAC: mac, Addrs: []netip.Prefix{c.addr}, Routes: []netlink.Route{c.route}})
				a := attach(t, pod, Options{Localhost: true})
				guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
				guest.Configure(a.nics[0])
				port, callers := callees(t, guest)
				if _, err := call(pod, c.refuse, port); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s: %v, want refused", c.refuse, err)
				}
				conn, err := call(pod, c.serves, port)
				if err == nil {
					err = echoes(conn, 1e5)
				}
				if got := callers(); err != nil || got[localhosts[c.serves]] != 1 {
					t.Errorf("%s: %v; callers %v", c.serves, err, got)
				}
			})
		})
	}
}

// What is from or for localhost as the guest sees it goes nowhere else, in either direction, and what is not is counted as
// without it.
func TestFramesForLocalhost(t *testing.T) { forEveryJoin(t, testFramesForLocalhost) }

func testFramesForLocalhost(t *testing.T, kind string) {
	w := newWireWith(t, kind, dualStack(), Options{Localhost: true})
	to := func(packet []byte, a netip.Addr) []byte {
		at := map[bool]int{true: 16, false: 24}[a.Is4()]
		copy(packet[at:], a.AsSlice())
		return packet
	}
	segment := func(flags byte) []byte { // of TCP, to port 80
		b := make([]byte, 20)
		b[1], b[3], b[12], b[13] = 80, 80, 5<<4, flags
		return b
	}
	const syn, ack = 0x02, 0x10
	four, six := ip4.Addr().String(), ip6.Addr().String()
	host4, host6 := localHost4.String(), localHost6.String()
	for name, c := range map[string]struct {
		fromGuest bool
		frame     []byte
		want      Reason // "": it arrives at the other end
	}{
		"a stranger's segment":            {false, ethernet(cluster, nil, ip4Kind, to(packet4(host4, protoTCP, 0, segment(syn)), ip4.Addr())), ClusterOwn},
		"a stranger's segment, IPv6":      {false, ethernet(cluster, nil, ip6Kind, to(packet6(host6, protoTCP, segment(syn)), ip6.Addr())), ClusterOwn},
		"a stranger with a priority":      {false, ethernet(cluster, []uint16{0}, ip4Kind, packet4(host4, protoTCP, 0, segment(syn))), ClusterOwn},
		"a stranger's ARP":                {false, ethernet(cluster, nil, arpKind, arpMessage(1, cluster, host4)), ClusterOwn},
		"a stranger's advertisement":      {false, ethernet(cluster, nil, ip6Kind, nd("fe80::c1", message(136, host6, option(2, cluster)))), ClusterOwn},
		"a segment from the cluster":      {false, ethernet(cluster, nil, ip4Kind, to(packet4(gw4.Addr().String(), protoTCP, 0, segment(syn)), ip4.Addr())), ""},
		"one for localhost":               {false, ethernet(cluster, nil, ip4Kind, to(packet4(gw4.Addr().String(), protoTCP, 0, segment(syn)), localHost4)), ""}, // as any other
		"a connection of the guest's":     {true, ethernet(mac, nil, ip4Kind, to(packet4(four, protoTCP, 0, segment(syn)), localHost4)), OwnAddress},
		"the same, IPv6":                  {true, ethernet(mac, nil, ip6Kind, to(packet6(six, protoTCP, segment(syn)), localHost6)), OwnAddress},
		"a datagram":                      {true, ethernet(mac, nil, ip4Kind, to(udp4(four, 53, 53), localHost4)), OwnAddress},
		"a datagram, IPv6":                {true, ethernet(mac, nil, ip6Kind, to(udp6(six, 53, 53), localHost6)), OwnAddress},
		"a fragment":                      {true, ethernet(mac, nil, ip4Kind, to(packet4(four, protoTCP, 4, segment(ack)), localHost4)), OwnAddress},
		"spoofed":                         {true, ethernet(mac, nil, ip4Kind, to(packet4(foreign4, protoTCP, 0, segment(ack)), localHost4)), SpoofedIPv4},
		"spoofed, IPv6":                   {true, ethernet(mac, nil, ip6Kind, to(packet6(foreign6, protoTCP, segment(ack)), localHost6)), SpoofedIPv6},
		"of another MAC":                  {true, ethernet(foreignMAC, nil, ip4Kind, to(packet4(four, protoTCP, 0, segment(ack)), localHost4)), SpoofedMAC},
		"a probe for its address":         {true, ethernet(mac, nil, arpKind, asking(arpMessage(1, mac, "0.0.0.0"), host4)), OwnAddress},
		"a probe, IPv6":                   {true, ethernet(mac, nil, ip6Kind, nd("::", message(135, host6))), OwnAddress},
		"an ARP answer about it":          {true, ethernet(mac, nil, arpKind, asking(arpMessage(2, mac, four), host4)), OwnAddress},
		"a question in another form":      {true, ethernet(mac, nil, ip6Kind, nd(guestLinkLocal, message(135, host6))), OwnAddress},
		"one with another MAC":            {true, ethernet(foreignMAC, nil, arpKind, asking(arpMessage(1, mac, four), host4)), SpoofedMAC},
		"another question of the guest's": {true, ethernet(mac, nil, arpKind, asking(arpMessage(1, mac, four), "169.254.0.68")), ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := w.fate(t, c.fromGuest, c.frame); got != c.want {
				t.Errorf("dropped for %q, want %q", got, c.want)
			}
		})
	}
	// An answer of the guest's to nobody is for the namespace, which says so to the guest alone.
	before := w.counters()
	w.send(true, ethernet(mac, nil, ip4Kind, to(checksummed(packet4(four, protoTCP, 0, segment(ack)), localHost4), localHost4)))
	reset := func(p gopacket.Packet) bool {
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		return ok && tcp.RST && has(localHost4.AsSlice())(p)
	}
	for end := time.Now().Add(patience); !w.arrivedBy(reset); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the namespace has not heard it, or the guest not its answer")
		}
	}
	if after := w.counters(); !cmp.Equal(before, after) {
		t.Errorf("counted: %v, before %v", after, before)
	}
	if got := w.cluster.Match(func(p gopacket.Packet) bool { return names(p) && testnet.From(mac.HardwareAddr())(p) }); len(got) > 0 {
		t.Errorf("on the node's side:\n%s", testnet.Dump(got))
	}
}

// checksummed puts the checksums of an IPv4 packet with a TCP segment right, for when it goes to an address.
func checksummed(packet []byte, to netip.Addr) []byte {
	copy(packet[16:], to.AsSlice())
	sum := func(words ...[]byte) uint16 {
		var n uint32
		for _, w := range words {
			for i := 0; i < len(w); i += 2 {
				n += uint32(w[i])<<8 | uint32(w[i+1])
			}
		}
		for n > 0xffff {
			n = n>>16 + n&0xffff
		}
		return ^uint16(n)
	}
	s := sum(packet[:20])
	packet[10], packet[11] = byte(s>>8), byte(s)
	s = sum(packet[12:20], []byte{0, protoTCP, 0, byte(len(packet) - 20)}, packet[20:])
	packet[36], packet[37] = byte(s>>8), byte(s)
	return packet
}

// After Detach the namespace has its localhost for itself again, and what it had set there.
func TestLocalhostIsGivenBack(t *testing.T) { forLinkKinds(t, testLocalhostIsGivenBack) }

func testLocalhostIsGivenBack(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := withLoopback(t, kind, node, dualStack())
	pod.Sysctl("ipv4/conf/lo/accept_local", "1") // somebody's own
	quiet(t, pod)
	a := attach(t, pod, Options{Localhost: true})
	if err := Check(pod.NS, a.rec); kind != "tap" && err != nil { // which has no carrier, and is up all the same
		t.Error(err)
	}
	for _, p := range a.ports {
		p.Close()
	}
	if err := Detach(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	quiet(t, pod)
	if d := changed(t, pod, a.before); d != "" {
		t.Errorf("-before +after:\n%s", d)
	}
	settings, err := readLoopback(pod.NS)
	want := map[string]string{"ipv4/conf/lo/route_localnet": "0", "ipv4/conf/lo/accept_local": "1"}
	if err != nil || !cmp.Equal(settings, want) {
		t.Errorf("settings %v, %v, want %v", settings, err, want)
	}
	if out := pod.MustRun("nft", "list", "ruleset"); out != "" {
		t.Errorf("rules are left:\n%s", out)
	}
	port, callers := callees(t, pod)
	for local := range localhosts {
		conn, err := call(pod, local, port)
		if err == nil {
			err = echoes(conn, 1e4)
		}
		if got := callers(); err != nil || got[local] != 1 {
			t.Errorf("the namespace's own %s: %v; callers %v", local, err, got)
		}
	}
}

// The NIC that localhost leads to is the first with addresses.
func TestGuestOf(t *testing.T) {
	addrs := func(all ...string) (out []netip.Prefix) {
		for _, a := range all {
			out = append(out, netip.MustParsePrefix(a))
		}
		return out
	}
	for name, c := range map[string]struct {
		nics []nic.NIC
		want string
	}{
		"both families":         {[]nic.NIC{{Name: "eth0", Addrs: addrs("2001:db8::2/64", "198.51.100.2/24", "198.51.100.3/24")}}, "eth0 [198.51.100.2 2001:db8::2]"},
		"one":                   {[]nic.NIC{{Name: "eth0", Addrs: addrs("2001:db8::2/64")}, {Name: "net1", Addrs: addrs("198.51.100.2/24")}}, "eth0 [2001:db8::2]"},
		"no address":            {[]nic.NIC{{Name: "eth0"}, {Name: "net1", Addrs: addrs("198.51.100.2/24")}}, "net1 [198.51.100.2]"},
		"none at all":           {[]nic.NIC{{Name: "eth0"}}, " []"},
		"a function":            {[]nic.NIC{{Name: "eth0", Addrs: addrs("198.51.100.2/24"), VF: &nic.VF{}}, {Name: "net1", Addrs: addrs("203.0.113.5/24")}}, " []"},
		"the address is itself": {[]nic.NIC{{Name: "eth0", Addrs: addrs("169.254.0.67/16", "2001:db8::2/64")}}, "eth0 [2001:db8::2]"},
	} {
		t.Run(name, func(t *testing.T) {
			link, leads := guestOf(c.nics)
			if got := fmt.Sprint(link, " ", leads); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}
