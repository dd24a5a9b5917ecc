package podnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// Uplink opens the way out of the guest's network: what is written to it, one whole Ethernet frame each time, leaves as if
// the guest had sent it. Nothing can be heard there. It leaves by the link without passing the rules; where the TAP is
// the link, it comes in by the TAP, and rules and [Port.Listen] take it for the guest's. The caller closes it.
func (p *Port) Uplink() (io.WriteCloser, error) {
	if p.Join.Datapath == AsItIs {
		return newInlet(p.Taps[0])
	}
	var conn *packet.Conn
	err := p.ns.Do(func() error {
		index, err := ioctlLink(p.Join.Link)
		if err != nil {
			return err
		}
		// A packet socket without a protocol receives nothing (packet(7)).
		conn, err = packet.Listen(&net.Interface{Index: index, Name: p.Join.Link}, packet.Raw, 0, nil)
		if err == nil && p.Join.KeepsAddrs {
			err = setMark(conn)
		}
		return err
	})
	if err != nil {
		if conn != nil {
			conn.Close()
		}
		return nil, fmt.Errorf("open the way out by %s: %w (needs CAP_NET_RAW)", p.Join.Link, err)
	}
	return uplink{conn}, nil
}

type uplink struct{ conn *packet.Conn }

func (u uplink) Write(frame []byte) (int, error) {
	if len(frame) < len(nic.MAC{}) {
		return 0, fmt.Errorf("frame of %d bytes", len(frame))
	}
	return u.conn.WriteTo(frame, &packet.Addr{HardwareAddr: net.HardwareAddr(frame[:len(nic.MAC{})])})
}

func (u uplink) Close() error { return u.conn.Close() }

// inlet writes frames into a TAP beside the guest. Its descriptor is a copy: it does not hear, as nobody reads it.
type inlet struct{ tap *os.File }

func newInlet(tap *os.File) (io.WriteCloser, error) {
	raw, err := tap.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dup := -1, error(nil)
	err = raw.Control(func(of uintptr) { fd, dup = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dup); err != nil {
		return nil, fmt.Errorf("open the way out by %s: %w", tap.Name(), err)
	}
	return inlet{os.NewFile(uintptr(fd), tap.Name())}, nil
}

func (i inlet) Write(frame []byte) (n int, err error) {
	raw, err := i.tap.SyscallConn()
	if err != nil {
		return 0, err
	}
	var wrote error
	err = raw.Control(func(fd uintptr) {
		// In front of a frame is a virtio-net header, whose length is the guest's choice; of zeros, it says nothing.
		head, err := unix.IoctlGetInt(int(fd), unix.TUNGETVNETHDRSZ)
		if err != nil {
			wrote = err
			return
		}
		n, wrote = unix.Write(int(fd), append(make([]byte, head), frame...))
		n = max(n-head, 0)
	})
	return n, errors.Join(err, wrote)
}

func (i inlet) Close() error { return i.tap.Close() }
