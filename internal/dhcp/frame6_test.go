package dhcp

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv6"

	"github.com/virtlet/virtlet/internal/nic"
)

var (
	guestLocal = netip.MustParseAddr("fe80::11:22ff:fe33:4455") // made of mac
	guest6     = netip.MustParseAddr("2001:db8::2")
	gateway6   = netip.MustParseAddr("2001:db8::1")
	gatewayMAC = nic.MAC{2, 0, 0, 0, 0, 0x99}
)

// ether makes a frame of IPv6 with the encoders of gopacket, which are not ours.
func ether(t testing.TB, from, to nic.MAC, src, dst netip.Addr, hops uint8, proto layers.IPProtocol, l ...gopacket.SerializableLayer) []byte {
	t.Helper()
	ip := &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	for _, layer := range l {
		if c, ok := layer.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			if err := c.SetNetworkLayerForChecksum(ip); err != nil {
				t.Fatal(err)
			}
		}
	}
	eth := &layers.Ethernet{SrcMAC: from.HardwareAddr(), DstMAC: to.HardwareAddr(), EthernetType: layers.EthernetTypeIPv6}
	return serialize(t, append([]gopacket.SerializableLayer{eth, ip}, l...)...)
}

// icmp makes a frame of neighbour discovery.
func icmp(t testing.TB, from, to nic.MAC, src, dst netip.Addr, kind uint8, body gopacket.SerializableLayer) []byte {
	t.Helper()
	return ether(t, from, to, src, dst, 255, layers.IPProtocolICMPv6, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}, body)
}

func linkOption(kind layers.ICMPv6Opt, m nic.MAC) layers.ICMPv6Options {
	return layers.ICMPv6Options{{Type: kind, Data: m.HardwareAddr()}}
}

// solicit is the guest's question for an address: to its group, or where to is a unicast MAC, a probe.
func solicit(t testing.TB, src, target netip.Addr, to nic.MAC) []byte {
	t.Helper()
	dst := target
	if to.IsZero() {
		dst = netip.AddrFrom16([16]byte(solicitedNodeOf(target)))
		to = nic.MAC{0x33, 0x33, 0xff, dst.AsSlice()[13], dst.AsSlice()[14], dst.AsSlice()[15]}
	}
	return icmp(t, mac, to, src, dst, layers.ICMPv6TypeNeighborSolicitation, &layers.ICMPv6NeighborSolicitation{
		TargetAddress: target.AsSlice(), Options: linkOption(layers.ICMPv6OptSourceAddress, mac),
	})
}

func solicitedNodeOf(a netip.Addr) net.IP {
	ip := net.ParseIP("ff02::1:ff00:0")
	copy(ip[13:], a.AsSlice()[13:])
	return ip
}

// tell is a neighbour's answer about an address, on its way to the guest.
func tell(t testing.TB, dst, target netip.Addr, flags uint8, opts layers.ICMPv6Options) []byte {
	t.Helper()
	to := mac
	if dst.IsMulticast() {
		to = nic.MAC{0x33, 0x33, 0, 0, 0, 1}
	}
	return icmp(t, gatewayMAC, to, target, dst, layers.ICMPv6TypeNeighborAdvertisement, &layers.ICMPv6NeighborAdvertisement{
		Flags: flags, TargetAddress: target.AsSlice(), Options: opts,
	})
}

func routerSolicit(t testing.TB, src netip.Addr, opts layers.ICMPv6Options) []byte {
	t.Helper()
	return icmp(t, mac, nic.MAC{0x33, 0x33, 0, 0, 0, 2}, src, netip.MustParseAddr("ff02::2"), layers.ICMPv6TypeRouterSolicitation, &layers.ICMPv6RouterSolicitation{Options: opts})
}

// datagram6 is a client's DHCPv6 message.
func datagram6(t testing.TB, dst netip.Addr, msg []byte) []byte {
	t.Helper()
	return ether(t, mac, nic.MAC{0x33, 0x33, 0, 1, 0, 2}, guestLocal, dst, 1, layers.IPProtocolUDP, &layers.UDP{SrcPort: 546, DstPort: 547}, gopacket.Payload(msg))
}

// packet6s takes a frame apart with gopacket, and checks every length and checksum.
func packet6s(t testing.TB, frame []byte) (gopacket.Packet, *layers.Ethernet, *layers.IPv6) {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := p.ErrorLayer(); e != nil {
		t.Fatalf("%v\n%s", e.Error(), hex.Dump(frame))
	}
	eth, _ := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	ip, _ := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	if ip == nil {
		t.Fatalf("no IPv6: %s", p)
	}
	for _, l := range p.Layers() {
		if c, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			if err := c.SetNetworkLayerForChecksum(ip); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err, bad := p.VerifyChecksums(); err != nil || len(bad) > 0 {
		t.Fatalf("checksums: %v %v\n%s", err, bad, hex.Dump(frame))
	}
	if len(frame) != 54+int(ip.Length) {
		t.Errorf("odd length: %s", p)
	}
	return p, eth, ip
}

// decode6 takes a reply apart with gopacket and the library.
func decode6(t testing.TB, frame []byte) (*layers.Ethernet, *layers.IPv6, *dhcpv6.Message) {
	t.Helper()
	p, eth, ip := packet6s(t, frame)
	udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	if udp == nil || udp.SrcPort != 547 || udp.DstPort != 546 || udp.Checksum == 0 {
		t.Fatalf("no DHCPv6: %s", p)
	}
	m, err := dhcpv6.MessageFromBytes(udp.Payload)
	if err != nil {
		t.Fatalf("%v\n%s", err, hex.Dump(udp.Payload))
	}
	return eth, ip, m
}

func TestParse6(t *testing.T) {
	whole := datagram6(t, allServers, request6(dhcpv6.MessageTypeSolicit).ToBytes())
	edit := func(at int, v byte) []byte { b := slices.Clone(whole); b[at] = v; return b }
	unfinished := slices.Clone(whole)
	p, _ := parse6(whole)
	binary.BigEndian.PutUint16(unfinished[60:], p.pseudo())
	for _, c := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"whole", whole, true},
		{"padded", append(slices.Clone(whole), make([]byte, 40)...), true},
		{"UDP checksum as a virtio NIC leaves it", unfinished, true},
		{"bad UDP checksum", edit(60, whole[60]^0xbe), false},
		{"IPv4", edit(12, 0x08), false},
		{"IP version 4", edit(14, 0x40), false},
		{"a fragment", edit(20, 44), false},
		{"hop-by-hop options", edit(20, 0), false},
		{"packet longer than the frame", edit(19, 0xff), false},
		{"another port", edit(57, 0x24), false},
		{"UDP longer than the packet", edit(58, 0xff), false},
		{"UDP shorter than its header", edit(59, 7), false},
		{"empty", nil, false},
	} {
		p, ok := parse6(c.frame)
		if ok {
			_, ok = p.message6()
		}
		if ok != c.ok {
			t.Errorf("%s: %v", c.name, ok)
		}
	}
	for i := range whole {
		if p, ok := parse6(whole[:i]); ok {
			t.Fatalf("the first %d bytes of %d pass for a packet: %+v", i, len(whole), p)
		}
	}
	p, _ = parse6(whole)
	p.payload = slices.Clone(p.payload)
	p.payload[6], p.payload[7] = 0, 0
	if got := p.frame(); !slices.Equal(got, whole) {
		t.Errorf("taken apart and put together:\n%s\nwas\n%s", hex.Dump(got), hex.Dump(whole))
	}
}
