package podnet

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/virtlet/virtlet/internal/testnet"
)

// sample is a frame and why it is to be dropped.
type sample struct {
	reason Reason // "": it passes
	frame  []byte
}

func udp4(src string, from, to uint16) []byte { return packet4(src, protoUDP, 0, ports(from, to)) }
func udp6(src string, from, to uint16, h ...extension) []byte {
	return packet6(src, protoUDP, ports(from, to), h...)
}

func nd(src string, body []byte, h ...extension) []byte { return packet6(src, protoICMPv6, body, h...) }

// guestSamples are frames of a guest.
func guestSamples() map[string]sample {
	v4, v6 := ip4.Addr().String(), ip6.Addr().String()
	g4 := func(b []byte, tags ...uint16) []byte { return ethernet(mac, tags, ip4Kind, b) }
	g6 := func(b []byte, tags ...uint16) []byte { return ethernet(mac, tags, ip6Kind, b) }
	ga := func(b []byte, tags ...uint16) []byte { return ethernet(mac, tags, arpKind, b) }
	snapped := append([]byte{0, 0x40, 0xaa, 0xaa, 3, 0, 0, 0, 0x86, 0xdd}, nd(guestLinkLocal, message(134, ""))...)
	return map[string]sample{
		"ARP question":                      {"", ga(arpMessage(1, mac, v4))},
		"ARP answer":                        {"", ga(arpMessage(2, mac, v4))},
		"ARP announcement":                  {"", ga(asking(arpMessage(1, mac, v4), v4))},
		"ARP probe":                         {"", ga(asking(arpMessage(1, mac, "0.0.0.0"), v4))},
		"UDP":                               {"", g4(udp4(v4, 68, 6767))},
		"UDP, VLAN 5":                       {"", g4(udp4(v4, 53, 5353), 5)},
		"UDP, priority":                     {"", g4(udp4(v4, 53, 5353), 0)},
		"TCP":                               {"", g4(packet4(v4, protoTCP, 0, ports(67, 68)))},
		"later fragment, like DHCP":         {"", g4(packet4(v4, protoUDP, 8, ports(68, 67)))},
		"UDP of IPv6":                       {"", g6(udp6(v6, 546, 5353))},
		"UDP from a link-local address":     {"", g6(udp6(guestLinkLocal, 5353, 5353))},
		"TCP of IPv6 with options":          {"", g6(packet6(v6, protoTCP, ports(546, 547), hopByHop, destOpts))},
		"later fragment of IPv6, like DHCP": {"", g6(udp6(v6, 546, 547, fragmented(8, true)))},
		"later fragment of extensions":      {"", g6(packet6(v6, protoICMPv6, message(128, ""), fragmented(8, false), destOpts))},
		"echo in fragments":                 {"", g6(nd(v6, message(128, ""), fragmented(0, true)))},
		"DAD":                               {"", g6(nd("::", message(135, guestLinkLocal)))},
		"DAD with a nonce":                  {"", g6(nd("::", message(135, v6, []byte{14, 1, 1, 2, 3, 4, 5, 6})))},
		"MLD before an address":             {"", g6(nd("::", message(143, ""), hopByHop))},
		"MLD":                               {"", g6(nd(guestLinkLocal, message(143, ""), hopByHop))},
		"neighbour solicitation":            {"", g6(nd(v6, message(135, gw6.Addr().String(), option(1, mac))))},
		"neighbour advertisement":           {"", g6(nd(v6, message(136, v6, option(2, mac))))},
		"without an option":                 {"", g6(nd(guestLinkLocal, message(136, guestLinkLocal)))},
		"foreign MAC":                       {SpoofedMAC, ethernet(foreignMAC, nil, ip4Kind, udp4(v4, 9, 9))},
		"foreign MAC, ARP":                  {SpoofedMAC, ethernet(foreignMAC, nil, arpKind, arpMessage(1, mac, v4))},
		"ARP for a foreign address":         {SpoofedARP, ga(arpMessage(1, mac, foreign4))},
		"ARP for the gateway's":             {SpoofedARP, ga(arpMessage(2, mac, gw4.Addr().String()))},
		"ARP for a foreign MAC":             {SpoofedARP, ga(arpMessage(2, foreignMAC, v4))},
		"ARP, priority":                     {SpoofedARP, ga(arpMessage(2, mac, foreign4), 0)},
		"ARP, VLAN 5":                       {SpoofedARP, ga(arpMessage(2, mac, foreign4), 5)},
		"ARP of another kind":               {SpoofedARP, ga(append([]byte{0, 6}, arpMessage(1, mac, v4)[2:]...))},
		"foreign IPv4 source":               {SpoofedIPv4, g4(udp4(foreign4, 9, 9))},
		"foreign IPv4 source, TCP":          {SpoofedIPv4, g4(packet4(foreign4, protoTCP, 0, ports(1, 2)))},
		"foreign IPv4 source, VLAN 5":       {SpoofedIPv4, g4(udp4(foreign4, 9, 9), 5)},
		"foreign IPv4 source, service tag":  {SpoofedIPv4, g4(udp4(foreign4, 9, 9), serviceTag)},
		"foreign IPv4 source, fragment":     {SpoofedIPv4, g4(packet4(foreign4, protoUDP, 8, ports(9, 9)))},
		"no IPv4 source":                    {SpoofedIPv4, g4(udp4("0.0.0.0", 9, 9))},
		"no IPv4 source, TCP":               {SpoofedIPv4, g4(packet4("0.0.0.0", protoTCP, 0, ports(1, 2)))},
		"foreign IPv6 source":               {SpoofedIPv6, g6(udp6(foreign6, 9, 9))},
		"foreign IPv6 source, priority":     {SpoofedIPv6, g6(udp6(foreign6, 9, 9), 0)},
		"foreign IPv6 source, TCP":          {SpoofedIPv6, g6(packet6(foreign6, protoTCP, ports(1, 2), destOpts))},
		"router's link-local source":        {SpoofedIPv6, g6(nd(gatewayLinkLocal, message(135, v6)))},
		"our link-local source":             {SpoofedIPv6, g6(udp6(ownLinkLocal, 9, 9))},
		"site-local source":                 {SpoofedIPv6, g6(udp6("fec0::1", 9, 9))},
		"NA for a foreign address":          {SpoofedND, g6(nd(guestLinkLocal, message(136, foreign6, option(2, mac))))},
		"NA for the gateway":                {SpoofedND, g6(nd(v6, message(136, gw6.Addr().String(), option(2, mac))))},
		"NA for the router's link-local":    {SpoofedND, g6(nd(v6, message(136, gatewayLinkLocal, option(2, mac))))},
		"NA for our link-local":             {SpoofedND, g6(nd(v6, message(136, ownLinkLocal, option(2, mac))))},
		"NA with options in front":          {SpoofedND, g6(nd(v6, message(136, foreign6), hopByHop, destOpts))},
		"NA with a foreign MAC":             {SpoofedND, g6(nd(v6, message(136, v6, option(2, foreignMAC))))},
		"NS with a foreign MAC":             {SpoofedND, g6(nd(v6, message(135, foreign6, option(1, foreignMAC))))},
		"NA with the foreign MAC behind":    {SpoofedND, g6(nd(v6, message(136, v6, option(2, mac), option(2, foreignMAC))))},
		"NS with the foreign MAC behind":    {SpoofedND, g6(nd(v6, message(135, foreign6, option(14, mac), option(1, foreignMAC))))},
		"another EtherType":                 {OtherProtocol, ethernet(mac, nil, 0x88b5, []byte("something"))},
		"two tags":                          {OtherProtocol, g4(udp4(foreign4, 9, 9), 5, 0)},
		"two priorities":                    {OtherProtocol, g6(nd(guestLinkLocal, message(134, "")), 0, 0)},
		"two kinds of tags":                 {OtherProtocol, g6(nd(guestLinkLocal, message(134, "")), serviceTag|5, 7)},
		"RA in SNAP":                        {OtherProtocol, ethernet(mac, nil, 0x40, snapped[2:])},
		"RA in SNAP, priority":              {OtherProtocol, ethernet(mac, []uint16{0}, 0x40, snapped[2:])},
		"STP":                               {OtherProtocol, append([]byte{1, 0x80, 0xc2, 0, 0, 0}, ethernet(mac, nil, 38, append([]byte{0x42, 0x42, 3}, make([]byte, 35)...))[6:]...)},
		"OFFER":                             {RogueDHCPv4, g4(udp4(v4, 67, 68))},
		"OFFER from another port, priority": {RogueDHCPv4, g4(udp4(v4, 6767, 68), 0)},
		"DHCPv6 reply":                      {RogueDHCPv6, g6(udp6(guestLinkLocal, 547, 546))},
		"DHCPv6 reply behind options":       {RogueDHCPv6, g6(udp6(guestLinkLocal, 547, 546, hopByHop, destOpts))},
		"RA":                                {RogueRA, g6(nd(guestLinkLocal, message(134, "")))},
		"RA behind options":                 {RogueRA, g6(nd(guestLinkLocal, message(134, ""), hopByHop, destOpts, destOpts))},
		"RA, first fragment":                {RogueRA, g6(nd(guestLinkLocal, message(134, ""), destOpts, fragmented(0, true)))},
		"RA, priority":                      {RogueRA, g6(nd(guestLinkLocal, message(134, "")), 0)},
		"redirect":                          {RogueRedirect, g6(nd(guestLinkLocal, message(137, foreign6)))},
		"DISCOVER":                          {GuestDHCPv4, g4(udp4("0.0.0.0", 68, 67))},
		"DISCOVER, priority":                {GuestDHCPv4, g4(udp4("0.0.0.0", 68, 67), 0)},
		"DISCOVER, first fragment":          {GuestDHCPv4, g4(packet4("0.0.0.0", protoUDP, 0x2000, ports(68, 67)))},
		"renewal":                           {GuestDHCPv4, g4(udp4(v4, 68, 67))},
		"SOLICIT":                           {GuestDHCPv6, g6(udp6(guestLinkLocal, 546, 547))},
		"SOLICIT from a port of its own":    {GuestDHCPv6, g6(udp6(guestLinkLocal, 4711, 547))},
		"SOLICIT, priority":                 {GuestDHCPv6, g6(udp6(guestLinkLocal, 546, 547), 0)},
		"SOLICIT behind options":            {GuestDHCPv6, g6(udp6(guestLinkLocal, 546, 547, hopByHop, destOpts))},
		"SOLICIT, first fragment":           {GuestDHCPv6, g6(udp6(guestLinkLocal, 546, 547, destOpts, fragmented(0, true)))},
		"RS":                                {GuestRS, g6(nd(guestLinkLocal, message(133, "", option(1, mac))))},
		"RS before an address":              {GuestRS, g6(nd("::", message(133, "")))},
		"RS, priority":                      {GuestRS, g6(nd(guestLinkLocal, message(133, "")), 0)},
		"RS behind options":                 {GuestRS, g6(nd(guestLinkLocal, message(133, ""), destOpts))},
		"RS, first fragment":                {GuestRS, g6(nd(guestLinkLocal, message(133, ""), fragmented(0, true)))},
		"ARP for our server":                {OwnAddress, ga(asking(arpMessage(1, mac, v4), linkLocalServer.String()))},
		"NS for our address":                {OwnAddress, g6(nd(guestLinkLocal, message(135, ownLinkLocal, option(1, mac))))},
		"NS for our address behind options": {OwnAddress, g6(nd(guestLinkLocal, message(135, ownLinkLocal), hopByHop))},
		"transport in the next fragment":    {GuestHidden, g6(packet6(guestLinkLocal, protoICMPv6, nil, fragmented(0, true), destOpts))},
		"NA in a fragment":                  {GuestHidden, g6(nd(v6, message(136, ""), fragmented(0, true)))},
		"the same, padding like TCP":        {GuestHidden, g6(append(packet6(guestLinkLocal, 60, nil, fragmented(0, true), destOpts), append([]byte{protoTCP, 0, 1, 4, 0, 0, 0, 0}, ports(1, 2)...)...))},
		"a fragment in a fragment":          {GuestHidden, g6(packet6(guestLinkLocal, protoICMPv6, nil, fragmented(0, false), fragmented(0, true), destOpts))},
		"routing header in a fragment":      {GuestHidden, g6(packet6(guestLinkLocal, protoUDP, nil, fragmented(0, true), extension{43, make([]byte, 8)}))},
	}
}

