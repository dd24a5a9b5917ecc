package dhcp

import (
	"net"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// BenchmarkDORA measures one exchange of four messages: from frame to frame, and over a TAP.
func BenchmarkDORA(b *testing.B) {
	list := opt{optRequestList, "\x01\x1c\x02\x03\x0f\x06\x77\x0c\x1a\x79"}
	discover := request(dhcpv4.MessageTypeDiscover, list)
	ask := request(dhcpv4.MessageTypeRequest, list, opt{optServerID, ip("198.51.100.1")}, opt{optRequestedIP, ip("198.51.100.2")})
	frames := [][]byte{broadcast(b, discover), broadcast(b, ask)}
	b.Run("frames", func(b *testing.B) {
		s := &Server{Lease: full()}
		var out []byte
		b.ReportAllocs()
		for b.Loop() {
			for _, f := range frames {
				if out, _ = s.handle(out[:0], f); out == nil {
					b.Fatal("silence")
				}
			}
		}
	})
	b.Run("TAP", func(b *testing.B) {
		n := nic.NIC{Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("198.51.100.2/24"), Routes: routes("0.0.0.0/0 via 198.51.100.1")}
		l := serve(b, n, "vm-1")
		var conn *packet.Conn
		l.guest.Must(func() error {
			ifi, err := net.InterfaceByName("eth0")
			if err == nil {
				conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_IP, nil)
			}
			return err
		})
		defer conn.Close()
		to, buf := &packet.Addr{HardwareAddr: broadcastMAC.HardwareAddr()}, make([]byte, 2048)
		b.ReportAllocs()
		for b.Loop() {
			for _, f := range frames {
				if _, err := conn.WriteTo(f, to); err != nil {
					b.Fatal(err)
				}
				conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, _, err := conn.ReadFrom(buf); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

// BenchmarkServer6 measures the way from frame to frame, for the questions that a guest asks most.
func BenchmarkServer6(b *testing.B) {
	l := full6()
	for name, frame := range map[string][]byte{
		"SOLICIT, rapid":        datagram6(b, allServers, request6(dhcpv6.MessageTypeSolicit, iaNA(1), rapid).ToBytes()),
		"router solicitation":   routerSolicit(b, guestLocal, nil),
		"gateway advertisement": tell(b, guest6, gateway6, 0x60, linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC)),
		"noise":                 []byte("noise"),
	} {
		b.Run(name, func(b *testing.B) {
			s := &Server6{Lease: l, Conn: discard{}, adverts: l.adverts(false)}
			b.ReportAllocs()
			for b.Loop() {
				s.handle(frame)
			}
		})
	}
}

// discard is a TAP that keeps nothing.
type discard struct{ net.PacketConn }

func (discard) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }
