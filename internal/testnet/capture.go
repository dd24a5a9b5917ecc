package testnet

import (
	"encoding/hex"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"
)

// Capture collects the frames that cross a link, both directions, until the test ends.
type Capture struct {
	mu     sync.Mutex
	frames []gopacket.Packet
}

// NewCapture starts to capture on a link of the namespace. When it returns, it listens.
func NewCapture(t testing.TB, n *Namespace, link string) *Capture {
	t.Helper()
	l, err := n.Link().LinkByName(link)
	check(t, err)
	var conn *packet.Conn
	n.Must(func() (err error) {
		conn, err = packet.Listen(&net.Interface{Index: l.Attrs().Index, Name: link}, packet.Raw, unix.ETH_P_ALL, nil)
		return err
	})
	c := &Capture{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16+64)
		for {
			k, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			p := gopacket.NewPacket(append([]byte(nil), buf[:k]...), layers.LayerTypeEthernet, gopacket.Default)
			c.mu.Lock()
			c.frames = append(c.frames, p)
			c.mu.Unlock()
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return c
}

// Frames gives what was captured so far.
func (c *Capture) Frames() []gopacket.Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]gopacket.Packet(nil), c.frames...)
}

// Match gives the captured frames that pred accepts.
func (c *Capture) Match(pred func(gopacket.Packet) bool) []gopacket.Packet {
	var out []gopacket.Packet
	for _, p := range c.Frames() {
		if pred(p) {
			out = append(out, p)
		}
	}
	return out
}

// Await waits until a frame that pred accepts was captured, and says whether one was.
func (c *Capture) Await(d time.Duration, pred func(gopacket.Packet) bool) bool {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if len(c.Match(pred)) > 0 {
			return true
		}
	}
	return false
}

// UDPPort accepts UDP frames to or from a port.
func UDPPort(port uint16) func(gopacket.Packet) bool {
	return func(p gopacket.Packet) bool {
		u, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
		return ok && (uint16(u.SrcPort) == port || uint16(u.DstPort) == port)
	}
}

// From accepts frames with that Ethernet source.
func From(mac net.HardwareAddr) func(gopacket.Packet) bool {
	return func(p gopacket.Packet) bool {
		e, ok := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		return ok && e.SrcMAC.String() == mac.String()
	}
}

// Dump is the frames in words, for a failing test.
func Dump(frames []gopacket.Packet) string {
	var s string
	for _, p := range frames {
		s += p.String() + hex.Dump(p.Data())
	}
	return s
}

// Send writes one Ethernet frame out of a link of the namespace.
func (n *Namespace) Send(link string, frame []byte) {
	n.t.Helper()
	l, err := n.Link().LinkByName(link)
	check(n.t, err)
	n.Must(func() error {
		conn, err := packet.Listen(&net.Interface{Index: l.Attrs().Index, Name: link}, packet.Raw, unix.ETH_P_ALL, nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.WriteTo(frame, &packet.Addr{HardwareAddr: net.HardwareAddr(frame[:6])})
		return err
	})
}