// With everything on, each frame passes, or is dropped for the reason that was meant and counted once. With everything
// off each arrives: what drops it are the rules.
func TestFramesOfTheGuest(t *testing.T) { forEveryJoin(t, testFramesOfTheGuest) }

func testFramesOfTheGuest(t *testing.T, kind string) {
	p := Policy{Own: []netip.Addr{netip.MustParseAddr(ownLinkLocal)}}
	held := newWire(t, kind, calico(), p)
	free := newWire(t, kind, calico(), Policy{Own: p.Own, NoSpoofCheck: true, ExternalDHCP: true, ExternalRA: true})
	for name, s := range guestSamples() {
		if got := held.fate(t, true, s.frame); got != s.reason {
			t.Errorf("%s: dropped for %q, want %q", name, got, s.reason)
		}
		if got := free.fate(t, true, s.frame); got != "" {
			t.Errorf("%s: dropped for %q on a NIC without rules", name, got)
		}
	}
}

// Each switch leaves out what it is for, and nothing else.
func TestPolicies(t *testing.T) {
	spoof := []Reason{
		SpoofedMAC, SpoofedARP, SpoofedIPv4, SpoofedIPv6, SpoofedND, OtherProtocol, RogueDHCPv4, RogueDHCPv6, RogueRA, RogueRedirect,
	}
	own := []netip.Addr{netip.MustParseAddr(ownLinkLocal)}
	addressless := calico()
	addressless.Addrs, addressless.Routes = nil, nil
	unchecked := map[string]Reason{
		// What is inside may be a router solicitation.
		"two priorities": GuestHidden, "RA in SNAP": GuestHidden, "RA in SNAP, priority": GuestHidden,
		"NA in a fragment": "", // it cannot be one
	}
	for name, c := range map[string]struct {
		spec   testnet.PodSpec
		policy Policy
		passes []Reason
		differ map[string]Reason // by sample
	}{
		"no spoof check": {calico(), Policy{Own: own, NoSpoofCheck: true}, spoof, unchecked},
		"no addresses":   {addressless, Policy{Own: own}, spoof, unchecked},
		"external RA":    {calico(), Policy{Own: own, ExternalRA: true}, []Reason{GuestRS}, nil},
		"external DHCP": {
			calico(),
			Policy{Own: own, ExternalDHCP: true},
			[]Reason{GuestDHCPv4, GuestDHCPv6},
			map[string]Reason{"ARP for our server": ""}, // there is none
		},
	} {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				w := newWire(t, kind, c.spec, c.policy)
				for name, s := range guestSamples() {
					want := s.reason
					if slices.Contains(c.passes, want) {
						want = ""
					}
					if r, ok := c.differ[name]; ok {
						want = r
					}
					if got := w.fate(t, true, s.frame); got != want {
						t.Errorf("%s: dropped for %q, want %q", name, got, want)
					}
				}
			})
		})
	}
}

