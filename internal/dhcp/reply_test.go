package dhcp

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
)

// full is a lease that says something in every option.
func full() Lease {
	l, _, _ := NewLease(nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("198.51.100.2/24"),
		Routes: routes("203.0.113.0/28", "192.0.2.0/25 via 198.51.100.9", "0.0.0.0/0 via 198.51.100.1"),
		DNS: nic.DNS{
			Servers: []netip.Addr{netip.MustParseAddr("198.51.100.53"), netip.MustParseAddr("192.0.2.53")},
			Domain:  "lab.example", Search: []string{"lab.example", "example"},
		},
	}, "vm-1")
	l.NTP = []netip.Addr{netip.MustParseAddr("198.51.100.123"), netip.MustParseAddr("2001:db8::123")}
	return l
}

// opt is one option of a request.
type opt struct {
	code  byte
	value string
}

// request makes a client's message.
func request(t dhcpv4.MessageType, opts ...opt) *dhcpv4.DHCPv4 {
	m := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: htypeEthernet, TransactionID: dhcpv4.TransactionID{1, 2, 3, 4},
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero,
		ClientHWAddr: mac.HardwareAddr(), Options: dhcpv4.Options{optMessageType: {byte(t)}},
	}
	for _, o := range opts {
		m.Options[o.code] = []byte(o.value)
	}
	return m
}

func with(m *dhcpv4.DHCPv4, change func(*dhcpv4.DHCPv4)) *dhcpv4.DHCPv4 {
	change(m)
	return m
}

func ip(s string) string { return string(netip.MustParseAddr(s).AsSlice()) }

func ciaddr(s string) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.ClientIPAddr = net.ParseIP(s) }
}

// answer is what a server does with a message, as it is on the wire: the whole frame, and the reason for silence.
func answer(t testing.TB, l Lease, req *dhcpv4.DHCPv4) ([]byte, silence) {
	t.Helper()
	var q query
	if !q.parse(req.ToBytes()) {
		t.Fatalf("not read as a message: %s", req.Summary())
	}
	frame, _, why := newResponder(&l).reply(nil, &q)
	return frame, why
}

// describe is a reply in one line: type, ciaddr, yiaddr, flags, options.
func describe(m *dhcpv4.DHCPv4) string {
	if m == nil {
		return "silence"
	}
	s := fmt.Sprintf("%s ciaddr %s yiaddr %s flags %04x", m.MessageType(), m.ClientIPAddr, m.YourIPAddr, m.Flags)
	for _, c := range slices.Sorted(maps.Keys(m.Options)) {
		if c != optMessageType {
			s += fmt.Sprintf(" %d=%s", c, hex.EncodeToString(m.Options[c]))
		}
	}
	return s
}

const (
	// 24 h, 12 h, 21 h
	leaseOptions = " 1=ffffff00 51=00015180 54=c6336401 58=0000a8c0 59=00012750"
	// What a client without a list gets.
	baseOptions = " 1=ffffff00 3=c6336401 6=c6336435c0000235 12=766d2d31 15=6c61622e6578616d706c65 26=05aa" +
		" 51=00015180 54=c6336401 58=0000a8c0 59=00012750 121=1ccb007100" + "00000000" + "19c0000200" + "c6336409" + "00c6336401"
	toOffer = "OFFER ciaddr 0.0.0.0 yiaddr 198.51.100.2 flags 0000"
	toAck   = "ACK ciaddr 0.0.0.0 yiaddr 198.51.100.2 flags 0000"
	toRenew = "ACK ciaddr 198.51.100.2 yiaddr 198.51.100.2 flags 0000"
	toNak   = "NAK ciaddr 0.0.0.0 yiaddr 0.0.0.0 flags 0000 54=c6336401 56=61646472657373206973206e6f74206f662074686973206e6574776f726b"
)

// stateCase is a message of a client in some state, and what comes of it.
type stateCase struct {
	name string
	req  *dhcpv4.DHCPv4
	want string
	why  silence
}

