package dhcp

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// networks are what plugins make of a pod.
func networks() map[string]nic.NIC {
	addrs := func(s ...string) (a []netip.Addr) {
		for _, s := range s {
			a = append(a, netip.MustParseAddr(s))
		}
		return a
	}
	many := nic.NIC{Addrs: prefixes("198.51.100.2/24"), MTU: 9000, DNS: nic.DNS{Servers: addrs("198.51.100.53")}}
	for i := range 39 {
		many.Routes = append(many.Routes, route(fmt.Sprintf("10.%d.0.0/16 via 198.51.100.%d", i, 100+i)))
	}
	many.Routes = append(many.Routes, route("0.0.0.0/0 via 198.51.100.1"))
	for i := range 12 {
		many.DNS.Search = append(many.DNS.Search, fmt.Sprintf("namespace-%02d-%s.svc.cluster-%02d.example", i, strings.Repeat("long", 5), i))
	}
	return map[string]nic.NIC{
		"plain": {
			Addrs: prefixes("198.51.100.2/24"), MTU: 1450, Routes: routes("203.0.113.0/28", "192.0.2.0/25 via 198.51.100.9", "0.0.0.0/0 via 198.51.100.1"),
			DNS: nic.DNS{Servers: addrs("198.51.100.53", "192.0.2.53"), Search: []string{"default.svc.cluster.example", "svc.cluster.example"}},
		},
		"Calico-like": {
			Addrs: prefixes("198.51.100.2/32"), MTU: 65521, Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1"),
			DNS: nic.DNS{Servers: addrs("192.0.2.53")},
		},
		"ptp-like": {
			Addrs: prefixes("198.51.100.2/24"), MTU: 1500,
			Routes: routes("198.51.100.1/32", "198.51.100.0/24 via 198.51.100.1", "0.0.0.0/0 via 198.51.100.1"),
		},
		"no gateway, but a link-local route": {Addrs: prefixes("198.51.100.2/24"), MTU: 1500, Routes: routes("169.254.0.0/16")},
		"Weave-like":                         {Addrs: prefixes("198.51.100.2/24"), MTU: 1376, Routes: routes("203.0.113.0/28")},
		"40 routes":                          many,
	}
}

// lossy is a wire that loses what the guest sends by unicast while it is told to.
type lossy struct {
	net.PacketConn
	unicast atomic.Bool
}

func (c *lossy) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := c.PacketConn.ReadFrom(b)
		if err != nil || n < 1 || b[0]&1 == 1 || !c.unicast.Load() {
			return n, from, err
		}
	}
}

// TestClients has every client live through a lease on every network: lease, power cut and restart with the old address,
// renewal at T1 by unicast, rebinding at T2 by broadcast, release. (A networkd whose link goes down while it renews gives
// up: so the restart comes first.) The clients wait most of the time, so all of them
// run at once.
func TestClients(t *testing.T) {
	testnet.NeedRoot(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	all := networks()
	all["Calico-like/redirect"] = all["Calico-like"] // another datapath: see wish
	for i := range clients {
		for name, n := range all {
			wg.Go(func() {
				t.Run(clients[i].name+"/"+name, func(t *testing.T) {
					clients[i].need(t)
					n.Name, n.MAC = "eth0", mac
					newLife(t, &clients[i], n).live()
				})
			})
		}
	}
}

// life is one client on one network.
type life struct {
	*lab
	t            testing.TB
	client       *client
	machine      *machine
	wire         *lossy
	tap, outside *testnet.Capture
}

// leaseTime makes T1 6 s and T2 10 s: enough for a busy machine.
const leaseTime = 12 * time.Second

func newLife(t testing.TB, c *client, n nic.NIC) *life {
	l := attach(t, n)
	if n.Addrs[0].Bits() == 32 {
		l.node.MustRun("ip", "addr", "add", n.Routes[0].Dst.String(), "dev", testnet.Bridge)
	}
	lease, _, ok := NewLease(n, "vm-1")
	if !ok {
		t.Fatal("no lease")
	}
	lease.Duration = leaseTime
	wire := &lossy{PacketConn: l.listen(t)}
	l.server = &Server{Lease: lease, Conn: wire}
	l.guest.MustRun("ip", "link", "set", "eth0", "mtu", "1500") // what a guest starts with
	f := &life{
		lab: l, t: t, client: c, machine: newMachine(t, l.guest, c.files), wire: wire,
		tap: testnet.NewCapture(t, l.pod, l.port.Join.Tap), outside: testnet.NewCapture(t, l.node.Namespace, l.veth),
	}
	start(t, l.server)
	return f
}

// sentMessage is what the guest sent to a server, and to which address.
type sentMessage struct {
	*dhcpv4.DHCPv4
	to netip.Addr
}

// sent gives the guest's messages, but the first skip ones.
func (f *life) sent(skip int) (all []sentMessage) {
	for _, p := range f.tap.Frames() {
		ip, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
		if ip == nil || udp == nil || udp.DstPort != serverPort {
			continue
		}
		m, err := dhcpv4.FromBytes(udp.Payload)
		if err != nil {
			f.t.Errorf("the client sent %v: %v", udp.Payload, err)
			continue
		}
		to, _ := netip.AddrFromSlice(ip.DstIP.To4())
		all = append(all, sentMessage{m, to})
	}
	return all[min(skip, len(all)):]
}

// requests says whether one of the messages is a REQUEST with these addresses (RFC 2131, section 4.3.6).
func requests(all []sentMessage, to, ciaddr, requested netip.Addr) bool {
	return slices.ContainsFunc(all, func(m sentMessage) bool {
		return m.MessageType() == dhcpv4.MessageTypeRequest && m.ServerIdentifier() == nil && m.to == to &&
			m.ClientIPAddr.String() == ciaddr.String() && option4(m.Options[optRequestedIP]) == requested
	})
}

var (
	none4      = netip.IPv4Unspecified()
	everybody4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})
)

