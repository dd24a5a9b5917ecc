package dhcp

import (
	"encoding/binary"
	"math"
	"net"
	"net/netip"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
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
	optNTP         = 42
	optRequestedIP = 50
	optLeaseTime   = 51
	optOverload    = 52
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
		optMask, optRouter, optRoutes, optRoutesMS, optDNS, optMTU, optDomain, optSearch, optHostname, optNTP, optBroadcast,
	}

	// first is what follows the message type, which some clients look for at the front, and the server identifier. The
	// mask has to come before the router (RFC 2132, section 3.3).
	first = []byte{optLeaseTime, optT1, optT2, optMask}
)

// Sizes in bytes.
const (
	headerLen  = 236                     // of a BOOTP message (RFC 951), before the cookie
	cookieLen  = 4                       // RFC 2131, section 3
	minBOOTP   = 300                     // RFC 951; relays and old clients drop shorter ones
	minMaxSize = 576                     // what every client accepts, as an IP datagram (RFC 2131, section 2; RFC 2132, section 9.10)
	ipUDPLen   = ipHeaderLen + udpHdrLen // what of that is not the message
)

// encode gives an option as it is on the wire, or nil where the lease has nothing to say.
func (l *Lease) encode(code byte) []byte {
	if code == optRoutes || code == optRoutesMS {
		return l.routes(code)
	}
	if v := l.value(code); len(v) > 0 {
		return appendOption(nil, code, v)
	}
	return nil
}

// value gives the bytes of an option other than the routes, or nil.
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
	case optNTP:
		return appendAddrs(nil, l.NTP...)
	case optServerID:
		return appendAddrs(nil, l.Server)
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

// routes encodes the routes (RFC 3442). A list too long for one option is split between two routes: systemd-networkd
// reads every piece by itself, and loses the rest of one that ends within a route (systemd #36883).
func (l *Lease) routes(code byte) (b []byte) {
	var piece []byte
	for _, r := range l.Routes {
		route := encodeRoute(r)
		if len(piece)+len(route) > maxOptionLen {
			b = appendOption(b, code, piece)
			piece = piece[:0]
		}
		piece = append(piece, route...)
	}
	if len(piece) > 0 {
		b = appendOption(b, code, piece)
	}
	return b
}

// encodeRoute gives prefix length, the bytes of the prefix that it covers, gateway. The gateway of an on-link route is
// 0.0.0.0.
func encodeRoute(r nic.Route) []byte {
	if !r.Dst.IsValid() || !r.Dst.Addr().Is4() || r.Gw.IsValid() && !r.Gw.Is4() {
		return nil
	}
	dst, gw := r.Dst.Masked().Addr().As4(), netip.IPv4Unspecified()
	if !r.OnLink() {
		gw = r.Gw
	}
	b := append([]byte{byte(r.Dst.Bits())}, dst[:(r.Dst.Bits()+7)/8]...)
	return appendAddrs(b, gw)
}

// infinity is a lease time without end (RFC 2131, section 3.3).
const infinity = math.MaxUint32

// seconds is a fraction of the lease time.
func (l *Lease) seconds(num, den int64) uint32 { return seconds(l.Duration, num, den) }

// seconds is a fraction of d as DHCP has it, a second at least. There is no fraction of an endless time.
func seconds(d time.Duration, num, den int64) uint32 {
	s := int64(d / time.Second)
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

// appendOption encodes an option. A value too long for one length byte goes into options of the same code, one after the
// other (RFC 3396).
func appendOption(b []byte, code byte, v []byte) []byte {
	for len(v) > maxOptionLen {
		b = append(append(b, code, maxOptionLen), v[:maxOptionLen]...)
		v = v[maxOptionLen:]
	}
	return append(append(b, code, byte(len(v))), v...)
}
