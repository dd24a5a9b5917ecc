package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// newProgram loads the program of a hook, which redirects to the loopback: a test run sends nothing.
func newProgram(t *testing.T, h hook, n nic.NIC, p Policy) *ebpf.Program {
	t.Helper()
	testnet.NeedRoot(t)
	l, err := loadHook(h, h.work(n, p, nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	if err := l.aim(1, false); err != nil {
		t.Fatal(err)
	}
	return l.prog
}

// rulesOf reads the program's map.
func rulesOf(t *testing.T, p *ebpf.Program) []Rule {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	var all []Rule
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		found, err := entries(m)
		m.Close()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

// verdictOf gives what a program makes of a frame: the reason of the only rule that counted it, "" for what is redirected.
func verdictOf(t *testing.T, p *ebpf.Program, frame []byte) Reason {
	t.Helper()
	before := rulesOf(t, p)
	got, err := p.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		t.Fatal(err)
	}
	var reason Reason
	counted := uint64(0)
	for i, r := range rulesOf(t, p) {
		if n := r.Packets - before[i].Packets; n > 0 {
			reason, counted = r.Reason, counted+n
			if bytes := r.Bytes - before[i].Bytes; bytes != uint64(len(frame)-14) {
				t.Errorf("%d bytes are counted of a frame of %d", bytes, len(frame))
			}
		}
	}
	if want := map[uint64]uint32{0: verdictRedirect, 1: verdictDrop}[counted]; got != want {
		t.Errorf("verdict %d of a frame that counted %d times", got, counted)
	}
	return reason
}

// tags of a frame are taken off before a program sees it, but not in a test run: those samples are for real links alone.
func hasTag(frame []byte) bool {
	kind := binary.BigEndian.Uint16(frame[12:])
	return kind == 0x8100 || kind == 0x88a8
}

var testNIC = nic.NIC{
	Name: "eth0", MAC: mac, Addrs: []netip.Prefix{ip4, ip6},
	Routes: []nic.Route{{Dst: netip.MustParsePrefix("::/0"), Gw: netip.MustParseAddr(gatewayLinkLocal)}},
}

// The samples of the tests on real links, each cut at every length too: what is too short for a rule is as nftables has it,
// which only ever makes it pass; the kernel's verifier has seen to the rest.
func TestProgramsBySample(t *testing.T) {
	own := Policy{Own: []netip.Addr{netip.MustParseAddr(ownLinkLocal)}}
	hooks := Join{Datapath: Redirected, Engine: EBPF, Link: "eth0", Tap: "vlttap0", KeepsAddrs: true}.hooks()
	for i, samples := range []map[string]sample{clusterSamples("veth"), guestSamples()} {
		p := newProgram(t, hooks[i], testNIC, own)
		for name, s := range samples {
			if hasTag(s.frame) {
				continue
			}
			if got := verdictOf(t, p, s.frame); got != s.reason {
				t.Errorf("%s: %s: dropped for %q, want %q", hooks[i], name, got, s.reason)
			}
			for n := 14; n < len(s.frame); n += 7 {
				if _, err := p.Run(&ebpf.RunOptions{Data: s.frame[:n]}); err != nil && !errors.Is(err, unix.EINVAL) { // as shorter than an IP header
					t.Errorf("%s: %s cut to %d bytes: %v", hooks[i], name, n, err)
				}
			}
		}
	}
}

// As many extension headers as are walked hide nothing, and more hide what is behind them.
func TestProgramsWalkExtensionHeaders(t *testing.T) {
	hooks := Join{Datapath: Redirected, Engine: EBPF, Link: "eth0", Tap: "vlttap0"}.hooks()
	guest, cluster := newProgram(t, hooks[1], testNIC, Policy{}), newProgram(t, hooks[0], testNIC, Policy{})
	for n, want := range map[int][2]Reason{
		1: {RogueRA, ClusterRA}, maxExtensions: {RogueRA, ClusterRA}, maxExtensions + 1: {GuestHidden, ClusterHidden},
	} {
		chain := slices.Repeat([]extension{destOpts}, n)
		frame := ethernet(mac, nil, ip6Kind, nd(guestLinkLocal, message(134, ""), chain...))
		if got := verdictOf(t, guest, frame); got != want[0] {
			t.Errorf("%d headers from the guest: %q, want %q", n, got, want[0])
		}
		frame = ethernet(foreignMAC, nil, ip6Kind, nd("fe80::c1", message(134, ""), chain...))
		if got := verdictOf(t, cluster, frame); got != want[1] {
			t.Errorf("%d headers from the cluster: %q, want %q", n, got, want[1])
		}
	}
	// An authentication header has a length of its own unit (RFC 4302).
	auth := extension{51, append([]byte{0, 4}, make([]byte, 22)...)}
	if got := verdictOf(t, guest, ethernet(mac, nil, ip6Kind, nd(guestLinkLocal, message(134, ""), auth, destOpts))); got != RogueRA {
		t.Errorf("behind an authentication header: %q", got)
	}
	// Without a rule for what is hidden it passes, as everything does.
	both := newProgram(t, hooks[0], testNIC, Policy{ExternalDHCP: true, ExternalRA: true})
	if got := verdictOf(t, both, ethernet(foreignMAC, nil, ip6Kind, nd("fe80::c1", message(134, ""), slices.Repeat([]extension{destOpts}, 30)...))); got != "" {
		t.Errorf("dropped for %q with nothing to keep off", got)
	}
}

// What a program with every kind of rule and the most addresses takes is within the verifier's limits.
func TestProgramWithManyAddresses(t *testing.T) {
	n := testNIC
	n.Addrs = nil
	for i := range maxAddrs {
		n.Addrs = append(n.Addrs, netip.MustParsePrefix(fmt.Sprintf("203.0.113.%d/32", i)), netip.MustParsePrefix(fmt.Sprintf("2001:db8:200::%x/128", i)))
	}
	hooks := Join{Datapath: Redirected, Engine: EBPF, Link: "eth0", Tap: "vlttap0"}.hooks()
	p := newProgram(t, hooks[1], n, Policy{Own: []netip.Addr{netip.MustParseAddr(ownLinkLocal)}})
	for src, want := range map[string]Reason{"203.0.113.0": "", "203.0.113.31": "", "203.0.113.32": SpoofedIPv4} {
		if got := verdictOf(t, p, ethernet(mac, nil, ip4Kind, udp4(src, 9, 9))); got != want {
			t.Errorf("%s: %q, want %q", src, got, want)
		}
	}
}

// Programs are filters of clsact, or of tcx where that is not there; neither leaves anything.
func TestHooksOfPrograms(t *testing.T) {
	for name, noClsact := range map[string]bool{"clsact": false, "tcx": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := testnet.NewNode(t, gw4, gw6)
			pod, _ := addPodOf(t, "redirect", node, dualStack())
			quiet(t, pod)
			a := attach(t, pod, Options{noClsact: noClsact})
			if out := pod.MustRun("tc", "filter", "show", "dev", "eth0", "ingress"); strings.Contains(out, "vlt_cluster") == noClsact {
				t.Errorf("filters: %s", out)
			}
			guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
			guest.Configure(a.nics[0])
			for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
				if !guest.Ping(to) {
					t.Errorf("guest does not reach %s", to)
				}
			}
			if err := Check(pod.NS, a.rec); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := Detach(pod.NS, a.rec); err != nil {
					t.Fatal(err)
				}
			}
			if out := pod.MustRun("tc", "qdisc", "show", "dev", "eth0"); strings.Contains(out, "clsact") {
				t.Errorf("left: %s", out)
			}
			rules, err := Rules(pod.NS, a.rec.Joins)
			if err != nil || len(rules["eth0"]) > 0 {
				t.Errorf("left: %v, %v", rules, err)
			}
			quiet(t, pod)
			if d := changed(t, pod, a.before); d != "" {
				t.Errorf("-before +after:\n%s", d)
			}
		})
	}
}

