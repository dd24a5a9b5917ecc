package podnet

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// Localhost of the namespace can lead to the guest: container managers serve port-forward by connections to 127.0.0.1, or
// else ::1, from inside the pod. Rules on the loopback give such a frame the guest's addresses and hand it to the TAP; rules
// on the TAP do the reverse. They keep no state, nothing of the namespace gets an address or a route, and the guest sees a
// host on its link, 169.254.0.67 or fe80::a9fe:43, that is nobody's but theirs. See docs/decisions/0012-localhost.md.
//
// Of a join this needs no more than that
//   - frames that come out of the TAP meet nftables' ingress hook there before anything takes them away (our programs let
//     pass what [localMatches] has), and
//   - frames for the guest meet rules at the join's first hook, where those are dropped that come from these addresses.

// The hosts that the guest sees in the place of localhost. The first is the DHCP responder's of a NIC without a gateway, to
// which the lease has a route then. Both are on the link, and questions for them are answered by rules.
var localHost4, localHost6 = linkLocalServer, netip.MustParseAddr("fe80::a9fe:43")

// loopback is the link of that name, which has this index in every namespace (LOOPBACK_IFINDEX of the kernel).
const loopback, loopbackIndex = "lo", 1

// loopbackSysctls let the loopback take frames that did not start there, for 127.0.0.1 and from it. No other link does.
var loopbackSysctls = map[string]string{"ipv4/conf/lo/route_localnet": "1", "ipv4/conf/lo/accept_local": "1"}

// readLoopback gives the settings that Attach is to change, as they are.
func readLoopback(ns *netns.NS) (found map[string]string, err error) {
	err = ns.Do(func() error { found = readSysctls(loopbackSysctls); return nil })
	return found, err
}

// guestOf gives the NIC that localhost leads to, the first one with addresses, and the first of each family of them; none
// if that NIC is a PCI function.
func guestOf(nics []nic.NIC) (name string, addrs []netip.Addr) {
	for _, n := range nics {
		if len(n.Addrs) == 0 {
			continue
		}
		if n.VF != nil {
			return "", nil
		}
		for _, family := range []family{inet4, inet6} {
			i := slices.IndexFunc(n.Addrs, func(p netip.Prefix) bool {
				return p.Addr().Is4() == family.host.Is4() && p.Addr() != family.host
			})
			if i >= 0 {
				addrs = append(addrs, n.Addrs[i].Addr())
			}
		}
		return n.Name, addrs
	}
	return "", nil
}

// family is what IPv4 and IPv6 have in common, each in its way.
type family struct {
	is, whole       match // a frame is of it, and is no fragment
	from, to        part
	fromAt, toAt    uint32 // where these are in the header
	sums            checksums
	localhost, host netip.Addr
	ask             func(f family, own nic.MAC) inquiry // for host
	claims          match                               // somebody says that he is host
}

var (
	inet4 = family{
		is: protocol.is(ipv4), whole: ip4Frag.without(0x3fff), from: ip4From, to: ip4To, fromAt: 12, toAt: 16, sums: checksums{unix.NFT_PAYLOAD_CSUM_INET, 10, true},
		localhost: netip.MustParseAddr("127.0.0.1"), host: localHost4, ask: askARP,
		claims: all(protocol.is(arp), arpSender.is(addr(localHost4))),
	}
	inet6 = family{
		is: protocol.is(ipv6), whole: fragment.is(named("missing", 0)), from: ip6From, to: ip6To, fromAt: 8, toAt: 24, sums: checksums{unix.NFT_PAYLOAD_CSUM_NONE, 0, true},
		localhost: netip.IPv6Loopback(), host: localHost6, ask: askND,
		claims: all(underICMP.match, icmp6Type.is(advertise), ndTarget.is(addr(localHost6))),
	}
)

// familyOf gives the family of an address.
func familyOf(a netip.Addr) family {
	if a.Is4() {
		return inet4
	}
	return inet6
}

// rename gives a packet other addresses.
func (f family) rename(from, to netip.Addr) attrs {
	return join(load(from.AsSlice()), store(network, f.fromAt, uint32(from.BitLen()/8), f.sums),
		load(to.AsSlice()), store(network, f.toAt, uint32(to.BitLen()/8), f.sums))
}

// setMACs gives a frame other MACs.
func setMACs(from, to nic.MAC) attrs {
	return join(load(to[:]), store(frame, 0, 6, none), load(from[:]), store(frame, 6, 6, none))
}

