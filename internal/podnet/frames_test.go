package podnet

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// Addresses beside those of the pod: another guest's, our responders' link-local one, and the router's.
var (
	foreignMAC       = nic.MAC{0x02, 0xff, 0xee, 0xdd, 0xcc, 0xbb}
	foreign4         = "198.51.100.77"
	foreign6         = "2001:db8:100::77"
	ownLinkLocal     = "fe80::c0:ffee"
	gatewayLinkLocal = "fe80::1"
	guestLinkLocal   = "fe80::8a1b:2c3d:4e5f:6071" // by no MAC
)

// wire is an attached pod whose guest is the test itself: nobody sends but the test.
type wire struct {
	t       *testing.T
	node    *testnet.Namespace
	pod     *testnet.Namespace
	host    string
	a       attached
	cluster *testnet.Capture
	tap     *os.File

	mu     sync.Mutex
	inside []gopacket.Packet // what the guest got
	serial uint32
}

func newWire(t *testing.T, kind string, spec testnet.PodSpec, p Policy) *wire {
	t.Helper()
	return newWireWith(t, kind, spec, Options{Policies: map[string]Policy{"eth0": p}})
}

func newWireWith(t *testing.T, kind string, spec testnet.PodSpec, o Options) *wire {
	t.Helper()
	node := testnet.NewNode(t, gw4)
	pod, host := addPodOf(t, kind, node, spec)
	quiet(t, pod)
	w := &wire{t: t, node: node.Namespace, pod: pod, host: host}
	w.a = attach(t, pod, o)
	w.cluster, w.tap = testnet.NewCapture(t, node.Namespace, host), w.a.ports[0].Taps[0]
	var reader sync.WaitGroup
	reader.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, err := w.tap.Read(buf)
			if err != nil {
				return
			}
			w.mu.Lock()
			w.inside = append(w.inside, gopacket.NewPacket(slices.Clone(buf[virtioNetHeader:n]), layers.LayerTypeEthernet, gopacket.Default))
			w.mu.Unlock()
		}
	})
	t.Cleanup(func() { w.tap.Close(); reader.Wait() })
	// The bridge's ports forward when the link watch has seen them.
	mark := []byte("the first frame that passes")
	for end := time.Now().Add(patience); !w.arrived(false, mark); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing passes")
		}
		w.send(false, append(ethernet(cluster, nil, 0x88b5, nil), mark...))
	}
	return w
}

const virtioNetHeader = 10

func (w *wire) send(fromGuest bool, frame []byte) {
	w.t.Helper()
	if !fromGuest {
		w.node.Send(w.host, frame)
		return
	}
	if _, err := w.tap.Write(append(make([]byte, virtioNetHeader), frame...)); err != nil {
		w.t.Fatal(err)
	}
}

// arrived says whether a frame with the mark is at the other end.
func (w *wire) arrived(fromGuest bool, mark []byte) bool {
	if fromGuest {
		return len(w.cluster.Match(has(mark))) > 0
	}
	return w.arrivedBy(has(mark))
}

// arrivedBy says whether the guest has got such a frame.
func (w *wire) arrivedBy(is func(gopacket.Packet) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.inside, is)
}

func (w *wire) counters() map[Reason]Counter {
	w.t.Helper()
	all, err := droppedBy(w.pod.NS, w.a.rec.Joins)
	if err != nil {
		w.t.Fatal(err)
	}
	return all["eth0"]
}

// fate sends a frame and gives why it was dropped, "" if it arrived. It fails where another counter moved too, or where a
// frame that was counted arrives.
func (w *wire) fate(t *testing.T, fromGuest bool, frame []byte) Reason {
	t.Helper()
	w.serial++
	mark := binary.BigEndian.AppendUint32([]byte("mark"), w.serial) // behind the packet, where padding is
	before := w.counters()
	w.send(fromGuest, append(slices.Clone(frame), mark...))
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		arrived, after := w.arrived(fromGuest, mark), w.counters()
		moved := map[Reason]uint64{}
		for r, c := range after {
			if n := c.Packets - before[r].Packets; n > 0 && r != OwnStack { // which speaks when it likes
				moved[r] = n
			}
		}
		if !arrived && len(moved) == 0 {
			continue
		}
		var reason Reason
		for reason = range moved {
		}
		if arrived && len(moved) > 0 || !arrived && !cmp.Equal(moved, map[Reason]uint64{reason: 1}) {
			t.Errorf("arrived: %v, counted: %v", arrived, moved)
		}
		return reason
	}
	t.Fatalf("the frame neither arrives nor is counted: %x", frame)
	return ""
}

