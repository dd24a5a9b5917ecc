// Package podnet applies, verifies and undoes the plan of package nic in a pod network namespace.
//
// [Observe] looks and changes nothing. [Attach] joins a TAP to every NIC's link, by one of three datapaths:
//
//	guest === TAP --- bridge --- veth ~~~ the CNI plugin's network
//	guest === TAP ---- redirect ---- veth, macvlan, ipvlan, netkit ~~~
//	guest === TAP that was there ~~~
//
// or has package vfio hand the NIC's PCI function itself over to QEMU; its PF then holds the guest to MAC and VLAN.
//
// The guest takes over the link's MAC, addresses and routes, so the link gives them up (by redirect, it keeps the MAC, and
// mostly the rest), and the namespace's own stack stays silent. Rules at the two ends keep apart what must never meet - the
// guest's DHCP and router advertisements and the cluster's, the guest and its own frames reflected by a hairpin port - and
// hold the guest to its MAC and addresses; a [Policy] leaves some out, [Rules] reads them back. They are nftables', or eBPF
// programs that redirect, too: the same rules in either.
// Localhost of the namespace can lead to the guest ([Options]).
// [Detach] puts every link back as Observe saw it.
//
// Attach hands a [Record] to its journal before the first change. The same Record undoes a failed Attach, a normal
// end, and the leavings of a killed process, from any process, any number of times. TAPs of ours are not persistent: they
// end with the descriptors in the [Port]s, which the caller of Attach owns.
package podnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/vfio"
)

// Options says what Attach makes beside the links.
type Options struct {
	Queues int  // queue pairs of each TAP; 0 stands for 1. More than one sets IFF_MULTI_QUEUE on every descriptor.
	Vhost  bool // open /dev/vhost-net once for every queue, where the machine has it

	// Localhost leads TCP connections that programs in the namespace make to 127.0.0.1 and ::1 to the guest: to the first
	// NIC that has addresses, unless that is a PCI function.
	Localhost bool

	Datapath Wish // how links are joined; "" stands for WishAuto

	Policies map[string]Policy // of the filters, by the NIC's name; a NIC without one has the zero Policy

	PCI vfio.Options // of NICs that are PCI functions

	Programs *Programs // from [Load], which the caller closes; nil: Attach loads what it needs

	fail     func(need) error // in tests: what the machine is to lack
	noClsact bool             // in tests: as on kernels without it
}

// Record is what Detach needs to put a namespace back. It is written before Attach changes anything.
type Record struct {
	Snapshot nic.Snapshot      `json:"snapshot"`
	Joins    []Join            `json:"joins"`
	VFs      []vfio.Handover   `json:"vfs,omitempty"`
	Loopback map[string]string `json:"loopback,omitempty"` // settings of lo, where Attach changes them, as Observe gives those of links
}

// Join names the links of one NIC.
type Join struct {
	Datapath   Datapath `json:"datapath,omitempty"`   // none: [Bridged], in records of old
	Link       string   `json:"link"`                 // the one that the plugin made
	Bridge     string   `json:"bridge,omitempty"`     // made by Attach; none where nothing is bridged
	Tap        string   `json:"tap"`                  // made by Attach, or Link itself
	Own        nic.MAC  `json:"own,omitzero"`         // what the link carries while the guest has its MAC; none: it keeps its MAC
	KeepsAddrs bool     `json:"keepsAddrs,omitempty"` // so does it with its addresses, and the namespace is silent by a rule
	Engine     Engine   `json:"engine,omitempty"`     // none: [Nftables], in records of old
	Why        string   `json:"why,omitempty"`        // this datapath, in words
	Lacks      string   `json:"lacks,omitempty"`      // why no better one: what the machine does not have
	// Localhost are addresses of the guest's NIC, one of each family at most, to which localhost of the namespace leads.
	Localhost []netip.Addr `json:"localhost,omitempty"`
}

// Datapath is how frames get from a link to the guest's TAP and back.
type Datapath string

const (
	Bridged    Datapath = "bridge"   // a bridge has both as ports; the link gives up its MAC
	Redirected Datapath = "redirect" // each hands its frames to the other; the link keeps its MAC
	AsItIs     Datapath = "tap"      // the link is a TAP, and the namespace has a path for it
)

func (j Join) datapath() Datapath { return cmp.Or(j.Datapath, Bridged) }
func (j Join) engine() Engine     { return cmp.Or(j.Engine, Nftables) }

// Port is one NIC, ready for a guest. The caller owns the files: they go to QEMU, and a TAP of ours ends when the last
// copy is closed.
type Port struct {
	NIC   nic.NIC
	Join  Join
	Taps  []*os.File   // one for each queue, IFF_VNET_HDR set
	Vhost []*os.File   // as many as Taps, or none
	VF    *vfio.Passed // instead of all that, of a NIC that is a PCI function

	ns       *netns.NS
	tapIndex int
}

