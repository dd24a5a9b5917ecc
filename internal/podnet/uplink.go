package podnet

import (
	"fmt"
	"io"
	"net"

	"github.com/mdlayher/packet"

	"github.com/virtlet/virtlet/internal/nic"
)

// Uplink opens the way out of the guest's network: what is written to it, one whole Ethernet frame each time, leaves by
// the veth as if the guest had sent it, without passing the filters or the bridge. Nothing can be heard there: a packet
// socket without a protocol receives nothing (packet(7)). The caller closes it.
func (p *Port) Uplink() (io.WriteCloser, error) {
	var conn *packet.Conn
	err := p.ns.Do(func() error {
		index, err := ioctlLink(p.Join.Link)
		if err != nil {
			return err
		}
		conn, err = packet.Listen(&net.Interface{Index: index, Name: p.Join.Link}, packet.Raw, 0, nil)
		return err
	})
	if err != nil {
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
