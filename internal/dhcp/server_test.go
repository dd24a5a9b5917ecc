package dhcp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// sockets are two ends of a datagram socket that carries frames, and stands for the packet socket on a TAP.
func sockets(t testing.TB) (server, guest net.PacketConn) {
	t.Helper()
	dir := t.TempDir()
	open := func(name string) net.PacketConn {
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	return open("server"), open("guest")
}

// start runs s until the test ends, and gives a function that ends it before and gives its error.
func start(t testing.TB, s interface{ Run(context.Context) error }) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	var err error
	go func() { defer close(done); err = s.Run(ctx) }()
	stop = func() error {
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Run does not end")
		}
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

func TestServer(t *testing.T) {
	conn, guest := sockets(t)
	var log bytes.Buffer
	s := &Server{Lease: full(), Conn: conn, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	s.Lease.Server = linkLocalServer
	stop := start(t, s)
	send := func(frame []byte) {
		if _, err := guest.WriteTo(frame, conn.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 2048)
	receive := func() []byte {
		guest.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, _, err := guest.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		return buf[:n]
	}
	answered := func(m *dhcpv4.DHCPv4, want dhcpv4.MessageType) {
		t.Helper()
		send(broadcast(t, m))
		if _, _, got := decode(t, receive()); got.MessageType() != want || got.TransactionID != m.TransactionID {
			t.Errorf("%s for %s", got, m)
		}
	}
	mine := opt{optRequestedIP, ip("198.51.100.2")}
	// Silence first: an answer to any of these would be read in place of the expected ones.
	send([]byte("noise"))
	send(broadcast(t, request(dhcpv4.MessageTypeDiscover))[:100])
	send(broadcast(t, request(dhcpv4.MessageTypeDecline, mine)))
	send(broadcast(t, request(dhcpv4.MessageTypeRelease)))
	send(broadcast(t, request(dhcpv4.MessageTypeOffer)))
	for range 3 {
		send(broadcast(t, with(request(dhcpv4.MessageTypeDiscover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr[5]++ })))
	}
	send(broadcast(t, request(dhcpv4.MessageTypeRequest, mine, opt{optServerID, ip("10.0.0.1")})))
	answered(request(dhcpv4.MessageTypeDiscover), dhcpv4.MessageTypeOffer)
	answered(request(dhcpv4.MessageTypeRequest, mine), dhcpv4.MessageTypeAck)
	answered(with(request(dhcpv4.MessageTypeRequest), ciaddr("198.51.100.2")), dhcpv4.MessageTypeAck)
	answered(with(request(dhcpv4.MessageTypeRequest), ciaddr("10.0.0.9")), dhcpv4.MessageTypeNak)
	answered(with(request(dhcpv4.MessageTypeInform), ciaddr("198.51.100.2")), dhcpv4.MessageTypeAck)
	send(arpFor(t, mac, linkLocalServer.AsSlice()))
	receive()
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	want := Stats{Discovers: 1, Requests: 4, Informs: 1, Declines: 1, Releases: 1, Offers: 1, Acks: 3, Naks: 1, ARPs: 1, OtherMAC: 3, OtherServer: 1, Ignored: 1, Malformed: 2}
	if got := s.Stats(); got != want {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
	if b, err := json.Marshal(want); err != nil || !strings.Contains(string(b), `"naks":1`) {
		t.Errorf("%s, %v", b, err)
	}
	for text, times := range map[string]int{
		"declined": 1, "guest is configured": 2, "not its own": 1, "holds no DHCP message": 2, string(otherServer): 1, "why=\"" + string(otherMAC): 2,
	} {
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("%q is in the log %d times, want %d (the first, second, fourth ... of a kind):\n%s", text, n, times, &log)
		}
	}
	if _, err := conn.WriteTo([]byte("x"), guest.LocalAddr()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run left the socket open: %v", err)
	}
}

func TestServerEnds(t *testing.T) {
	t.Run("before it starts", func(t *testing.T) {
		conn, _ := sockets(t)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := (&Server{Lease: full(), Conn: conn}).Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("socket breaks", func(t *testing.T) {
		conn, _ := sockets(t)
		conn.Close()
		if err := (&Server{Lease: full(), Conn: conn}).Run(context.Background()); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), mac.String()) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("lease without address", func(t *testing.T) {
		conn, _ := sockets(t)
		if err := (&Server{Lease: Lease{MAC: mac}, Conn: conn}).Run(context.Background()); err == nil {
			t.Error("served")
		}
		if err := conn.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run left the socket open: %v", err)
		}
	})
}

// A reply that cannot be sent is lost and counted; the next one goes out.
func TestServerLosesAReply(t *testing.T) {
	conn, guest := sockets(t)
	_, gone := sockets(t)
	frame := broadcast(t, request(dhcpv4.MessageTypeDiscover))
	if _, err := gone.WriteTo(frame, conn.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	gone.Close() // before the server starts
	if _, err := guest.WriteTo(frame, conn.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	s := &Server{Lease: full(), Conn: conn}
	stop := start(t, s)
	guest.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, _, err := guest.ReadFrom(make([]byte, 2048)); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if got, want := s.Stats(), (Stats{Discovers: 2, Offers: 1, Unsent: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// From frame to frame no memory is allocated, with an answer or without, once the server has seen the first.
func TestAnswersAllocateNothing(t *testing.T) {
	list := opt{optRequestList, "\x01\x1c\x02\x03\x0f\x06\x77\x0c\x1a\x79\x2a"}
	local := full()
	local.Server = linkLocalServer
	frames := map[string][]byte{
		"DISCOVER":       broadcast(t, request(dhcpv4.MessageTypeDiscover, list, opt{optClientID, "\x01abcdef"})),
		"REQUEST":        broadcast(t, request(dhcpv4.MessageTypeRequest, list, opt{optRequestedIP, ip("198.51.100.2")})),
		"renewal":        broadcast(t, with(request(dhcpv4.MessageTypeRequest, list), ciaddr("198.51.100.2"))),
		"wrong address":  broadcast(t, with(request(dhcpv4.MessageTypeRequest, list), ciaddr("198.51.100.3"))),
		"INFORM":         broadcast(t, with(request(dhcpv4.MessageTypeInform), ciaddr("198.51.100.2"))),
		"RELEASE":        broadcast(t, request(dhcpv4.MessageTypeRelease)),
		"another MAC":    broadcast(t, with(request(dhcpv4.MessageTypeDiscover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 1} })),
		"no message":     []byte("noise"),
		"ARP for server": arpFor(t, mac, linkLocalServer.AsSlice()),
	}
	frames["bad checksum"] = bytes.Clone(frames["DISCOVER"])
	frames["bad checksum"][60]++
	s := &Server{Lease: local}
	out, _ := s.handle(nil, frames["DISCOVER"])
	for name, frame := range frames {
		if n := testing.AllocsPerRun(100, func() { s.handle(out[:0], frame) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
