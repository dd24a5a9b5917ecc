package dhcp

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
)

var guestIP, gatewayIP = net.IPv4(198, 51, 100, 2), net.IPv4(198, 51, 100, 1)

// datagram makes a client's frame with the encoders of gopacket, which are not ours.
func datagram(t testing.TB, src, dst net.IP, payload []byte) []byte {
	t.Helper()
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: src, DstIP: dst}
	udp := &layers.UDP{SrcPort: clientPort, DstPort: serverPort}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	return serialize(t, &layers.Ethernet{SrcMAC: mac.HardwareAddr(), DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeIPv4}, ip, udp, gopacket.Payload(payload))
}

func serialize(t testing.TB, l ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func broadcast(t testing.TB, m *dhcpv4.DHCPv4) []byte {
	t.Helper()
	return datagram(t, net.IPv4zero, net.IPv4bcast, m.ToBytes())
}

func arpFor(t testing.TB, sender nic.MAC, target net.IP) []byte {
	t.Helper()
	return serialize(t,
		&layers.Ethernet{SrcMAC: sender.HardwareAddr(), DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
			SourceHwAddress: sender.HardwareAddr(), SourceProtAddress: guestIP.To4(), DstHwAddress: make([]byte, 6), DstProtAddress: target.To4(),
		})
}

// decode takes a reply apart, and checks every length and checksum, with gopacket and the library.
func decode(t testing.TB, frame []byte) (*layers.Ethernet, *layers.IPv4, *dhcpv4.DHCPv4) {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := p.ErrorLayer(); e != nil {
		t.Fatalf("%v\n%s", e.Error(), hex.Dump(frame))
	}
	eth, _ := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	ip, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	if _, ok := p.Layer(layers.LayerTypeDHCPv4).(*layers.DHCPv4); !ok || udp == nil {
		t.Fatalf("no DHCP: %s", p)
	}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	if err, bad := p.VerifyChecksums(); err != nil || len(bad) > 0 {
		t.Fatalf("checksums: %v %v\n%s", err, bad, hex.Dump(frame))
	}
	if udp.SrcPort != serverPort || udp.DstPort != clientPort || udp.Checksum == 0 || ip.TTL != 64 || len(frame) != etherHdrLen+int(ip.Length) {
		t.Errorf("odd headers: %s", p)
	}
	if len(udp.Payload) < minBOOTP {
		t.Errorf("message of %d bytes", len(udp.Payload))
	}
	m, err := dhcpv4.FromBytes(udp.Payload)
	if err != nil {
		t.Fatal(err)
	}
	return eth, ip, m
}

// Where a reply goes (RFC 2131, section 4.1), and that it says on the wire what Reply said.
func TestAppendFrame(t *testing.T) {
	none := opt{optRequestList, "\xfe"}
	set := (*dhcpv4.DHCPv4).SetBroadcast
	cases := []struct {
		name  string
		lease Lease
		req   *dhcpv4.DHCPv4
		mac   nic.MAC
		ip    string
	}{
		{"offer", full(), request(dhcpv4.MessageTypeDiscover), mac, "198.51.100.2"},
		{"offer, short", full(), request(dhcpv4.MessageTypeDiscover, none), mac, "198.51.100.2"},
		{"offer, broadcast", full(), with(request(dhcpv4.MessageTypeDiscover), set), broadcastMAC, "255.255.255.255"},
		{"ack", full(), request(dhcpv4.MessageTypeRequest, opt{optRequestedIP, ip("198.51.100.2")}), mac, "198.51.100.2"},
		{"ack to ciaddr", full(), with(request(dhcpv4.MessageTypeRequest), ciaddr("198.51.100.2")), mac, "198.51.100.2"},
		{"ack to ciaddr beats the flag", full(), with(with(request(dhcpv4.MessageTypeRequest), ciaddr("198.51.100.2")), set), mac, "198.51.100.2"},
		{"nak", full(), request(dhcpv4.MessageTypeRequest, opt{optRequestedIP, ip("10.0.0.1")}), broadcastMAC, "255.255.255.255"},
		{"nak to ciaddr", full(), with(request(dhcpv4.MessageTypeRequest), ciaddr("10.0.0.1")), broadcastMAC, "255.255.255.255"},
		{"inform", full(), with(request(dhcpv4.MessageTypeInform), ciaddr("10.0.0.1")), mac, "10.0.0.1"},
		{"inform without address", full(), request(dhcpv4.MessageTypeInform), broadcastMAC, "255.255.255.255"},
		{"split option", big(1024), request(dhcpv4.MessageTypeDiscover, opt{optMaxSize, "\xff\xff"}), mac, "198.51.100.2"},
		{"odd length", full(), request(dhcpv4.MessageTypeDiscover, opt{optMaxSize, "\xff\xff"}, opt{optClientID, strings.Repeat("x", 151)}), mac, "198.51.100.2"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			want := c.lease.Reply(c.req)
			frame, _ := answer(t, c.lease, c.req)
			eth, ip, got := decode(t, frame)
			if eth.DstMAC.String() != c.mac.String() || ip.DstIP.String() != c.ip {
				t.Errorf("goes to %s, %s, want %s, %s", eth.DstMAC, ip.DstIP, c.mac, c.ip)
			}
			if own := c.lease.serverMAC(); eth.SrcMAC.String() != own.String() || ip.SrcIP.String() != c.lease.Server.String() {
				t.Errorf("comes from %s, %s", eth.SrcMAC, ip.SrcIP)
			}
			if describe(got) != describe(want) || got.TransactionID != c.req.TransactionID {
				t.Errorf("on the wire:\n%s\nwant\n%s", describe(got), describe(want))
			}
		})
	}
}