// sendBack turns a frame round.
func sendBack(own nic.MAC) attrs {
	return join(loadPayload(frame, 6, 6), store(frame, 0, 6, none), load(own[:]), store(frame, 6, 6, none))
}

// inquiry is one for the MAC of a host.
type inquiry struct {
	match  match
	sound  match // and it gets an answer
	answer attrs // what makes the one of the other
}

// askARP is for localHost4: RFC 826, with the places that arpFormat and the others have.
func askARP(f family, own nic.MAC) inquiry {
	const operation, sender, senderIP, target = 6, 8, 14, 18
	return inquiry{
		match: all(protocol.is(arp), arpTarget.is(addr(f.host))),
		sound: all(arpRequest.is(named("", 0, 1, 8, 0, 6, 4, 0, 1)), arpSender.isNot(noIPv4)),
		answer: join(
			loadPayload(network, sender, 10), store(network, target, 10, none), // MAC and address of who asks
			load([]byte{0, 2}), store(network, operation, 2, none),
			load(own[:]), store(network, sender, 6, none), load(f.host.AsSlice()), store(network, senderIP, 4, none), sendBack(own)),
	}
}

// askND is for localHost6. A sound question has its asker's MAC as its only option, and becomes an answer of the same length:
// RFC 4861, sections 4.3 and 4.4.
func askND(f family, own nic.MAC) inquiry {
	const kind, flags, option, optionMAC = 0, 4, 24, 26
	const solicited, override = 0x40, 0x20
	icmp := checksums{unix.NFT_PAYLOAD_CSUM_INET, 2, false}
	return inquiry{
		match: all(protocol.is(ipv6), underICMP.match, icmp6Type.is(solicit), ndTarget.is(addr(f.host))),
		sound: all(ip6Length.is(word(32)), ndOption.is(octet(1)), ip6From.isNot(noIPv6)),
		answer: join(
			load([]byte{136, 0}), store(layer4, kind, 2, icmp), load([]byte{solicited | override, 0, 0, 0}), store(layer4, flags, 4, icmp),
			load([]byte{2, 1}), store(layer4, option, 2, icmp), load(own[:]), store(layer4, optionMAC, 6, icmp),
			loadPayload(network, f.fromAt, 16), store(network, f.toAt, 16, f.sums),
			load(f.host.AsSlice()), store(network, f.fromAt, 16, f.sums), sendBack(own)),
	}
}

// from is where the frames come from that a hook of these rules is for.
type from string

const (
	fromOthers   from = "others"
	fromGuest    from = "guest"
	fromLoopback from = "loopback"
)

// localHooks gives the hooks of these rules at a join, and, at the NIC that localhost leads to, at the loopback. They are before
// the join's own hooks.
func (j Join) localHooks() []hook {
	all := []hook{{device: j.Tap, local: fromGuest}}
	if first := j.hooks()[0]; j.engine() == Nftables { // a program has these itself, as nothing goes on to nftables
		all = append([]hook{{device: first.device, egress: first.egress, local: fromOthers}}, all...)
	}
	if len(j.Localhost) > 0 {
		all = append(all, hook{device: loopback, local: fromLoopback})
	}
	return all
}

// localAddrs gives the addresses that localhost leads to.
func localAddrs(joins []Join) []netip.Addr {
	for _, j := range joins {
		if len(j.Localhost) > 0 {
			return j.Localhost
		}
	}
	return nil
}

// addLocalhost adds the rules. Every TAP has them: which NIC a guest answers by is its own business.
func (b *batch) addLocalhost(joints []*joint) {
	var joins []Join
	for _, j := range joints {
		joins = append(joins, j.Join)
	}
	addrs := localAddrs(joins)
	if len(addrs) == 0 {
		return
	}
	for _, j := range joints {
		for _, h := range j.Join.localHooks() {
			b.addHook(h)
			for _, r := range j.localRules(h, addrs) {
				b.addLocalRule(h, r)
			}
		}
	}
}

// localRule is one that drops, for its reason, lets frames with our mark pass, or changes those that match and hands them to
// a device.
type localRule struct {
	rule
	chain  string // of the change, named for whom it is about
	change attrs
	to     string
	index  int // of that device
}

