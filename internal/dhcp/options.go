package dhcp

import (
	"encoding/binary"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Option codes: RFC 2132, but for 119 (RFC 3397), 121 (RFC 3442) and 249, under which Windows asked for 121 before
// the RFC and still does beside it.
const (
	optMask        = 1
	optRouter      = 3
	optDNS         = 6
	optHostname    = 12
	optDomain      = 15
	optMTU         = 26
	optBroadcast   = 28
	optRequestedIP = 50
	optLeaseTime   = 51
	optMessageType = 53
	optServerID    = 54
	optRequestList = 55
	optMessage     = 56
	optMaxSize     = 57
	optT1          = 58
	optT2          = 59
	optClientID    = 61
	optSearch      = 119
	optRoutes      = 121
	optRoutesMS    = 249
	optPad         = 0
	optEnd         = 255
)

var (
	// leaseSet goes with every address, asked for or not: without a mask a client would make one up from the class of
	// the address, and without T1 and T2 it may choose odd ones.
	leaseSet = []byte{optLeaseTime, optT1, optT2, optMask}

	// baseSet goes to a client that sends no parameter request list.
	baseSet = []byte{optMask, optRouter, optDNS, optHostname, optDomain, optMTU, optRoutes}

	// byNeed orders what a client may ask for by what a guest can do without least. A reply too small for all leaves
	// out the last ones.
	byNeed = []byte{
		optMask, optRouter, optRoutes, optRoutesMS, optDNS, optMTU, optDomain, optSearch, optHostname, optBroadcast,
	}

	// first is where replies start: some clients look for the message type at the front, and the mask has to come
	// before the router (RFC 2132, section 3.3).
	first = []byte{optMessageType, optServerID, optLeaseTime, optT1, optT2, optMask}
)

// Sizes in bytes.
const (
	headerLen  = 236                     // of a BOOTP message (RFC 951), before the cookie
	cookieLen  = 4                       // RFC 2131, section 3
	minBOOTP   = 300                     // RFC 951; relays and old clients drop shorter ones
	minMaxSize = 576                     // what every client accepts, as an IP datagram (RFC 2131, section 2; RFC 2132, section 9.10)
	ipUDPLen   = ipHeaderLen + udpHdrLen // what of that is not the message
)

// requestList gives what the client asks for, in its order.
func requestList(req *dhcpv4.DHCPv4) []byte {
	if list := req.Options[optRequestList]; len(list) > 0 {
		return list
	}
	return baseSet
}

// fill adds the options that the client asks for, as far as they fit.
func (l *Lease) fill(resp, req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, silence) {
	var asked [256]bool
	for _, c := range requestList(req) {
		asked[c] = true
	}
	// A client that knows classless routes ignores the router (RFC 3442); one that asks for them without knowing them
	// well needs it.
	asked[optRouter] = asked[optRouter] || asked[optRoutes] || asked[optRoutesMS]
	size, limit := optionsLen(resp.Options)+headerLen+cookieLen+1, l.sizeLimit(req)
	if size > limit {
		return nil, tooBig
	}
	add := func(c byte) {
		if _, has := resp.Options[c]; has || !asked[c] {
			return
		}
		v := l.value(c)
		if n := optionLen(v); len(v) > 0 && size+n <= limit {
			resp.Options[c] = v
			size += n
		}
	}
	for _, c := range byNeed {
		if c == optRoutesMS && asked[optRoutes] {
			continue // says the same once more: the first to go
		}
		add(c)
	}
	add(optRoutesMS)
	return resp, ""
}

// sizeLimit gives the bytes that a reply may have: what the client accepts (option 57), in one frame.
func (l *Lease) sizeLimit(req *dhcpv4.DHCPv4) int {
	limit := minMaxSize
	if v := req.Options[optMaxSize]; len(v) == 2 {
		limit = max(limit, int(binary.BigEndian.Uint16(v)))
	}
	if l.MTU > 0 {
		limit = min(limit, l.MTU)
	}
	return limit - ipUDPLen
}

// value gives an option's bytes, or nil where the lease has nothing to say.
func (l *Lease) value(code byte) []byte {
	switch code {
	case optMask:
		return net.CIDRMask(l.Addr.Bits(), 32)
	case optRouter:
		return appendAddrs(nil, l.Router)
	case optDNS:
		return appendAddrs(nil, l.DNS.Servers...)
	case optHostname:
		return []byte(l.Hostname)
	case optDomain:
		// A client that knows no search list still completes names by the first one.
		if l.DNS.Domain == "" && len(l.DNS.Search) > 0 {
			return []byte(l.DNS.Search[0])
		}
		return []byte(l.DNS.Domain)
	case optSearch:
		return appendNames(nil, l.DNS.Search)
	case optMTU:
		if l.MTU < 68 || l.MTU > math.MaxUint16 { // the least that IPv4 allows (RFC 2132, section 5.1)
			return nil
		}
		return binary.BigEndian.AppendUint16(nil, uint16(l.MTU))
	case optBroadcast:
		return l.broadcast()
	case optRoutes, optRoutesMS:
		return l.routes()
	case optLeaseTime:
		return binary.BigEndian.AppendUint32(nil, l.seconds(1, 1))
	case optT1: // RFC 2131, section 4.4.5
		return l.timer(1, 2)
	case optT2:
		return l.timer(7, 8)
	}
	return nil
}

// broadcast is the last address of the subnet; /31 (RFC 3021) and /32 have none.
func (l *Lease) broadcast() []byte {
	bits := l.Addr.Bits()
	if bits > 30 {
		return nil
	}
	a := l.Addr.Addr().As4()
	return binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(a[:])|math.MaxUint32>>bits)
}

