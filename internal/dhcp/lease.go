// Package dhcp answers the one guest behind a NIC: it tells the guest, by DHCPv4, DHCPv6 and router advertisements, what
// the CNI plugin gave to the pod.
//
// [NewLease] turns a NIC into a [Lease], which is plain data, and [Lease.Reply] is the whole protocol as a function of
// the lease and one message: nothing is allocated, nothing expires, there is no state to lose. [Server] moves frames
// between that function and a packet socket on the guest's TAP:
//
//	conn, err := port.Listen(dhcp.Filter())   // before QEMU starts: the guest's first DISCOVER waits in the socket
//	s := &dhcp.Server{Lease: lease, Conn: conn}
//	go s.Run(ctx)                             // owns conn, closes it, ends with ctx
//
// [NewLease6], [Lease6.Reply] and [Server6] are the same for IPv6, with a socket of their own:
//
//	conn, err := port.Listen(lease6.Filter())
//	up, err := port.Uplink()
//	s := &dhcp.Server6{Lease: lease6, Conn: conn, Uplink: up}
//	go s.Run(ctx)                             // owns both, closes them, takes its routers back when ctx ends
//
// Such a socket hears the guest alone and reaches the guest alone. A server on an IP address of the pod's namespace
// could be asked, and answer, from the cluster's side; this one has no address there.
//
// # Routers
//
// A router advertisement names its router by its source, a link-local address, and most gateways of CNI networks have a
// global one. An address of ours stands for such a gateway: what the guest asks about it goes to the gateway, as if the
// guest had asked about that, and what the gateway says of itself the guest hears of our address too. So the guest has
// the MAC that the gateway has now, and nothing of this is kept here. [Lease6.Own] gives these addresses, which must not
// be seen on the cluster's side.
//
// # Server identifier
//
// A guest renews by unicast to the server identifier. Where the NIC has an IPv4 gateway, that is the server identifier:
// the guest resolves it as for any other traffic, the TAP's socket hears the frame whatever MAC it goes to, and the
// filter on the TAP keeps it from the gateway. No address of the pod's subnet is taken, none can clash. Where the NIC
// has no gateway it is 169.254.0.67, from the block that nobody may pick for itself (RFC 3927, section 2.1); Server answers
// ARP for it, toward the guest, and the lease has a route to it on the link, the one route that is not the pod's: without
// it a client whose socket is not bound to the interface would not renew before T2.
package dhcp

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/virtlet/virtlet/internal/nic"
)

// LeaseTime is the Duration that NewLease sets. The address is the guest's as long as the VM lives, so the time says
// only how often an idle guest wakes up, and how soon it hears of changed options: it asks again after 12 hours. With an
// infinite lease it would never ask again.
const LeaseTime = 24 * time.Hour

// linkLocalServer is the server identifier of a NIC without a gateway. 169.254.0.0/24 is reserved: a host that
// configures itself may not choose from it (RFC 3927, section 2.1). The last byte is DHCP's port.
var linkLocalServer = netip.AddrFrom4([4]byte{169, 254, 0, 67})

// Lease is all that one guest NIC is told. Pure data; JSON-able.
type Lease struct {
	MAC      nic.MAC       `json:"mac"`
	Addr     netip.Prefix  `json:"addr"`             // the guest's IPv4 address and mask
	Server   netip.Addr    `json:"server"`           // server identifier
	Router   netip.Addr    `json:"router,omitzero"`  // unset: no default route through a gateway
	Routes   []nic.Route   `json:"routes,omitempty"` // IPv4 ones, on-link first, default last
	MTU      int           `json:"mtu"`              // bytes, as `ip link` counts
	DNS      nic.DNS       `json:"dns,omitzero"`     // IPv4 servers and well-formed names only
	NTP      []netip.Addr  `json:"ntp,omitempty"`    // time servers; NewLease sets none, as no CNI result has them
	Hostname string        `json:"hostname,omitempty"`
	Duration time.Duration `json:"duration"` // nanoseconds; 136 years or more stand for ever
}

// NewLease gives the lease of a NIC, and false where DHCPv4 has nothing to say: the NIC has no IPv4 address, or is a VF,
// whose frames do not pass through the host. Notes are sentences for the user about what the guest is not told.
func NewLease(n nic.NIC, hostname string) (l Lease, notes []string, ok bool) {
	if n.VF != nil {
		return Lease{}, nil, false
	}
	note := func(format string, args ...any) { notes = append(notes, n.Name+": "+fmt.Sprintf(format, args...)) }
	l = Lease{MAC: n.MAC, MTU: n.MTU, Duration: LeaseTime}
	for _, a := range n.Addrs {
		switch {
		case !a.Addr().Is4() || a.Addr().IsUnspecified() || !a.IsValid():
		case !l.Addr.IsValid():
			l.Addr = a
		default:
			note("DHCP carries one address, %s is left out; cloud-init can carry it", a)
		}
	}
	if !l.Addr.IsValid() {
		return Lease{}, notes, false
	}
	l.route(n.Routes, note)
	l.DNS = resolver(n.DNS, netip.Addr.Is4, note)
	l.Hostname = hostName(hostname, note)
	if codes := l.tooLong(); len(codes) > 0 {
		note("DHCP options %v do not fit into a message of 576 bytes; a guest that does not accept more is not told them", codes)
	}
	return l, notes, true
}

