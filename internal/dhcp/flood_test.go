package dhcp

import (
	"bytes"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// A guest that sends junk as fast as it can, and messages of every kind that gets no answer, is answered in between, and
// costs neither memory nor a log that grows with it.
func TestFlood(t *testing.T) {
	l := attach(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1500, Addrs: prefixes("198.51.100.2/24")})
	lease, _, _ := NewLease(l.port.NIC, "")
	var log bytes.Buffer
	l.server = &Server{Lease: lease, Conn: l.listen(t), Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	stop := start(t, l.server)

	discover := broadcast(t, request(dhcpv4.MessageTypeDiscover))
	edit := func(change func(b []byte)) []byte { b := slices.Clone(discover); change(b); return b }
	junk := [][]byte{
		edit(func(b []byte) { b[60]++ }),                                  // checksum
		edit(func(b []byte) { b[40], b[41] = 0, 0; b[278]++ }),            // cookie
		edit(func(b []byte) { b[39]++ }),                                  // length
		edit(func(b []byte) { b[20] = 0x20 }),                             // fragment, dropped by the filter
		slices.Insert(slices.Clone(discover), 12, 0x81, 0x00, 0x00, 0x05), // tagged, likewise
		broadcast(t, with(request(dhcpv4.MessageTypeDiscover), func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 9} })),
		broadcast(t, with(request(dhcpv4.MessageTypeDiscover), func(m *dhcpv4.DHCPv4) { m.GatewayIPAddr = net.IPv4(10, 0, 0, 1) })),
		broadcast(t, request(dhcpv4.MessageTypeDecline)),
		broadcast(t, with(request(dhcpv4.MessageTypeRequest), ciaddr("198.51.100.77"))), // answered by NAK
	}
	var conn *packet.Conn
	l.guest.Must(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_IP, nil)
		}
		return err
	})
	defer conn.Close()
	to := &packet.Addr{HardwareAddr: broadcastMAC.HardwareAddr()}
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := held()
	var quit atomic.Bool
	sent := make(chan int, 1)
	go func() {
		n := 0
		for ; n < 1000 || !quit.Load(); n++ {
			if _, err := conn.WriteTo(junk[n%len(junk)], to); err != nil {
				t.Errorf("after %d frames: %v", n, err)
				break
			}
		}
		sent <- n
	}()
	l.await(t, "the flood", func(s Stats) bool {
		return s.BadChecksum > 100 && s.Malformed > 100 && s.OtherMAC > 100 && s.Relayed > 100
	})
	// The flood fills the socket's buffer, and a DISCOVER may be lost: a client repeats it.
	for end := time.Now().Add(20 * time.Second); l.server.Stats().Offers == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no answer in the flood: %+v", l.server.Stats())
		}
		l.guest.Send("eth0", discover)
	}
	quit.Store(true)
	n := <-sent
	if err := stop(); err != nil {
		t.Error(err)
	}
	s := l.server.Stats()
	t.Logf("%d frames of junk, %+v, %d bytes of log", n, s, log.Len())
	if grown := int64(held()) - int64(before); grown > 1<<20 {
		t.Errorf("the flood left %d bytes", grown)
	}
	// A line for the first, second, fourth ... of each of nine kinds.
	if lines := strings.Count(log.String(), "\n"); lines > 9*32 {
		t.Errorf("%d lines of log", lines)
	}
}
