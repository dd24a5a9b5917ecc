package sriov

import (
	"net"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
)

// frame is what is counted of frames: whose they are, and their VLAN, 0 for none.
type frame struct {
	mac  string
	vlan int
}

// wire counts the frames that come to the world.
type wire struct {
	fd   int
	seen map[frame]int
	end  chan struct{}
	done sync.WaitGroup
}

// listen hears all that comes in by a device of a namespace, with the tags that the kernel takes off (PACKET_AUXDATA).
func listen(t *testing.T, name, device string) *wire {
	t.Helper()
	w := &wire{seen: map[frame]int{}, end: make(chan struct{})}
	ns, err := netns.Open("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() (err error) {
		const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // in the order of the network
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		i, err := net.InterfaceByName(device)
		if err == nil {
			err = unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)
		}
		if err == nil {
			err = unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
		}
		if err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	w.done.Go(w.hear)
	return w
}

// auxdata is struct tpacket_auxdata (linux/if_packet.h).
type auxdata struct {
	status, length, snaplen uint32
	mac, net, tci, tpid     uint16
}

func (w *wire) hear() {
	b, oob := make([]byte, 2048), make([]byte, 256)
	for {
		select {
		case <-w.end:
			return
		default:
		}
		n, oobn, _, from, err := unix.Recvmsg(w.fd, b, oob, 0)
		if at, ok := from.(*unix.SockaddrLinklayer); err != nil || n < 14 || !ok || at.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		f := frame{mac: net.HardwareAddr(b[6:12]).String()}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range messages {
			if err == nil && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= int(unsafe.Sizeof(auxdata{})) {
				if a := (*auxdata)(unsafe.Pointer(&m.Data[0])); a.status&unix.TP_STATUS_VLAN_VALID != 0 {
					f.vlan = int(a.tci & 0xfff)
				}
			}
		}
		if b[12] == 0x81 && b[13] == 0 { // a tag that is still there
			f.vlan = int(b[14]&0xf)<<8 | int(b[15])
		}
		if f.mac != worldMAC {
			w.seen[f]++
		}
	}
}

// stop gives what was heard; what is under way has a moment to come.
func (w *wire) stop() map[frame]int {
	time.Sleep(500 * time.Millisecond)
	close(w.end)
	w.done.Wait()
	unix.Close(w.fd)
	return w.seen
}