// route sets the routes, the router and the server identifier.
func (l *Lease) route(routes []nic.Route, note func(string, ...any)) {
	// The kernel takes the least metric, and DHCP has no place for one.
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(a, b nic.Route) int { return cmp.Compare(a.Metric, b.Metric) })
	for _, r := range routes {
		if !r.Dst.IsValid() || !r.Dst.Addr().Is4() || r.Gw.IsValid() && !r.Gw.Is4() {
			continue
		}
		if r.Gw.IsUnspecified() {
			r.Gw = netip.Addr{} // how the kernel, and option 121, say that there is none
		}
		dst := r.Dst.Masked()
		if r.OnLink() && dst == l.Addr.Masked() {
			continue // follows from address and mask
		}
		if slices.ContainsFunc(l.Routes, func(o nic.Route) bool { return o.Dst == dst }) {
			note("DHCP carries one route to %s, the one with metric %d is left out", dst, r.Metric)
			continue
		}
		if r.MTU != 0 && r.MTU < l.MTU {
			note("DHCP carries no MTU of a route, the %d of the one to %s is left out", r.MTU, dst)
		}
		l.Routes = append(l.Routes, nic.Route{Dst: dst, Gw: r.Gw})
	}
	l.reachGateways()
	slices.SortStableFunc(l.Routes, func(a, b nic.Route) int { return rank(a) - rank(b) })
	l.Server = linkLocalServer
	for _, r := range l.Routes {
		if r.OnLink() || r.Gw == l.Addr.Addr() {
			continue
		}
		if r.IsDefault() {
			l.Router = r.Gw
		}
		if l.Server == linkLocalServer || r.IsDefault() {
			l.Server = r.Gw
		}
	}
	covered := slices.ContainsFunc(l.Routes, func(r nic.Route) bool { return r.OnLink() && r.Dst.Contains(l.Server) })
	if l.Server == linkLocalServer && !covered {
		l.Routes = slices.Insert(l.Routes, 0, nic.Route{Dst: netip.PrefixFrom(l.Server, 32)})
	}
}

// reachGateways adds an on-link route to every gateway that neither the subnet nor an on-link route covers. A pod's
// kernel can have such a route by the onlink flag, which DHCP does not know.
func (l *Lease) reachGateways() {
	for _, r := range slices.Clone(l.Routes) {
		if r.OnLink() || l.Addr.Masked().Contains(r.Gw) || slices.ContainsFunc(l.Routes, func(o nic.Route) bool {
			return o.OnLink() && !o.IsDefault() && o.Dst.Contains(r.Gw)
		}) {
			continue
		}
		l.Routes = append(l.Routes, nic.Route{Dst: netip.PrefixFrom(r.Gw, 32)})
	}
}

// rank orders routes so that a client which adds them one by one never meets a gateway that it cannot reach.
func rank(r nic.Route) int {
	switch {
	case r.IsDefault():
		return 2
	case r.OnLink():
		return 0
	}
	return 1
}

// resolver gives the part of a resolver configuration that a responder can tell: servers of its family, names that are
// names.
func resolver(d nic.DNS, family func(netip.Addr) bool, note func(string, ...any)) (out nic.DNS) {
	for _, s := range d.Servers {
		if family(s) {
			out.Servers = append(out.Servers, s)
		}
	}
	name := func(s string) (string, bool) {
		if s = trimDot(s); validName(s, true) {
			return s, true
		}
		note("search domain %q is no valid name, it is left out of DHCP", s)
		return "", false
	}
	if d.Domain != "" {
		out.Domain, _ = name(d.Domain)
	}
	for _, s := range d.Search {
		if s, ok := name(s); ok {
			out.Search = append(out.Search, s)
		}
	}
	if len(d.Options) > 0 {
		note("DHCP carries no resolver options, %q are left out: set them in the guest, by user-data", d.Options)
	}
	return out
}

// hostName gives the name where it is one, else nothing.
func hostName(s string, note func(string, ...any)) string {
	if s != "" && !validName(s, false) {
		note("host name %q is no valid name (RFC 1123), it is left out of DHCP", s)
		return ""
	}
	return s
}

// tooLong gives the codes of the options that a client of the least message size (RFC 2131, section 2) does not get.
func (l *Lease) tooLong() []byte {
	r := newResponder(l)
	r.choose(new(optionSet), &query{}, verdict{kind: dhcpv4.MessageTypeOffer, lease: true})
	return r.left
}

// check says what makes a lease unfit to be served.
func (l *Lease) check() error {
	switch {
	case l.MAC.IsZero():
		return fmt.Errorf("lease of %s has no MAC", l.Addr)
	case !l.Addr.IsValid() || !l.Addr.Addr().Is4():
		return fmt.Errorf("lease of %s has no IPv4 address but %q", l.MAC, l.Addr)
	case !l.Server.Is4():
		return fmt.Errorf("lease of %s has no IPv4 server identifier but %q", l.MAC, l.Server)
	case l.Duration < time.Second:
		return fmt.Errorf("lease of %s lasts %s, less than a second", l.MAC, l.Duration)
	}
	return nil
}
