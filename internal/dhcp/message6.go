package dhcp

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/insomniacslk/dhcp/dhcpv6"
)

// Sizes in bytes (RFC 8415, sections 8, 11.1, 21.1, 21.4 to 21.6 and 21.21).
const (
	header6Len    = 4 // type and transaction
	option6HdrLen = 4
	minDUID       = 3
	maxDUID       = 130
	iaidLen       = 4
	timesLen      = 8 // T1 and T2
	ia6AddrLen    = 24
)

// query6 is what counts in a client's DHCPv6 message. Its slices are parts of the message, but for the list.
type query6 struct {
	kind   dhcpv6.MessageType
	xid    [3]byte
	client []byte // DUIDs; nil where the message has none
	server []byte
	rapid  bool
	fqdn   []byte
	list   []byte // codes of two bytes; nil where the client does not have the option
	assocs []assoc
}

// assoc is an identity association: what the client wants an address or a prefix for.
type assoc struct {
	code  dhcpv6.OptionCode
	id    [iaidLen]byte
	addrs []netip.Addr // that the client has, or would like
}

// parse reads a message, and says whether it is one. Any bytes may be tried. A message whose options do not end where
// it ends, or that has an option twice that may be there once, leaves open what was meant: that is no message. One of a
// relay has another header, of which only the type is read.
func (q *query6) parse(msg []byte) bool {
	*q = query6{}
	if len(msg) < header6Len {
		return false
	}
	q.kind, q.xid = dhcpv6.MessageType(msg[0]), [3]byte(msg[1:])
	if relay6(q.kind) {
		return true
	}
	return options6(msg[header6Len:], q.option)
}

func relay6(k dhcpv6.MessageType) bool {
	return k == dhcpv6.MessageTypeRelayForward || k == dhcpv6.MessageTypeRelayReply
}

// options6 gives every option to f, and says whether all are whole and liked by f.
func options6(b []byte, f func(dhcpv6.OptionCode, []byte) bool) bool {
	for len(b) > 0 {
		if len(b) < option6HdrLen {
			return false
		}
		code, end := dhcpv6.OptionCode(binary.BigEndian.Uint16(b)), option6HdrLen+int(binary.BigEndian.Uint16(b[2:]))
		if end > len(b) || !f(code, b[option6HdrLen:end]) {
			return false
		}
		b = b[end:]
	}
	return true
}

func (q *query6) option(code dhcpv6.OptionCode, v []byte) bool {
	once := func(to *[]byte, least, most int) bool {
		ok := *to == nil && least <= len(v) && len(v) <= most
		*to = v
		return ok
	}
	switch code {
	case dhcpv6.OptionClientID:
		return once(&q.client, minDUID, maxDUID)
	case dhcpv6.OptionServerID:
		return once(&q.server, minDUID, maxDUID)
	case dhcpv6.OptionFQDN:
		return once(&q.fqdn, 1, len(v)) // RFC 4704, section 4
	case dhcpv6.OptionRapidCommit:
		q.rapid = true
	case dhcpv6.OptionORO: // some clients send several
		q.list = append(slices.Clip(append([]byte{}, q.list...)), v...)
		return len(v)%2 == 0
	case dhcpv6.OptionIANA, dhcpv6.OptionIAPD:
		return q.assoc(code, v, iaidLen+timesLen)
	case dhcpv6.OptionIATA:
		return q.assoc(code, v, iaidLen)
	}
	return true
}

// assoc reads an identity association whose options start at head.
func (q *query6) assoc(code dhcpv6.OptionCode, v []byte, head int) bool {
	if len(v) < head {
		return false
	}
	a := assoc{code: code, id: [iaidLen]byte(v)}
	ok := options6(v[head:], func(c dhcpv6.OptionCode, v []byte) bool {
		if c == dhcpv6.OptionIAAddr && len(v) >= ia6AddrLen {
			a.addrs = append(a.addrs, netip.AddrFrom16([16]byte(v)))
		}
		return c != dhcpv6.OptionIAAddr || len(v) >= ia6AddrLen
	})
	q.assocs = append(q.assocs, a)
	return ok
}

// asks says whether the client wants an option. One without a list wants what everybody does.
func (q *query6) asks(code dhcpv6.OptionCode) bool {
	if q.list == nil {
		return code == dhcpv6.OptionDNSRecursiveNameServer || code == dhcpv6.OptionDomainSearchList
	}
	for c := range slices.Chunk(q.list, 2) {
		if dhcpv6.OptionCode(binary.BigEndian.Uint16(c)) == code {
			return true
		}
	}
	return false
}

// appendOption6 encodes an option.
func appendOption6(b []byte, code dhcpv6.OptionCode, v []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(code))
	return append(binary.BigEndian.AppendUint16(b, uint16(len(v))), v...)
}
