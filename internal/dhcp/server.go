package dhcp

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Server answers one NIC's guest. It is used once: Run closes Conn.
type Server struct {
	Lease Lease

	// Conn is an AF_PACKET socket on the guest's TAP, with [Filter] on it: whole Ethernet frames in and out. A reply is
	// written to the address that its request came from, so any kind of address will do.
	Conn net.PacketConn

	Log *slog.Logger // nil: silent

	responder *responder // of Lease, made for the first message

	tally[Stats]
}

// Stats counts what a Server has heard and said.
type Stats struct {
	// Messages with the guest's MAC.
	Discovers uint64 `json:"discovers"`
	Requests  uint64 `json:"requests"`
	Informs   uint64 `json:"informs"`
	Declines  uint64 `json:"declines"`
	Releases  uint64 `json:"releases"`

	// Replies that were sent.
	Offers uint64 `json:"offers"`
	Acks   uint64 `json:"acks"`
	Naks   uint64 `json:"naks"`
	ARPs   uint64 `json:"arps"` // for the server identifier

	Shortened uint64 `json:"shortened"` // of OFFER and ACK: without options that the guest asked for and that did not fit
	Unsent    uint64 `json:"unsent"`    // replies that the socket did not take

	// Messages without an answer, DECLINE and RELEASE apart.
	OtherMAC    uint64 `json:"otherMAC"`    // with another hardware address than the NIC's
	OtherServer uint64 `json:"otherServer"` // with another's server identifier
	Relayed     uint64 `json:"relayed"`     // with a relay's address (giaddr)
	Ignored     uint64 `json:"ignored"`     // of any other kind

	// Frames that hold no message. What the socket's filter drops - tagged frames, fragments, other protocols and
	// ports - is not seen here, and counted nowhere.
	Malformed   uint64 `json:"malformed"`   // lengths that contradict each other, no cookie, an option cut short
	Oversize    uint64 `json:"oversize"`    // longer than the NIC's MTU
	BadChecksum uint64 `json:"badChecksum"` // of IPv4 or UDP
}

// etherMTU is the least MTU that the read buffer is made for.
const etherMTU = 1500

// Run answers until ctx ends (then nil), or the socket breaks or the lease cannot be served (an error). It closes Conn
// in any case. The socket was opened before, so nothing is lost between start and the first read.
func (s *Server) Run(ctx context.Context) error {
	defer s.Conn.Close()
	if err := s.Lease.check(); err != nil {
		return fmt.Errorf("serve DHCP: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Conn.SetDeadline(time.Unix(1, 0)) }) // long ago: wakes the read
	defer stop()
	in := make([]byte, etherHdrLen+max(s.Lease.MTU, etherMTU)+1) // a frame that fills it was longer
	var out []byte
	l := newLink(s.Conn)
	for {
		n, err := l.read(in)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve DHCP to %s: read from its TAP: %w (was the TAP removed or set down?)", s.Lease.MAC, err)
		}
		if n == len(in) {
			s.ignored(oversize, nil)
			continue
		}
		frame, sent := s.handle(out[:0], in[:n])
		if frame == nil {
			continue
		}
		out = frame
		if err := l.reply(frame); err != nil {
			// A full TAP loses a reply as a wire does; the client asks again. What lasts ends the next read.
			if n := s.count(&s.stats.Unsent); due(s.Log, n) {
				report(s.Log, slog.LevelWarn, n, "reply is lost", "err", err)
			}
			continue
		}
		s.count(sent)
	}
}

// handle gives the frame that answers one from the guest, in b's memory where it fits, and the counter to raise when it
// is sent; or nil.
func (s *Server) handle(b, frame []byte) ([]byte, *uint64) {
	if arp, ok := s.Lease.answerARP(b, frame); ok {
		return arp, &s.stats.ARPs
	}
	if s.responder == nil {
		s.responder = newResponder(&s.Lease)
	}
	var q query
	msg, why := message(frame)
	if why == "" && !q.parse(msg) {
		why = badMessage
	}
	if why != "" {
		s.ignored(why, nil)
		return nil, nil
	}
	out, kind, why := s.responder.reply(b, &q)
	s.heard(&q, why)
	if why != "" {
		return nil, nil
	}
	if left := s.responder.left; len(left) > 0 {
		if n := s.count(&s.stats.Shortened); due(s.Log, n) {
			report(s.Log, slog.LevelWarn, n, "reply leaves out options that do not fit into what the guest accepts",
				"options", fmt.Sprint(left), "bytes", s.responder.sizeLimit(&q)+ipUDPLen)
		}
	}
	return out, s.said(&q, kind)
}

// said gives the counter of a reply.
func (s *Server) said(q *query, kind dhcpv4.MessageType) *uint64 {
	switch kind {
	case dhcpv4.MessageTypeOffer:
		return &s.stats.Offers
	case dhcpv4.MessageTypeNak:
		if n := s.Stats().Naks + 1; due(s.Log, n) {
			report(s.Log, slog.LevelWarn, n, "guest asked for an address that is not its own",
				"ciaddr", q.addr(offCiaddr), "requested", option4(q.requested), "addr", s.Lease.Addr)
		}
		return &s.stats.Naks
	}
	if n := s.Stats().Acks + 1; due(s.Log, n) {
		report(s.Log, slog.LevelInfo, n, "guest is configured", "addr", s.Lease.Addr, "inform", q.kind() == dhcpv4.MessageTypeInform)
	}
	return &s.stats.Acks
}

// heard counts a message, and the silence after it.
func (s *Server) heard(q *query, why silence) {
	switch why {
	case notRequest, notEthernet, otherMAC, relayed, unknownType:
	default:
		switch q.kind() {
		case dhcpv4.MessageTypeDiscover:
			s.count(&s.stats.Discovers)
		case dhcpv4.MessageTypeRequest:
			s.count(&s.stats.Requests)
		case dhcpv4.MessageTypeInform:
			s.count(&s.stats.Informs)
		case dhcpv4.MessageTypeDecline:
			if n := s.count(&s.stats.Declines); due(s.Log, n) {
				report(s.Log, slog.LevelWarn, n, "guest declined its address: it found another host that answers for it", "addr", s.Lease.Addr)
			}
		case dhcpv4.MessageTypeRelease:
			s.count(&s.stats.Releases)
		}
	}
	if why != "" && why != nothingToDo {
		s.ignored(why, q)
	}
}

// ignored counts a message that gets no answer, or a frame (q is nil) that holds none, by the reason.
func (s *Server) ignored(why silence, q *query) {
	c := &s.stats.Ignored
	switch why {
	case otherMAC:
		c = &s.stats.OtherMAC
	case otherServer:
		c = &s.stats.OtherServer
	case relayed:
		c = &s.stats.Relayed
	case badFrame, badMessage:
		c = &s.stats.Malformed
	case oversize:
		c = &s.stats.Oversize
	case badChecksum:
		c = &s.stats.BadChecksum
	}
	n := s.count(c)
	if !due(s.Log, n) {
		return
	}
	if q == nil {
		report(s.Log, slog.LevelDebug, n, "frame holds no DHCP message", "why", string(why))
		return
	}
	report(s.Log, slog.LevelDebug, n, "message is ignored", "why", string(why), "type", q.kind())
}
