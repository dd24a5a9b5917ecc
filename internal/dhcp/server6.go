package dhcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/mdlayher/packet"
)

// Server6 advertises routers to one NIC's guest, answers it by DHCPv6, and lets it find the gateway. It is used once:
// Run closes Conn and Uplink.
type Server6 struct {
	Lease Lease6

	NoDHCP bool // leave DHCPv6 to servers of the guest's network
	NoRA   bool // leave advertisements to its routers

	// Conn is an AF_PACKET socket on the guest's TAP, with [Lease6.Filter] on it: whole Ethernet frames in and out.
	Conn net.PacketConn

	// Uplink takes frames as if the guest had sent them, one with each Write: questions for the MAC of a gateway. Only a
	// lease whose gateway has no link-local address needs it.
	Uplink io.WriteCloser

	Interval time.Duration // between advertisements that nobody asked for; 0 stands for AdvertInterval
	Log      *slog.Logger  // nil: silent

	adverts [][]byte // of Lease
	rate    bucket   // of Uplink

	tally[Stats6]
}

// Stats6 counts what a Server6 has heard and said.
type Stats6 struct {
	// Messages with the guest's MAC.
	Solicits       uint64 `json:"solicits"`
	Requests       uint64 `json:"requests"`
	Confirms       uint64 `json:"confirms"`
	Renews         uint64 `json:"renews"`
	Rebinds        uint64 `json:"rebinds"`
	Declines       uint64 `json:"declines"`
	Releases       uint64 `json:"releases"`
	Informs        uint64 `json:"informs"`
	RouterSolicits uint64 `json:"routerSolicits"`

	// What was sent.
	Advertises    uint64 `json:"advertises"`    // of DHCPv6
	Replies       uint64 `json:"replies"`       // of DHCPv6
	RouterAdverts uint64 `json:"routerAdverts"` // frames; several where one does not hold all
	GatewayAsks   uint64 `json:"gatewayAsks"`   // neighbour solicitations that were turned into ones for a gateway
	GatewayTells  uint64 `json:"gatewayTells"`  // neighbour advertisements of a gateway that the guest was given in its terms

	Ignored   uint64 `json:"ignored"`   // messages without an answer: another MAC, another server ...
	Malformed uint64 `json:"malformed"` // frames that hold no message
	Unsent    uint64 `json:"unsent"`    // frames that a socket did not take
}

// farewell bounds how long Run tries to say goodbye.
const farewell = time.Second

// Run advertises and answers until ctx ends (then nil, and the guest is told that its routers go), or the socket breaks
// or the lease cannot be served (an error). It closes Conn and Uplink in any case. The socket was opened before, so
// nothing is lost between start and the first read.
func (s *Server6) Run(ctx context.Context) error {
	defer s.Conn.Close()
	if s.Uplink != nil {
		defer s.Uplink.Close()
	}
	if err := s.Lease.check(); err != nil {
		return fmt.Errorf("serve IPv6: %w", err)
	}
	if ctx.Err() != nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Conn.SetReadDeadline(time.Unix(1, 0)) }) // long ago: wakes the read
	defer stop()
	if !s.NoRA {
		s.adverts = s.Lease.adverts(false)
	}
	interval := s.Interval
	if interval <= 0 {
		interval = AdvertInterval
	}
	in := make([]byte, etherHdrLen+max(s.Lease.MTU, etherMTU))
	for ctx.Err() == nil {
		s.send(&s.stats.RouterAdverts, s.adverts...)
		if err := s.answer(ctx, in, time.Now().Add(interval)); err != nil {
			return fmt.Errorf("serve IPv6 to %s: read from its TAP: %w (was the TAP removed or set down?)", s.Lease.MAC, err)
		}
	}
	if !s.NoRA {
		_ = s.Conn.SetWriteDeadline(time.Now().Add(farewell))
		s.send(&s.stats.RouterAdverts, s.Lease.adverts(true)...)
	}
	return nil
}

// answer answers until it is time for something else, or ctx ends.
func (s *Server6) answer(ctx context.Context, in []byte, until time.Time) error {
	if err := s.Conn.SetReadDeadline(until); err != nil {
		return err
	}
	for ctx.Err() == nil { // asked after the deadline is set, which would otherwise undo the one that ctx has set
		n, _, err := s.Conn.ReadFrom(in)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		s.handle(in[:n])
	}
	return nil
}