// addLocalRule adds one. What it hands on has our mark from then on, by which rules know it at the device that it gets to.
func (b *batch) addLocalRule(h hook, r localRule) {
	if r.to == "" {
		b.addRules(h.chain(), []rule{r.rule}, passes)
		return
	}
	chain := h.chain() + "-" + r.chain
	b.addChain(chain)
	b.addForward(chain, join(r.change, setMeta(unix.NFT_META_MARK, ourMark), forward(r.index)))
	b.addRule(h.chain(), join(r.match.exprs(), verdict(follow, chain)), r.words(r.to))
}

// localRules gives those of a hook, for the guest's addresses.
func (j *joint) localRules(h hook, addrs []netip.Addr) []localRule {
	var all []localRule
	if h.egress || h.local == fromLoopback { // where our own come by
		all = append(all, localRule{rule: ours})
	}
	for _, a := range addrs {
		switch f := familyOf(a); h.local {
		case fromOthers:
			all = append(all, strangers(f)...)
		case fromGuest:
			all = append(all, j.answers(f, a)...)
		case fromLoopback:
			all = append(all, j.calls(f, a))
		}
	}
	return all
}

// calls leads connections to localhost to the guest.
func (j *joint) calls(f family, guest netip.Addr) localRule {
	return localRule{
		rule:  rule{match: all(f.is, l4proto.is(tcp), f.from.is(addr(f.localhost)), f.to.is(addr(f.localhost)))},
		chain: "to-" + guest.String(), change: join(f.rename(f.host, guest), setMACs(ownMAC(j.NIC.MAC), j.NIC.MAC)), to: j.Join.Tap, index: j.tapIndex,
	}
}

// answers leads the guest's part of such connections to the loopback, and answers its questions for whom it sees there. It
// cannot begin a connection, and nothing of it for that address goes anywhere else. What is not from the guest's own MAC and
// address is left to the rules of the spoof check.
func (j *joint) answers(f family, guest netip.Addr) []localRule {
	honest, ask := etherFrom.is(hardware(j.NIC.MAC)), f.ask(f, ownMAC(j.NIC.MAC))
	toHost := toHost(f, j.NIC.MAC, guest)
	return []localRule{
		{
			rule: rule{match: all(toHost, f.whole, l4proto.is(tcp), notSYN)}, chain: "from-" + guest.String(),
			change: join(f.rename(f.localhost, f.localhost), setMACs(nic.MAC{}, nic.MAC{}), setMeta(unix.NFT_META_PKTTYPE, unix.PACKET_HOST)),
			to:     loopback, index: loopbackIndex,
		},
		// (The DHCP responder may answer too, with the same MAC.)
		{rule: rule{match: all(honest, ask.match, ask.sound)}, chain: "for-" + f.host.String(), change: ask.answer, to: j.Join.Tap, index: j.tapIndex},
		{rule: rule{OwnAddress, nil, toHost}},
		{rule: rule{OwnAddress, nil, all(honest, ask.match)}},
	}
}

// localMatches are what of the guest's frames the rules at the TAP are for. They dispose of all of it, in one way or another.
func localMatches(own nic.MAC, addrs []netip.Addr) (found []match) {
	for _, a := range addrs {
		f := familyOf(a)
		found = append(found, toHost(f, own, a), all(etherFrom.is(hardware(own)), f.ask(f, ownMAC(own)).match))
	}
	return found
}

// toHost matches what an honest guest sends to whom it sees in the place of localhost.
func toHost(f family, own nic.MAC, guest netip.Addr) match {
	return all(etherFrom.is(hardware(own)), f.is, f.from.is(addr(guest)), f.to.is(addr(f.host)))
}

// strangers keeps others from being taken for localhost.
func strangers(f family) []localRule {
	return []localRule{{rule: rule{ClusterOwn, nil, all(f.is, f.from.is(addr(f.host)))}}, {rule: rule{ClusterOwn, nil, f.claims}}}
}

// checkLocalhost says what is missing of it.
func checkLocalhost(ns *netns.NS, joins []Join) error {
	if len(localAddrs(joins)) == 0 {
		return nil
	}
	is, err := readLoopback(ns)
	if err != nil {
		return err
	}
	for path, want := range loopbackSysctls {
		if is[path] != want {
			return fmt.Errorf("localhost of the namespace does not lead to the guest any more: net/%s is %q, not %q", path, is[path], want)
		}
	}
	for _, j := range joins {
		for _, h := range j.localHooks() {
			rules, err := inForce(ns.Nftables(), h.chain())
			if err != nil {
				return err
			}
			if len(rules) == 0 {
				return fmt.Errorf("localhost of the namespace does not lead to the guest any more: its rules at %s are gone", h)
			}
		}
	}
	return nil
}
