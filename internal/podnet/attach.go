package podnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// kernel is what changes go through. Both handles are the namespace's own.
type kernel struct {
	h   *netlink.Handle
	nft *nftables.Conn
}

// attempt is one Attach.
type attempt struct {
	kernel
	rec  Record
	nics []nic.NIC
	o    Options

	joints   []*joint
	rtnl     *nl.SocketHandle // for set, which opens it
	ready    chan opened      // gets one value, once all TAPs are there
	filtered chan filtered    // gets one value, at last
}

// joint is one NIC's join in the making.
type joint struct {
	Port
	link   *nic.Link    // as Observe saw it
	bridge netlink.Link // of a join by bridge

	// Of a redirect by eBPF: whether it is to the link's peer, and why programs cannot be filters of clsact.
	peer     bool
	noClsact error
}

// filtered is how laying the filters ended, with the programs by NIC that are to be put in place.
type filtered struct {
	progs [][]*loaded
	err   error
}

// opened is what filter waits for.
type opened struct {
	ok   bool // all is there
	nfnl int  // a socket for nftables, or noSocket
}

// way is how one datapath is made, in three steps of every NIC in turn. Filters are laid beside the second.
type way struct {
	open func(*attempt, *joint) error // makes or opens the TAP, and what else is to have filters or a name of its own
	join func(*attempt, *joint) error // does the rest but for one thing, without which no frame passes
	up   func(*attempt, *joint) error // does that
}

// ways has every datapath. A new one has a row here, a case in [Join.hooks], and the kinds of links that it serves in
// newJoin; Detach knows none of them, as it compares links with what they were.
var ways = map[Datapath]way{
	Bridged:    {(*attempt).openBridge, (*attempt).joinBridge, (*attempt).upBridge},
	Redirected: {(*attempt).openRedirect, (*attempt).joinRedirect, (*attempt).upRedirect},
	AsItIs:     {(*attempt).openTheirs, (*attempt).joinTheirs, (*attempt).upTheirs},
}

const noSocket = -1

func newAttempt(ns *netns.NS, rec Record, nics []nic.NIC, o Options) *attempt {
	return &attempt{
		kernel: kernel{h: ns.Netlink(), nft: ns.Nftables()}, rec: rec, nics: nics, o: o,
		ready: make(chan opened, 1), filtered: make(chan filtered, 1),
	}
}

// filter lays the filters while attach goes on with the links that it has made. (While it makes them would be no gain:
// the kernel lets a new link wait for a batch.) Programs need no links, and may be there already; attach puts them in place. It
// ends before attach does.
func (a *attempt) filter() {
	b := filters(a.rec.Joins, a.nics, a.o.Policies)
	progs, err := a.o.Programs.of(a.rec.Joins, a.nics, a.o)
	on := <-a.ready
	if on.nfnl != noSocket {
		defer unix.Close(on.nfnl)
	}
	if err == nil && on.ok && b != nil {
		for _, j := range a.joints { // they are all there now
			b.addForwards(j)
		}
		b.addLocalhost(a.joints)
		err = a.lay(b, on.nfnl)
	}
	a.filtered <- filtered{progs, err}
}

// lay puts the filters into force.
func (a *attempt) lay(b *batch, nfnl int) error {
	err := a.o.lacks(needNftables)
	if err == nil && len(b.forwards) > 0 {
		err = a.o.lacks(needForward)
	}
	if err = cmp.Or(err, b.send(nfnl)); err == nil {
		return nil
	}
	of := needNftables
	if l := (*lack)(nil); errors.As(err, &l) {
		of = l.of
	}
	return &lack{of, fmt.Errorf("add filters: %w (needs %s)", err, strings.Join(filterConfigs(a.rec.Joins), ", "))}
}

// lacks is the lack that a test wants.
func (o *Options) lacks(n need) error {
	if o.fail == nil {
		return nil
	}
	if err := o.fail(n); err != nil {
		return &lack{n, err}
	}
	return nil
}

func (a *attempt) close() {
	if a.rtnl != nil {
		a.rtnl.Socket.Close()
	}
}