// routes encodes the routes (RFC 3442): prefix length, the bytes of the prefix that it covers, gateway. The gateway of
// an on-link route is 0.0.0.0.
func (l *Lease) routes() []byte {
	var b []byte
	for _, r := range l.Routes {
		if !r.Dst.IsValid() || !r.Dst.Addr().Is4() || r.Gw.IsValid() && !r.Gw.Is4() {
			continue
		}
		dst, gw := r.Dst.Masked().Addr().As4(), netip.IPv4Unspecified()
		if !r.OnLink() {
			gw = r.Gw
		}
		b = append(b, byte(r.Dst.Bits()))
		b = append(b, dst[:(r.Dst.Bits()+7)/8]...)
		b = appendAddrs(b, gw)
	}
	return b
}

// infinity is a lease time without end (RFC 2131, section 3.3).
const infinity = math.MaxUint32

// seconds is a fraction of the lease time.
func (l *Lease) seconds(num, den int64) uint32 {
	s := int64(l.Duration / time.Second)
	if s >= infinity {
		return infinity
	}
	return uint32(max(s, 1) * num / den)
}

// timer is seconds for T1 and T2, which an endless lease does not have.
func (l *Lease) timer(num, den int64) []byte {
	s := l.seconds(num, den)
	if s == infinity {
		return nil
	}
	return binary.BigEndian.AppendUint32(nil, s)
}

// appendAddrs appends addresses of four bytes; others are left out (one of sixteen makes Windows drop the lease).
func appendAddrs(b []byte, addrs ...netip.Addr) []byte {
	for _, a := range addrs {
		if a.Is4() {
			b = append(b, a.AsSlice()...)
		}
	}
	return b
}

// maxOptionLen is what the length byte of an option can say.
const maxOptionLen = 255

// optionLen is the size of an option on the wire, with the headers of the pieces that a long one is split into.
func optionLen(v []byte) int {
	pieces := max(1, (len(v)+maxOptionLen-1)/maxOptionLen)
	return len(v) + 2*pieces
}

func optionsLen(o dhcpv4.Options) int {
	n := 0
	for _, v := range o {
		n += optionLen(v)
	}
	return n
}

// appendOptions encodes options with the essential ones first and then in the order of the client's list, which a
// server has to try (RFC 2132, section 9.8), and closes them. The codec sorts by code.
func appendOptions(b []byte, o dhcpv4.Options, list []byte) []byte {
	var done [256]bool
	done[optPad], done[optEnd] = true, true
	put := func(c byte) {
		v, ok := o[c]
		if !ok || done[c] {
			return
		}
		done[c] = true
		// RFC 3396: a value too long for one length byte goes into options of the same code, one after the other.
		for piece := range slices.Chunk(v, maxOptionLen) {
			b = append(append(b, c, byte(len(piece))), piece...)
		}
		if len(v) == 0 {
			b = append(b, c, 0)
		}
	}
	for _, c := range first {
		put(c)
	}
	for _, c := range list {
		put(c)
	}
	for c := range done {
		put(byte(c))
	}
	return append(b, optEnd)
}
