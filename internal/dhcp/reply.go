package dhcp

import (
	"encoding/binary"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// silence says why a message gets no answer; empty where it gets one.
type silence string

// Reasons for silence.
const (
	noLease     silence = "the lease has no IPv4 address"
	notRequest  silence = "not a client's message"
	notEthernet silence = "hardware address is not an Ethernet one"
	otherMAC    silence = "hardware address is not this NIC's"
	relayed     silence = "came through a relay"
	otherServer silence = "meant for another server"
	noAddress   silence = "request names no address"
	badOption   silence = "option of a wrong length"
	nothingToDo silence = "needs no answer"
	unknownType silence = "message type unknown or missing"
	tooBig      silence = "the reply does not fit into what the client accepts"
	oversize    silence = "frame is longer than the MTU"
	badFrame    silence = "frame is no datagram to the server's port, or not a whole one"
	badChecksum silence = "checksum is wrong"
	badMessage  silence = "cookie is missing, or an option is cut short"
)

// Reply gives the answer to req, or nil for silence (RFC 2131, section 4.3). It reads nothing but its arguments, and
// does what Server does to the same message on the wire. Addresses in req are nil or IPv4, as the codec has it.
func (l *Lease) Reply(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	var q query
	if req == nil || !q.parse(req.ToBytes()) {
		return nil
	}
	frame, _, why := newResponder(l).reply(nil, &q)
	if why != "" {
		return nil
	}
	resp, err := dhcpv4.FromBytes(frame[etherHdrLen+ipUDPLen:])
	if err != nil {
		return nil // not reached: the codec reads what we write, as the tests show
	}
	return resp
}

// responder answers by one lease. What does not depend on the message is encoded once, so that an answer allocates
// nothing beyond the memory that it is given.
type responder struct {
	lease  Lease
	start  []byte      // a frame up to its options, with all that is the same in every one
	option [256][]byte // by code, as on the wire; empty where the lease has nothing to say
	left   []byte      // codes that the last reply would have had, if they had fitted
}

func newResponder(l *Lease) *responder {
	r := &responder{lease: *l, left: make([]byte, 0, len(byNeed))}
	if !r.able() {
		return r
	}
	r.start = l.frameStart()
	for c := range r.option {
		r.option[c] = l.encode(byte(c))
	}
	return r
}

// able says whether the lease can be given at all.
func (r *responder) able() bool {
	return r.lease.Addr.IsValid() && r.lease.Addr.Addr().Is4() && r.lease.Server.Is4()
}

// verdict is what a message gets: a reply of a kind, with the lease or without.
type verdict struct {
	kind           dhcpv4.MessageType
	lease          bool // mask and times come with it
	ciaddr, yiaddr netip.Addr
}

// reply appends the frame that answers a message, and gives its kind, or the reason for silence.
func (r *responder) reply(b []byte, q *query) ([]byte, dhcpv4.MessageType, silence) {
	r.left = r.left[:0]
	v, why := r.decide(q)
	if why != "" {
		return nil, 0, why
	}
	var set optionSet
	if !r.choose(&set, q, v) {
		return nil, 0, tooBig
	}
	return r.appendFrame(b, q, v, &set), v.kind, ""
}

// decide is RFC 2131, section 4.3, for a server with one client and one address.
func (r *responder) decide(q *query) (verdict, silence) {
	switch {
	case q.header[offOp] != opRequest:
		return verdict{}, notRequest
	case !r.able():
		return verdict{}, noLease
	case !q.ethernet():
		return verdict{}, notEthernet
	case q.mac() != r.lease.MAC:
		return verdict{}, otherMAC
	case !q.addr(offGiaddr).IsUnspecified():
		return verdict{}, relayed
	}
	none := netip.IPv4Unspecified()
	switch q.kind() {
	case dhcpv4.MessageTypeDiscover:
		return verdict{dhcpv4.MessageTypeOffer, true, none, r.lease.Addr.Addr()}, ""
	case dhcpv4.MessageTypeRequest:
		return r.request(q)
	case dhcpv4.MessageTypeInform: // the client has an address by other means: nothing about a lease
		return verdict{dhcpv4.MessageTypeAck, false, q.addr(offCiaddr), none}, ""
	case dhcpv4.MessageTypeDecline, dhcpv4.MessageTypeRelease:
		return verdict{}, nothingToDo // the address stays the pod's, and so the guest's
	}
	return verdict{}, unknownType
}

// request decides on a REQUEST of any state of the client (RFC 2131, section 4.3.2): with a server identifier it selects
// an offer, with a requested address it reboots, with ciaddr it renews or rebinds. Every address that it names has to be
// the guest's. A NAK for a wrong one is safe in every state, as no other server is there for this guest: it makes the
// client start over at once instead of keeping an address that the pod network does not carry.
func (r *responder) request(q *query) (verdict, silence) {
	if q.server != nil && len(q.server) != 4 || q.requested != nil && len(q.requested) != 4 {
		return verdict{}, badOption
	}
	if q.server != nil && option4(q.server) != r.lease.Server {
		return verdict{}, otherServer
	}
	none, ciaddr, own := netip.IPv4Unspecified(), q.addr(offCiaddr), r.lease.Addr.Addr()
	switch {
	case q.requested == nil && ciaddr.IsUnspecified():
		return verdict{}, noAddress
	case q.requested != nil && option4(q.requested) != own, !ciaddr.IsUnspecified() && ciaddr != own:
		return verdict{dhcpv4.MessageTypeNak, false, none, none}, ""
	}
	return verdict{dhcpv4.MessageTypeAck, true, ciaddr, own}, "" // ciaddr: RFC 2131, table 3
}

// nakMessage is option 56 of a NAK.
var nakMessage = appendOption(nil, optMessage, []byte("address is not of this network"))

// optionSet is options by code.
type optionSet [256]bool

// choose gives the lease's options that a reply is to have: what the client asks for, as far as it fits; r.left has the
// others. False: not even what every reply has fits.
func (r *responder) choose(set *optionSet, q *query, v verdict) bool {
	const kindLen = 3
	size := headerLen + cookieLen + kindLen + len(r.option[optServerID]) + 1
	if q.clientID != nil {
		size += optionLen(q.clientID)
	}
	if v.lease {
		for _, c := range leaseSet {
			set[c] = true
			size += len(r.option[c])
		}
	}
	limit := r.sizeLimit(q)
	if v.kind == dhcpv4.MessageTypeNak {
		return size+len(nakMessage) <= limit
	}
	if size > limit {
		return false
	}
	var asked optionSet
	for _, c := range q.requestList() {
		asked[c] = true
	}
	// A client that knows classless routes ignores the router (RFC 3442); one that asks for them without knowing them
	// well needs it.
	asked[optRouter] = asked[optRouter] || asked[optRoutes] || asked[optRoutesMS]
	add := func(c byte) {
		n := len(r.option[c])
		switch {
		case n == 0 || !asked[c] || set[c]:
		case size+n <= limit:
			set[c] = true
			size += n
		case c != optRoutesMS || !set[optRoutes]:
			r.left = append(r.left, c)
		}
	}
	for _, c := range byNeed {
		if c == optRoutesMS && asked[optRoutes] {
			continue // says the same once more: the first to go
		}
		add(c)
	}
	add(optRoutesMS)
	return true
}

// sizeLimit gives the bytes that a message may have: what the client accepts (option 57), in one frame.
func (r *responder) sizeLimit(q *query) int {
	limit := minMaxSize
	if len(q.maxSize) == 2 {
		limit = max(limit, int(binary.BigEndian.Uint16(q.maxSize)))
	}
	if r.lease.MTU > 0 {
		limit = min(limit, r.lease.MTU)
	}
	return limit - ipUDPLen
}

// appendOptions appends the options of a reply: the essential ones first, then in the order of the client's list, which
// a server has to try (RFC 2132, section 9.8); the client identifier comes back (RFC 6842).
func (r *responder) appendOptions(b []byte, q *query, v verdict, set *optionSet) []byte {
	b = append(b, optMessageType, 1, byte(v.kind))
	b = append(b, r.option[optServerID]...)
	if v.kind == dhcpv4.MessageTypeNak {
		b = append(b, nakMessage...)
	}
	for _, list := range [...][]byte{first, q.requestList(), {optRouter}} {
		for _, c := range list {
			if set[c] {
				set[c] = false
				b = append(b, r.option[c]...)
			}
		}
	}
	if q.clientID != nil {
		b = appendOption(b, optClientID, q.clientID)
	}
	return append(b, optEnd)
}