// stateCases are all messages in all states of the client (RFC 2131, section 4.3).
func stateCases() []stateCase {
	const (
		discover = dhcpv4.MessageTypeDiscover
		ask      = dhcpv4.MessageTypeRequest
		inform   = dhcpv4.MessageTypeInform
	)
	mine, other := ip("198.51.100.2"), ip("198.51.100.3")
	us, them := opt{optServerID, ip("198.51.100.1")}, opt{optServerID, ip("198.51.100.77")}
	none := opt{optRequestList, "\xfe"} // asks for nothing that we have
	return []stateCase{
		{"discover, no list", request(discover), toOffer + baseOptions, ""},
		{"discover, empty list", request(discover, opt{optRequestList, ""}), toOffer + baseOptions, ""},
		{"discover, list of nothing", request(discover, none), toOffer + leaseOptions, ""},
		{"discover wants another address", request(discover, none, opt{optRequestedIP, other}), toOffer + leaseOptions, ""},
		{"discover with ciaddr", with(request(discover, none), ciaddr("198.51.100.3")), toOffer + leaseOptions, ""},
		{"discover, broadcast flag", with(request(discover, none), (*dhcpv4.DHCPv4).SetBroadcast), strings.Replace(toOffer, "0000", "8000", 1) + leaseOptions, ""},
		{"discover, client id", request(discover, none, opt{optClientID, "\x01abc"}), toOffer + leaseOptions + " 61=01616263", ""},

		{"selecting", request(ask, none, us, opt{optRequestedIP, mine}), toAck + leaseOptions, ""},
		{"selecting, wrong address", request(ask, none, us, opt{optRequestedIP, other}), toNak, ""},
		{"selecting, wrong address, client id", request(ask, none, us, opt{optRequestedIP, other}, opt{optClientID, "a"}), toNak + " 61=61", ""},
		{"selecting another server", request(ask, none, them, opt{optRequestedIP, mine}), "silence", otherServer},
		{"selecting another server's address", request(ask, none, them, opt{optRequestedIP, other}), "silence", otherServer},
		{"selecting nothing", request(ask, none, us), "silence", noAddress},
		{"selecting, short server id", request(ask, none, opt{optServerID, "\xc6\x33"}, opt{optRequestedIP, mine}), "silence", badOption},
		{"selecting, IPv6-size server id", request(ask, none, opt{optServerID, string(net.ParseIP("198.51.100.1"))}, opt{optRequestedIP, mine}), "silence", badOption},

		{"init-reboot", request(ask, none, opt{optRequestedIP, mine}), toAck + leaseOptions, ""},
		{"init-reboot, wrong address", request(ask, none, opt{optRequestedIP, other}), toNak, ""},
		{"init-reboot, wrong network", request(ask, none, opt{optRequestedIP, ip("10.0.0.9")}), toNak, ""},
		{"init-reboot, long address", request(ask, none, opt{optRequestedIP, mine + "x"}), "silence", badOption},
		{"init-reboot, empty address", request(ask, none, opt{optRequestedIP, ""}), "silence", badOption},

		{"renewing or rebinding", with(request(ask, none), ciaddr("198.51.100.2")), toRenew + leaseOptions, ""},
		{"renewing, wrong address", with(request(ask, none), ciaddr("198.51.100.3")), toNak, ""},
		{"renewing with our id", with(request(ask, none, us), ciaddr("198.51.100.2")), toRenew + leaseOptions, ""},
		{"renewing with both addresses", with(request(ask, none, opt{optRequestedIP, mine}), ciaddr("198.51.100.2")), toRenew + leaseOptions, ""},
		{"renewing, the other address wrong", with(request(ask, none, opt{optRequestedIP, other}), ciaddr("198.51.100.2")), toNak, ""},
		{"request of nothing", request(ask, none), "silence", noAddress},

		{"inform", with(request(inform), ciaddr("198.51.100.2")), "ACK ciaddr 198.51.100.2 yiaddr 0.0.0.0 flags 0000" +
			strings.NewReplacer(" 51=00015180", "", " 58=0000a8c0", "", " 59=00012750", "").Replace(baseOptions), ""},
		{
			"inform asks for times", with(request(inform, opt{optRequestList, "\x33\x3a\x3b\x1a"}), ciaddr("10.0.0.9")),
			"ACK ciaddr 10.0.0.9 yiaddr 0.0.0.0 flags 0000 26=05aa 54=c6336401", "",
		},

		{"decline", request(dhcpv4.MessageTypeDecline, us, opt{optRequestedIP, mine}), "silence", nothingToDo},
		{"release", with(request(dhcpv4.MessageTypeRelease, us), ciaddr("198.51.100.2")), "silence", nothingToDo},
		{"a server's message type", request(dhcpv4.MessageTypeOffer), "silence", unknownType},
		{"unknown message type", request(99), "silence", unknownType},
		{"BOOTP", with(request(discover), func(m *dhcpv4.DHCPv4) { delete(m.Options, optMessageType) }), "silence", unknownType},
		{"nothing", nil, "silence", notRequest},
		{"a reply", with(request(discover), func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }), "silence", notRequest},
		{"another MAC", with(request(discover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 1} }), "silence", otherMAC},
		{"short MAC", with(request(discover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = m.ClientHWAddr[:4] }), "silence", notEthernet},
		{"long MAC", with(request(discover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = make([]byte, 16) }), "silence", notEthernet},
		{"InfiniBand", with(request(discover), func(m *dhcpv4.DHCPv4) { m.HWType = 32 }), "silence", notEthernet},
		{"relayed", with(request(discover), func(m *dhcpv4.DHCPv4) { m.GatewayIPAddr = net.IPv4(10, 0, 0, 1) }), "silence", relayed},
		{"client id longer than a reply", request(discover, opt{optClientID, strings.Repeat("x", 600)}), "silence", tooBig},
	}
}