// attach makes the ports inside the namespace. All filters are there before the first frame can pass. The ports own
// descriptors, also beside an error.
func (a *attempt) attach(ctx context.Context) ([]*Port, error) {
	defer a.close()
	err := a.open()
	nfnl := noSocket
	if err == nil && a.rec.hasTable() {
		nfnl, err = openNetfilter()
	}
	a.ready <- opened{err == nil, nfnl}
	ports := make([]*Port, 0, len(a.joints))
	for _, j := range a.joints {
		ports = append(ports, &j.Port)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = j.named(ways[j.Join.datapath()].join(a, j))
		}
	}
	laid := <-a.filtered
	if err = errors.Join(err, laid.err); err == nil {
		err = a.place(laid.progs)
	}
	if err != nil {
		return ports, err
	}
	for _, j := range a.joints {
		if err := j.named(ways[j.Join.datapath()].up(a, j)); err != nil {
			return ports, err
		}
	}
	return ports, nil
}

// named says in an error which NIC it is about.
func (j *joint) named(err error) error {
	if err != nil {
		return fmt.Errorf("attach %s: %w", j.NIC.Name, err)
	}
	return nil
}

// openNetfilter gives a socket that takes batches of any size.
func openNetfilter() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return noSocket, &lack{needNftables, fmt.Errorf("open nfnetlink: %w (needs CONFIG_NF_TABLES)", err)}
	}
	// A batch is one message, which has to fit. What is asked for is no more than a limit.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20); err != nil {
		unix.Close(fd)
		return noSocket, fmt.Errorf("make room for filters: %w (needs CAP_NET_ADMIN)", err)
	}
	return fd, nil
}

// open makes the namespace silent, and then the TAPs and bridges. Joints own descriptors, also beside an error.
func (a *attempt) open() error {
	if err := writeSysctls(nsSysctls); err != nil {
		return err
	}
	if slices.ContainsFunc(a.rec.Joins, func(j Join) bool { return j.datapath() != Redirected }) {
		if err := writeSysctls(bridgeSysctls); err != nil {
			return err
		}
	}
	if len(localAddrs(a.rec.Joins)) > 0 {
		if err := writeSysctls(loopbackSysctls); err != nil {
			return err
		}
	}
	for i, n := range a.nics {
		r := a.rec.Joins[i]
		j := &joint{Port: Port{NIC: n, Join: r}, link: a.rec.Snapshot.Link(r.Link)}
		a.joints = append(a.joints, j)
		if err := j.named(ways[r.datapath()].open(a, j)); err != nil {
			return err
		}
		if a.o.Vhost {
			j.Vhost = openVhost(len(j.Taps))
		}
	}
	return nil
}

// silence takes the addresses of a link away, and with them its routes, and keeps the namespace's stack from
// answering on it. IPv6 goes first: switching it off removes its addresses in one step.
func (k *kernel) silence(dev netlink.Link, link *nic.Link) error {
	if err := writeSysctls(linkSysctls(link.Name)); err != nil {
		return err
	}
	for _, a := range link.Addrs {
		if !a.Prefix.Addr().Is4() {
			continue
		}
		err := k.h.AddrDel(dev, &netlink.Addr{IPNet: ipNet(a.Prefix), Peer: peer(a)})
		// A secondary address goes with its primary.
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s away: %w", a.Prefix, err)
		}
	}
	return nil
}

// set changes several things of a link in one message, which the library has no call for. flags are those to be set.
func (a *attempt) set(index int, flags uint32, attrs ...*nl.RtAttr) error {
	if a.rtnl == nil {
		rtnl, err := nl.Subscribe(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		a.rtnl = &nl.SocketHandle{Socket: rtnl}
	}
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: a.rtnl}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, flags
	req.AddData(msg)
	for _, at := range attrs {
		req.AddData(at)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func attr(kind, value int) *nl.RtAttr { return nl.NewRtAttr(kind, nl.Uint32Attr(uint32(value))) }

func noqueue(link netlink.Link) netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT},
		QdiscType:  "noqueue",
	}
}

// step is one change and its name in an error.
type step struct {
	what string
	do   func() error
}

func run(steps ...step) error {
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

// device stands for a link of which no more than this is known.
func device(index int, name string) netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name}}
}

func peer(a nic.Addr) *net.IPNet {
	if a.Peer == (netip.Prefix{}) {
		return nil
	}
	return ipNet(a.Peer)
}

func writeSysctls(values map[string]string) error {
	for path, v := range values {
		if err := writeSysctl(path, v); err != nil {
			return err
		}
	}
	return nil
}
