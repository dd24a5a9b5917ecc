package dhcp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"github.com/virtlet/virtlet/internal/nic"
)

// alter gives a frame with a byte changed.
func alter(frame []byte, at int, v byte) []byte {
	frame = slices.Clone(frame)
	frame[at] = v
	return frame
}

// hops gives a frame of ICMPv6 with another hop limit, which no checksum covers.
func hops(frame []byte, n byte) []byte { return alter(frame, 21, n) }

func TestAsks(t *testing.T) {
	l := full6()
	own, second := l.Routers[0].Source, l.Routers[1].Source
	plain := solicit(t, guestLocal, own, nic.MAC{})
	for _, c := range []struct {
		name  string
		frame []byte
		to    string // MAC and address that the question goes to; empty for silence
		src   netip.Addr
		why   silence
	}{
		{"by its link-local address", plain, "33:33:ff:00:00:01 ff02::1:ff00:1", guestLocal, ""},
		{"by its own address", solicit(t, guest6, own, nic.MAC{}), "33:33:ff:00:00:01 ff02::1:ff00:1", guest6, ""},
		{"for the second router", solicit(t, guest6, second, nic.MAC{}), "33:33:ff:00:00:09 ff02::1:ff00:9", guest6, ""},
		{"a probe", solicit(t, guest6, own, gatewayMAC), "02:00:00:00:00:99 2001:db8::1", guest6, ""},
		{"duplicate address detection", solicit(t, netip.IPv6Unspecified(), own, nic.MAC{}), "", netip.Addr{}, otherSource},
		{"by another's address", solicit(t, netip.MustParseAddr("2001:db8::77"), own, nic.MAC{}), "", netip.Addr{}, otherSource},
		{"by the router's address", solicit(t, own, own, nic.MAC{}), "", netip.Addr{}, otherSource},
		{"by the server's address", solicit(t, l.Server, own, nic.MAC{}), "", netip.Addr{}, otherSource},
		{"for the server", solicit(t, guestLocal, l.Server, nic.MAC{}), "", netip.Addr{}, otherTarget},
		{"for the gateway itself", solicit(t, guestLocal, gateway6, nic.MAC{}), "", netip.Addr{}, otherTarget},
		{"for a link-local gateway", solicit(t, guestLocal, l.Routers[2].Source, nic.MAC{}), "", netip.Addr{}, otherTarget},
		{"from another MAC", alter(plain, 11, 0x77), "", netip.Addr{}, otherMAC},
		{"through a router", hops(plain, 254), "", netip.Addr{}, badND},
		{"bad checksum", alter(plain, 56, plain[56]+1), "", netip.Addr{}, badND},
		{"option without a length", alter(plain, 79, 0), "", netip.Addr{}, badND},
	} {
		p, ok := parse6(c.frame)
		if !ok {
			t.Fatalf("%s: not parsed", c.name)
		}
		out, why := l.asks(&p)
		if why != c.why || (out == nil) != (why != "") {
			t.Errorf("%s: %q, want %q", c.name, why, c.why)
		}
		if out == nil {
			continue
		}
		packet, eth, ip := packet6s(t, out)
		ns, _ := packet.Layer(layers.LayerTypeICMPv6NeighborSolicitation).(*layers.ICMPv6NeighborSolicitation)
		if got := eth.DstMAC.String() + " " + ip.DstIP.String(); got != c.to || eth.SrcMAC.String() != mac.String() || !ip.SrcIP.Equal(c.src.AsSlice()) || ip.HopLimit != 255 {
			t.Errorf("%s: goes to %s, want %s: %s", c.name, got, c.to, packet)
		}
		if ns == nil || !slices.ContainsFunc(l.Routers, func(r Router6) bool { return ns.TargetAddress.Equal(r.Gateway.AsSlice()) }) ||
			len(ns.Options) != 1 || ns.Options[0].Type != layers.ICMPv6OptSourceAddress || !bytes.Equal(ns.Options[0].Data, mac[:]) {
			t.Errorf("%s: asks %s", c.name, packet)
		}
	}
}

