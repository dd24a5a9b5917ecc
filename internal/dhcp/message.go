package dhcp

import (
	"encoding/binary"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
)

// Offsets in a message (RFC 2131, section 2).
const (
	offOp     = 0
	offHType  = 1
	offHLen   = 2
	offXID    = 4
	offFlags  = 10
	offCiaddr = 12
	offYiaddr = 16
	offGiaddr = 24
	offChaddr = 28
	offSname  = 44
	offFile   = 108
)

const (
	opRequest     = 1
	opReply       = 2
	htypeEthernet = 1
	flagBroadcast = 0x8000
)

// cookie stands between the header and the options (RFC 2131, section 3).
var cookie = [cookieLen]byte{99, 130, 83, 99}

// query is what counts in a client's message. Its slices are parts of the message; an option that comes in pieces
// is the only one that is copied.
type query struct {
	header []byte // headerLen bytes

	// Options; nil where the client does not have them.
	kindOption, server, requested, list, maxSize, clientID, overload []byte
}

// parse reads a message, and says whether it is one. Any bytes may be tried.
//
// What clients do beside the rule is read where it can only mean one thing. Options that go on in the fields for the
// boot file and the server's name (option 52) are read in the order of RFC 3396, section 5; the mark at the end of the
// options may be missing; an option that comes again is continued (RFC 3396, section 7), which makes one of a fixed
// length too long and the message one to be ignored. An option cut short, though, leaves open what was meant: that is
// no message.
func (q *query) parse(msg []byte) bool {
	*q = query{}
	if len(msg) < headerLen+cookieLen || [cookieLen]byte(msg[headerLen:]) != cookie {
		return false
	}
	q.header = msg[:headerLen]
	if !q.options(msg[headerLen+cookieLen:]) {
		return false
	}
	if len(q.overload) != 1 {
		return true
	}
	where := q.overload[0] // 1: boot file, 2: server name, 3: both (RFC 2132, section 9.3)
	return (where != 1 && where != 3 || q.options(msg[offFile:headerLen])) &&
		(where != 2 && where != 3 || q.options(msg[offSname:offFile]))
}

// options reads one field of options, and says whether all of them are whole.
func (q *query) options(b []byte) bool {
	for len(b) > 0 {
		switch b[0] {
		case optPad:
			b = b[1:]
			continue
		case optEnd:
			return true
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return false
		}
		end := 2 + int(b[1])
		if o := q.option(b[0]); o != nil {
			if v := b[2:end:end]; *o == nil {
				*o = v
			} else {
				*o = append(*o, v...)
			}
		}
		b = b[end:]
	}
	return true
}

// option gives the place of an option that counts.
func (q *query) option(code byte) *[]byte {
	switch code {
	case optMessageType:
		return &q.kindOption
	case optServerID:
		return &q.server
	case optRequestedIP:
		return &q.requested
	case optRequestList:
		return &q.list
	case optMaxSize:
		return &q.maxSize
	case optClientID:
		return &q.clientID
	case optOverload:
		return &q.overload
	}
	return nil
}

// kind gives the type of the message, and 0 for none: then it is BOOTP, or broken.
func (q *query) kind() dhcpv4.MessageType {
	if len(q.kindOption) != 1 {
		return dhcpv4.MessageTypeNone
	}
	return dhcpv4.MessageType(q.kindOption[0])
}

func (q *query) addr(off int) netip.Addr { return netip.AddrFrom4([4]byte(q.header[off:])) }

func (q *query) mac() nic.MAC { return nic.MAC(q.header[offChaddr:]) }

func (q *query) ethernet() bool {
	return q.header[offHType] == htypeEthernet && q.header[offHLen] == byte(len(nic.MAC{}))
}

func (q *query) broadcast() bool {
	return binary.BigEndian.Uint16(q.header[offFlags:])&flagBroadcast != 0
}

// requestList gives what the client asks for, in its order.
func (q *query) requestList() []byte {
	if len(q.list) > 0 {
		return q.list
	}
	return baseSet
}

// option4 reads an option that is an IPv4 address; anything else is 0.0.0.0.
func option4(v []byte) netip.Addr {
	if len(v) != 4 {
		return netip.IPv4Unspecified()
	}
	return netip.AddrFrom4([4]byte(v))
}