// A clsact that has somebody else's filter stays.
func TestClsactOfAnother(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, _ := addPodOf(t, "redirect", node, dualStack())
	pod.MustRun("tc", "qdisc", "add", "dev", "eth0", "clsact")
	pod.MustRun("tc", "filter", "add", "dev", "eth0", "egress", "pref", "9", "u32", "match", "u32", "0", "0", "classid", "1:1")
	a := attach(t, pod, Options{})
	if err := Detach(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	if out := pod.MustRun("tc", "filter", "show", "dev", "eth0", "egress"); !strings.Contains(out, "u32") || strings.Contains(out, "vlt_") {
		t.Errorf("the other's filter: %s", out)
	}
}

// What a machine lacks leads to the next best datapath, and says so; nothing of the attempts before is left.
func TestFallbacks(t *testing.T) {
	for name, c := range map[string]struct {
		kind     string
		wish     Wish
		lacks    []need
		datapath Datapath
		engine   Engine
		says     []string
	}{
		"redirect":               {kind: "veth", wish: WishRedirect, datapath: Redirected, engine: EBPF},
		"no eBPF":                {"veth", WishRedirect, []need{needEBPF}, Redirected, Nftables, []string{"no redirect by ebpf: ebpf is not here"}},
		"no eBPF, no fwd":        {"veth", WishRedirect, []need{needEBPF, needForward}, Bridged, Nftables, []string{"no redirect by ebpf: ebpf is not here", "no redirect by nftables: add filters: " + string(needForward) + " is not here"}},
		"nothing of all":         {"veth", WishRedirect, []need{needEBPF, needForward, needBridge}, "", "", []string{"ebpf is not here", string(needForward) + " is not here", "bridge is not here"}},
		"no fwd":                 {kind: "veth", wish: WishRedirect, lacks: []need{needForward}, datapath: Redirected, engine: EBPF},
		"no fwd, auto":           {kind: "veth", wish: WishAuto, lacks: []need{needForward}, datapath: Bridged, engine: Nftables},
		"neither":                {"veth", WishRedirect, []need{needEBPF, needNftables}, "", "", []string{"ebpf is not here", "nftables is not here"}},
		"no bridge":              {"veth", WishAuto, []need{needBridge}, Redirected, EBPF, []string{"no bridge by nftables: bridge is not here"}},
		"no nftables":            {"veth", WishAuto, []need{needNftables}, Redirected, EBPF, []string{"no bridge by nftables: add filters: nftables is not here"}},
		"no bridge, asked for":   {"veth", WishBridge, []need{needBridge}, "", "", []string{"bridge is not here"}},
		"no bridge, no eBPF":     {"veth", WishAuto, []need{needBridge, needEBPF}, Redirected, Nftables, []string{"no bridge", "no redirect by ebpf"}},
		"macvlan":                {kind: "macvlan", wish: WishAuto, datapath: Redirected, engine: EBPF},
		"macvlan, no eBPF":       {"macvlan", WishAuto, []need{needEBPF}, Redirected, Nftables, []string{"ebpf is not here"}},
		"macvlan, no fwd":        {"macvlan", WishRedirect, []need{needEBPF, needForward}, "", "", []string{"ebpf is not here", string(needForward) + " is not here"}},
		"macvlan, bridge wanted": {"macvlan", WishBridge, nil, "", "", []string{"a bridge cannot serve a macvlan"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := testnet.NewNode(t, gw4)
			pod, _ := addPodOf(t, c.kind, node, dualStack())
			quiet(t, pod)
			before := observe(t, pod)
			records := 0
			o := Options{Datapath: c.wish, fail: func(n need) error {
				if slices.Contains(c.lacks, n) {
					return fmt.Errorf("%s is not here", n)
				}
				return nil
			}}
			var rec Record
			ports, err := Attach(t.Context(), pod.NS, before, plainNICs(before), o, func(r Record) error { records++; rec = r; return nil })
			for _, p := range ports {
				defer p.Close()
			}
			if c.datapath == "" {
				for _, s := range c.says {
					if err == nil || !strings.Contains(err.Error(), s) {
						t.Errorf("error %v, want %q", err, s)
					}
				}
				quiet(t, pod)
				if d := changed(t, pod, before); d != "" {
					t.Errorf("-before +after:\n%s", d)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			j := rec.Joins[0]
			if j.Datapath != c.datapath || j.Engine != c.engine || j.Why == "" || (len(c.says) == 0) != (j.Lacks == "") {
				t.Errorf("joined by %+v", j)
			}
			for _, s := range c.says {
				if strings.Count(j.Lacks, s) != 1 {
					t.Errorf("%q does not say %q once", j.Lacks, s)
				}
			}
			guest := testnet.NewGuest(t, ports[0].NIC, ports[0].Taps[0])
			guest.Configure(ports[0].NIC)
			if !guest.Ping(gw4.Addr()) {
				t.Error("the guest does not reach the node")
			}
			if err := Check(pod.NS, rec); err != nil {
				t.Error(err)
			}
		})
	}
}

// Check finds a program that somebody has taken off.
func TestCheckMissesPrograms(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, _ := addPodOf(t, "redirect", node, dualStack())
	a := attach(t, pod, Options{})
	if err := Check(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	k := &kernel{h: pod.Link()}
	pod.Must(func() error { return k.removePrograms(a.before.Link("eth0").Index, a.rec.Joins[0].hooks()[2]) })
	if err := Check(pod.NS, a.rec); err == nil || !strings.Contains(err.Error(), "its filters at the egress eth0 are gone") {
		t.Errorf("error %v", err)
	}
}

// What limits a pod's bandwidth sits at the node's end of the veth, on its ingress: frames that go to the peer at once pass
// there, too. (They do not pass the pod's end.)
func TestPeerIsNoWayAround(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, host := addPodOf(t, "redirect", node, dualStack())
	node.MustRun("ip", "link", "add", "ifb0", "type", "ifb")
	node.MustRun("ip", "link", "set", "ifb0", "up")
	node.MustRun("tc", "qdisc", "add", "dev", host, "ingress")
	node.MustRun("tc", "filter", "add", "dev", host, "parent", "ffff:", "protocol", "all", "u32", "match", "u32", "0", "0", "action", "mirred", "egress", "redirect", "dev", "ifb0")
	node.MustRun("tc", "qdisc", "add", "dev", "ifb0", "root", "tbf", "rate", "100mbit", "burst", "1mb", "latency", "50ms")
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	sent := func() uint64 {
		l, err := pod.Link().LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Statistics.TxPackets
	}
	past := sent()
	limited := testnet.NewCapture(t, node.Namespace, "ifb0")
	mark := []byte("a frame that is to be limited")
	guest.Send("eth0", datagram{src: 9, dst: 9}.frame(t, mac.HardwareAddr(), mark))
	if !limited.Await(patience, has(mark)) {
		t.Error("the guest's frame has not passed the limit")
	}
	if now := sent(); now != past {
		t.Errorf("the pod's end has sent %d frames, before %d: they do not go to the peer", now, past)
	}
	if !guest.Ping(gw4.Addr()) {
		t.Error("the node is lost")
	}
}

// A node that routes takes frames by their MAC, of which the TAP says that it is not its own.
func TestPeerThatRoutes(t *testing.T) {
	for _, kind := range []string{"veth", "redirect"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			node := testnet.NewNode(t)
			spec := dualStack()
			spec.NoPort = true
			pod, host := addPodOf(t, kind, node, spec)
			node.MustRun("ip", "link", "set", host, "up", "mtu", "1450")
			node.MustRun("ip", "addr", "add", gw4.String(), "dev", host)
			node.MustRun("ip", "addr", "add", gw6.String(), "dev", host, "nodad")
			a := attach(t, pod, Options{})
			guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
			guest.Configure(a.nics[0])
			for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
				if !guest.Ping(to) {
					t.Errorf("guest does not reach %s", to)
				}
			}
			testnet.Transfer(t, guest, node.Namespace, gw4.Addr(), 1e6)
		})
	}
}

// The machine's default queueing discipline, fq, drops by time stamps what is redirected with one (talos #13745): the TAP has
// none of its own.
func TestNothingIsDroppedByTimeStamp(t *testing.T) {
	forLinkKinds(t, func(t *testing.T, kind string) {
		if kind == "tap" {
			t.Skip("the TAP is its maker's")
		}
		node := testnet.NewNode(t, gw4)
		pod, host := addPodOf(t, kind, node, dualStack())
		a := attach(t, pod, Options{})
		if out := pod.MustRun("tc", "qdisc", "show", "dev", a.rec.Joins[0].Tap); !strings.HasPrefix(out, "qdisc noqueue") || strings.Count(out, "qdisc") != 1+strings.Count(out, "clsact") {
			t.Errorf("the TAP queues by %s", out)
		}
		guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
		guest.Configure(a.nics[0])
		inside := testnet.NewCapture(t, guest, "eth0")
		awaitForwarding(t, node, host, inside)
		// A capture makes the kernel stamp every frame that comes in; TCP stamps those that go out.
		testnet.NewCapture(t, node.Namespace, host)
		start := time.Now()
		testnet.Transfer(t, node.Namespace, guest, ip4.Addr(), 2e6)
		testnet.Transfer(t, guest, node.Namespace, gw4.Addr(), 2e6)
		t.Logf("%v", time.Since(start))
	})
}
