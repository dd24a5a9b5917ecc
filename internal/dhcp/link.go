package dhcp

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// link moves frames. A Server alone uses it, from one goroutine.
type link interface {
	read(b []byte) (int, error) // what of a frame does not fit is lost
	reply(frame []byte) error   // to where the last frame came from
}

// newLink gives the link of a packet socket, which allocates nothing, or of any other.
func newLink(conn net.PacketConn) link {
	if c, ok := conn.(syscall.Conn); ok && conn.LocalAddr().Network() == "packet" {
		if raw, err := c.SyscallConn(); err == nil {
			return newPacketLink(raw)
		}
	}
	return &anyLink{conn: conn}
}

// packetLink is a packet socket. It is bound to its interface: frames come from there and go there, and no address has
// to be told.
type packetLink struct {
	raw         syscall.RawConn
	recv, send  func(fd uintptr) bool // made once, as a closure is allocated
	frame       []byte                // for recv and send, and
	transferred int                   // what comes of it
	err         error
}

func newPacketLink(raw syscall.RawConn) *packetLink {
	l := &packetLink{raw: raw}
	transfer := func(call func(int, []byte) (int, error)) func(uintptr) bool {
		return func(fd uintptr) bool {
			for {
				l.transferred, l.err = call(int(fd), l.frame)
				if l.err != unix.EINTR {
					return l.err != unix.EAGAIN
				}
			}
		}
	}
	l.recv, l.send = transfer(unix.Read), transfer(unix.Write)
	return l
}

func (l *packetLink) read(b []byte) (int, error) {
	l.frame = b
	if err := l.raw.Read(l.recv); err != nil {
		return 0, err
	}
	return l.transferred, l.err
}

func (l *packetLink) reply(frame []byte) error {
	l.frame = frame
	if err := l.raw.Write(l.send); err != nil {
		return err
	}
	return l.err
}

// anyLink is a socket of datagrams that are frames.
type anyLink struct {
	conn net.PacketConn
	from net.Addr
}

func (l *anyLink) read(b []byte) (n int, err error) {
	n, l.from, err = l.conn.ReadFrom(b)
	return n, err
}

func (l *anyLink) reply(frame []byte) error {
	_, err := l.conn.WriteTo(frame, l.from)
	return err
}
