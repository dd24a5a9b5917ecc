package nic

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Attachment is one CNI network that configured the namespace.
type Attachment struct {
	Network string           // CNI network name
	Plugin  string           // type of the network's first plugin, which makes the interface; "" where unknown
	IfName  string           // CNI_IFNAME of the ADD: eth0
	Device  string           // PCI address of the device that the network was given, or made its interface of; "": none is known
	Result  *types100.Result // of version 1.x, converted if need be; nil where only the namespace is known
	// DeviceType is what device info calls the device: pci, vdpa, vhost-user, memif. "": nothing calls it anything.
	DeviceType string
	DeviceNote string // for the user: what of all that tells of the device could not be used
}

// MaxTapMTU is the largest MTU that a TAP takes, in bytes: the kernel's tun driver allows a frame of 65535 bytes
// (MAX_MTU) and takes the Ethernet header of 14 off it. A veth takes 65535.
const MaxTapMTU = 65521

// ErrNoInterface says that a namespace has nothing that could become an interface of a guest.
var ErrNoInterface = errors.New("the pod's network namespace has no interface for a guest")

const (
	loopback = "lo" // the kernel's name of it; the guest has its own
	// minMTU is the kernel's ETH_MIN_MTU: no veth and no TAP goes below.
	minMTU = 68
	// maxEntries bounds each list of a CNI result. Real ones have a handful; a plugin may print 4 MiB of them.
	maxEntries = 1024
	// maxNotes bounds what Plan tells the user.
	maxNotes = 64
)

// fallbackKinds are tunnels whose module makes one device in every namespace, down and of no use: sit0, tunl0, ip6tnl0,
// gre0, gretap0, erspan0, ip_vti0, ip6_vti0, ip6gre0 ... (sysctl net.core.fb_tunnels_only_for_init_net).
var fallbackKinds = map[string]bool{
	"sit": true, "ipip": true, "ip6tnl": true, "gre": true, "gretap": true, "erspan": true, "vti": true, "vti6": true,
	"ip6gre": true, "ip6gretap": true, "ip6erspan": true,
}

// Plan works out the guest's interfaces from what the CNI plugins answered and from what they did to the namespace.
// notes are sentences for the user about what was corrected or could not be carried over; they are given beside an
// error too. as may be empty: then the namespace alone speaks. Plan changes neither as nor snap.
//
// The namespace is the authority: MAC, MTU, addresses and routes are those of the link. Results add what it cannot
// say (order, network names, DNS) and what it does not say: addresses of a family that the link has none of, and routes
// to destinations that no link has a route to. Where both speak and differ, the namespace wins and a note says so.
//
// Errors: a result names an interface that is not there; an interface is of a kind that no guest can be joined to; a
// link without a usable MAC or MTU; nothing is left ([ErrNoInterface]).
//
// Of a TAP that is the port of a bridge, the bridge and its other ports are the way to the network, and no interfaces of
// the guest.
func Plan(as []Attachment, snap Snapshot) (nics []NIC, notes []string, err error) {
	p := newPlanner(snap)
	nics, err = p.plan(as)
	if p.unlisted > 0 {
		p.notes = append(p.notes, fmt.Sprintf("%d more notes are not listed", p.unlisted))
	}
	return nics, p.notes, err
}

// planner is the state of one Plan.
type planner struct {
	links  []*Link // by interface index, then those of functions without one
	vfs    []VF
	drafts map[string]*draft // by the link's name
	claims []claim           // one for each attachment
	order  []*draft          // the guest's interfaces
	// routed has the gateways (the zero Addr: none) by which each destination is reached already.
	routed map[netip.Prefix][]netip.Addr
	// routedFamily says which families have a route in the namespace, in any table.
	routedFamily [2]bool
	// multipath has the routes with several next hops that were met, without their hops.
	multipath map[KernelRoute]bool

	notes    []string
	noted    map[string]bool
	unlisted int
}

// claim is an attachment and the interfaces that are its own.
type claim struct {
	Attachment
	ifaces []*draft // by index of Result.Interfaces; nil: the entry is no interface of the pod
	nics   []*draft // in the guest's order
}