// Essential options come first, then what the client asked for in its order; long ones in adjoining pieces (RFC 3396).
func TestOptionOrder(t *testing.T) {
	l := big(600)
	req := request(dhcpv4.MessageTypeDiscover, opt{optRequestList, "\x79\x06\x1a\x03\x06\x01"}, opt{optMaxSize, "\xff\xff"}, opt{optClientID, "me"})
	b, _ := answer(t, l, req)
	b = b[etherHdrLen+ipUDPLen+headerLen+cookieLen:]
	var got []string
	for b[0] != optEnd {
		got = append(got, fmt.Sprintf("%d:%d", b[0], b[1]))
		b = b[2+int(b[1]):]
	}
	want := []string{"53:1", "54:4", "51:4", "58:4", "59:4", "1:4", "121:248", "121:248", "121:104", "6:8", "26:2", "3:4", "61:2"}
	if !slices.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	if len(bytes.Trim(b[1:], "\x00")) > 0 {
		t.Errorf("after the end: %x", b)
	}
}

// What is not a whole datagram to port 67 is not read as one.
func TestMessage(t *testing.T) {
	payload := request(dhcpv4.MessageTypeDiscover).ToBytes()
	whole := datagram(t, net.IPv4zero, net.IPv4bcast, payload)
	edit := func(change func(b []byte)) []byte {
		b := slices.Clone(whole)
		change(b)
		return b
	}
	be := binary.BigEndian
	options := serialize(t, &layers.Ethernet{SrcMAC: mac.HardwareAddr(), DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeIPv4},
		&layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: guestIP, DstIP: gatewayIP, Options: []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}}},
		gopacket.Payload(datagram(t, guestIP, gatewayIP, payload)[etherHdrLen+ipHeaderLen:]))
	udpSum := func(c uint16) []byte { return edit(func(b []byte) { be.PutUint16(b[40:], c) }) }
	pseudo := func(n int) uint16 { return uint16(0xffff + 0xffff + protoUDP + n - 2*0xffff) } // of 0.0.0.0 and 255.255.255.255
	odd := datagram(t, net.IPv4zero, net.IPv4bcast, append(slices.Clone(payload), optPad))
	cases := []struct {
		name  string
		frame []byte
		why   silence
	}{
		{"whole", whole, ""},
		{"padded", append(slices.Clone(whole), make([]byte, 40)...), ""},
		{"with IP options", options, ""},
		{"without UDP checksum", udpSum(0), ""},
		{"UDP checksum left to the hardware", udpSum(pseudo(udpHdrLen + len(payload))), ""},
		{"of another length", udpSum(pseudo(udpHdrLen+len(payload)) + 1), badChecksum},
		{"bad UDP checksum", udpSum(be.Uint16(whole[40:]) + 1), badChecksum},
		{"bad byte", edit(func(b []byte) { b[60] ^= 4 }), badChecksum},
		{"bad IP checksum", edit(func(b []byte) { b[25]++ }), badChecksum},
		{"don't fragment", edit(func(b []byte) { be.PutUint16(b[20:], 0x4000); be.PutUint16(b[24:], be.Uint16(b[24:])-0x4000) }), ""},
		{"first fragment", edit(func(b []byte) { be.PutUint16(b[20:], 0x2000) }), badFrame},
		{"later fragment", edit(func(b []byte) { be.PutUint16(b[20:], 0x0010) }), badFrame},
		{"IPv6", edit(func(b []byte) { be.PutUint16(b[12:], 0x86dd) }), badFrame},
		{"tagged", edit(func(b []byte) { be.PutUint16(b[12:], 0x8100) }), badFrame},
		{"IP version 6", edit(func(b []byte) { b[14] = 0x65 }), badFrame},
		{"IP header of four words", edit(func(b []byte) { b[14] = 0x44 }), badFrame},
		{"IP header longer than the datagram", edit(func(b []byte) { b[14] = 0x4f; be.PutUint16(b[16:], 64) }), badFrame},
		{"IP longer than the frame", edit(func(b []byte) { be.PutUint16(b[16:], uint16(len(whole))) }), badFrame},
		{"IP shorter than its headers", edit(func(b []byte) { be.PutUint16(b[16:], 27) }), badFrame},
		{"TCP", edit(func(b []byte) { b[23] = 6 }), badFrame},
		{"another port", edit(func(b []byte) { be.PutUint16(b[36:], 68) }), badFrame},
		{"UDP longer than the datagram", edit(func(b []byte) { be.PutUint16(b[38:], uint16(len(whole)-33)) }), badFrame},
		{"UDP shorter than its header", edit(func(b []byte) { be.PutUint16(b[38:], 7) }), badFrame},
		{"empty", nil, badFrame},
	}
	for _, c := range cases {
		got, why := message(c.frame)
		if why != c.why || why == "" && !bytes.Equal(got, payload) {
			t.Errorf("%s: %q, want %q; %d bytes", c.name, why, c.why, len(got))
		}
	}
	if got, why := message(odd); why != "" || len(got) != len(payload)+1 {
		t.Errorf("odd length: %q, %d bytes", why, len(got))
	}
	for i := range whole {
		if _, why := message(whole[:i]); why == "" {
			t.Fatalf("the first %d bytes of %d pass for a message", i, len(whole))
		}
	}
}

