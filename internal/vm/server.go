package vm

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// server is what tells the guest about one NIC. A part is nil where there is nothing to tell, or somebody else does.
type server struct {
	nic string
	v4  *dhcp.Server
	v6  *dhcp.Server6
}

// server plans what the guest is told about a NIC. Nothing is opened yet.
func (v *VM) server(n nic.NIC) server {
	s := server{nic: n.Name}
	if !v.cfg.ExternalDHCP {
		lease, notes, ok := dhcp.NewLease(v.cfg.leased(n), v.cfg.Hostname)
		v.note(notes...)
		for _, a := range v.cfg.NTP {
			if a, err := netip.ParseAddr(a); err == nil && a.Is4() {
				lease.NTP = append(lease.NTP, a)
			}
		}
		if ok {
			s.v4 = &dhcp.Server{Lease: lease, Log: v.log(n.Name)}
		}
	}
	if !v.cfg.ExternalDHCP || !v.cfg.ExternalRA {
		lease, notes, ok := dhcp.NewLease6(n, v.cfg.Hostname)
		v.note(notes...)
		if ok {
			s.v6 = &dhcp.Server6{Lease: lease, NoDHCP: v.cfg.ExternalDHCP, NoRA: v.cfg.ExternalRA, Log: v.log(n.Name)}
		}
	}
	return s
}

// policy gives what may pass between the guest and the network beside that.
func (s *server) policy(c *Config) podnet.Policy {
	p := podnet.Policy{ExternalDHCP: c.ExternalDHCP, ExternalRA: c.ExternalRA, NoSpoofCheck: c.NoSpoofCheck}
	if s.v6 != nil {
		p.Own = s.v6.Lease.Own()
	}
	return p
}

// answer opens the servers' sockets, and lets the servers answer.
func (v *VM) answer() (string, error) {
	ctx, quiet := context.WithCancel(context.Background())
	v.quiet = quiet
	var words []string
	for i, p := range v.ports {
		s := v.servers[i]
		if s.v4 != nil {
			conn, err := p.Listen(dhcp.Filter())
			if err != nil {
				return "", err
			}
			s.v4.Conn = conn
			v.run(ctx, s.nic, s.v4)
			v.state.Leases = append(v.state.Leases, s.v4.Lease)
			words = append(words, fmt.Sprintf("%s on %s", s.v4.Lease.Addr, s.nic))
		}
		if s.v6 != nil {
			conn, err := p.Listen(s.v6.Lease.Filter())
			if err != nil {
				return "", err
			}
			up, err := p.Uplink()
			if err != nil {
				conn.Close()
				return "", err
			}
			s.v6.Conn, s.v6.Uplink = conn, up
			v.run(ctx, s.nic, s.v6)
			v.state.Leases6 = append(v.state.Leases6, s.v6.Lease)
			for _, a := range s.v6.Lease.Addrs {
				words = append(words, fmt.Sprintf("%s on %s", a, s.nic))
			}
		}
	}
	if err := v.tellCounters(ctx); err != nil {
		return "", err
	}
	if len(words) == 0 {
		return "no address to give", nil
	}
	return strings.Join(words, ", "), nil
}

// run lets a server answer until ctx ends.
func (v *VM) run(ctx context.Context, nic string, s interface{ Run(context.Context) error }) {
	log := v.log(nic) // Boot changes the configuration meanwhile
	v.serve.Go(func() error {
		err := s.Run(ctx)
		if err != nil && log != nil {
			log.Error("the guest gets no more answers", "err", err)
		}
		return err
	})
}