// draft is a NIC in the making.
type draft struct {
	NIC
	link   *Link
	kernel []KernelRoute // the link's routes that could concern a guest
	given  [2]bool       // families of which the link itself has addresses
	gws    [2]netip.Addr // what the result calls the gateway of the family; not a route
	seen   map[Route]bool
}

func newPlanner(snap Snapshot) *planner {
	p := &planner{drafts: map[string]*draft{}, routed: map[netip.Prefix][]netip.Addr{}, multipath: map[KernelRoute]bool{}, noted: map[string]bool{}}
	for i := range snap.Links {
		if l := &snap.Links[i]; l.Name != "" && l.Name != loopback && p.link(l.Name) == nil {
			p.links = append(p.links, l)
		}
	}
	slices.SortStableFunc(p.links, func(a, b *Link) int { return cmp.Compare(a.Index, b.Index) })
	p.vfs = snap.VFs
	return p
}

func (p *planner) plan(as []Attachment) ([]NIC, error) {
	if err := p.devices(as); err != nil {
		return nil, err
	}
	p.detached(as)
	if err := p.arrange(as); err != nil {
		return nil, err
	}
	for _, d := range p.order {
		if err := p.identify(d); err != nil {
			return nil, err
		}
		p.readRoutes(d)
		p.linkAddresses(d)
	}
	for i := range p.claims {
		p.compare(&p.claims[i])
		p.resultAddresses(&p.claims[i])
	}
	// Routes follow when all addresses are known, and results when all that the namespace routes is known.
	for _, d := range p.order {
		p.linkRoutes(d)
	}
	for i := range p.claims {
		p.resultRoutes(&p.claims[i])
	}
	p.gatewayRoutes()
	for i := range p.claims {
		p.resolver(&p.claims[i])
	}
	nics := make([]NIC, 0, len(p.order))
	for _, d := range p.order {
		d.finishRoutes()
		p.checkMTU(d)
		nics = append(nics, d.NIC)
	}
	return nics, nil
}

// arrange decides which links are the guest's interfaces and in which order: those of the attachments in CNI order,
// then the links that no result speaks of (a meta-plugin's net1 ...) by index.
func (p *planner) arrange(as []Attachment) error {
	p.claims = make([]claim, len(as))
	for i, a := range as {
		p.claims[i].Attachment = a
	}
	// What is named exactly comes first, so that no guess takes a link that another result names.
	for _, step := range []func(*claim) error{p.claimNamed, p.claimFound, p.claimLast} {
		for i := range p.claims {
			if err := step(&p.claims[i]); err != nil {
				return err
			}
		}
	}
	for _, c := range p.claims {
		for _, d := range c.nics {
			if !slices.Contains(p.order, d) {
				p.order = append(p.order, d)
			}
		}
	}
	var left []string
	for _, l := range p.links {
		switch idle := !l.Up && len(l.Addrs) == 0; {
		case p.drafts[l.Name] != nil:
		case p.behind(l) != "":
			p.note("interface %s is left to the namespace: it leads to the guest's %s", quote(l.Name), quote(p.behind(l)))
		case !served(l) && idle:
			left = append(left, quote(l.Name))
			if !fallbackKinds[l.Kind] {
				p.note("interface %s is left out: it is a %s, down, without addresses, and no CNI result names it", quote(l.Name), l.what())
			}
		default:
			d, err := p.take(nil, l)
			if err != nil {
				return err
			}
			p.order = append(p.order, d)
		}
	}
	if len(p.order) == 0 {
		has := "only its loopback"
		if len(left) > 0 {
			has = "its loopback and what no guest can use: " + list(left)
		}
		return fmt.Errorf("%w: it has %s; let a CNI plugin for Ethernet (bridge, ptp, macvlan, Calico, Flannel ...) configure it first, and see that the plugin's ADD succeeded", ErrNoInterface, has)
	}
	return nil
}