// Close closes the descriptors of p. The TAP goes when QEMU's copies are closed too.
func (p *Port) Close() error {
	var errs []error
	for _, f := range append(p.Taps, p.Vhost...) {
		errs = append(errs, f.Close())
	}
	p.Taps, p.Vhost = nil, nil
	if p.VF != nil {
		errs = append(errs, p.VF.Close())
	}
	return errors.Join(errs...)
}

// Attach gives the NICs to a guest: for every one a TAP joined to its link, filters, and a silent link. journal is called
// before the first change, with all that Detach needs; its error stops Attach. When Attach fails it has called Detach. Where
// the machine lacks what a datapath needs, it takes the next one that serves, and calls journal again; [Join.Lacks] says why.
//
// snap is what Observe saw and nics what [nic.Plan] made of it; ns stays the caller's and must stay open as long as
// the ports are used.
func Attach(ctx context.Context, ns *netns.NS, snap nic.Snapshot, nics []nic.NIC, o Options, journal func(Record) error) ([]*Port, error) {
	if o.Queues < 1 {
		o.Queues = 1
	}
	if o.Programs == nil {
		o.Programs = Load(snap, nics, o) // beside what journal does
		defer o.Programs.Close()
	}
	for lacks := (lacking{}); ; {
		rec, err := plan(snap, nics, o, lacks)
		if err != nil {
			return nil, err
		}
		ports, err := attachAll(ctx, ns, rec, nics, o, journal)
		var l *lack
		if !errors.As(err, &l) || ctx.Err() != nil {
			return ports, err
		}
		if lacks[l.of] != nil {
			return nil, err
		}
		lacks[l.of] = l
		if _, none := plan(snap, nics, o, lacks); none != nil && len(lacks) > 1 {
			return nil, none // which has the errors of all
		} else if none != nil {
			return nil, err
		}
	}
}

// attachAll makes one attempt at it.
func attachAll(ctx context.Context, ns *netns.NS, rec Record, nics []nic.NIC, o Options, journal func(Record) error) ([]*Port, error) {
	if len(localAddrs(rec.Joins)) > 0 {
		var err error
		if rec.Loopback, err = readLoopback(ns); err != nil {
			return nil, err
		}
	}
	var m *vfio.Machine
	if len(taps(nics)) < len(nics) {
		var err error
		if m, err = vfio.Open(ns); err != nil {
			return nil, err
		}
		defer m.Close()
		if rec.VFs, err = m.Plan(nics, o.PCI); err != nil {
			return nil, err
		}
	}
	if err := journal(rec); err != nil {
		return nil, fmt.Errorf("record the network before changing it: %w", err)
	}
	ports, err := attachTaps(ctx, ns, rec, taps(nics), o)
	for _, h := range rec.VFs {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			break
		}
		p := &Port{NIC: nics[slices.IndexFunc(nics, func(n nic.NIC) bool { return n.Name == h.NIC })], ns: ns}
		p.VF, err = m.Take(h, o.PCI)
		ports = append(ports, p)
		if err != nil {
			err = fmt.Errorf("attach %s: %w", h.NIC, err)
		}
	}
	if err == nil {
		return inOrder(ports, nics), nil
	}
	for _, p := range ports {
		p.Close()
	}
	return nil, errors.Join(err, Detach(ns, rec))
}

// attachTaps joins the NICs that are served through TAPs. The ports own descriptors, also beside an error.
func attachTaps(ctx context.Context, ns *netns.NS, rec Record, nics []nic.NIC, o Options) (ports []*Port, err error) {
	if len(nics) == 0 {
		return nil, nil
	}
	a := newAttempt(ns, rec, nics, o)
	go a.filter() // attach waits for it
	// One visit to the namespace's thread: waking it is what costs on a busy machine.
	err = ns.Do(func() error {
		ports, err = a.attach(ctx)
		return err
	})
	for _, p := range ports {
		p.ns = ns
	}
	return ports, err
}

// taps gives the NICs that are served through a TAP.
func taps(nics []nic.NIC) []nic.NIC {
	return slices.DeleteFunc(slices.Clone(nics), func(n nic.NIC) bool { return n.VF != nil })
}

// inOrder gives ports the order of their NICs.
func inOrder(ports []*Port, nics []nic.NIC) []*Port {
	place := func(p *Port) int { return slices.IndexFunc(nics, func(n nic.NIC) bool { return n.Name == p.NIC.Name }) }
	slices.SortFunc(ports, func(a, b *Port) int { return cmp.Compare(place(a), place(b)) })
	return ports
}

