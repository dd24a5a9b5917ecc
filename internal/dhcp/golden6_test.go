package dhcp

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	diff "github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv6"

	"github.com/virtlet/virtlet/internal/nic"
)

// full6 is a lease with everything in it: the default router stands for a gateway, another one too, a third is itself.
func full6() Lease6 {
	l, _, _ := NewLease6(nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("2001:db8::2/64", "2001:db8:2::2/128", "2001:db8:3::11:22ff:fe33:4455/64"),
		Routes: routes("2001:db8:4::/64", "2001:db8:9::/48 via 2001:db8::9", "2001:db8:8::/80 via fe80::8", "::/0 via 2001:db8::1"),
		DNS:    netDNS6,
	}, "vm-1")
	return l
}

// clientDUID is made of the MAC and a time, as clients do.
var clientDUID = &dhcpv6.DUIDLLT{HWType: 1, Time: 0x2d0f1e2c, LinkLayerAddr: mac.HardwareAddr()}

// request6 makes a client's message with the library's encoder.
func request6(kind dhcpv6.MessageType, opts ...dhcpv6.Option) *dhcpv6.Message {
	m := &dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{0xab, 0xcd, 0xef}}
	m.AddOption(dhcpv6.OptClientID(clientDUID))
	m.AddOption(dhcpv6.OptElapsedTime(0))
	m.AddOption(dhcpv6.OptRequestedOption(dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList, dhcpv6.OptionFQDN, dhcpv6.OptionInformationRefreshTime))
	for _, o := range opts {
		m.AddOption(o)
	}
	return m
}

func serverID(last byte) dhcpv6.Option {
	l := Lease6{MAC: mac}
	own := l.serverMAC()
	own[5] += last
	return dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: own.HardwareAddr()})
}

func iaNA(id byte, addrs ...string) dhcpv6.Option {
	ia := &dhcpv6.OptIANA{IaId: [4]byte{0, 0, 0, id}}
	for _, a := range addrs {
		ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(a), PreferredLifetime: time.Hour, ValidLifetime: time.Hour})
	}
	return ia
}

func iaTA(id byte) dhcpv6.Option { return &dhcpv6.OptIATA{IaId: [4]byte{0, 0, 0, id}} }
func iaPD(id byte) dhcpv6.Option { return &dhcpv6.OptIAPD{IaId: [4]byte{0, 0, 0, id}} }

func fqdn(flags uint8) dhcpv6.Option {
	return &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionFQDN, OptionData: []byte{flags, 5, 'g', 'u', 'e', 's', 't'}}
}

var rapid = &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}

// cases6 are what may be in a client's message.
var cases6 = []struct {
	name    string
	opts    []dhcpv6.Option
	unicast bool
	remove  dhcpv6.OptionCode
}{
	{name: "no address", opts: []dhcpv6.Option{iaNA(1)}},
	{name: "its address", opts: []dhcpv6.Option{iaNA(1, "2001:db8::2")}},
	{name: "another address", opts: []dhcpv6.Option{iaNA(1, "2001:db8::2", "2001:db8::77")}},
	{name: "no association", opts: nil},
	{name: "no association, by unicast", unicast: true},
	{name: "without its own name", opts: []dhcpv6.Option{iaNA(1, "2001:db8::2")}, remove: dhcpv6.OptionClientID},
	{name: "without a list", opts: []dhcpv6.Option{iaNA(1, "2001:db8::2")}, remove: dhcpv6.OptionORO},
	{name: "rapid commit", opts: []dhcpv6.Option{iaNA(1), rapid}},
	{name: "with a host name", opts: []dhcpv6.Option{iaNA(1), fqdn(1)}},
	{name: "every kind of association", opts: []dhcpv6.Option{iaPD(1), iaTA(2), iaNA(3, "2001:db8::2"), iaNA(4)}},
	{name: "by unicast", opts: []dhcpv6.Option{iaNA(1, "2001:db8::2")}, unicast: true},
	{name: "to us, no address", opts: []dhcpv6.Option{serverID(0), iaNA(1)}},
	{name: "to us, its address", opts: []dhcpv6.Option{serverID(0), iaNA(1, "2001:db8::2")}},
	{name: "to us, another address", opts: []dhcpv6.Option{serverID(0), iaNA(1, "2001:db8::2", "2001:db8::77")}},
	{name: "to us, every kind of association", opts: []dhcpv6.Option{serverID(0), iaPD(1), iaTA(2), iaNA(3, "2001:db8::2"), iaNA(4)}},
	{name: "to us, without its own name", opts: []dhcpv6.Option{serverID(0), iaNA(1, "2001:db8::2")}, remove: dhcpv6.OptionClientID},
	{name: "to us, no association", opts: []dhcpv6.Option{serverID(0)}},
	{name: "to us, by unicast", opts: []dhcpv6.Option{serverID(0), iaNA(1, "2001:db8::2")}, unicast: true},
	{name: "to another server, no association", opts: []dhcpv6.Option{serverID(1)}},
	{name: "to another server", opts: []dhcpv6.Option{serverID(1), iaNA(1, "2001:db8::2")}},
}

// answer6 gives the frame that answers a message, or why there is none.
func answer6(t testing.TB, l Lease6, msg []byte, multicast bool) ([]byte, silence) {
	t.Helper()
	var q query6
	if !q.parse(msg) {
		return nil, "malformed"
	}
	v, why := l.decide(&q, multicast)
	if why != "" {
		return nil, why
	}
	out, why := l.message(&q, v)
	if why != "" {
		return nil, why
	}
	return l.datagram6(guestLocal, out), ""
}

