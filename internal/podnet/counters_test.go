package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// losses gives the packets of those counters that are not zero.
func losses(t *testing.T, pod *testnet.Namespace, joins []Join) map[Reason]uint64 {
	t.Helper()
	all, err := droppedBy(pod.NS, joins)
	if err != nil {
		t.Fatal(err)
	}
	out := map[Reason]uint64{}
	for reason, c := range all["eth0"] {
		if c.Packets > 0 {
			out[reason] = c.Packets
		}
	}
	return out
}

// A real guest that minds its own business loses nothing: duplicate address detection, MLD, stable and random link-local
// addresses, ARP, neighbour discovery, TCP and what is bigger than the MTU. Its router solicitations are for our responder.
func TestNothingOfAnHonestGuestIsDropped(t *testing.T) {
	for name, hairpin := range map[string]bool{"plain": false, "hairpin": true} {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				if hairpin && !isVeth(kind) {
					t.Skip("see TestHairpin")
				}
				testNothingOfAnHonestGuestIsDropped(t, kind, hairpin)
			})
		})
	}
}

func testNothingOfAnHonestGuestIsDropped(t *testing.T, kind string, hairpin bool) {
	node := testnet.NewNode(t, gw4, gw6)
	spec := dualStack()
	spec.Hairpin = hairpin
	pod, _ := addPodOf(t, kind, node, spec)
	quiet(t, pod)
	a := attach(t, pod, Options{})
	guest := newBigGuest(t, a.nics[0], a.ports[0])
	const stable, random = "2", "3" // addr_gen_mode, of ip-sysctl
	for _, mode := range []string{stable, random} {
		guest.MustRun("ip", "link", "set", "eth0", "down")
		guest.Sysctl("ipv6/conf/eth0/stable_secret", "2001:db8::5ec")
		guest.Sysctl("ipv6/conf/eth0/addr_gen_mode", mode)
		guest.MustRun("ip", "link", "set", "eth0", "up")
		quiet(t, guest.Namespace)
	}
	for _, addr := range a.nics[0].Addrs { // with duplicate address detection, unlike Configure
		guest.MustRun("ip", "addr", "add", addr.String(), "dev", "eth0")
	}
	quiet(t, guest.Namespace)
	guest.MustRun("ip", "route", "add", "default", "via", gw4.Addr().String())
	guest.MustRun("ip", "maddr", "add", "33:33:00:00:12:34", "dev", "eth0")
	for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
		if !guest.Ping(to) || !guest.Ping(to, "-s", "4000") {
			t.Errorf("guest does not reach %s", to)
		}
	}
	for _, to := range []netip.Addr{ip4.Addr(), ip6.Addr()} {
		node.MustRun("ip", "neigh", "flush", "dev", testnet.Bridge)
		if !node.Ping(to) || !node.Ping(to, "-s", "4000") {
			t.Errorf("node does not reach %s", to)
		}
	}
	testnet.Transfer(t, guest.Namespace, node.Namespace, gw4.Addr(), 1e6)
	testnet.Transfer(t, guest.Namespace, node.Namespace, gw6.Addr(), 1e6)
	got := losses(t, pod, a.rec.Joins)
	if got[GuestRS] == 0 {
		t.Error("no router solicitation: was the guest's IPv6 off?")
	}
	if hairpin == (got[Reflected] == 0) {
		t.Errorf("%d frames reflected", got[Reflected])
	}
	delete(got, GuestRS)
	delete(got, Reflected)
	delete(got, OwnStack) // the pod's, not the guest's
	if len(got) > 0 {
		t.Errorf("dropped: %v", got)
	}
}