// clusterSamples are frames toward the guest.
func clusterSamples(kind string) map[string]sample {
	router := "fe80::c1"
	c4 := func(b []byte, tags ...uint16) []byte { return ethernet(cluster, tags, ip4Kind, b) }
	c6 := func(b []byte, tags ...uint16) []byte { return ethernet(cluster, tags, ip6Kind, b) }
	// Of a macvlan's broadcasts the parent holds back fragments, until all are there, and for ever those that come back to it.
	toGuest := func(frame []byte) []byte {
		if kind != "macvlan" {
			return frame
		}
		return append(slices.Clone(mac[:]), frame[len(mac):]...)
	}
	gw := gw4.Addr().String()
	advert := nd(router, message(134, "", option(1, cluster)))
	ledBack := append(slices.Clone(mac[:]), ethernet(mac, nil, ip4Kind, packet4(gw, protoTCP, 0, ports(67, 68)))[len(mac):]...)
	samples := map[string]sample{
		"ARP for the guest":                 {"", ethernet(cluster, nil, arpKind, asking(arpMessage(1, cluster, gw), ip4.Addr().String()))},
		"UDP":                               {"", c4(udp4(gw, 67, 6868))},
		"TCP":                               {"", c4(packet4(gw, protoTCP, 0, ports(67, 68)))},
		"DISCOVER":                          {"", c4(udp4("0.0.0.0", 68, 67))},
		"later fragment, like DHCP":         {"", toGuest(c4(packet4(gw, protoUDP, 8, ports(67, 68))))},
		"neighbour solicitation":            {"", c6(nd(router, message(135, ip6.Addr().String(), option(1, cluster))))},
		"neighbour advertisement":           {"", c6(nd(router, message(136, router, option(2, cluster))))},
		"another guest's RS":                {"", c6(nd("fe80::c2", message(133, "")))},
		"another guest's SOLICIT":           {"", c6(udp6("fe80::c2", 546, 547))},
		"the router's redirect":             {"", c6(nd(router, message(137, foreign6)))},
		"echo":                              {"", c6(nd(router, message(128, ""), hopByHop))},
		"later fragment of IPv6, like DHCP": {"", c6(udp6(router, 547, 546, fragmented(8, true)))},
		"TCP of IPv6":                       {"", c6(packet6(router, protoTCP, ports(547, 546), destOpts))},
		"RA in VLAN 7 in VLAN 5":            {"", c6(advert, 5, 7)},
		"another EtherType":                 {"", ethernet(cluster, nil, 0x88b5, []byte("something"))},
		"another SNAP":                      {"", ethernet(cluster, nil, 0x40, []byte{0xaa, 0xaa, 3, 0, 0, 0xc, 0x20, 0})},
		"the guest's own":                   {Reflected, ethernet(mac, nil, ip6Kind, nd("::", message(135, ip6.Addr().String())))},
		"the guest's own, priority":         {Reflected, ethernet(mac, []uint16{0}, ip4Kind, udp4(gw, 9, 9))},
		"the guest's own, led back to it":   {"", ledBack},
		"OFFER":                             {ClusterDHCPv4, c4(udp4(gw, 67, 68))},
		"OFFER, first fragment":             {ClusterDHCPv4, toGuest(c4(packet4(gw, protoUDP, 0x2000, ports(67, 68))))},
		"OFFER, priority":                   {ClusterDHCPv4, c4(udp4(gw, 67, 68), 0)},
		"DHCPv6 reply":                      {ClusterDHCPv6, c6(udp6(router, 547, 546))},
		"DHCPv6 reply from another port":    {ClusterDHCPv6, c6(udp6(gw6.Addr().String(), 4711, 546))},
		"DHCPv6 reply, priority":            {ClusterDHCPv6, c6(udp6(router, 547, 546), serviceTag)},
		"DHCPv6 reply behind options":       {ClusterDHCPv6, c6(udp6(router, 547, 546, hopByHop, destOpts, destOpts))},
		"DHCPv6 reply, first fragment":      {ClusterDHCPv6, c6(udp6(router, 547, 546, destOpts, fragmented(0, true)))},
		"RA":                                {ClusterRA, c6(advert)},
		"RA, priority":                      {ClusterRA, c6(advert, 0)},
		"RA, VLAN 7":                        {ClusterRA, c6(advert, 7)},
		"RA behind options":                 {ClusterRA, c6(nd(router, message(134, ""), hopByHop, destOpts, destOpts))},
		"RA behind a routing header":        {ClusterRA, c6(nd(router, message(134, ""), extension{43, make([]byte, 8)}))},
		"RA, first fragment":                {ClusterRA, c6(nd(router, message(134, ""), hopByHop, fragmented(0, true)))},
		"RA, the only fragment":             {ClusterRA, c6(nd(router, message(134, ""), fragmented(0, false)))},
		"NA for our address":                {ClusterOwn, c6(nd(router, message(136, ownLinkLocal, option(2, cluster))))},
		"NA for our address behind options": {ClusterOwn, c6(nd(router, message(136, ownLinkLocal), hopByHop))},
		"RA in the next fragment":           {ClusterHidden, c6(packet6(router, protoICMPv6, nil, fragmented(0, true), destOpts))},
		"the same, padding like TCP":        {ClusterHidden, c6(append(packet6(router, 60, nil, fragmented(0, true), destOpts), append([]byte{protoTCP, 0, 1, 4, 0, 0, 0, 0}, ports(1, 2)...)...))},
		"RA in a fragment of a fragment":    {ClusterHidden, c6(packet6(router, protoICMPv6, nil, fragmented(0, false), fragmented(0, true), destOpts))},
		"RA, two priorities":                {ClusterHidden, c6(advert, 0, 0)},
		"RA, two kinds of priority":         {ClusterHidden, c6(advert, serviceTag, 0)},
		"the other way":                     {ClusterHidden, c6(advert, 0, serviceTag)},
		"RA in SNAP":                        {ClusterHidden, ethernet(cluster, nil, 0x40, append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 0x86, 0xdd}, advert...))},
		"RA in SNAP, priority":              {ClusterHidden, ethernet(cluster, []uint16{0}, 0x40, append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 0x86, 0xdd}, advert...))},
	}
	switch kind {
	case "macvlan":
		delete(samples, "the guest's own")
		delete(samples, "the guest's own, priority")
	case "tap": // which is on a bridge that learns: it takes the guest for being where this comes from
		delete(samples, "the guest's own, led back to it")
	}
	return samples
}