func TestAnswerARP(t *testing.T) {
	local := full()
	local.Server = linkLocalServer
	target := net.IP(linkLocalServer.AsSlice())
	frame, ok := local.answerARP(nil, arpFor(t, mac, target))
	if !ok {
		t.Fatal("no answer")
	}
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	arp, _ := p.Layer(layers.LayerTypeARP).(*layers.ARP)
	eth, _ := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	if arp == nil || arp.Operation != layers.ARPReply || !net.IP(arp.SourceProtAddress).Equal(target) || !net.IP(arp.DstProtAddress).Equal(guestIP) ||
		!bytes.Equal(arp.SourceHwAddress, eth.SrcMAC) || !bytes.Equal(arp.DstHwAddress, mac[:]) || !bytes.Equal(eth.DstMAC, mac[:]) {
		t.Errorf("answer: %s", p)
	}
	if own := local.serverMAC(); !bytes.Equal(eth.SrcMAC, own[:]) || own == mac || own[0]&3 != 2 {
		t.Errorf("answer from %s", eth.SrcMAC)
	}

	reply := arpFor(t, mac, target)
	reply[21] = arpReply
	for name, c := range map[string]struct {
		lease Lease
		frame []byte
	}{
		"the gateway answers for itself": {full(), arpFor(t, mac, gatewayIP)},
		"the guest's own address":        {local, arpFor(t, mac, guestIP)},
		"another asker":                  {local, arpFor(t, nic.MAC{2, 0, 0, 0, 0, 1}, target)},
		"an answer":                      {local, reply},
		"short":                          {local, arpFor(t, mac, target)[:41]},
		"no ARP":                         {local, broadcast(t, request(dhcpv4.MessageTypeDiscover))},
	} {
		if frame, ok := c.lease.answerARP(nil, c.frame); ok || frame != nil {
			t.Errorf("%s: answered", name)
		}
	}
}

