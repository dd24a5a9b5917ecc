package dhcp

import (
	"encoding/binary"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// More reasons for silence: those of IPv6.
const (
	badND         silence = "not a valid message of neighbour discovery"
	otherTarget   silence = "about an address that is none of ours"
	otherSource   silence = "from or for an address that is not the guest's"
	tooMany       silence = "more than a guest needs"
	noClientID    silence = "names no client"
	noServerID    silence = "names no server"
	needlessID    silence = "names a server where it may not"
	noAssociation silence = "has no address to confirm"
	assocInInform silence = "wants an address where it may not"
	notMulticast  silence = "not sent to all servers"
	notOurs       silence = "left to the guest's network"
)

// Reply gives the answer to a DHCPv6 message that the guest has sent to all servers, or nil for silence (RFC 8415,
// section 18.3). It reads nothing but its arguments, and does what Server6 does to the same message on the wire. The
// answer is no part of msg.
func (l *Lease6) Reply(msg []byte) []byte {
	var q query6
	if !q.parse(msg) {
		return nil
	}
	v, why := l.decide(&q, true)
	if why != "" {
		return nil
	}
	out, _ := l.message(&q, v)
	return out
}

// verdict6 is what a message gets.
type verdict6 struct {
	kind   dhcpv6.MessageType
	status iana.StatusCode // of the whole message
	judged bool            // status is in it, success or not
	assocs bool            // the client's associations are answered
	config bool            // what is not addresses comes with it
}

// decide is RFC 8415, section 16 for what is answered at all and 18.3 for how, for a server with one client whose
// binding is always there: its addresses are the pod's, leased or not.
func (l *Lease6) decide(q *query6, multicast bool) (verdict6, silence) {
	if why := l.admit(q, multicast); why != "" {
		return verdict6{}, why
	}
	v := verdict6{kind: dhcpv6.MessageTypeReply, config: true}
	switch q.kind {
	case dhcpv6.MessageTypeSolicit:
		v.assocs = true
		if !q.rapid {
			v.kind = dhcpv6.MessageTypeAdvertise
		}
		return v, ""
	case dhcpv6.MessageTypeInformationRequest:
		return v, ""
	case dhcpv6.MessageTypeConfirm:
		v.judged = true
		var some bool
		for _, a := range q.assocs {
			some = some || len(a.addrs) > 0
			if l.foreign(a) {
				v.status = iana.StatusNotOnLink
			}
		}
		if !some {
			return verdict6{}, noAssociation
		}
		return v, ""
	}
	// Unicast is for clients that were told to use it, which we never do (section 18.4). RFC 9915 has no unicast any more.
	if !multicast {
		return verdict6{kind: dhcpv6.MessageTypeReply, status: iana.StatusUseMulticast, judged: true}, ""
	}
	v.assocs = true
	if q.kind == dhcpv6.MessageTypeRelease || q.kind == dhcpv6.MessageTypeDecline {
		v.judged, v.config = true, false // and the address stays the pod's, and so the guest's
	}
	return v, ""
}

// admit says why a message gets no answer by what it names (RFC 8415, section 16).
func (l *Lease6) admit(q *query6, multicast bool) silence {
	need := func(client, server, toAll bool) silence {
		switch {
		case client && q.client == nil:
			return noClientID
		case server && q.server == nil:
			return noServerID
		case server && !slices.Equal(q.server, l.duid()):
			return otherServer
		case !server && q.server != nil:
			return needlessID
		case toAll && !multicast:
			return notMulticast
		}
		return ""
	}
	switch q.kind {
	case dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRebind:
		return need(true, false, true)
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		return need(true, true, false)
	case dhcpv6.MessageTypeInformationRequest: // may come without a name, and may name us (section 16.12)
		if len(q.assocs) > 0 {
			return assocInInform
		}
		return need(false, q.server != nil, true)
	}
	if relay6(q.kind) {
		return relayed
	}
	return unknownType
}

// foreign says whether an association has an address that is not the guest's. Another one of the same prefix is as
// wrong as any: the pod network carries none but the pod's.
func (l *Lease6) foreign(a assoc) bool {
	return slices.ContainsFunc(a.addrs, func(ip netip.Addr) bool { return !slices.Contains(l.Addrs, ip) })
}

// duid is our own identifier, of type DUID-LL (RFC 8415, section 11.4): it lasts as long as the NIC's MAC.
func (l *Lease6) duid() []byte {
	const typeLL, hardwareEthernet = 3, 1
	own := l.serverMAC()
	return append([]byte{0, typeLL, 0, hardwareEthernet}, own[:]...)
}

// message makes the answer. Silence: not even what every answer has fits.
func (l *Lease6) message(q *query6, v verdict6) ([]byte, silence) {
	b := append([]byte{byte(v.kind)}, q.xid[:]...)
	if q.client != nil {
		b = appendOption6(b, dhcpv6.OptionClientID, q.client)
	}
	b = appendOption6(b, dhcpv6.OptionServerID, l.duid())
	if v.kind == dhcpv6.MessageTypeAdvertise {
		// Nobody else is there to answer: the client need not wait for others (RFC 8415, section 18.2.1).
		b = appendOption6(b, dhcpv6.OptionPreference, []byte{math.MaxUint8})
	}
	if q.kind == dhcpv6.MessageTypeSolicit && v.kind == dhcpv6.MessageTypeReply {
		b = appendOption6(b, dhcpv6.OptionRapidCommit, nil)
	}
	if v.judged {
		b = appendStatus(b, v.status)
	}
	if v.assocs {
		var given bool // the first association has the addresses
		for _, a := range q.assocs {
			mine := a.code == dhcpv6.OptionIANA && !given
			given = given || mine
			b = l.appendAssoc(b, q.kind, a, mine)
		}
	}
	limit := l.room() - udpHdrLen
	if v.config {
		b = l.appendConfig(b, q, limit)
	}
	if len(b) > limit {
		return nil, tooBig
	}
	return b, ""
}

// appendAssoc answers one association; mine says that it is the one that has the guest's addresses. All of these are in
// one: a client that knows a single association would not hear of others.
func (l *Lease6) appendAssoc(b []byte, kind dhcpv6.MessageType, a assoc, mine bool) []byte {
	head := append([]byte(nil), a.id[:]...)
	if a.code != dhcpv6.OptionIATA {
		head = append(head, make([]byte, timesLen)...)
	}
	refuse := func(s iana.StatusCode) []byte { return appendOption6(b, a.code, appendStatus(head, s)) }
	switch kind {
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		if mine && !l.foreign(a) {
			return b // success, as the message says
		}
		return refuse(iana.StatusNoBinding)
	case dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRebind:
		if !mine {
			return refuse(iana.StatusNoBinding)
		}
	default:
		switch {
		case a.code == dhcpv6.OptionIAPD:
			return refuse(iana.StatusNoPrefixAvail)
		case !mine:
			return refuse(iana.StatusNoAddrsAvail)
		case kind == dhcpv6.MessageTypeRequest && l.foreign(a):
			return refuse(iana.StatusNotOnLink)
		}
	}
	life := seconds(l.Duration, 1, 1)
	binary.BigEndian.PutUint32(head[iaidLen:], seconds(l.Duration, 1, 2)) // T1 and T2 as RFC 8415, section 21.4, recommends
	binary.BigEndian.PutUint32(head[iaidLen+4:], seconds(l.Duration, 4, 5))
	for _, ip := range l.Addrs {
		head = appendAddr6(head, ip, life)
	}
	if kind != dhcpv6.MessageTypeSolicit { // where they are no more than a wish
		for _, ip := range a.addrs {
			if !slices.Contains(l.Addrs, ip) {
				head = appendAddr6(head, ip, 0) // the client is to drop it (section 18.3.4)
			}
		}
	}
	return appendOption6(b, a.code, head)
}

// appendAddr6 appends an address with its preferred and its valid lifetime, in seconds.
func appendAddr6(b []byte, ip netip.Addr, life uint32) []byte {
	v := binary.BigEndian.AppendUint32(ip.AsSlice(), life)
	return appendOption6(b, dhcpv6.OptionIAAddr, binary.BigEndian.AppendUint32(v, life))
}

func appendStatus(b []byte, s iana.StatusCode) []byte {
	return appendOption6(b, dhcpv6.OptionStatusCode, binary.BigEndian.AppendUint16(nil, uint16(s)))
}

// appendConfig appends what the client asks for beside addresses, as much as fits: a list is cut, and the guest has it
// whole from the router advertisements.
func (l *Lease6) appendConfig(b []byte, q *query6, limit int) []byte {
	add := func(code dhcpv6.OptionCode, items [][]byte) {
		var v []byte
		for _, item := range items {
			if len(b)+option6HdrLen+len(v)+len(item) > limit {
				break
			}
			v = append(v, item...)
		}
		if len(v) > 0 && q.asks(code) {
			b = appendOption6(b, code, v)
		}
	}
	var servers, names [][]byte
	for _, s := range l.DNS.Servers {
		servers = append(servers, s.AsSlice())
	}
	for _, s := range l.search() {
		names = append(names, appendName(nil, s))
	}
	if q.kind == dhcpv6.MessageTypeInformationRequest {
		add(dhcpv6.OptionInformationRefreshTime, [][]byte{binary.BigEndian.AppendUint32(nil, seconds(l.Duration, 1, 1))})
	}
	if q.fqdn != nil {
		add(dhcpv6.OptionFQDN, [][]byte{l.fqdn(q.fqdn[0])})
	}
	add(dhcpv6.OptionDNSRecursiveNameServer, servers)
	add(dhcpv6.OptionDomainSearchList, names)
	return b
}

// fqdn tells the guest its name; a name of one label is a partial one, without the final zero. We enter none into any
// DNS, and say so (RFC 4704, sections 4.1 and 6).
func (l *Lease6) fqdn(client byte) []byte {
	const serverUpdates, overrides, noUpdates = 1, 2, 4 // flags S, O, N
	if l.Hostname == "" {
		return nil
	}
	flags := byte(noUpdates)
	if client&serverUpdates != 0 {
		flags |= overrides
	}
	v := appendName([]byte{flags}, l.Hostname)
	if !strings.Contains(l.Hostname, ".") {
		v = v[:len(v)-1]
	}
	return v
}