// live goes through the states of RFC 2131, figure 5.
func (f *life) live() {
	own, server := f.server.Lease.Addr.Addr(), f.server.Lease.Server
	start := func() { f.client.start(f.machine) }
	wait := func() {}
	f.phase("first lease", start, func(sent []sentMessage) bool { return sent[0].MessageType() == dhcpv4.MessageTypeDiscover })
	f.configured()
	f.phase("restart with the old address", func() { f.client.restart(f) }, func(sent []sentMessage) bool {
		sent = slices.DeleteFunc(sent, func(m sentMessage) bool { return !m.ClientIPAddr.IsUnspecified() }) // from before
		if len(sent) == 0 {
			return false
		}
		if f.client.reboots {
			return sent[0].MessageType() == dhcpv4.MessageTypeRequest && requests(sent, everybody4, none4, own)
		}
		return sent[0].MessageType() == dhcpv4.MessageTypeDiscover && option4(sent[0].Options[optRequestedIP]) == own
	})
	f.configured()
	f.phase("renewal by unicast at T1", wait, func(sent []sentMessage) bool { return requests(sent, server, own, none4) })
	f.wire.unicast.Store(true)
	f.phase("rebinding by broadcast at T2", wait, func(sent []sentMessage) bool { return requests(sent, everybody4, own, none4) })
	f.wire.unicast.Store(false)
	f.configured()
	// RELEASE is a farewell that nobody repeats: the kernel has to know the server's MAC, or it goes with the address.
	_, _ = f.guest.Run("ping", "-c", "1", "-W", "1", "-I", "eth0", server.String())
	for attempts := 0; !f.released(3 * time.Second); attempts++ { // dhcpcd 9.4 misses a signal on a busy machine
		if attempts == 10 {
			f.t.Fatalf("no release; counters %+v", f.server.Stats())
		}
	}
	f.apart()
}

// released has the client give its lease back, and says whether it does so in time.
func (f *life) released(in time.Duration) bool {
	f.client.giveBack(f.machine)
	for end := time.Now().Add(in); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f.server.Stats().Releases > 0 {
			return true
		}
	}
	return false
}

// phase does something and waits until the guest has sent what ok wants to see since, and was answered.
func (f *life) phase(what string, do func(), ok func([]sentMessage) bool) {
	f.t.Helper()
	before, acks := len(f.sent(0)), f.server.Stats().Acks
	do()
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if sent := f.sent(before); len(sent) > 0 && ok(sent) && f.server.Stats().Acks > acks {
			return
		}
	}
	for _, m := range f.sent(before) {
		f.t.Logf("%s to %s, ciaddr %s, requested %s, server %s", m.MessageType(), m.to, m.ClientIPAddr, m.RequestedIPAddress(), m.ServerIdentifier())
	}
	f.t.Fatalf("%s: not seen; counters %+v", what, f.server.Stats())
}