// handle does what a frame asks for. Which direction it came in the socket's filter has seen to: an advertisement of a
// neighbour is one for the guest, all else is from it.
func (s *Server6) handle(frame []byte) {
	p, ok := parse6(frame)
	msg, dhcp := []byte(nil), false
	if ok {
		msg, dhcp = p.message6()
	}
	switch {
	case dhcp && s.NoDHCP, ok && p.proto == protoICMPv6 && s.NoRA:
		s.ignore(notOurs, "message")
	case dhcp:
		s.dhcp(&p, msg)
	case !ok || p.proto != protoICMPv6:
		s.malformed(frame)
	case p.payload[0] == typeRouterSolicit:
		to, dst, why := s.Lease.solicited(&p)
		if why != "" {
			s.ignore(why, "router solicitation")
			return
		}
		s.count(&s.stats.RouterSolicits)
		for _, f := range s.adverts {
			s.send(&s.stats.RouterAdverts, readdress(f, to, dst))
		}
	case p.payload[0] == typeNeighborSolicit:
		out, why := s.Lease.asks(&p)
		if why == "" && !s.rate.take(time.Now()) {
			why = tooMany
		}
		if why != "" {
			s.ignore(why, "neighbour solicitation")
			return
		}
		s.ask(out)
	case p.payload[0] == typeNeighborAdvert:
		out, why := s.Lease.answers(&p)
		if why != "" {
			s.ignore(why, "neighbour advertisement")
			return
		}
		s.send(&s.stats.GatewayTells, out)
	default:
		s.malformed(frame)
	}
}

// dhcp answers a DHCPv6 message.
func (s *Server6) dhcp(p *packet6, msg []byte) {
	var q query6
	switch {
	case !q.parse(msg):
		s.malformed(msg)
		return
	case p.from != s.Lease.MAC:
		s.ignore(otherMAC, q.kind)
		return
	case !s.Lease.guestAddr(p.src):
		s.ignore(otherSource, q.kind)
		return
	}
	if c := s.heard(q.kind); c != nil {
		if n := s.count(c); q.kind == dhcpv6.MessageTypeDecline && due(s.Log, n) {
			report(s.Log, slog.LevelWarn, n, "guest declined its addresses: it found another host that answers for one", "addrs", s.Lease.Addrs)
		}
	}
	v, why := s.Lease.decide(&q, p.dst == allServers)
	var out []byte
	if why == "" {
		out, why = s.Lease.message(&q, v)
	}
	if why != "" {
		s.ignore(why, q.kind)
		return
	}
	sent := &s.stats.Replies
	if v.kind == dhcpv6.MessageTypeAdvertise {
		sent = &s.stats.Advertises
	}
	s.send(sent, s.Lease.datagram6(p.src, out))
	if n := s.Stats().Replies; v.kind == dhcpv6.MessageTypeReply && due(s.Log, n) {
		report(s.Log, slog.LevelInfo, n, "guest is answered", "type", q.kind, "addrs", s.Lease.Addrs)
	}
}

// heard gives the counter of a client's message.
func (s *Server6) heard(kind dhcpv6.MessageType) *uint64 {
	counters := [...]*uint64{
		dhcpv6.MessageTypeSolicit:            &s.stats.Solicits,
		dhcpv6.MessageTypeRequest:            &s.stats.Requests,
		dhcpv6.MessageTypeConfirm:            &s.stats.Confirms,
		dhcpv6.MessageTypeRenew:              &s.stats.Renews,
		dhcpv6.MessageTypeRebind:             &s.stats.Rebinds,
		dhcpv6.MessageTypeRelease:            &s.stats.Releases,
		dhcpv6.MessageTypeDecline:            &s.stats.Declines,
		dhcpv6.MessageTypeInformationRequest: &s.stats.Informs,
	}
	if int(kind) >= len(counters) {
		return nil
	}
	return counters[kind]
}

// ask sends a question out to the cluster.
func (s *Server6) ask(frame []byte) {
	if s.Uplink == nil {
		s.count(&s.stats.Unsent)
		return
	}
	_, err := s.Uplink.Write(frame)
	s.sent(&s.stats.GatewayAsks, err)
}

// send sends frames to the guest, and counts each.
func (s *Server6) send(c *uint64, frames ...[]byte) {
	for _, f := range frames {
		// The address is of no meaning to a socket that takes whole frames of one link, but has to be there.
		_, err := s.Conn.WriteTo(f, &packet.Addr{HardwareAddr: s.Lease.MAC.HardwareAddr()})
		s.sent(c, err)
	}
}

// sent counts a frame, or its loss. A full TAP loses frames as a wire does; the guest asks again. What lasts ends the
// next read.
func (s *Server6) sent(c *uint64, err error) {
	if err == nil {
		s.count(c)
		return
	}
	if n := s.count(&s.stats.Unsent); due(s.Log, n) {
		report(s.Log, slog.LevelWarn, n, "frame is lost", "err", err)
	}
}

func (s *Server6) ignore(why silence, what any) {
	if n := s.count(&s.stats.Ignored); due(s.Log, n) {
		report(s.Log, slog.LevelDebug, n, "message is ignored", "why", string(why), "type", what)
	}
}

func (s *Server6) malformed(b []byte) {
	if n := s.count(&s.stats.Malformed); due(s.Log, n) {
		report(s.Log, slog.LevelDebug, n, "frame is no message", "bytes", len(b))
	}
}
