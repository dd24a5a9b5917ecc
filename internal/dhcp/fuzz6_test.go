package dhcp

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv6"

	"github.com/virtlet/virtlet/internal/nic"
)

// Any message from a guest is answered properly or not at all.
func FuzzReply6(f *testing.F) {
	for _, c := range cases6 {
		for _, k := range []dhcpv6.MessageType{dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRelayForward} {
			f.Add(request6(k, c.opts...).ToBytes())
		}
	}
	l := full6()
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := slices.Clone(msg)
		out := l.Reply(msg)
		if !slices.Equal(before, msg) {
			t.Fatal("the message was changed")
		}
		if out == nil {
			return
		}
		if len(out) > l.room()-udpHdrLen {
			t.Fatalf("message of %d bytes", len(out))
		}
		if _, err := dhcpv6.MessageFromBytes(msg); err != nil {
			return // the library looks into identifiers, which are the client's own business (RFC 8415, section 11)
		}
		m, err := dhcpv6.MessageFromBytes(out)
		if err != nil {
			t.Fatal(err)
		}
		if [3]byte(m.TransactionID) != [3]byte(msg[1:]) || m.MessageType != dhcpv6.MessageTypeReply && m.MessageType != dhcpv6.MessageTypeAdvertise {
			t.Fatalf("%s answers %x", m.Summary(), msg)
		}
		for _, ia := range m.Options.IANA() {
			for _, a := range ia.Options.Addresses() {
				ip, _ := netip.AddrFromSlice(a.IPv6Addr)
				if a.ValidLifetime > 0 && !slices.Contains(l.Addrs, ip) {
					t.Fatalf("gives %s", ip)
				}
			}
		}
	})
}

// Any frame gets well-formed ones in return, or none; and none leaves for the cluster but a question for a gateway.
func FuzzFrame6(f *testing.F) {
	l := full6()
	f.Add(datagram6(f, allServers, request6(dhcpv6.MessageTypeSolicit, iaNA(1)).ToBytes()))
	f.Add(routerSolicit(f, guestLocal, linkOption(layers.ICMPv6OptSourceAddress, mac)))
	f.Add(routerSolicit(f, netip.IPv6Unspecified(), nil))
	f.Add(solicit(f, guest6, l.Routers[0].Source, nic.MAC{}))
	f.Add(solicit(f, guestLocal, l.Routers[1].Source, gatewayMAC))
	f.Add(tell(f, guest6, gateway6, 0x60, linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC)))
	f.Add(tell(f, allNodes, gateway6, 0x20, linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC)))
	f.Add([]byte("noise"))
	f.Fuzz(func(t *testing.T, frame []byte) {
		up := &uplink{}
		conn := &sink{}
		s := &Server6{Lease: l, Conn: conn, Uplink: up, adverts: l.adverts(false)}
		s.handle(frame)
		for _, out := range conn.frames {
			p, ok := parse6(out)
			if !ok || p.proto == protoICMPv6 && p.sum() != 0xffff || p.from != l.serverMAC() {
				t.Fatalf("bad frame %x", out)
			}
		}
		for _, out := range up.frames {
			p, ok := parse6(out)
			if !ok || !p.ndValid(neighborLen) || p.from != mac || p.payload[0] != typeNeighborSolicit || !slices.Contains([]string{"2001:db8::1", "2001:db8::9"}, p.target().String()) {
				t.Fatalf("leaves for the cluster: %x", out)
			}
		}
		if st := s.Stats(); st == (Stats6{}) {
			t.Fatal("a frame was not counted")
		}
	})
}

// Whatever a plugin and a namespace say of a NIC, its IPv6 lease is one that can be served.
func FuzzNewLease6(f *testing.F) {
	addr := func(s string) string { return "\x01" + string(netip.MustParseAddr(s).AsSlice()) }
	// MAC, MTU, addresses, routes, servers, search list, domain.
	start := string(mac[:]) + "\x00\x00\x05\xdc"
	f.Add([]byte(start+"\x01"+addr("2001:db8::2")+"\x40"+"\x02"+
		addr("2001:db8:9::")+"\x30"+addr("2001:db8::9")+"\x00\x00"+addr("::")+"\x00"+addr("2001:db8::1")+"\x00\x00"+
		"\x01"+addr("2001:db8::53")+"\x01\x07example"), "vm-1")
	f.Add([]byte(start+"\x02"+addr("2001:db8::2")+"\x80"+addr("2001:db8::11:22ff:fe33:4455")+"\x40"+
		"\x01"+addr("::")+"\x00"+addr("fe80::ecee:eeff:feee:eeee")+"\x00\x00"), "")
	f.Add([]byte(start+"\x03"+addr("::ffff:198.51.100.2")+"\x80"+addr("fe80::1")+"\x40"+addr("ff02::1")+"\xff"), strings.Repeat("x.", 120))
	f.Fuzz(func(t *testing.T, b []byte, hostname string) {
		n := fuzzNIC(b)
		l, notes, ok := NewLease6(n, hostname)
		for _, note := range notes {
			if !strings.HasPrefix(note, "eth0: ") {
				t.Errorf("note %q", note)
			}
		}
		if !ok {
			return
		}
		if err := l.check(); (err != nil) != n.MAC.IsZero() {
			t.Fatalf("check: %v", err)
		}
		for _, end := range []bool{false, true} {
			for _, frame := range l.adverts(end) {
				p, ok := parse6(frame)
				if !ok || !p.ndValid(routerAdvertLen) || len(frame) > etherHdrLen+min(l.MTU, maxPacket) {
					t.Fatalf("advertisement %x", frame)
				}
			}
		}
		if len(l.Filter()) == 0 || slices.ContainsFunc(l.Own(), func(a netip.Addr) bool { return !a.IsLinkLocalUnicast() }) {
			t.Fatalf("filter %v, own %v", l.Filter(), l.Own())
		}
		if out := l.Reply(request6(dhcpv6.MessageTypeSolicit, iaNA(1)).ToBytes()); out == nil {
			t.Fatal("no answer")
		}
	})
}