// apart checks that nobody on the node's side saw anything of it, and that the server had nothing to find fault with.
func (f *life) apart() {
	ours := f.server.Lease.serverMAC()
	leaked := f.outside.Match(func(p gopacket.Packet) bool {
		arp, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP)
		return dhcpFrames(p) || testnet.From(ours.HardwareAddr())(p) ||
			ok && (slices.Equal(arp.DstProtAddress, linkLocalServer.AsSlice()) || slices.Equal(arp.SourceProtAddress, linkLocalServer.AsSlice()))
	})
	if f.server.Lease.Server != linkLocalServer && len(f.outside.Match(testnet.From(mac.HardwareAddr()))) == 0 {
		f.t.Error("the capture saw nothing of the guest, not even how it looked for its gateway")
	}
	if len(leaked) > 0 {
		f.t.Errorf("on the node's side:\n%s", testnet.Dump(leaked))
	}
	if s := f.server.Stats(); s.Naks+s.Ignored+s.OtherMAC+s.OtherServer+s.Malformed+s.BadChecksum+s.Unsent > 0 {
		f.t.Errorf("counters %+v", s)
	}
}

// state is what a client made of its lease.
type state struct {
	Addrs, Routes []string
	MTU           int
	Told          told
}

// configured waits until the guest is as the lease says.
func (f *life) configured() {
	f.t.Helper()
	if all := f.server.Stats().Shortened == 0; all == f.client.small && f.server.Lease.MTU == 9000 {
		f.t.Errorf("the replies have all options: %t", all)
	}
	want, diff := f.want(), ""
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if diff = cmp.Diff(want, f.got(), cmpopts.EquateEmpty()); diff == "" {
			return
		}
	}
	f.t.Errorf("the guest is not as its lease says, -want +got:\n%s", diff)
}

func (f *life) want() state {
	l := &f.server.Lease
	s := state{Addrs: []string{l.Addr.String()}, MTU: l.MTU, Told: told{Search: l.DNS.Search, Hostname: l.Hostname}}
	if f.client.offlink {
		s.MTU = min(s.MTU, 65535-15) // what the kernel takes for a route
	}
	all := f.server.Stats().Shortened == 0
	if n := len(appendNames(nil, l.DNS.Search)); n > 0 && !all || n > maxOptionLen && f.client.pieces {
		s.Told.Search = l.DNS.Search[:1] // from the domain
	}
	for _, a := range l.DNS.Servers {
		s.Told.DNS = append(s.Told.DNS, a.String())
	}
	for _, r := range l.Routes {
		if all || r.IsDefault() {
			f.route(&s, r)
		}
	}
	slices.Sort(s.Routes)
	return s
}

// route adds a route, unless it says of the own subnet what follows from the address: clients differ in those, and one
// to the subnet through a gateway has the connected one beside it, which wins or is in the way.
func (f *life) route(s *state, r nic.Route) {
	if own := f.server.Lease.Addr.Masked(); r.Dst == own || r.OnLink() && own.Contains(r.Dst.Addr()) && r.Dst.Bits() >= own.Bits() {
		return
	}
	s.Routes = append(s.Routes, fmt.Sprintf("%s via %s", r.Dst, r.Gw))
}

// got looks into the guest.
func (f *life) got() state {
	var links []struct {
		MTU   int `json:"mtu"`
		Addrs []struct {
			Local netip.Addr `json:"local"`
			Bits  int        `json:"prefixlen"`
		} `json:"addr_info"`
	}
	var routes []struct {
		Dst     string     `json:"dst"`
		Gateway netip.Addr `json:"gateway"`
		Metrics []struct {
			MTU int `json:"mtu"`
		} `json:"metrics"`
	}
	for what, to := range map[string]any{"addr": &links, "route": &routes} {
		if err := json.Unmarshal([]byte(f.guest.MustRun("ip", "-4", "-j", what, "show", "dev", "eth0")), to); err != nil {
			f.t.Fatalf("ip %s: %v", what, err)
		}
	}
	s := state{Told: f.client.told(f.machine)}
	for _, l := range links {
		s.MTU = l.MTU
		for _, a := range l.Addrs {
			s.Addrs = append(s.Addrs, netip.PrefixFrom(a.Local, a.Bits).String())
		}
	}
	for _, r := range routes {
		if f.client.offlink && len(r.Metrics) == 1 {
			s.MTU = r.Metrics[0].MTU
		}
		dst, err := netip.ParsePrefix(r.Dst)
		if a, hostErr := netip.ParseAddr(r.Dst); hostErr == nil {
			dst, err = netip.PrefixFrom(a, 32), nil
		} else if r.Dst == "default" {
			dst, err = netip.PrefixFrom(none4, 0), nil
		}
		if err != nil {
			f.t.Fatal(err)
		}
		f.route(&s, nic.Route{Dst: dst, Gw: r.Gateway})
	}
	slices.Sort(s.Routes)
	return s
}