// plan decides names. It changes nothing.
func plan(snap nic.Snapshot, nics []nic.NIC, o Options, lacks lacking) (Record, error) {
	rec := Record{Snapshot: snap}
	local, leads := "", []netip.Addr(nil)
	if o.Localhost {
		local, leads = guestOf(nics)
	}
	for i, n := range nics {
		if n.VF != nil {
			continue
		}
		link := snap.Link(n.Name)
		if link == nil {
			return Record{}, fmt.Errorf("attach %s: no such link in the namespace", n.Name)
		}
		if v4, v6 := addrs(n); checks(n, o.Policies[n.Name]) && max(len(v4), len(v6)) > maxAddrs {
			return Record{}, fmt.Errorf("attach %s: more than %d addresses of a kind are too many for the spoof check: turn it off", n.Name, maxAddrs)
		}
		c, err := choose(link, o.Datapath, lacks)
		if err != nil {
			return Record{}, fmt.Errorf("attach %s: %w", n.Name, err)
		}
		j := newJoin(link, n, i, c)
		for _, name := range []string{j.Bridge, j.Tap} {
			if name != j.Link && snap.Link(name) != nil {
				return Record{}, fmt.Errorf("attach %s: link %s is in the namespace already: another VM uses it, or a killed one left it; `virtlet gc` cleans up after killed ones", n.Name, name)
			}
		}
		if n.Name == local {
			j.Localhost = leads
		}
		rec.Joins = append(rec.Joins, j)
	}
	return rec, nil
}

// newJoin names what the i-th NIC is joined by.
func newJoin(link *nic.Link, n nic.NIC, i int, c choice) Join {
	j := Join{Datapath: c.datapath, Engine: c.engine, Why: c.why, Lacks: c.lacks, Link: n.Name, Tap: fmt.Sprintf("%s%d", tapPrefix, i)}
	switch c.datapath {
	case AsItIs:
		j.Tap, j.Own = n.Name, ownMAC(n.MAC)
	case Bridged:
		j.Bridge, j.Own = fmt.Sprintf("%s%d", bridgePrefix, i), ownMAC(n.MAC)
	case Redirected:
		// An ipvlan needs its addresses: what comes for others, the driver gives to another link or to the host. Those of a
		// macvlan are taken off as ever. Elsewhere they stay for CNI CHECK.
		j.KeepsAddrs = link.Kind != "macvlan"
	}
	return j
}

const (
	bridgePrefix = "vltbr"
	tapPrefix    = "vlttap"
)

// ownMAC gives the address that a veth carries while the guest has its own: a locally administered unicast one
// (IEEE 802, clause 8) whose first byte never equals the guest's, so that the two are told apart and still look alike.
func ownMAC(guest nic.MAC) nic.MAC {
	const group, local, other = 0x01, 0x02, 0x40
	own := guest
	own[0] = (guest[0]&^group | local) ^ other
	return own
}

// nsSysctls are settings of the namespace that Attach changes before it makes a link. They keep our bridges and TAPs silent,
// which are born with them: without IPv6, and without answers to ARP for a local address (8,
// Documentation/networking/ip-sysctl).
var nsSysctls = map[string]string{"ipv6/conf/default/disable_ipv6": "1", "ipv4/conf/default/arp_ignore": "8"}

// bridgeSysctls are others, where there is a bridge, ours or the path of a TAP that is there: with br_netfilter in the kernel,
// bridged frames of the guest would go through the namespace's iptables and conntrack, which drop IPv6 neighbour discovery at
// times.
var bridgeSysctls = map[string]string{
	"bridge/bridge-nf-call-iptables":  "0",
	"bridge/bridge-nf-call-ip6tables": "0",
	"bridge/bridge-nf-call-arptables": "0",
}

// linkSysctls are settings of a link that is there already and is to be silent.
func linkSysctls(link string) map[string]string {
	return map[string]string{"ipv6/conf/" + link + "/disable_ipv6": "1", "ipv4/conf/" + link + "/arp_ignore": "8"}
}

const sysctlRoot = "/proc/sys/net/" // resolved in the network namespace of the reading thread

// readSysctls gives those of the settings that the kernel has. The files are opened by system calls alone: the poller
// that os.File goes by costs more than the reading.
func readSysctls(settings map[string]string) map[string]string {
	found := map[string]string{}
	for path := range settings {
		fd, err := unix.Open(sysctlRoot+path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		var b [32]byte // of one integer
		if n, err := unix.Read(fd, b[:]); err == nil {
			found[path] = strings.TrimSpace(string(b[:n]))
		}
		unix.Close(fd)
	}
	return found
}

// writeSysctl sets one value; a kernel without the setting has nothing to be silenced.
func writeSysctl(path, value string) error {
	fd, err := unix.Open(sysctlRoot+path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open sysctl net/%s: %w", path, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return fmt.Errorf("set sysctl net/%s to %s: %w", path, value, err)
	}
	return nil
}
