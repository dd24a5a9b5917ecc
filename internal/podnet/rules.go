package podnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// Policy says what the filters of one NIC let pass. The zero Policy keeps apart all that can be kept apart.
type Policy struct {
	// Own are addresses that our responders have toward the guest alone. The guest's questions for them end at the TAP,
	// and it may not claim them elsewhere. The responder's 169.254.0.67 is among them without being named.
	Own []netip.Addr
	// ExternalDHCP leaves the guest to the DHCP servers of its network, for IPv4 and IPv6; ours must then be silent.
	ExternalDHCP bool
	// ExternalRA leaves the guest to the routers of its network in the same way.
	ExternalRA bool
	// NoSpoofCheck lets the guest send from any address, and be a router, a DHCP server or a bridge. A NIC without
	// addresses is never checked: what is behind it is not known.
	NoSpoofCheck bool
}

// Reason is why a frame was dropped. Its name is stable: it is in counters and comments, and documented.
type Reason string

// Reasons for frames of the guest, of the cluster, and of the namespace itself.
const (
	SpoofedMAC    Reason = "spoofed-mac"
	SpoofedARP    Reason = "spoofed-arp"
	SpoofedIPv4   Reason = "spoofed-ipv4"
	SpoofedIPv6   Reason = "spoofed-ipv6"
	SpoofedND     Reason = "spoofed-nd"
	OtherProtocol Reason = "other-protocol"
	RogueDHCPv4   Reason = "rogue-dhcpv4"
	RogueDHCPv6   Reason = "rogue-dhcpv6"
	RogueRA       Reason = "rogue-ra"
	RogueRedirect Reason = "rogue-redirect"

	GuestDHCPv4 Reason = "guest-dhcpv4"
	GuestDHCPv6 Reason = "guest-dhcpv6"
	GuestRS     Reason = "guest-rs"
	OwnAddress  Reason = "own-address"
	GuestHidden Reason = "guest-hidden"

	Reflected     Reason = "reflected"
	ClusterDHCPv4 Reason = "cluster-dhcpv4"
	ClusterDHCPv6 Reason = "cluster-dhcpv6"
	ClusterRA     Reason = "cluster-ra"
	ClusterOwn    Reason = "cluster-own"
	ClusterHidden Reason = "cluster-hidden"

	OwnStack Reason = "own-stack"
)

// because says the same in words.
var because = map[Reason]string{
	SpoofedMAC:    "source MAC is not the NIC's",
	SpoofedARP:    "ARP sender is not the NIC",
	SpoofedIPv4:   "source is no address of the NIC",
	SpoofedIPv6:   "source is no address of the NIC",
	SpoofedND:     "claims another's address, or another's MAC",
	OtherProtocol: "neither IP nor ARP, or tagged twice",
	RogueDHCPv4:   "a guest is no DHCP server",
	RogueDHCPv6:   "a guest is no DHCPv6 server",
	RogueRA:       "a guest is no router",
	RogueRedirect: "a guest is no router",
	GuestDHCPv4:   "the guest's DHCP server is inside",
	GuestDHCPv6:   "the guest's DHCPv6 server is inside",
	GuestRS:       "the guest's router advertisements are from inside",
	OwnAddress:    "an address of the guest's servers, which are inside",
	GuestHidden:   "wrapped or cut, so that it may be anything",
	Reflected:     "the guest's own frame comes back",
	ClusterDHCPv4: "the guest's DHCP server is inside",
	ClusterDHCPv6: "the guest's DHCPv6 server is inside",
	ClusterRA:     "the guest's router advertisements are from inside",
	ClusterOwn:    "an address of the guest's servers, which are inside, is nobody else's",
	ClusterHidden: "wrapped or cut, so that it may be anything",
	OwnStack:      "the namespace itself is silent",
}

// rule drops the frames that match, for its reason; without one it lets them pass the rules that follow.
type rule struct {
	reason Reason
	under  *group
	match  match
}

// group is how several rules begin.
type group struct {
	name  string
	match match
}

// whole is all that has to match.
func (r rule) whole() match {
	if r.under == nil {
		return r.match
	}
	return all(r.under.match, r.match)
}

var (
	underARP  = &group{"arp", protocol.is(arp)}
	underUDP  = &group{"udp", l4proto.is(udp)}
	underICMP = &group{"icmpv6", l4proto.is(icmpv6)}
	underFrag = &group{"frag", fragment.is(named("exists", 1))}
)