func TestAnswers(t *testing.T) {
	const r, s, o = 0x80, 0x40, 0x20
	l := full6()
	link := linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC)
	plain := tell(t, guest6, gateway6, r|s|o, link)
	for _, c := range []struct {
		name  string
		frame []byte
		flags uint8
		why   silence
	}{
		{"an answer", plain, r | s | o, ""},
		{"to the link-local address", tell(t, guestLocal, gateway6, r|s|o, link), r | s | o, ""},
		{"from a host that does not call itself a router", tell(t, guest6, gateway6, s|o, link), r | s | o, ""},
		{"for somebody else, who may be overruled", tell(t, guest6, gateway6, r|s, link), r | s, ""},
		{"of a probe, without a MAC", tell(t, guest6, gateway6, r|s, nil), r | s, ""},
		{"unasked", tell(t, allNodes, gateway6, r|o, link), r | o, ""},
		{"of the second router", tell(t, guest6, netip.MustParseAddr("2001:db8::9"), s|o, link), r | s | o, ""},
		{"asked by all", tell(t, allNodes, gateway6, s|o, link), 0, badND},
		{"about another host", tell(t, guest6, netip.MustParseAddr("2001:db8::77"), s|o, link), 0, otherTarget},
		{"about a router of ours", tell(t, guest6, l.Routers[0].Source, s|o, link), 0, otherTarget},
		{"about a link-local gateway", tell(t, guest6, l.Routers[2].Gateway, s|o, link), 0, otherTarget},
		{"to another host", tell(t, netip.MustParseAddr("2001:db8::77"), gateway6, s|o, link), 0, otherSource},
		{"by the guest", alter(alter(alter(alter(alter(alter(plain, 6, mac[0]), 7, mac[1]), 8, mac[2]), 9, mac[3]), 10, mac[4]), 11, mac[5]), 0, otherMAC},
		{"says the guest's MAC", tell(t, guest6, gateway6, s|o, linkOption(layers.ICMPv6OptTargetAddress, mac)), 0, badND},
		{"says the MAC of a group", tell(t, guest6, gateway6, s|o, linkOption(layers.ICMPv6OptTargetAddress, nic.MAC{0x33, 0x33})), 0, badND},
		{"through a router", hops(plain, 64), 0, badND},
		{"bad checksum", alter(plain, 57, plain[57]+1), 0, badND},
		{"option without a length", alter(plain, 79, 0), 0, badND},
	} {
		p, ok := parse6(c.frame)
		if !ok {
			t.Fatalf("%s: not parsed", c.name)
		}
		out, why := l.answers(&p)
		if why != c.why || (out == nil) != (why != "") {
			t.Errorf("%s: %q, want %q", c.name, why, c.why)
		}
		if out == nil {
			continue
		}
		packet, eth, ip := packet6s(t, out)
		na, _ := packet.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
		own := l.serverMAC()
		if na == nil || na.Flags != c.flags || ip.HopLimit != 255 || !ip.SrcIP.Equal(na.TargetAddress) || !ip.DstIP.Equal(p.dst.AsSlice()) ||
			!bytes.Equal(eth.DstMAC, c.frame[:6]) || !bytes.Equal(eth.SrcMAC, own[:]) {
			t.Errorf("%s: %s", c.name, packet)
			continue
		}
		i := slices.IndexFunc(l.Routers, func(r Router6) bool { return r.Gateway == p.target() })
		if !na.TargetAddress.Equal(l.Routers[i].Source.AsSlice()) {
			t.Errorf("%s: speaks for %s", c.name, na.TargetAddress)
		}
		_, has := p.linkOption(neighborLen, ndTargetLink)
		if has != (len(na.Options) == 1) || has && !bytes.Equal(na.Options[0].Data, gatewayMAC[:]) {
			t.Errorf("%s: options %v", c.name, na.Options)
		}
	}
}

func TestSolicited(t *testing.T) {
	l := full6()
	none := netip.IPv6Unspecified()
	link := linkOption(layers.ICMPv6OptSourceAddress, mac)
	plain := routerSolicit(t, guestLocal, link)
	for _, c := range []struct {
		name  string
		frame []byte
		to    string
		why   silence
	}{
		{"with an address", plain, "02:11:22:33:44:55 fe80::11:22ff:fe33:4455", ""},
		{"without a MAC", routerSolicit(t, guestLocal, nil), "02:11:22:33:44:55 fe80::11:22ff:fe33:4455", ""},
		{"without an address", routerSolicit(t, none, nil), "33:33:00:00:00:01 ff02::1", ""},
		{"without an address, but a MAC", routerSolicit(t, none, link), "", badND},
		{"by another's address", routerSolicit(t, netip.MustParseAddr("2001:db8::77"), link), "", otherSource},
		{"from another MAC", alter(plain, 11, 0x77), "", otherMAC},
		{"through a router", hops(plain, 1), "", badND},
		{"bad checksum", alter(plain, 56, plain[56]+1), "", badND},
		{"option cut short", alter(plain, 63, 2), "", badND},
	} {
		p, ok := parse6(c.frame)
		to, dst, why := l.solicited(&p)
		if got := fmt.Sprintf("%s %s", to, dst); !ok || why != c.why || why == "" && got != c.to {
			t.Errorf("%s: %q %s, want %q %s", c.name, why, got, c.why, c.to)
		}
	}
	for _, f := range l.adverts(false) {
		packet, eth, ip := packet6s(t, readdress(f, mac, guestLocal))
		if eth.DstMAC.String() != mac.String() || !ip.DstIP.Equal(guestLocal.AsSlice()) || packet.Layer(layers.LayerTypeICMPv6RouterAdvertisement) == nil {
			t.Errorf("readdressed: %s", packet)
		}
	}
}