func TestReplyStates(t *testing.T) {
	for _, c := range stateCases() {
		t.Run(c.name, func(t *testing.T) {
			l := full()
			got := l.Reply(c.req)
			if d := cmp.Diff(c.want, describe(got)); d != "" {
				t.Error(d)
			}
			if c.req == nil {
				return
			}
			if _, why := answer(t, l, c.req); why != c.why {
				t.Errorf("silent because %q, want %q", why, c.why)
			}
			if got == nil {
				return
			}
			if got.OpCode != dhcpv4.OpcodeBootReply || got.TransactionID != c.req.TransactionID || !bytes.Equal(got.ClientHWAddr, mac[:]) || got.HWType != htypeEthernet {
				t.Errorf("header: %s", got.Summary())
			}
		})
	}
}

func TestReplyOptions(t *testing.T) {
	calico, _, _ := NewLease(nic.NIC{MAC: mac, MTU: 1440, Addrs: prefixes("10.10.192.128/32"), Routes: routes("169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1")}, "")
	pair, _, _ := NewLease(nic.NIC{MAC: mac, Addrs: prefixes("10.0.0.4/31"), DNS: nic.DNS{Search: []string{"a.example", "example"}}}, "")
	forever := calico
	forever.Duration = 1 << 62
	short := calico
	short.Duration = 16 * time.Second
	const calicoLease = " 1=ffffffff 51=00015180 54=a9fe0101 58=0000a8c0 59=00012750"
	const calicoRoutes = "20a9fe010100000000" + "00a9fe0101"
	cases := []struct {
		name  string
		lease Lease
		list  string
		want  string // options but for the message type
	}{
		{"classless routes bring the router", calico, "\x79", strings.Replace(calicoLease, " 51", " 3=a9fe0101 51", 1) + " 121=" + calicoRoutes},
		{"under the old number too", calico, "\xf9", strings.Replace(calicoLease, " 51", " 3=a9fe0101 51", 1) + " 249=" + calicoRoutes},
		{"both numbers", calico, "\x79\xf9", strings.Replace(calicoLease, " 51", " 3=a9fe0101 51", 1) + " 121=" + calicoRoutes + " 249=" + calicoRoutes},
		{"router alone", calico, "\x03", strings.Replace(calicoLease, " 51", " 3=a9fe0101 51", 1)},
		{"no broadcast address of /32", calico, "\x1c", calicoLease},
		{"our own options cannot be asked away", calico, "\x35\x36\x3d\x32\x37\x39\x00\xff", calicoLease},
		{"asked for twice", calico, "\x1a\x1a", strings.Replace(calicoLease, " 51", " 26=05a0 51", 1)},
		{"nor of /31, nor a router, nor an MTU of 0; a route to the server", pair, "\x1c\x03\x79\x1a", " 1=fffffffe 51=00015180 54=a9fe0043 58=0000a8c0 59=00012750 121=20a9fe004300000000"},
		{"the search list stands in for the domain", pair, "\x0f", " 1=fffffffe 15=612e6578616d706c65 51=00015180 54=a9fe0043 58=0000a8c0 59=00012750"},
		{"search list", pair, "\x77", " 1=fffffffe 51=00015180 54=a9fe0043 58=0000a8c0 59=00012750 119=0161076578616d706c6500c002"},
		{"time servers, IPv4 ones", full(), "\x2a", strings.Replace(leaseOptions, " 51", " 42=c633647b 51", 1)},
		{"broadcast address", full(), "\x1c", strings.Replace(leaseOptions, " 51", " 28=c63364ff 51", 1)},
		{"endless", forever, "\xfe", " 1=ffffffff 51=ffffffff 54=a9fe0101"},
		{"times", short, "\xfe", " 1=ffffffff 51=00000010 54=a9fe0101 58=00000008 59=0000000e"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := c.lease.Reply(request(dhcpv4.MessageTypeDiscover, opt{optRequestList, c.list}))
			_, opts, _ := strings.Cut(describe(got), "flags 0000")
			if d := cmp.Diff(c.want, opts); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestReplyWithoutALease(t *testing.T) {
	tiny := full()
	tiny.MTU = 68 // no message fits
	for _, l := range []Lease{tiny, {}, {MAC: mac}, {MAC: mac, Addr: netip.MustParsePrefix("2001:db8::2/64"), Server: linkLocalServer}} {
		if got := l.Reply(request(dhcpv4.MessageTypeDiscover)); got != nil {
			t.Errorf("%+v answers %s", l, describe(got))
		}
	}
}

// big is a lease whose routes take n bytes of option 121.
func big(n int) Lease {
	l := full()
	l.Routes = nil
	for i := range n / 8 {
		l.Routes = append(l.Routes, nic.Route{Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), Gw: l.Router})
	}
	return l
}

// shortened gives how many replies the server says to have shortened, in its counters and its log.
func shortened(t *testing.T, l Lease, req *dhcpv4.DHCPv4) uint64 {
	t.Helper()
	var log bytes.Buffer
	s := Server{Lease: l, Log: slog.New(slog.NewTextHandler(&log, nil))}
	if out, _ := s.handle(nil, broadcast(t, req)); out == nil {
		t.Fatal("silence")
	}
	n := s.Stats().Shortened
	if n != uint64(strings.Count(log.String(), "leaves out options")) {
		t.Errorf("%d replies are counted as shortened, the log has %s", n, &log)
	}
	return n
}

// What does not fit is left out, the least needed first; the reply goes out.
func TestReplySize(t *testing.T) {
	all := "\x01\x1c\x0c\x77\x0f\x1a\x06\xf9\x79\x03"
	maxSize := func(n int) opt { return opt{optMaxSize, string([]byte{byte(n >> 8), byte(n)})} }
	cases := []struct {
		name  string
		lease Lease
		opts  []opt
		want  []byte // what it has beside the lease's
		short bool   // and this is said
	}{
		{"all fits", full(), nil, []byte{3, 6, 12, 15, 26, 28, 119, 121, 249}, false},
		{"routes are not said twice", big(160), nil, []byte{3, 6, 12, 15, 26, 28, 119, 121}, false},
		{"routes leave no room for names", big(232), nil, []byte{3, 6, 12, 15, 26, 121}, true},
		{"routes do not fit", big(400), nil, []byte{3, 6, 12, 15, 26, 28, 119}, true},
		{"client accepts more", big(400), []opt{maxSize(1450)}, []byte{3, 6, 12, 15, 26, 28, 119, 121, 249}, false},
		{"client accepts more than a frame holds", big(2000), []opt{maxSize(65535)}, []byte{3, 6, 12, 15, 26, 28, 119}, true},
		{"client accepts too little to be true", full(), []opt{maxSize(100)}, []byte{3, 6, 12, 15, 26, 28, 119, 121, 249}, false},
		{"broken size", big(400), []opt{{optMaxSize, "\x05\x00\x00"}}, []byte{3, 6, 12, 15, 26, 28, 119}, true},
		{"long client id", full(), []opt{{optClientID, strings.Repeat("x", 240)}}, nil, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			req := request(dhcpv4.MessageTypeDiscover, append(c.opts, opt{optRequestList, all})...)
			resp := c.lease.Reply(req)
			if resp == nil {
				t.Fatal("silence")
			}
			limit := minMaxSize
			if n, err := req.MaxMessageSize(); err == nil {
				limit = min(max(limit, int(n)), c.lease.MTU)
			}
			frame, _ := answer(t, c.lease, req)
			if n := len(frame) - etherHdrLen; n > limit {
				t.Errorf("datagram of %d bytes, the client takes %d", n, limit)
			}
			var got []byte
			for _, code := range slices.Sorted(maps.Keys(resp.Options)) {
				if !slices.Contains([]byte{1, 51, 53, 54, 58, 59, 61}, code) {
					got = append(got, code)
				}
			}
			if n := shortened(t, c.lease, req); (n > 0) != c.short {
				t.Errorf("options left out: %d", n)
			}
			if c.want == nil { // as much as there is room for
				if n := len(frame) - etherHdrLen; n < limit-20 || len(got) == 0 {
					t.Errorf("options %v in %d bytes", got, n)
				}
				return
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("options %v, want %v (%d bytes)", got, c.want, len(frame)-etherHdrLen)
			}
		})
	}
}