// Protocols and message types by nft's names.
var (
	arp    = etherType("arp", unix.ETH_P_ARP)
	ipv4   = etherType("ip", unix.ETH_P_IP)
	ipv6   = etherType("ip6", unix.ETH_P_IPV6)
	vlan   = etherType("8021q", unix.ETH_P_8021Q)
	qinq   = etherType("8021ad", unix.ETH_P_8021AD)
	llc    = etherType("0x4", unix.ETH_P_802_2) // the kernel's, for a frame with a length where the EtherType should be
	tcp    = named("tcp", unix.IPPROTO_TCP)
	udp    = named("udp", unix.IPPROTO_UDP)
	icmpv6 = named("ipv6-icmp", unix.IPPROTO_ICMPV6)

	solicitRouter   = named("nd-router-solicit", 133)
	advertiseRouter = named("nd-router-advert", 134)
	solicit         = named("nd-neighbor-solicit", 135)
	advertise       = named("nd-neighbor-advert", 136)
	redirect        = named("nd-redirect", 137)
)

// UDP ports of DHCP (RFC 2131, section 4.1; RFC 8415, section 7.2). A client listens on its own and a server on its own;
// where a datagram comes from is up to the sender and not looked at.
var (
	dhcpServer, dhcpClient     = word(67), word(68)
	dhcpv6Server, dhcpv6Client = word(547), word(546)
)

// vlanID are the bits of a tag that say which VLAN.
const vlanID = 0x0fff

// linkLocalServer is the server identifier that package dhcp gives on a NIC without an IPv4 gateway (its
// linkLocalServer). It answers ARP for it on the TAP, so the question must not reach the cluster.
var linkLocalServer = netip.MustParseAddr("169.254.0.67")

var noIPv4, noIPv6 = addr(netip.IPv4Unspecified()), addr(netip.IPv6Unspecified())

// linkLocal are the IPv6 link-local addresses, fe80::/10. A guest makes its own, by its MAC (RFC 4291), its secret
// (RFC 7217) or chance, so all of them are as good.
var linkLocal = [2]value{addr(netip.MustParseAddr("fe80::")), addr(netip.MustParseAddr("febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"))}

// clusterRules are those at the veth, for frames toward the guest. Redirects pass: they are a router's word about a
// better next hop, and a guest believes only the router that it uses (RFC 4861, section 8.1).
func clusterRules(n nic.NIC, p Policy) []rule {
	// The guest would take its own solicitation for another host's and its address for taken (RFC 4862, section 5.4.4). But what
	// is also for its MAC has been led back to it, by a port of the node or a Service: a bridge with br_netfilter changes addresses
	// of such a packet and where the frame goes, and leaves its source as it was (br_nf_pre_routing_finish_bridge of the kernel).
	own := hardware(n.MAC)
	rules := []rule{{Reflected, nil, all(etherFrom.is(own), etherTo.isNot(own))}}
	if p.ExternalDHCP && p.ExternalRA {
		return rules
	}
	rules = append(rules, fragments(ClusterHidden)...)
	rules = append(rules, notTCP())
	if !p.ExternalDHCP {
		rules = append(rules, rule{ClusterDHCPv4, underUDP, udpTo.is(dhcpClient)}, rule{ClusterDHCPv6, underUDP, udpTo.is(dhcpv6Client)})
	}
	rules = append(rules, notUDP())
	rules = append(rules, wrapped(ClusterHidden)...)
	if !p.ExternalRA {
		rules = append(rules, rule{ClusterRA, underICMP, icmp6Type.is(advertiseRouter)})
		for _, a := range p.Own { // or anybody could be the guest's router
			if a.Is6() {
				rules = append(rules, rule{ClusterOwn, underICMP, all(icmp6Type.is(advertise), ndTarget.is(addr(a)))})
			}
		}
	}
	return rules
}

// ours lets what has our mark pass.
var ours = rule{match: mark.is(value{fmt.Sprintf("0x%x", ourMark), binary.NativeEndian.AppendUint32(nil, ourMark)})}

// marked lets what has our mark pass other rules.
func marked(rules func(nic.NIC, Policy) []rule) func(nic.NIC, Policy) []rule {
	return func(n nic.NIC, p Policy) []rule { return append([]rule{ours}, rules(n, p)...) }
}

// stackRules keep a link silent whose addresses have to stay.
func stackRules(nic.NIC, Policy) []rule { return []rule{{OwnStack, nil, match{}}} }