// claimNamed takes the interfaces that the result itself places in the sandbox. Entries without a sandbox are on the
// host (bridge, veth peer, ifb), before, between and after the pod's. The text of the sandbox is not compared: plugins
// write the path of the namespace in several ways.
func (p *planner) claimNamed(c *claim) error {
	if c.Result == nil {
		return nil
	}
	if n := max(len(c.Result.Interfaces), len(c.Result.IPs), len(c.Result.Routes)); n > maxEntries {
		return fmt.Errorf("network %s: the CNI result has a list of %d entries; at most %d are read: the plugin is broken", quote(c.Network), n, maxEntries)
	}
	c.ifaces = make([]*draft, len(c.Result.Interfaces))
	for i, f := range c.Result.Interfaces {
		if f == nil || f.Sandbox == "" || f.Name == loopback {
			continue
		}
		l := p.link(f.Name)
		if l == nil {
			return p.missing(c, "the CNI result names", f.Name)
		}
		d, err := p.take(c, l)
		if err != nil {
			return err
		}
		c.ifaces[i] = d
	}
	return nil
}

// claimFound takes, for a result that names no interface of the pod, the links that carry its addresses, or else the
// one that the plugin was asked to make.
func (p *planner) claimFound(c *claim) error {
	if len(c.nics) > 0 || c.IfName == loopback {
		return nil
	}
	asked := p.link(c.IfName)
	if c.Result != nil {
		for _, ip := range c.Result.IPs {
			if ip == nil {
				continue
			}
			// Networks with the same subnet hand out the same address: the link that was asked for comes first.
			l, addr := asked, addrOf(ip.Address.IP)
			if l == nil || !carries(l, addr) {
				i := slices.IndexFunc(p.links, func(l *Link) bool { return p.drafts[l.Name] == nil && carries(l, addr) })
				if i < 0 {
					continue
				}
				l = p.links[i]
			}
			if _, err := p.take(c, l); err != nil {
				return err
			}
		}
	}
	if len(c.nics) == 0 && asked != nil {
		_, err := p.take(c, asked)
		return err
	}
	return nil
}

// claimLast gives an attachment that fits no link by name or address the only link that is left.
func (p *planner) claimLast(c *claim) error {
	if len(c.nics) > 0 || c.IfName == loopback {
		return nil
	}
	var free []*Link
	for _, l := range p.links {
		if p.drafts[l.Name] == nil && served(l) && p.behind(l) == "" {
			free = append(free, l)
		}
	}
	if len(free) == 1 {
		p.note("network %s is taken for that of interface %s, the only one left: its CNI result fits none by name or address", quote(c.Network), quote(free[0].Name))
		_, err := p.take(c, free[0])
		return err
	}
	if c.IfName == "" {
		p.note("network %s: its CNI result is left out: it fits no interface of the namespace by name or address", quote(c.Network))
		return nil
	}
	return p.missing(c, "the CNI plugin was to make", c.IfName)
}

func (p *planner) missing(c *claim, who, name string) error {
	has := "none"
	if len(p.links) > 0 {
		var names []string
		for _, l := range p.links {
			names = append(names, quote(l.Name))
		}
		has = list(names)
	}
	return fmt.Errorf("network %s: %s interface %s in the pod, but its namespace has no such link (there is: %s); the plugin did not finish, or the link was removed or renamed since: detach the network and attach it again",
		quote(c.Network), who, quote(name), has)
}

// take makes l one of the guest's interfaces; c may be nil.
func (p *planner) take(c *claim, l *Link) (*draft, error) {
	network, where := "", fmt.Sprintf("interface %s (no CNI result names it)", quote(l.Name))
	if c != nil {
		network, where = c.Network, fmt.Sprintf("network %s%s: interface %s", quote(c.Network), c.plugin(), quote(l.Name))
	}
	if why := l.refused(); why != "" {
		return nil, fmt.Errorf("%s is of kind %s, %s", where, l.what(), why)
	}
	if master := p.link(l.Master); l.Master != "" && !(l.isTap() && master != nil && master.Kind == "bridge") {
		return nil, fmt.Errorf("%s is a port of %s already: another VM uses the namespace, or a killed one left it so (`virtlet gc` cleans up), or a program in the pod took it", where, quote(l.Master))
	}
	d := p.drafts[l.Name]
	if d == nil {
		d = &draft{NIC: NIC{Name: l.Name, Network: network}, link: l, seen: map[Route]bool{}}
		p.drafts[l.Name] = d
	} else if c != nil && !slices.Contains(c.nics, d) {
		p.note("%s is that of network %s already", where, quote(d.Network))
	}
	if c != nil && !slices.Contains(c.nics, d) {
		c.nics = append(c.nics, d)
	}
	return d, nil
}