// What does not fit into one advertisement goes into several, and nothing is lost.
func TestAdvertsAreSplit(t *testing.T) {
	n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1280, Addrs: prefixes("2001:db8::2/64"), Routes: routes("::/0 via 2001:db8::1")}
	for i := range 12 {
		n.DNS.Search = append(n.DNS.Search, strings.Repeat(fmt.Sprintf("%s%02d.", strings.Repeat("x", 60), i), 3)+"example")
	}
	for i := range 40 {
		n.Routes = append(n.Routes, route(fmt.Sprintf("2001:db8:%x::/72 via 2001:db8::1", 0x100+i)))
		n.DNS.Servers = append(n.DNS.Servers, netip.MustParseAddr(fmt.Sprintf("2001:db8::53:%x", i)))
	}
	l, _, _ := NewLease6(n, "")
	var nets, servers int
	var search []string
	frames := l.adverts(false)
	for _, f := range frames {
		if len(f) > etherHdrLen+1280 {
			t.Errorf("packet of %d bytes", len(f)-etherHdrLen)
		}
		packet, _, ip := packet6s(t, f)
		ra, _ := packet.Layer(layers.LayerTypeICMPv6RouterAdvertisement).(*layers.ICMPv6RouterAdvertisement)
		if ra == nil || ra.RouterLifetime != 9000 || ra.Flags != 0xc0 || !ip.SrcIP.Equal(l.Routers[0].Source.AsSlice()) {
			t.Fatalf("no advertisement of the default router: %s", packet)
		}
		for _, o := range ra.Options {
			switch o.Type {
			case ndRoute:
				nets++
			case ndRDNSS:
				servers += (len(o.Data) - 6) / net.IPv6len
			case ndDNSSL:
				search = append(search, plainNames(o.Data[6:])...)
			}
		}
	}
	if len(frames) < 4 || nets != 40 || servers != 40 || !slices.Equal(search, n.DNS.Search) {
		t.Errorf("%d frames with %d routes, %d servers, search list %q", len(frames), nets, servers, search)
	}
}

// plainNames reads names without compression, up to the padding.
func plainNames(b []byte) (names []string) {
	for len(b) > 0 && b[0] != 0 {
		var labels []string
		for b[0] != 0 {
			labels = append(labels, string(b[1:1+b[0]]))
			b = b[1+b[0]:]
		}
		names = append(names, strings.Join(labels, "."))
		b = b[1:]
	}
	return names
}

func TestBucket(t *testing.T) {
	var b bucket
	now := time.Unix(1700000000, 0)
	took := func(n int) (took int) {
		for range n {
			if b.take(now) {
				took++
			}
		}
		return took
	}
	if n := took(1000); n != askBurst {
		t.Errorf("%d at once", n)
	}
	now = now.Add(5*askPeriod + askPeriod/2)
	if n := took(1000); n != 5 {
		t.Errorf("%d after five periods", n)
	}
	now = now.Add(time.Hour)
	if n := took(1000); n != askBurst {
		t.Errorf("%d after a rest", n)
	}
	if n := testing.AllocsPerRun(10, func() { b.take(now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Lists that do not fit are cut after a whole item, addresses never.
func TestReplyFits(t *testing.T) {
	l := full6()
	l.MTU = 1280
	for i := range 12 {
		l.DNS.Search = append(l.DNS.Search, strings.Repeat(fmt.Sprintf("%s%02d.", strings.Repeat("y", 60), i), 3)+"example")
	}
	frame, why := answer6(t, l, request6(1, iaNA(1)).ToBytes(), true)
	if why != "" || len(frame) > etherHdrLen+1280 {
		t.Fatalf("%q, frame of %d bytes", why, len(frame))
	}
	_, _, m := decode6(t, frame)
	got := m.Options.DomainSearchList().Labels
	if len(got) == 0 || len(got) >= len(l.DNS.Search) || !slices.Equal(got, l.DNS.Search[:len(got)]) {
		t.Errorf("search list %q", got)
	}
	if len(m.Options.DNS()) != 2 || len(m.Options.OneIANA().Options.Addresses()) != 3 {
		t.Errorf("addresses or servers are missing: %s", m.Summary())
	}
	many := request6(5, serverID(0))
	for i := range 200 {
		ia := iaNA(0)
		binary.BigEndian.PutUint32(ia.ToBytes(), uint32(i))
		many.AddOption(ia)
	}
	if _, why := answer6(t, l, many.ToBytes(), true); why != tooBig {
		t.Errorf("two hundred associations: %q", why)
	}
}