// ethernet is a frame with tags, outermost first, as in datagram.
func ethernet(from nic.MAC, tags []uint16, kind uint16, payload []byte) []byte {
	b := append(slices.Clone([]byte(broadcast)), from[:]...)
	for _, tag := range tags {
		tpid := uint16(0x8100)
		if tag&serviceTag != 0 {
			tpid = 0x88a8
		}
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, tpid), tag&0xfff)
	}
	return append(binary.BigEndian.AppendUint16(b, kind), payload...)
}

const arpKind, ip4Kind, ip6Kind = 0x0806, 0x0800, 0x86dd

// arpMessage is an ARP message for the gateway.
func arpMessage(op byte, sender nic.MAC, addr string) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, op}, sender[:]...)
	b = append(b, netip.MustParseAddr(addr).AsSlice()...)
	return append(append(b, make([]byte, 6)...), gw4.Addr().AsSlice()...)
}

func asking(b []byte, target string) []byte {
	return append(slices.Clone(b[:24]), netip.MustParseAddr(target).AsSlice()...)
}

// packet4 is an IPv4 packet; frag is of the header's field, 0x2000 for more to come.
func packet4(src string, proto byte, frag uint16, body []byte) []byte {
	b := []byte{0x45, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(20+len(body)))
	b = binary.BigEndian.AppendUint16(append(b, 0, 1), frag)
	b = append(b, 64, proto, 0, 0)
	b = append(b, netip.MustParseAddr(src).AsSlice()...)
	return append(append(b, 255, 255, 255, 255), body...)
}

// extension is an IPv6 extension header; its first byte is filled in.
type extension struct {
	kind byte
	body []byte
}

var (
	hopByHop = extension{0, []byte{0, 0, 1, 4, 0, 0, 0, 0}} // padding
	destOpts = extension{60, []byte{0, 0, 1, 4, 0, 0, 0, 0}}
)

// fragmented is a fragment header, with an offset in bytes.
func fragmented(offset uint16, more bool) extension {
	if more {
		offset |= 1
	}
	return extension{44, append(binary.BigEndian.AppendUint16([]byte{0, 0}, offset), 0, 0, 0, 7)}
}

// packet6 is an IPv6 packet to all nodes. The headers lead to proto.
func packet6(src string, proto byte, body []byte, headers ...extension) []byte {
	var chain []byte
	next := proto
	for _, h := range slices.Backward(headers) {
		one := slices.Clone(h.body)
		one[0], next = next, h.kind
		chain = append(one, chain...)
	}
	b := []byte{0x60, 0, 0, 0}
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(chain)+len(body))), next, 255)
	b = append(b, netip.MustParseAddr(src).AsSlice()...)
	b = append(b, netip.MustParseAddr("ff02::1").AsSlice()...)
	return append(append(b, chain...), body...)
}

const protoTCP, protoUDP, protoICMPv6 = 6, 17, 58

func ports(src, dst uint16) []byte {
	b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, src), dst)
	return append(b, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
}

// message is one of ICMPv6; those of neighbour discovery have a target and options.
func message(kind byte, target string, options ...[]byte) []byte {
	b := []byte{kind, 0, 0, 0, 0, 0, 0, 0}
	if target != "" {
		b = append(b, netip.MustParseAddr(target).AsSlice()...)
	}
	return append(b, slices.Concat(options...)...)
}

func option(kind byte, m nic.MAC) []byte { return append([]byte{kind, 1}, m[:]...) }

// calico is a pod whose router has a link-local address, and no gateway of IPv4.
func calico() testnet.PodSpec {
	spec := dualStack()
	spec.Routes = []netlink.Route{testnet.Via("::/0", gatewayLinkLocal)}
	return spec
}