// TestReplyTable6 compares the answers to every message type in every case with testdata/replies6.golden, byte by byte.
func TestReplyTable6(t *testing.T) {
	var kinds []dhcpv6.MessageType
	for k := range dhcpv6.MessageTypeLeaseQueryData {
		kinds = append(kinds, k)
	}
	kinds = append(kinds, dhcpv6.MessageTypeDHCPv4Query, dhcpv6.MessageTypeAddrRegInform, 255)
	var table, bodies bytes.Buffer
	var frames [][]byte
	l := full6()
	for _, k := range kinds {
		fmt.Fprintf(&table, "%d %s\n", k, k)
		var rows, outcomes []string
		for _, c := range cases6 {
			req := request6(k, c.opts...)
			req.Options.Del(c.remove)
			msg := req.ToBytes()
			frame, why := answer6(t, l, msg, !c.unicast)
			rows = append(rows, c.name)
			if why != "" {
				outcomes = append(outcomes, "silence: "+string(why))
				continue
			}
			_, _, m := decode6(t, frame)
			if reply := l.Reply(msg); !c.unicast && !bytes.Equal(reply, m.ToBytes()) {
				t.Errorf("%s, %s: Reply says %x, the wire %x", k, c.name, reply, m.ToBytes())
			}
			n := slices.IndexFunc(frames, func(f []byte) bool { return bytes.Equal(f, frame) })
			if n < 0 {
				n = len(frames)
				frames = append(frames, frame)
				fmt.Fprintf(&bodies, "\nreply %d\n%s", n+1, annotate6(frame))
			}
			outcomes = append(outcomes, fmt.Sprintf("%s, reply %d", m.MessageType, n+1))
		}
		if len(slices.Compact(slices.Clone(outcomes))) == 1 {
			rows = []string{"every case"}
		}
		for i, row := range rows {
			fmt.Fprintf(&table, "    %-38s %s\n", row, outcomes[i])
		}
	}
	golden(t, "testdata/replies6.golden", table.String()+bodies.String())
}

// TestAdvertTable compares router advertisements with testdata/adverts.golden, byte by byte.
func TestAdvertTable(t *testing.T) {
	local, _, _ := NewLease6(nic.NIC{Name: "eth0", MAC: mac, MTU: 1440, Addrs: prefixes("2001:db8::2/128"), Routes: routes("::/0 via fe80::ecee:eeff:feee:eeee")}, "")
	alone, _, _ := NewLease6(nic.NIC{Name: "net1", MAC: mac, MTU: 9000, Addrs: prefixes("2001:db8::2/64")}, "")
	var text strings.Builder
	for _, c := range []struct {
		name  string
		lease Lease6
		end   bool
	}{
		{"everything", full6(), false},
		{"everything, at the end", full6(), true},
		{"Calico", local, false},
		{"Calico, at the end", local, true},
		{"no router", alone, false},
		{"no router, at the end", alone, true},
	} {
		for i, f := range c.lease.adverts(c.end) {
			fmt.Fprintf(&text, "%s, frame %d\n%s\n", c.name, i+1, annotate6(f))
		}
	}
	golden(t, "testdata/adverts.golden", text.String())
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := diff.Diff(string(want), got); d != "" {
		t.Errorf("answers differ from %s (-update writes it again) -want +got:\n%s", path, d)
	}
}

// annotate6 writes every byte of a frame down, with its place.
func annotate6(frame []byte) string {
	var s strings.Builder
	be := binary.BigEndian
	row := func(indent int, name string, b []byte, words ...any) {
		s.WriteString(strings.TrimRight(fmt.Sprintf("    %*s%-*s %s %s", indent, "", 18-indent, name, hex.EncodeToString(b), fmt.Sprint(words...)), " ") + "\n")
	}
	addr := func(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)) }
	row(0, "to", frame[:6])
	row(0, "from", frame[6:12])
	row(0, "ethertype", frame[12:14])
	ip, body := frame[14:54], frame[54:]
	row(0, "IPv6", ip[:8])
	row(0, "source", ip[8:24], addr(ip[8:]))
	row(0, "destination", ip[24:40], addr(ip[24:]))
	if ip[6] == protoICMPv6 {
		row(0, "ICMPv6", body[:4])
		row(0, "hop limit, flags", body[4:6])
		row(0, "lifetime", body[6:8], be.Uint16(body[6:]), " s")
		row(0, "reachable, retrans", body[8:16])
		for o := body[16:]; len(o) > 0; o = o[int(o[1])*8:] {
			row(0, ndOptions[o[0]], o[:int(o[1])*8])
		}
		return s.String()
	}
	row(0, "UDP", body[:8])
	row(0, "type", body[8:9], dhcpv6.MessageType(body[8]))
	row(0, "transaction", body[9:12])
	var options func(indent int, b []byte)
	options = func(indent int, b []byte) {
		for len(b) > 0 {
			code, end := dhcpv6.OptionCode(be.Uint16(b)), 4+int(be.Uint16(b[2:]))
			head := map[dhcpv6.OptionCode]int{dhcpv6.OptionIANA: 16, dhcpv6.OptionIAPD: 16, dhcpv6.OptionIATA: 8, dhcpv6.OptionIAAddr: 28}[code]
			if head == 0 {
				row(indent, fmt.Sprintf("option %d", code), b[:end], code)
			} else {
				row(indent, fmt.Sprintf("option %d", code), b[:head], code)
				options(indent+2, b[head:end])
			}
			b = b[end:]
		}
	}
	options(0, body[12:])
	return s.String()
}

var ndOptions = map[byte]string{ndPrefix: "prefix", ndMTU: "MTU", ndRoute: "route", ndRDNSS: "RDNSS", ndDNSSL: "DNSSL"}