// The same the other way, with hairpin ports or without, and with each switch.
func TestFramesOfTheCluster(t *testing.T) {
	hairpin := calico()
	hairpin.Hairpin = true
	dhcp, ra := []Reason{ClusterDHCPv4, ClusterDHCPv6}, []Reason{ClusterRA, ClusterOwn}
	own := []netip.Addr{netip.MustParseAddr(ownLinkLocal)}
	for name, c := range map[string]struct {
		spec   testnet.PodSpec
		policy Policy
		passes []Reason
	}{
		"all on":          {calico(), Policy{Own: own}, nil},
		"hairpin":         {hairpin, Policy{Own: own}, nil},
		"nothing of ours": {calico(), Policy{}, []Reason{ClusterOwn}},
		"no spoof check":  {calico(), Policy{Own: own, NoSpoofCheck: true}, nil},
		"external DHCP":   {calico(), Policy{Own: own, ExternalDHCP: true}, dhcp},
		"external RA":     {calico(), Policy{Own: own, ExternalRA: true}, ra},
		"both":            {calico(), Policy{Own: own, ExternalDHCP: true, ExternalRA: true}, append([]Reason{ClusterHidden, ClusterRA, ClusterOwn}, dhcp...)},
	} {
		t.Run(name, func(t *testing.T) {
			forEveryJoin(t, func(t *testing.T, kind string) {
				w := newWire(t, kind, c.spec, c.policy)
				for name, s := range clusterSamples(kind) {
					want := s.reason
					if slices.Contains(c.passes, want) {
						want = ""
					}
					if got := w.fate(t, false, s.frame); got != want {
						t.Errorf("%s: dropped for %q, want %q", name, got, want)
					}
				}
			})
		})
	}
}
