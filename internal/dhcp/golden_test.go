package dhcp

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var update = flag.Bool("update", false, "write testdata again from what the code does")

// clientStates are how a client's state shows in its messages (RFC 2131, section 4.3.6), with the right and a wrong
// address. To a server, REBINDING looks like RENEWING: only the receiver's address differs.
var clientStates = []struct {
	name   string
	header func(*dhcpv4.DHCPv4)
	opts   []opt
}{
	{"INIT", nil, nil},
	{"SELECTING", nil, []opt{{optServerID, ip("198.51.100.1")}, {optRequestedIP, ip("198.51.100.2")}}},
	{"SELECTING, wrong address", nil, []opt{{optServerID, ip("198.51.100.1")}, {optRequestedIP, ip("198.51.100.77")}}},
	{"SELECTING another server", nil, []opt{{optServerID, ip("198.51.100.9")}, {optRequestedIP, ip("198.51.100.2")}}},
	{"INIT-REBOOT", nil, []opt{{optRequestedIP, ip("198.51.100.2")}}},
	{"INIT-REBOOT, wrong address", nil, []opt{{optRequestedIP, ip("198.51.100.77")}}},
	{"RENEWING or REBINDING", ciaddr("198.51.100.2"), nil},
	{"RENEWING or REBINDING, wrong address", ciaddr("198.51.100.77"), nil},
}

// laterKinds are the message types after RFC 2131, none of which a host sends to its server: RFC 3203, 4388, 6926, 7724.
var laterKinds = map[dhcpv4.MessageType]string{
	9: "FORCERENEW", 10: "LEASEQUERY", 11: "LEASEUNASSIGNED", 12: "LEASEUNKNOWN", 13: "LEASEACTIVE", 14: "BULKLEASEQUERY",
	15: "LEASEQUERYDONE", 16: "ACTIVELEASEQUERY", 17: "LEASEQUERYSTATUS", 18: "TLS",
}

// TestReplyTable compares every message type in every state of the client with testdata/replies.golden, byte by byte.
// The file is a table, and after it every reply that the table names.
func TestReplyTable(t *testing.T) {
	kinds := []dhcpv4.MessageType{0}
	for k := dhcpv4.MessageType(1); k <= 18; k++ {
		kinds = append(kinds, k)
	}
	kinds = append(kinds, 255)
	var table, bodies bytes.Buffer
	var frames [][]byte
	for _, k := range kinds {
		name := fmt.Sprintf("%d %s", k, cmp.Or(laterKinds[k], k.String()))
		if k == 0 {
			name = "BOOTP"
		}
		fmt.Fprintf(&table, "%s\n", name)
		var rows, outcomes []string
		for _, state := range clientStates {
			req := request(k, append([]opt{{optRequestList, "\x01\x79\x03\x06\x0f\x1a\x1c\x0c\x77"}, {optClientID, "\x01" + string(mac[:])}}, state.opts...)...)
			if k == 0 {
				delete(req.Options, optMessageType)
			}
			if state.header != nil {
				state.header(req)
			}
			frame, why := answer(t, full(), req)
			if why != "" {
				rows, outcomes = append(rows, state.name), append(outcomes, "silence: "+string(why))
				continue
			}
			n := slices.IndexFunc(frames, func(f []byte) bool { return bytes.Equal(f, frame) })
			if n < 0 {
				n = len(frames)
				frames = append(frames, frame)
				fmt.Fprintf(&bodies, "\nreply %d\n%s", n+1, annotate(frame))
			}
			_, _, m := decode(t, frame)
			rows, outcomes = append(rows, state.name), append(outcomes, fmt.Sprintf("%s, reply %d", m.MessageType(), n+1))
		}
		if len(slices.Compact(slices.Clone(outcomes))) == 1 {
			rows = []string{"every state"}
		}
		for i, row := range rows {
			fmt.Fprintf(&table, "    %-38s %s\n", row, outcomes[i])
		}
	}
	golden(t, "testdata/replies.golden", table.String()+bodies.String())
}

// annotate writes every byte of a reply down, with its place; only runs of zeros are counted.
func annotate(frame []byte) string {
	var s strings.Builder
	row := func(name string, n int, words ...any) {
		v := hex.EncodeToString(frame[:n])
		if n > 8 && strings.Trim(v, "0") == "" {
			v = fmt.Sprintf("%d zeros", n)
		}
		s.WriteString(strings.TrimRight(fmt.Sprintf("    %-14s %s %s", name, v, fmt.Sprint(words...)), " ") + "\n")
		frame = frame[n:]
	}
	addr := func(off int) netip.Addr { return netip.AddrFrom4([4]byte(frame[off:])) }
	row("to", 6)
	row("from", 6)
	row("ethertype", 2)
	row("IPv4", 12)
	row("source", 4, addr(0))
	row("destination", 4, addr(0))
	row("UDP", 8)
	row("op, hardware", 4)
	row("xid", 4)
	row("secs, flags", 4)
	for _, name := range []string{"ciaddr", "yiaddr", "siaddr", "giaddr"} {
		row(name, 4, addr(0))
	}
	row("chaddr", 6)
	row("rest of it", 10)
	row("sname", 64)
	row("file", 128)
	row("cookie", 4)
	for frame[0] != optEnd {
		code := dhcpv4.GenericOptionCode(frame[0])
		row(fmt.Sprintf("option %d", code), 2+int(frame[1]), optionNames[byte(code)])
	}
	row("end", 1)
	if len(frame) > 0 {
		row("padding", len(frame))
	}
	return s.String()
}

var optionNames = map[byte]string{
	optMask: "subnet mask", optRouter: "router", optDNS: "DNS", optHostname: "host name", optDomain: "domain", optMTU: "MTU",
	optBroadcast: "broadcast address", optLeaseTime: "lease time", optMessageType: "message type", optServerID: "server identifier",
	optMessage: "message", optT1: "T1", optT2: "T2", optClientID: "client identifier", optSearch: "search list", optRoutes: "classless routes",
}