// What another process reads is what nft shows, as JSON too; after Detach there is nothing.
func TestCountersFromAnotherProcess(t *testing.T) {
	t.Parallel()
	w := newWire(t, "veth", calico(), Policy{Own: []netip.Addr{netip.MustParseAddr(ownLinkLocal)}})
	for range 3 {
		w.fate(t, true, ethernet(mac, nil, ip6Kind, nd(guestLinkLocal, message(134, ""))))
	}
	w.fate(t, false, ethernet(cluster, nil, ip4Kind, udp4("198.51.100.1", 67, 68)))
	ns, err := netns.Open(w.pod.Path()) // as inspect does
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	all, err := droppedBy(ns, w.a.rec.Joins)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	var back map[string]map[string]map[string]uint64
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	const packet = 40 + 8 + 8 // IPv6, the message; fate's mark
	want := map[string]uint64{"packets": 3, "bytes": 3 * packet}
	if d := cmp.Diff(want, back["eth0"]["rogue-ra"]); d != "" {
		t.Errorf("rogue-ra (-want +got):\n%s", d)
	}
	for reason := range because {
		if reason == OwnStack {
			continue // of another datapath
		}
		if _, ok := back["eth0"][string(reason)]; !ok {
			t.Errorf("no counter for %s", reason)
		}
	}
	out := w.pod.MustRun("nft", "list", "table", "netdev", table.Name)
	for _, want := range []string{
		`counter packets 3 bytes ` + fmt.Sprint(want["bytes"]) + ` drop comment "rogue-ra: a guest is no router"`,
		`counter packets 1 `, `comment "cluster-dhcpv4: `,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("nft does not show %q:\n%s", want, out)
		}
	}
	rules, err := Rules(ns, w.a.rec.Joins)
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(rules["eth0"], func(r Rule) bool { return r.Reason == RogueRA }); i < 0 {
		t.Error("no rule for rogue-ra")
	} else if d := cmp.Diff(Rule{
		Hook: "ingress vlttap0", Match: "meta l4proto ipv6-icmp icmpv6 type nd-router-advert", Action: "drop", Reason: RogueRA,
		Counter: Counter{3, want["bytes"]},
	}, rules["eth0"][i]); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if err := Detach(w.pod.NS, w.a.rec); err != nil {
		t.Fatal(err)
	}
	if rules, err := Rules(ns, w.a.rec.Joins); err != nil || len(rules["eth0"]) > 0 {
		t.Errorf("after Detach: %v, %v", rules, err)
	}
}

// nft makes of a rule's words the same expressions as we do.
func TestWordsOfRules(t *testing.T) {
	t.Parallel()
	n := nic.NIC{
		Name: "eth0", MAC: mac, Addrs: []netip.Prefix{ip4, ip6, netip.MustParsePrefix("198.51.100.7/24")},
		Routes: []nic.Route{{Dst: netip.MustParsePrefix("::/0"), Gw: netip.MustParseAddr(gatewayLinkLocal)}},
	}
	var rules []rule
	for _, p := range []Policy{{Own: []netip.Addr{netip.MustParseAddr(ownLinkLocal)}}, {NoSpoofCheck: true}, {ExternalDHCP: true}} {
		rules = append(rules, append(guestRules(n, p), clusterRules(n, p)...)...)
	}
	j := &joint{Port: Port{NIC: n, Join: Join{Link: "eth0", Tap: "vlttap0", Localhost: []netip.Addr{ip4.Addr(), ip6.Addr()}}}}
	for _, h := range j.Join.localHooks() {
		for _, r := range j.localRules(h, j.Join.Localhost) {
			rules = append(rules, r.rule)
		}
	}
	pod := testnet.New(t, "pod")
	b := newBatch()
	b.addTable()
	b.addChain("ours")
	script := "add chain netdev " + table.Name + " theirs\n"
	target := regexp.MustCompile(`icmpv6 taddr (!= )?(\S+)`) // newer nft has it
	for _, r := range rules {
		b.addRule("ours", join(r.whole().exprs(), verdict(drop, "")), nil)
		words := target.ReplaceAllStringFunc(r.whole().text, func(s string) string {
			m := target.FindStringSubmatch(s)
			var hex []string
			for _, a := range strings.Split(m[2], "-") {
				hex = append(hex, fmt.Sprintf("0x%x", netip.MustParseAddr(a).AsSlice()))
			}
			return "@th,64,128 " + m[1] + strings.Join(hex, "-")
		})
		script += "add rule netdev " + table.Name + " theirs " + words + " drop\n"
	}
	var fd int
	pod.Must(func() (err error) { fd, err = openNetfilter(); return err })
	defer unix.Close(fd)
	if err := b.send(fd); err != nil {
		t.Fatal(err)
	}
	pod.MustRun("nft", script)
	ours, theirs := bytecode(pod, "ours"), bytecode(pod, "theirs")
	if len(ours) != len(rules) || len(theirs) != len(rules) {
		t.Fatalf("%d rules of ours, %d of nft's, want %d", len(ours), len(theirs), len(rules))
	}
	for i, r := range rules {
		if d := cmp.Diff(theirs[i], ours[i]); d != "" {
			t.Errorf("%q (-nft +ours):\n%s", r.whole().text, d)
		}
	}
}

var (
	listed  = regexp.MustCompile(`(?m)^netdev \S+ \S+ .*\n((?:  \[ .*\n?)*)`)
	ranged  = regexp.MustCompile(`\[ range eq reg 1 (\S+) (\S+) \]`)
	implied = "  [ meta load protocol => reg 1 ]\n  [ cmp eq reg 1 0x0000dd86 ]\n"
)

