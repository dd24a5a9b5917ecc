package dhcp

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// raw is a DISCOVER with the given bytes in its three fields for options.
func raw(options, file, sname string) []byte {
	b := request(dhcpv4.MessageTypeDiscover).ToBytes()[:headerLen+cookieLen]
	copy(b[offFile:headerLen], file)
	copy(b[offSname:offFile], sname)
	return append(b, options...)
}

func TestQuery(t *testing.T) {
	const kind = "\x35\x01\x01"
	whole := strings.Repeat("x", 60)
	cases := []struct {
		name         string
		msg          []byte
		bad          bool
		kind         dhcpv4.MessageType
		id, list     string
		serverLength int
	}{
		{name: "plain", msg: raw(kind+"\x3d\x03abc\x37\x02\x01\x03\xff", "", ""), kind: 1, id: "abc", list: "\x01\x03"},
		{name: "padding between", msg: raw("\x00\x00"+kind+"\x00\x3d\x03abc\x00\xff", "", ""), kind: 1, id: "abc"},
		{name: "no end", msg: raw(kind+"\x3d\x03abc", "", ""), kind: 1, id: "abc"},
		{name: "no end but padding", msg: raw(kind+"\x3d\x03abc\x00\x00\x00", "", ""), kind: 1, id: "abc"},
		{name: "noise after the end", msg: raw(kind+"\xff\x3d\x03abc\x3d", "", ""), kind: 1},
		{name: "empty option", msg: raw(kind+"\x36\x00\xff", "", ""), kind: 1},
		{name: "no options", msg: raw("", "", "")},
		{name: "unknown options", msg: raw("\xe0\x02zz"+kind+"\x0c\x04vm-1\xff", "", ""), kind: 1},

		// RFC 3396, section 7
		{name: "in two pieces", msg: raw(kind+"\x3d\x03abc\x37\x01\x01\x3d\x02de\xff", "", ""), kind: 1, id: "abcde", list: "\x01"},
		{name: "type twice", msg: raw(kind+kind+"\xff", "", "")},
		{name: "server twice", msg: raw(kind+strings.Repeat("\x36\x04\xc6\x33\x64\x01", 2)+"\xff", "", ""), kind: 1, serverLength: 8},

		// RFC 2132, section 9.3; RFC 3396, section 5
		{name: "file is no options", msg: raw(kind+"\xff", "\x3d\x03abc\xff", "\x3d\x03def\xff"), kind: 1},
		{name: "in file", msg: raw(kind+"\x34\x01\x01\xff", "\x3d\x03abc\xff", "\x3d\x03def\xff"), kind: 1, id: "abc"},
		{name: "in sname", msg: raw(kind+"\x34\x01\x02\xff", "\x3d\x03abc\xff", "\x3d\x03def\xff"), kind: 1, id: "def"},
		{name: "in both, file first", msg: raw(kind+"\x34\x01\x03\xff", "\x3d\x03abc\xff", "\x3d\x03def\xff"), kind: 1, id: "abcdef"},
		{name: "in three pieces", msg: raw("\x34\x01\x03\x3d\x01_\xff", kind+"\x3d\x03abc\xff", "\x3d\x03def\xff"), kind: 1, id: "_abcdef"},
		{name: "sname to its last byte", msg: raw(kind+"\x34\x01\x02\xff", "", "\x3d\x3e"+whole+"yz"), kind: 1, id: whole + "yz"},
		{name: "beyond sname", msg: raw(kind+"\x34\x01\x02\xff", "", "\x3d\x3f"+whole+"yz"), bad: true},
		{name: "file cut short", msg: raw(kind+"\x34\x01\x01\xff", strings.Repeat("\x0c\x06123456", 15)+"\x0c\x07", ""), bad: true},
		{name: "overload of no sense", msg: raw(kind+"\x34\x01\x04\xff", "\x3d\x03abc\xff", "\x3d\xff"), kind: 1},
		{name: "overload of no length", msg: raw(kind+"\x34\x00\xff", "\x3d\x03abc\xff", "\x3d\xff"), kind: 1},
		{name: "overload in the overload", msg: raw(kind+"\x34\x01\x01\xff", "\x34\x01\x02\xff", "\x3d\x03def\xff"), kind: 1},

		{name: "cut short", msg: raw(kind+"\x3d\x04abc", "", ""), bad: true},
		{name: "cut before the length", msg: raw(kind+"\x3d", "", ""), bad: true},
		{name: "no cookie", msg: raw("", "", "")[:headerLen+cookieLen-1], bad: true},
		{name: "wrong cookie", msg: slices.Replace(raw(kind, "", ""), headerLen, headerLen+1, 98), bad: true},
		{name: "empty", bad: true},
	}
	for _, c := range cases {
		var q query
		if ok := q.parse(c.msg); ok == c.bad {
			t.Errorf("%s: read: %v", c.name, ok)
			continue
		}
		if c.bad {
			continue
		}
		if q.kind() != c.kind || string(q.clientID) != c.id || string(q.list) != c.list || len(q.server) != c.serverLength {
			t.Errorf("%s: type %d, id %q, list %q, server %x", c.name, q.kind(), q.clientID, q.list, q.server)
		}
	}
}

// A piece of an option is not written over what follows the first one in the read buffer.
func TestQueryLeavesTheMessageAlone(t *testing.T) {
	msg := raw("\x3d\x03abc\x35\x01\x01\x3d\x02de\xff", "", "")
	before := slices.Clone(msg)
	var q query
	if !q.parse(msg) || !bytes.Equal(msg, before) {
		t.Errorf("message is\n%x, was\n%x", msg, before)
	}
}

// Whatever the library makes of a message, which has a parser of its own, we make of it, too.
func FuzzQuery(f *testing.F) {
	f.Add(raw("\x35\x01\x01\x3d\x03abc\x37\x02\x01\x03\xff", "", ""))
	f.Add(raw("\x35\x01\x03\x36\x04\xc6\x33\x64\x01\x32\x04\xc6\x33\x64\x02\x39\x02\x05\xdc", "", ""))
	f.Add(raw("\x35\x01\x01\x3d\x03abc\x3d\x03def\x00\x00\xff\x3d", "", ""))
	f.Add(raw("\x34\x01\x03\x3d\x01_\xff", "\x35\x01\x01\x3d\x03abc\xff", "\x3d\x03def\xff"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		var q query
		ours := q.parse(msg)
		m, err := dhcpv4.FromBytes(append(slices.Clone(msg), optEnd)) // which the library insists on
		if err != nil {
			if ours {
				t.Fatalf("we read what the library does not: %v", err)
			}
			return
		}
		if m.Options.Has(dhcpv4.OptionOptionOverload) {
			return // which the library does not follow
		}
		if !ours {
			t.Fatalf("we do not read %s", m.Summary())
		}
		for code, v := range m.Options {
			if o := q.option(code); o != nil && (*o == nil || !bytes.Equal(*o, v)) {
				t.Errorf("option %d is %x, the library reads %x", code, *o, v)
			}
		}
		if q.addr(offCiaddr).String() != m.ClientIPAddr.String() || q.addr(offGiaddr).String() != m.GatewayIPAddr.String() ||
			q.broadcast() != m.IsBroadcast() || q.ethernet() && !bytes.Equal(m.ClientHWAddr, q.header[offChaddr:][:6]) {
			t.Errorf("header: %x\nthe library reads %s", q.header, m.Summary())
		}
	})
}
