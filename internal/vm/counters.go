package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/podnet"
)

// Counters is what was counted at one NIC since the VM's start.
type Counters struct {
	NIC     string                           `json:"nic"`
	DHCP    *dhcp.Stats                      `json:"dhcp,omitempty"`    // nil: we do not serve it
	IPv6    *dhcp.Stats6                     `json:"ipv6,omitempty"`    // likewise
	Dropped map[podnet.Reason]podnet.Counter `json:"dropped,omitempty"` // frames, by reason
	Rules   []podnet.Rule                    `json:"rules,omitempty"`   // in the order in which they look at a frame
}

// Whoever asks for a VM's counters connects to a socket, and gets them as JSON. Nothing is written to disk while nobody
// asks: a VM that idles costs nothing.
const (
	countersSocket = "counters.sock"
	countersTime   = 5 * time.Second // for the exchange
)

// tellCounters answers on the counters' socket until ctx ends.
func (v *VM) tellCounters(ctx context.Context) error {
	l, err := v.store.listen(v.cfg.Name, countersSocket)
	if err != nil {
		return fmt.Errorf("listen for who asks for counters: %w", err)
	}
	context.AfterFunc(ctx, func() { l.Close() })
	log := v.cfg.Log // Boot changes the configuration meanwhile
	if log != nil {
		log = log.With("vm", v.cfg.Name)
	}
	v.serve.Go(func() error {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("tell counters: %w", err)
			}
			_ = conn.SetDeadline(time.Now().Add(countersTime))
			_ = json.NewEncoder(conn).Encode(v.counters(log)) // whoever asked may have gone
			conn.Close()
		}
	})
	return nil
}

// counters reads what there is; rules that cannot be read are left out.
func (v *VM) counters(log *slog.Logger) []Counters {
	rules := map[string][]podnet.Rule{}
	var joins []podnet.Join
	for _, p := range v.ports {
		if p.VF == nil {
			joins = append(joins, p.Join)
		}
	}
	// Through a handle of its own: the other one may be at work.
	if ns, err := netns.Open(v.ns.Path()); err == nil {
		rules, err = podnet.Rules(ns, joins)
		if err != nil && log != nil {
			log.Warn("read the filters", "err", err)
		}
		ns.Close()
	}
	var all []Counters
	for _, s := range v.servers {
		c := Counters{NIC: s.nic, Rules: rules[s.nic], Dropped: podnet.Dropped(rules[s.nic])}
		if s.v4 != nil {
			stats := s.v4.Stats()
			c.DHCP = &stats
		}
		if s.v6 != nil {
			stats := s.v6.Stats()
			c.IPv6 = &stats
		}
		all = append(all, c)
	}
	return all
}

// Counters asks a running VM for what it has counted. [ErrStopped] when it does not run.
func (s Store) Counters(name string) ([]Counters, error) {
	st, err := s.Get(name)
	if err != nil {
		return nil, err
	}
	if st.Status != Running {
		return nil, fmt.Errorf("counters of VM %q: %w: it is %s", name, ErrStopped, st.Status)
	}
	var all []Counters
	conn, err := s.dial(name, countersSocket)
	if err == nil {
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(countersTime))
		err = json.NewDecoder(conn).Decode(&all)
	}
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) { // its servers have ended, and soon it has
		err = errors.Join(err, ErrStopped)
	}
	if err != nil {
		return nil, fmt.Errorf("counters of VM %q: %w", name, err)
	}
	return all, nil
}
