package dhcp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv6"

	"github.com/virtlet/virtlet/internal/nic"
)

// tapEnd stands for the packet socket on a TAP: whatever is written to it arrives at the guest.
type tapEnd struct {
	net.PacketConn
	guest net.Addr
}

func (e tapEnd) WriteTo(b []byte, _ net.Addr) (int, error) { return e.PacketConn.WriteTo(b, e.guest) }

// uplink keeps what goes to the cluster.
type uplink struct {
	mu     sync.Mutex
	frames [][]byte
	closed bool
	err    error
}

func (u *uplink) Write(b []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.frames = append(u.frames, slices.Clone(b))
	return len(b), u.err
}

func (u *uplink) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	return nil
}

// wire6 is a server between a guest's socket and an uplink.
type wire6 struct {
	t     testing.TB
	tap   tapEnd
	guest net.PacketConn
	up    *uplink
}

func newWire6(t testing.TB) *wire6 {
	conn, guest := sockets(t)
	return &wire6{t: t, tap: tapEnd{conn, guest.LocalAddr()}, guest: guest, up: &uplink{}}
}

func (w *wire6) send(frame []byte) {
	w.t.Helper()
	if _, err := w.guest.WriteTo(frame, w.tap.LocalAddr()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *wire6) receive() []byte {
	w.t.Helper()
	buf := make([]byte, 2048)
	w.guest.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, _, err := w.guest.ReadFrom(buf)
	if err != nil {
		w.t.Fatal(err)
	}
	return buf[:n]
}

// advert reads an advertisement and gives its source and lifetime in seconds.
func (w *wire6) advert() (netip.Addr, uint16, net.IP) {
	w.t.Helper()
	p, _, ip := packet6s(w.t, w.receive())
	ra, _ := p.Layer(layers.LayerTypeICMPv6RouterAdvertisement).(*layers.ICMPv6RouterAdvertisement)
	if ra == nil {
		w.t.Fatalf("want an advertisement: %s", p)
	}
	src, _ := netip.AddrFromSlice(ip.SrcIP)
	return src, ra.RouterLifetime, ip.DstIP
}

func TestServer6(t *testing.T) {
	w := newWire6(t)
	var log bytes.Buffer
	l := full6()
	s := &Server6{Lease: l, Conn: w.tap, Uplink: w.up, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	stop := start(t, s)
	adverts := func(dst netip.Addr, lifetime uint16) {
		t.Helper()
		for i, r := range l.Routers {
			want := lifetime
			if i > 0 {
				want = 0
			}
			if src, life, to := w.advert(); src != r.Source || life != want || !to.Equal(dst.AsSlice()) {
				t.Errorf("advertisement %d from %s for %d s to %s", i, src, life, to)
			}
		}
	}
	answered := func(m *dhcpv6.Message, want dhcpv6.MessageType) {
		t.Helper()
		w.send(datagram6(t, allServers, m.ToBytes()))
		if _, ip, got := decode6(t, w.receive()); got.MessageType != want || got.TransactionID != m.TransactionID || !ip.SrcIP.Equal(l.Server.AsSlice()) || !ip.DstIP.Equal(guestLocal.AsSlice()) {
			t.Errorf("%s for %s", got, m)
		}
	}
	adverts(allNodes, 9000)
	// Silence first: an answer to any of these would be read in place of the expected ones.
	w.send([]byte("noise"))
	w.send(datagram6(t, allServers, []byte{1, 2, 3}))
	stranger := datagram6(t, allServers, request6(dhcpv6.MessageTypeSolicit, iaNA(1)).ToBytes())
	w.send(alter(stranger, 11, 0x77))
	w.send(datagram6(t, allServers, append([]byte{byte(dhcpv6.MessageTypeRelayForward)}, make([]byte, 33)...)))
	w.send(routerSolicit(t, netip.MustParseAddr("2001:db8::77"), nil))
	w.send(solicit(t, netip.IPv6Unspecified(), l.Routers[0].Source, nic.MAC{}))
	w.send(solicit(t, guest6, l.Routers[0].Source, nic.MAC{}))
	w.send(icmp(t, mac, gatewayMAC, guest6, gateway6, 128, &layers.ICMPv6Echo{}))
	na := tell(t, guest6, netip.MustParseAddr("2001:db8::77"), 0x60, nil)
	w.send(na)

	answered(request6(dhcpv6.MessageTypeSolicit, iaNA(1)), dhcpv6.MessageTypeAdvertise)
	answered(request6(dhcpv6.MessageTypeSolicit, iaNA(1), rapid), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeRequest, serverID(0), iaNA(1)), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeConfirm, iaNA(1, "2001:db8::2")), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeRenew, serverID(0), iaNA(1, "2001:db8::2")), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeRebind, iaNA(1, "2001:db8::2")), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeDecline, serverID(0), iaNA(1, "2001:db8::2")), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeRelease, serverID(0), iaNA(1, "2001:db8::2")), dhcpv6.MessageTypeReply)
	answered(request6(dhcpv6.MessageTypeInformationRequest), dhcpv6.MessageTypeReply)
	w.send(routerSolicit(t, guestLocal, nil))
	adverts(guestLocal, 9000)
	w.send(tell(t, guest6, gateway6, 0x60, linkOption(layers.ICMPv6OptTargetAddress, gatewayMAC)))
	if p, _, _ := packet6s(t, w.receive()); p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement) == nil {
		t.Errorf("the gateway's answer: %s", p)
	}
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	adverts(allNodes, 0)

	want := Stats6{
		Solicits: 2, Requests: 1, Confirms: 1, Renews: 1, Rebinds: 1, Declines: 1, Releases: 1, Informs: 1, RouterSolicits: 1,
		Advertises: 1, Replies: 8, RouterAdverts: 9, GatewayAsks: 1, GatewayTells: 1, Ignored: 5, Malformed: 3,
	}
	if got := s.Stats(); got != want {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
	if b, err := json.Marshal(want); err != nil || !strings.Contains(string(b), `"gatewayAsks":1`) {
		t.Errorf("%s, %v", b, err)
	}
	if len(w.up.frames) != 1 || !w.up.closed {
		t.Errorf("%d frames for the cluster, closed: %v", len(w.up.frames), w.up.closed)
	}
	for text, times := range map[string]int{"declined": 1, "guest is answered": 4, "no message": 2, string(otherMAC): 1} {
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("%q is in the log %d times, want %d (the first, second, fourth ... of a kind):\n%s", text, n, times, &log)
		}
	}
	if _, err := w.tap.WriteTo([]byte("x"), nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run left the socket open: %v", err)
	}
}