// identify fills in what makes d that very interface: MAC, MTU and, for a passthrough function, the PCI address.
func (p *planner) identify(d *draft) error {
	const group = 0x01 // IEEE 802: the lowest bit of the first byte marks a group address
	l, where := d.link, "interface "+quote(d.Name)
	if d.Network != "" {
		where = "network " + quote(d.Network) + ": " + where
	}
	d.MAC, d.MTU = l.MAC, l.MTU
	switch {
	case l.MAC.IsZero():
		return fmt.Errorf("%s has no Ethernet address, so no guest can stand in for it: use a CNI plugin for Ethernet", where)
	case l.MAC[0]&group != 0:
		return fmt.Errorf("%s has the multicast address %s, which no network card can own: set a unicast MAC", where, l.MAC)
	case l.MTU < minMTU:
		return fmt.Errorf("%s has an MTU of %d bytes; Ethernet needs at least %d: set the MTU of its CNI network", where, l.MTU, minMTU)
	}
	if l.ParentBus == busPCI {
		if !pciAddress.MatchString(l.ParentDev) {
			return fmt.Errorf("%s: its device %s has no PCI address (like 0000:01:10.0): use another SR-IOV function", where, quote(l.ParentDev))
		}
		d.VF = &VF{BDF: l.ParentDev, Group: -1}
		if seen := p.vf(l.ParentDev); seen != nil {
			*d.VF = *seen
		}
		return nil
	}
	if d.MTU > MaxTapMTU {
		p.note("interface %s: the MTU of %d bytes is lowered to %d, a TAP's largest", quote(l.Name), d.MTU, MaxTapMTU)
		d.MTU = MaxTapMTU
	}
	return nil
}

// compare notes where a result describes an interface other than it is: a later plugin of the chain may change it
// (tuning sets the MAC) and leave the result as it was.
func (p *planner) compare(c *claim) {
	for i, d := range c.ifaces {
		if d == nil {
			continue
		}
		f := c.Result.Interfaces[i]
		mac, err := ParseMAC(f.Mac)
		switch {
		case f.Mac == "":
		case err != nil:
			p.note("network %s: the MAC %s of interface %s in the CNI result is ignored: it is no Ethernet address", quote(c.Network), quote(f.Mac), quote(d.Name))
		case mac != d.MAC:
			p.note("network %s: the CNI result gives interface %s the MAC %s, the link has %s: the link's is taken", quote(c.Network), quote(d.Name), mac, d.MAC)
		}
		if f.Mtu != 0 && f.Mtu != d.link.MTU {
			p.note("network %s: the CNI result gives interface %s an MTU of %d, the link has %d: the link's is taken", quote(c.Network), quote(d.Name), f.Mtu, d.link.MTU)
		}
	}
}

// checkMTU warns of IPv6 on a link that cannot carry it (RFC 8200, section 5).
func (p *planner) checkMTU(d *draft) {
	const minIPv6 = 1280
	if d.MTU < minIPv6 && d.has(ipv6) {
		p.note("interface %s: IPv6 needs an MTU of at least %d bytes and it has %d: a guest will refuse its IPv6 addresses", quote(d.Name), minIPv6, d.MTU)
	}
}

func (p *planner) link(name string) *Link {
	for _, l := range p.links {
		if l.Name == name {
			return l
		}
	}
	return nil
}

// note keeps one sentence for the user, once.
func (p *planner) note(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	switch {
	case p.noted[s]:
	case len(p.notes) == maxNotes:
		p.unlisted++
	default:
		p.noted[s] = true
		p.notes = append(p.notes, s)
	}
}

// quote makes a text from outside fit to be shown: bounded and without control characters.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}

func list(names []string) string {
	const most = 16
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}