// guestRules are those at the TAP, for frames from the guest. The first that matches counts.
func guestRules(n nic.NIC, p Policy) []rule {
	check := checks(n, p)
	if !check && p.ExternalDHCP && p.ExternalRA {
		return nil
	}
	var rules []rule
	if check {
		rules = sourceRules(n, p)
	}
	rules = append(rules, fragments(GuestHidden)...)
	rules = append(rules, datagramRules(p, check)...)
	if check {
		rules = append(rules, rule{SpoofedIPv4, nil, all(protocol.is(ipv4), ip4From.is(noIPv4))})
	}
	rules = append(rules, notTCP())
	if check {
		// Whatever the VLAN, what is in a tagged frame is held to the same rules.
		rules = append(rules, rule{OtherProtocol, nil, protocol.isNone(ipv4, ipv6, arp)})
	} else {
		rules = append(rules, wrapped(GuestHidden)...)
	}
	rules = append(rules, arpRules(n, p, check)...)
	return append(rules, icmpRules(n, p, check)...)
}

// checks says whether the guest is held to its addresses.
func checks(n nic.NIC, p Policy) bool { return len(n.Addrs) > 0 && !p.NoSpoofCheck }

// maxAddrs is how many addresses of a family may be in a rule: the kernel ends a listing, without a word, at a rule that
// is longer than a page (4 KiB). No plugin gives a NIC nearly as many.
const maxAddrs = 32

// sourceRules hold the guest to its MAC and its addresses. From 0.0.0.0 comes DHCP, which has its rules, and nothing
// else. It may use :: before it has an address, to look whether another host has it and to say what groups it listens to;
// nobody can answer or forward that (RFC 4291, section 2.5.2).
func sourceRules(n nic.NIC, p Policy) []rule {
	v4, v6 := addrs(n)
	rules := []rule{
		{SpoofedMAC, nil, etherFrom.isNot(hardware(n.MAC))},
		{SpoofedIPv4, nil, all(protocol.is(ipv4), ip4From.isNone(append(v4, noIPv4)...))},
		{SpoofedIPv6, nil, all(protocol.is(ipv6), ip6From.isNone(append(v6, noIPv6)...), ip6From.outside(linkLocal[0], linkLocal[1]))},
	}
	for _, a := range others(n, p) {
		rules = append(rules, rule{SpoofedIPv6, nil, all(protocol.is(ipv6), ip6From.is(addr(a)))})
	}
	return rules
}

// datagramRules are those for UDP.
func datagramRules(p Policy, check bool) []rule {
	var rules []rule
	if p.ExternalDHCP && check { // from 0.0.0.0, too
		rules = append(rules, rule{"", underUDP, udpTo.is(dhcpServer)})
	}
	if !p.ExternalDHCP {
		rules = append(rules, rule{GuestDHCPv4, underUDP, udpTo.is(dhcpServer)}, rule{GuestDHCPv6, underUDP, udpTo.is(dhcpv6Server)})
	}
	if check {
		rules = append(rules, rule{RogueDHCPv4, underUDP, udpTo.is(dhcpClient)}, rule{RogueDHCPv6, underUDP, udpTo.is(dhcpv6Client)})
		rules = append(rules, rule{SpoofedIPv4, underUDP, all(protocol.is(ipv4), ip4From.is(noIPv4))})
	}
	return append(rules, notUDP())
}

// arpRules keep questions for our own addresses inside, and hold the guest to its own ones. 0.0.0.0 is the sender of
// probes (RFC 5227).
func arpRules(n nic.NIC, p Policy, check bool) []rule {
	var rules []rule
	for _, a := range ownAddrs(n, p) {
		if a.Is4() {
			rules = append(rules, rule{OwnAddress, underARP, arpTarget.is(addr(a))})
		}
	}
	if !check {
		return rules
	}
	v4, _ := addrs(n)
	return append(rules,
		rule{SpoofedARP, underARP, arpFormat.isNot(named("", 0, 1, 8, 0, 6, 4))}, // Ethernet and IPv4
		rule{SpoofedARP, underARP, arpSenderMAC.isNot(hardware(n.MAC))},
		rule{SpoofedARP, underARP, arpSender.isNone(append(v4, noIPv4)...)})
}