// bytecode gives the expressions of each rule of a chain, as nft lists them. Differences of form go: what is loaded
// twice, ranges as pairs, the check for Ethernet, and the one for IPv6 where extension headers or ICMPv6 imply it.
func bytecode(pod *testnet.Namespace, chain string) []string {
	var out []string
	all := pod.MustRun("nft", "--debug=netlink", "list", "chain", "netdev", table.Name, chain)
	for _, m := range listed.FindAllStringSubmatch(all, -1) {
		code := strings.ReplaceAll(m[1], "  [ meta load iiftype => reg 1 ]\n  [ cmp eq reg 1 0x00000001 ]\n", "")
		code = ranged.ReplaceAllString(code, "[ cmp gte reg 1 $1 ]\n  [ cmp lte reg 1 $2 ]")
		if strings.Contains(code, "exthdr") || strings.Contains(code, "cmp eq reg 1 0x0000003a") {
			code = strings.ReplaceAll(code, implied, "")
		}
		var load string
		var lines []string
		for line := range strings.Lines(code) {
			if strings.Contains(line, " load ") {
				if line == load {
					continue
				}
				load = line
			}
			lines = append(lines, line)
		}
		out = append(out, strings.Join(lines, ""))
	}
	return out
}

// A batch that the kernel refuses gives the reason, and what the kernel lacks by it, and leaves nothing.
func TestRefusedBatch(t *testing.T) {
	nowhere, unknown := verdict(drop, ""), expression("vltnone", nil) // which is as fwd is where there is none
	noName := strings.Repeat("x", unix.IFNAMSIZ+1)
	for name, c := range map[string]struct {
		lay  func(*batch)
		want need
	}{
		"a rule without a chain": {func(b *batch) { b.addRule("nowhere", nowhere, nil); b.addForward("nowhere", nowhere) }, needNftables},
		"no fwd":                 {func(b *batch) { b.addRule("chain", verdict(drop, ""), nil); b.addForward("chain", unknown) }, needForward},
		"no egress":              {func(b *batch) { b.addHook(hook{device: noName, egress: true}) }, needForward},
		"no ingress":             {func(b *batch) { b.addHook(hook{device: noName}) }, needNftables},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := testnet.New(t, "pod")
			var fd int
			pod.Must(func() (err error) { fd, err = openNetfilter(); return err })
			defer unix.Close(fd)
			b := newBatch()
			b.addTable()
			b.addChain("chain")
			c.lay(b)
			b.addChain("never")
			err := b.send(fd)
			var l *lack
			if !errors.As(err, &l) || l.of != c.want {
				t.Errorf("%v, want one for lack of %q", err, c.want)
			}
			if no := errors.Is(err, unix.ENOENT); strings.HasSuffix(name, "gress") == no {
				t.Errorf("the reason is %v", err)
			}
			if out := pod.MustRun("nft", "list", "ruleset"); out != "" {
				t.Errorf("left: %s", out)
			}
		})
	}
}

// The most addresses that rules have room for, and one more.
func TestManyAddresses(t *testing.T) {
	t.Parallel()
	spec := dualStack()
	for i := range maxAddrs - 1 {
		spec.Addrs = append(spec.Addrs, netip.MustParsePrefix(fmt.Sprintf("203.0.113.%d/32", i)), netip.MustParsePrefix(fmt.Sprintf("2001:db8:200::%x/128", i)))
	}
	w := newWire(t, "veth", spec, Policy{})
	for _, src := range []string{"203.0.113.0", "203.0.113.30"} {
		if got := w.fate(t, true, ethernet(mac, nil, ip4Kind, udp4(src, 9, 9))); got != "" {
			t.Errorf("%s: %s", src, got)
		}
	}
	rules, err := Rules(w.pod.NS, w.a.rec.Joins)
	if want := len(guestRules(w.a.nics[0], Policy{})) + len(clusterRules(w.a.nics[0], Policy{})); err != nil || len(rules["eth0"]) != want {
		t.Errorf("%d rules are read back, want %d: %v", len(rules["eth0"]), want, err)
	}
	if got := w.fate(t, true, ethernet(mac, nil, ip6Kind, udp6("2001:db8:200::64", 9, 9))); got != SpoofedIPv6 {
		t.Errorf("a foreign source: %q", got)
	}
	n := w.a.nics[0]
	n.Addrs = append(slices.Clone(n.Addrs), netip.MustParsePrefix("203.0.113.200/32"))
	snap := nic.Snapshot{Links: []nic.Link{{Name: n.Name}}}
	if _, err := plan(snap, []nic.NIC{n}, Options{}, nil); err == nil || !strings.Contains(err.Error(), "addresses") {
		t.Errorf("%d addresses: %v", len(n.Addrs), err)
	}
	if _, err := plan(snap, []nic.NIC{n}, Options{Policies: map[string]Policy{n.Name: {NoSpoofCheck: true}}}, nil); err != nil {
		t.Errorf("without a check: %v", err)
	}
}