// sound gives a frame with the checksums that it should have, for a fuzzer that does not find them by itself.
func sound(frame []byte) []byte {
	b := slices.Clone(frame)
	if _, why := message(b); why == badChecksum {
		ip := b[etherHdrLen:]
		hdr := int(ip[0]&0x0f) * 4
		ip[10], ip[11], ip[hdr+6], ip[hdr+7] = 0, 0, 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip[:hdr]))
	}
	return b
}

// Any bytes from a guest are answered properly, to the guest, or not at all, whatever the library makes of them.
func FuzzReply(f *testing.F) {
	for _, m := range []*dhcpv4.DHCPv4{
		request(dhcpv4.MessageTypeDiscover),
		request(dhcpv4.MessageTypeDiscover, opt{optRequestList, "\x01\x03\x79\xf9\x77\x0f"}, opt{optMaxSize, "\x02\x40"}, opt{optClientID, "\x01abc"}),
		request(dhcpv4.MessageTypeRequest, opt{optRequestedIP, ip("198.51.100.2")}, opt{optServerID, ip("198.51.100.1")}),
		with(request(dhcpv4.MessageTypeRequest), ciaddr("198.51.100.7")),
		with(request(dhcpv4.MessageTypeInform), ciaddr("198.51.100.2")),
		request(dhcpv4.MessageTypeDecline),
	} {
		f.Add(broadcast(f, m))
	}
	f.Add(arpFor(f, mac, linkLocalServer.AsSlice()))
	served := []Lease{full(), big(400), full()}
	served[2].Server = linkLocalServer
	f.Fuzz(func(t *testing.T, frame []byte) {
		frame = sound(frame)
		before := slices.Clone(frame)
		for i := range served {
			s := Server{Lease: served[i]}
			out, _ := s.handle(nil, frame)
			if !bytes.Equal(frame, before) {
				t.Fatal("the frame was changed")
			}
			if out == nil {
				continue
			}
			if to := nic.MAC(out); to != mac && to != broadcastMAC || nic.MAC(out[6:]) != s.Lease.serverMAC() {
				t.Fatalf("frame from % x to %s", out[6:12], to)
			}
			if binary.BigEndian.Uint16(out[12:]) == etherTypeARP {
				continue
			}
			if len(out)-etherHdrLen > s.Lease.MTU {
				t.Fatalf("frame of %d bytes", len(out))
			}
			msg, why := message(frame)
			if why != "" {
				t.Fatalf("answered though %s", why)
			}
			req, err := dhcpv4.FromBytes(append(slices.Clone(msg), optEnd)) // which the library insists on
			if err != nil {
				t.Fatal(err)
			}
			_, _, resp := decode(t, out)
			if resp.TransactionID != req.TransactionID || !bytes.Equal(resp.ClientHWAddr, mac[:]) || resp.OpCode != dhcpv4.OpcodeBootReply {
				t.Fatalf("%s answers %s", resp.Summary(), req.Summary())
			}
			if y := option4(resp.YourIPAddr.To4()); !y.IsUnspecified() && y != s.Lease.Addr.Addr() {
				t.Fatalf("gives %s", y)
			}
		}
	})
}