// The server repeats itself, also while a guest floods it with noise.
func TestServer6Repeats(t *testing.T) {
	w := newWire6(t)
	l := full6()
	l.Routers = l.Routers[:1]
	s := &Server6{Lease: l, Conn: w.tap, Uplink: w.up, Interval: 10 * time.Millisecond}
	start(t, s)
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-over:
				return
			default:
				_, _ = w.guest.WriteTo([]byte("noise"), w.tap.LocalAddr())
			}
		}
	}()
	for range 5 {
		w.advert()
	}
	close(over)
	<-done
}

func TestServer6Ends(t *testing.T) {
	t.Run("before it starts", func(t *testing.T) {
		w := newWire6(t)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s := &Server6{Lease: full6(), Conn: w.tap, Uplink: w.up}
		if err := s.Run(ctx); err != nil || s.Stats() != (Stats6{}) || !w.up.closed {
			t.Errorf("%v, %+v", err, s.Stats())
		}
	})
	t.Run("socket breaks", func(t *testing.T) {
		w := newWire6(t)
		w.tap.Close()
		if err := (&Server6{Lease: full6(), Conn: w.tap}).Run(context.Background()); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), mac.String()) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Run("lease without address", func(t *testing.T) {
		w := newWire6(t)
		if err := (&Server6{Lease: Lease6{MAC: mac}, Conn: w.tap, Uplink: w.up}).Run(context.Background()); err == nil || !w.up.closed {
			t.Errorf("served, or left the uplink open: %v", err)
		}
	})
}

// What a socket does not take is lost and counted; a guest cannot make the server flood the cluster.
func TestServer6Loses(t *testing.T) {
	w := newWire6(t)
	s := &Server6{Lease: full6(), Conn: w.tap}
	ask := solicit(t, guest6, s.Lease.Routers[0].Source, nic.MAC{})
	s.handle(ask)
	s.Uplink = &uplink{err: io.ErrClosedPipe}
	s.handle(ask)
	w.tap.Close()
	s.handle(datagram6(t, allServers, request6(dhcpv6.MessageTypeSolicit, iaNA(1)).ToBytes()))
	if got, want := s.Stats(), (Stats6{Solicits: 1, Unsent: 3}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	s.Uplink = w.up
	began := time.Now()
	for range 1000 {
		s.handle(ask)
	}
	most := askBurst + int(time.Since(began)/askPeriod) + 1
	if got := s.Stats(); got.GatewayAsks == 0 || got.GatewayAsks > uint64(most) || got.GatewayAsks+got.Ignored != 1000 {
		t.Errorf("more than %d of a thousand went out: %+v", most, got)
	}
}

// sink is a TAP that takes everything.
type sink struct {
	net.PacketConn
	frames [][]byte
}

func (s *sink) WriteTo(b []byte, _ net.Addr) (int, error) {
	s.frames = append(s.frames, slices.Clone(b))
	return len(b), nil
}

// What a guest can send in any number and gets no answer for costs no memory.
func TestServer6IgnoresForFree(t *testing.T) {
	s := &Server6{Lease: full6(), Conn: discard{}}
	ask := solicit(t, guest6, s.Lease.Routers[0].Source, nic.MAC{})
	for name, frame := range map[string][]byte{
		"noise":               []byte("noise"),
		"solicits in vain":    solicit(t, guest6, gateway6, nic.MAC{}),
		"another MAC":         alter(ask, 11, 0x77),
		"bad checksum":        alter(ask, 56, ask[56]+1),
		"router solicitation": hops(routerSolicit(t, guestLocal, nil), 1),
		"cut message":         datagram6(t, allServers, []byte{1}),
	} {
		if n := testing.AllocsPerRun(100, func() { s.handle(frame) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// What the network answers itself is not answered here.
func TestLeftToTheNetwork(t *testing.T) {
	solicit := datagram6(t, allServers, request6(dhcpv6.MessageTypeSolicit).ToBytes())
	for _, c := range []struct{ noDHCP, noRA bool }{{false, true}, {true, false}, {true, true}} {
		w := newWire6(t)
		s := &Server6{Lease: full6(), Conn: w.tap, Uplink: w.up, NoDHCP: c.noDHCP, NoRA: c.noRA}
		stop := start(t, s)
		w.send(routerSolicit(t, netip.MustParseAddr("fe80::11:22ff:fe33:4455"), nil))
		w.send(solicit)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			st := s.Stats()
			done := (st.Advertises == 1) == !c.noDHCP && (st.RouterSolicits == 1) == !c.noRA && int(st.Ignored) == count(c.noDHCP, c.noRA)
			if done {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%+v: %+v", c, st)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if st := s.Stats(); (st.RouterAdverts > 0) != !c.noRA {
			t.Errorf("%+v: %+v", c, st)
		}
	}
}

func count(all ...bool) (n int) {
	for _, b := range all {
		if b {
			n++
		}
	}
	return n
}