// icmpRules do the same for neighbour discovery, and keep a guest from being a router. (A redirect of IPv4 is believed
// from the gateway's address only, which the guest cannot send from.)
func icmpRules(n nic.NIC, p Policy, check bool) []rule {
	var rules []rule
	if !p.ExternalRA {
		rules = append(rules, rule{GuestRS, underICMP, icmp6Type.is(solicitRouter)})
	}
	for _, a := range ownAddrs(n, p) {
		if a.Is6() {
			rules = append(rules, rule{OwnAddress, underICMP, all(icmp6Type.is(solicit), ndTarget.is(addr(a)))})
		}
	}
	if !check {
		return rules
	}
	_, v6 := addrs(n)
	rules = append(rules,
		rule{RogueRA, underICMP, icmp6Type.is(advertiseRouter)},
		rule{RogueRedirect, underICMP, icmp6Type.is(redirect)},
		// Hosts ignore neighbour discovery in fragments, or ought to (RFC 6980): the target may be in the second.
		rule{GuestHidden, underICMP, all(icmp6Type.within(octet(135), octet(136)), fragment.is(named("exists", 1)))},
		rule{SpoofedND, underICMP, all(icmp6Type.is(advertise), ndTarget.isNone(v6...), ndTarget.outside(linkLocal[0], linkLocal[1]))})
	for _, a := range others(n, p) {
		rules = append(rules, rule{SpoofedND, underICMP, all(icmp6Type.is(advertise), ndTarget.is(addr(a)))})
	}
	// The MAC of a solicitation or advertisement is in an option (RFC 4861, section 4.6.1). Rules find the first alone: so
	// there may be one, without extension headers in front, and 32 bytes are enough for that.
	return append(rules,
		rule{SpoofedND, underICMP, all(icmp6Type.within(octet(135), octet(136)), ip6Length.above(word(32)))},
		rule{SpoofedND, underICMP, all(icmp6Type.within(octet(135), octet(136)), ndOption.within(octet(1), octet(2)), ndOptionMAC.isNot(hardware(n.MAC)))})
}

// notTCP lets TCP pass: nothing of what follows is of it, and most frames are.
func notTCP() rule { return rule{"", nil, l4proto.is(tcp)} }

// notUDP ends what there is for UDP in the same way. With it a frame meets half as many rules.
func notUDP() rule { return rule{"", underUDP, match{}} }

// fragments let the later fragments of a packet pass: they come to nothing without the first. They have data where the
// others have a transport header, which would match at random. Of IPv6, they drop a first fragment whose extension
// headers go on behind the fragment header: what they lead to may be in the next one, out of sight (RFC 7112), and
// padding of the frame could look like it. Nobody sends such packets in earnest. Without fragments the rules see behind
// all headers, and IPv4 has nothing to hide a message behind.
func fragments(why Reason) []rule {
	return []rule{
		{"", nil, all(protocol.is(ipv4), ip4Frag.with(0x1fff))},
		{"", underFrag, match{"frag frag-off != 0", ip6Frag.with(0xfff8).tests}},
		{why, underFrag, fragNext.within(octet(unix.IPPROTO_ROUTING), octet(unix.IPPROTO_FRAGMENT))},
		{why, underFrag, fragNext.is(octet(unix.IPPROTO_AH))},
		{why, underFrag, fragNext.is(octet(unix.IPPROTO_DSTOPTS))},
	}
}

// wrapped drops what the other rules cannot see into. They see through one tag; a host takes off any number of VLAN 0,
// which is a priority alone (IEEE 802.1Q, clause 6.9), and nobody sends two in earnest. Other VLANs are the guest's
// business. Some hosts take an EtherType behind LLC and SNAP (RFC 1042) for the frame's.
func wrapped(why Reason) []rule {
	return []rule{
		{why, nil, all(protocol.is(vlan), tag.without(vlanID))},
		{why, nil, all(protocol.is(qinq), tag.without(vlanID))},
		{why, nil, all(protocol.is(llc), snap.is(named("", 0xaa, 0xaa, 3, 0, 0, 0)))},
	}
}

// addrs are the NIC's addresses by family.
func addrs(n nic.NIC) (v4, v6 []value) {
	for _, p := range n.Addrs {
		if p.Addr().Is4() {
			v4 = append(v4, addr(p.Addr()))
		} else {
			v6 = append(v6, addr(p.Addr()))
		}
	}
	return v4, v6
}

// ownAddrs are the addresses that are answered for on the TAP.
func ownAddrs(n nic.NIC, p Policy) []netip.Addr {
	if n.HasGateway(4) || p.ExternalDHCP {
		return p.Own
	}
	return append([]netip.Addr{linkLocalServer}, p.Own...)
}

// others are link-local addresses that are known not to be the guest's: those of its routers.
func others(n nic.NIC, p Policy) []netip.Addr {
	var out []netip.Addr
	add := func(a netip.Addr) {
		if a.Is6() && a.IsLinkLocalUnicast() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, r := range n.Routes {
		add(r.Gw)
	}
	for _, a := range p.Own {
		add(a)
	}
	return out
}
