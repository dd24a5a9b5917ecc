package podnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// attachAs attaches eth0 as if it were of another kind.
func attachAs(t *testing.T, pod *testnet.Namespace, change func(*nic.Link)) attached {
	t.Helper()
	a := attached{before: observe(t, pod)}
	a.nics = plainNICs(a.before)
	change(a.before.Link("eth0"))
	var err error
	a.ports, err = Attach(t.Context(), pod.NS, a.before, a.nics, optionsFor(pod, Options{Localhost: true}), func(r Record) error { a.rec = r; return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, p := range a.ports {
			p.Close()
		}
	})
	return a
}

// An ipvlan keeps its addresses. The kernel of the test machine has none; a macvlan is treated as one.
func TestLinkThatKeepsItsAddresses(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4, gw6)
	pod, host := withLoopback(t, "macvlan", node, dualStack())
	quiet(t, pod)
	a := attachAs(t, pod, func(l *nic.Link) { l.Kind, l.Mode = "ipvlan", "l2" })
	now := observe(t, pod)
	if is, was := now.Link("eth0"), a.before.Link("eth0"); len(is.Addrs) != len(was.Addrs) || is.MAC != was.MAC {
		t.Errorf("addresses %v, MAC %s; before %v, %s", is.Addrs, is.MAC, was.Addrs, was.MAC)
	}
	if err := Check(pod.NS, a.rec); err != nil {
		t.Error(err)
	}
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	quiet(t, guest)
	for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
		if !guest.Ping(to) {
			t.Errorf("guest does not reach %s", to)
		}
	}
	port, callers := callees(t, guest)
	for local, stranger := range localhosts {
		conn, err := call(pod, local, port)
		if err == nil {
			err = echoes(conn, 1e5)
		}
		if got := callers(); err != nil || got[stranger] != 1 {
			t.Errorf("%s: %v; callers %v", local, err, got)
		}
	}
	wire := testnet.NewCapture(t, node.Namespace, host)
	tap := testnet.NewCapture(t, pod, a.rec.Joins[0].Tap)
	// What the namespace itself has to say: ARP, ND, ICMP, TCP. Nothing answers it, so its programs fail.
	for _, to := range []string{"198.51.100.99", "2001:db8:100::99", gw4.Addr().String()} {
		if out, err := pod.Run("ping", "-c", "1", "-w", "1", to); err == nil {
			t.Errorf("the namespace's own stack is heard: %s", out)
		}
	}
	up, err := a.ports[0].Uplink()
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	mark := []byte("what our responder asks")
	if _, err := up.Write(datagram{src: 9, dst: 9}.frame(t, mac.HardwareAddr(), mark)); err != nil {
		t.Fatal(err)
	}
	if !wire.Await(patience, has(mark)) {
		t.Error("the way out is closed for us")
	}
	own := func(p gopacket.Packet) bool {
		return testnet.From(mac.HardwareAddr())(p) && !has(mark)(p) && len(tap.Match(has(p.Data()))) == 0
	}
	if got := wire.Match(own); len(got) > 0 {
		t.Errorf("%d frames of the namespace's own:\n%s", len(got), testnet.Dump(got))
	}
	if losses(t, pod, a.rec.Joins)[OwnStack] == 0 {
		t.Error("the rule has nothing to do: the test proves nothing")
	}
	loseRules(t, pod, a.rec.Joins[0])
	pod.Run("ping", "-c", "1", "-w", "1", "198.51.100.99")
	if !wire.Await(patience, own) {
		t.Error("without the rule the namespace is silent too: the test proves nothing")
	}
}

// The real thing, where there is one.
func TestIPvlan(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4, gw6)
	parent, pod := testnet.New(t, "parent"), testnet.New(t, "pod")
	node.AddLink(t, parent, testnet.PodSpec{Name: "up0"})
	if out, err := parent.Run("ip", "link", "add", "link", "up0", "name", "ip0", "type", "ipvlan", "mode", "l2"); err != nil {
		t.Skipf("needs CONFIG_IPVLAN: %s", out)
	}
	parent.MustRun("ip", "link", "set", "ip0", "netns", pod.Name, "name", "eth0")
	pod.MustRun("ip", "link", "set", "eth0", "up")
	for _, a := range []netip.Prefix{ip4, ip6} {
		pod.MustRun("ip", "addr", "add", a.String(), "dev", "eth0")
	}
	quiet(t, pod)
	if l := observe(t, pod); l.Link("eth0").Mode != "l2" {
		t.Errorf("mode %q", l.Link("eth0").Mode)
	}
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr()} {
		if !guest.Ping(to) {
			t.Errorf("guest does not reach %s", to)
		}
	}
	for _, to := range []netip.Addr{ip4.Addr(), ip6.Addr()} {
		if !node.Ping(to) {
			t.Errorf("node does not reach %s", to)
		}
	}
}

// A netkit is a pair like a veth, whose ends run programs of their maker.
func TestNetkit(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod := testnet.New(t, "pod")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "nk0"
	nk := &netlink.Netkit{LinkAttrs: attrs, Mode: netlink.NETKIT_MODE_L2, Policy: netlink.NETKIT_POLICY_FORWARD, PeerPolicy: netlink.NETKIT_POLICY_FORWARD}
	peer := netlink.NewLinkAttrs()
	peer.Name = "eth0"
	nk.SetPeerAttrs(&peer)
	if err := pod.Link().LinkAdd(nk); err != nil {
		t.Skipf("needs CONFIG_NETKIT: %v", err)
	}
	pod.MustRun("ip", "link", "set", "nk0", "netns", node.Name)
	pod.MustRun("ip", "link", "set", "eth0", "up")
	node.MustRun("ip", "link", "set", "nk0", "master", testnet.Bridge, "up")
	pod.MustRun("ip", "addr", "add", ip4.String(), "dev", "eth0")
	quiet(t, pod)
	a := attach(t, pod, Options{})
	if j := a.rec.Joins[0]; j.Datapath != Redirected || !j.KeepsAddrs {
		t.Errorf("joined by %+v", j)
	}
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	if !guest.Ping(gw4.Addr()) || !node.Ping(ip4.Addr()) {
		t.Error("guest and node do not reach each other")
	}
}

// Macvlans of one parent reach each other in mode bridge, pod or guest, with duplicate address detection on; in every mode
// they reach the node.
func TestMacvlanModes(t *testing.T) {
	for _, mode := range []string{"bridge", "vepa", "private", "passthru"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			node := testnet.NewNode(t, gw4, gw6)
			parent := testnet.New(t, "parent")
			parent.Sysctl("ipv6/conf/default/disable_ipv6", "1")
			node.AddLink(t, parent, testnet.PodSpec{Name: "up0"})
			var guests []*testnet.Namespace
			for i := range 2 {
				if i > 0 && mode == "passthru" {
					break // the parent takes one
				}
				pod := testnet.New(t, "pod")
				parent.MustRun("ip", "link", "add", "link", "up0", "name", "mv0", "type", "macvlan", "mode", mode)
				parent.MustRun("ip", "link", "set", "mv0", "netns", pod.Name, "name", "eth0")
				pod.MustRun("ip", "link", "set", "eth0", "up")
				for _, a := range []string{"198.51.100.%d/24", "2001:db8:100::%d/64"} {
					pod.MustRun("ip", "addr", "add", fmt.Sprintf(a, 2+i), "dev", "eth0")
				}
				quiet(t, pod)
				a := attach(t, pod, Options{})
				if got := a.before.Link("eth0").Mode; got != mode {
					t.Errorf("mode %q is seen", got)
				}
				guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
				for _, addr := range a.nics[0].Addrs {
					guest.MustRun("ip", "addr", "add", addr.String(), "dev", "eth0")
				}
				quiet(t, guest)
				if out := guest.MustRun("ip", "-6", "addr", "show", "dadfailed"); out != "" {
					t.Errorf("duplicate address: %s", out)
				}
				guests = append(guests, guest)
			}
			for i, guest := range guests {
				for _, to := range []string{"198.51.100.%d", "2001:db8:100::%d"} {
					if !guest.Ping(netip.MustParseAddr(fmt.Sprintf(to, 1))) {
						t.Errorf("guest %d does not reach the node", i)
					}
					if !node.Ping(netip.MustParseAddr(fmt.Sprintf(to, 2+i))) {
						t.Errorf("the node does not reach guest %d", i)
					}
					if other := netip.MustParseAddr(fmt.Sprintf(to, 3-i)); mode == "bridge" && !guest.Ping(other) {
						t.Errorf("guest %d does not reach the other", i)
					}
				}
			}
		})
	}
}

// A multicast group that the guest alone knows reaches it.
func TestGroupsOfTheGuest(t *testing.T) {
	forLinkKinds(t, func(t *testing.T, kind string) {
		node := testnet.NewNode(t, gw4)
		pod, host := addPodOf(t, kind, node, dualStack())
		a := attach(t, pod, Options{})
		guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
		inside := testnet.NewCapture(t, guest, "eth0")
		awaitForwarding(t, node, host, inside)
		mark, mdns := []byte("for mDNS"), []byte{0x01, 0, 0x5e, 0, 0, 0xfb}
		node.Send(host, datagram{src: 5353, dst: 5353, to: mdns}.frame(t, cluster.HardwareAddr(), mark))
		if !inside.Await(patience, has(mark)) {
			t.Error("the guest does not hear mDNS")
		}
	})
}

// Our responders reach the guest and the way out, whatever the rules keep off.
func TestRespondersPass(t *testing.T) {
	forLinkKinds(t, func(t *testing.T, kind string) {
		node := testnet.NewNode(t, gw4)
		pod, host := addPodOf(t, kind, node, dualStack())
		a := attach(t, pod, Options{})
		guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
		inside, wire := testnet.NewCapture(t, guest, "eth0"), testnet.NewCapture(t, node.Namespace, host)
		awaitForwarding(t, node, host, inside)
		conn, err := a.ports[0].Listen(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ours, theirs := []byte("our OFFER"), []byte("a rogue OFFER")
		node.Send(host, datagram{src: 67, dst: 68}.frame(t, cluster.HardwareAddr(), theirs))
		if _, err := conn.WriteTo(datagram{src: 67, dst: 68}.frame(t, a.rec.Joins[0].Own.HardwareAddr(), ours), &packet.Addr{HardwareAddr: broadcast}); err != nil {
			t.Fatal(err)
		}
		if !inside.Await(patience, has(ours)) {
			t.Error("our OFFER does not reach the guest")
		}
		up, err := a.ports[0].Uplink()
		if err != nil {
			t.Fatal(err)
		}
		defer up.Close()
		question := question(t, mac.HardwareAddr(), broadcast, gw4.Addr().String())
		if n, err := up.Write(question); err != nil || n != len(question) {
			t.Fatal(n, err)
		}
		if !wire.Await(patience, has(question)) {
			t.Error("our question does not leave")
		}
		if len(inside.Match(has(theirs))) > 0 {
			t.Error("the cluster's OFFER reaches the guest")
		}
		if len(wire.Match(has(ours))) > 0 {
			t.Error("our OFFER reaches the cluster")
		}
	})
}

// A process that is killed at any step of Attach leaves what the Record undoes.
func TestKilledAtEveryStep(t *testing.T) {
	for name, steps := range map[string]int{"nothing": 0, "opened": 1, "joined": 2, "filtered": 3, "up": 4} {
		t.Run(name, func(t *testing.T) {
			forEveryJoin(t, func(t *testing.T, kind string) {
				node := testnet.NewNode(t, gw4, gw6)
				pod, _ := addPodOf(t, kind, node, dualStack())
				quiet(t, pod)
				before := observe(t, pod)
				nics := plainNICs(before)
				o := optionsFor(pod, Options{Queues: 1, Localhost: true})
				o.Programs = Load(before, nics, o)
				defer o.Programs.Close()
				lacks := lacking{}
				if o.fail != nil {
					lacks[needEBPF] = &lack{needEBPF, errNoEBPF}
				}
				rec, err := plan(before, nics, o, lacks)
				if err == nil {
					rec.Loopback, err = readLoopback(pod.NS)
				}
				if err != nil {
					t.Fatal(err)
				}
				a := newAttempt(pod.NS, rec, nics, o)
				pod.Must(func() error {
					if steps < 1 {
						return nil
					}
					if err := a.open(); err != nil {
						return err
					}
					defer a.close()
					j := a.joints[0]
					w := ways[j.Join.datapath()]
					if steps >= 2 {
						if err := w.join(a, j); err != nil {
							return err
						}
					}
					if steps >= 3 {
						go a.filter()
						fd, err := openNetfilter()
						a.ready <- opened{err == nil, fd}
						laid := <-a.filtered
						if err = errors.Join(err, laid.err); err == nil {
							err = a.place(laid.progs)
						}
						if err != nil {
							return err
						}
					}
					if steps >= 4 {
						return w.up(a, j)
					}
					return nil
				})
				for _, j := range a.joints { // as the kernel does
					j.Close()
				}
				for range 2 {
					if err := Detach(pod.NS, rec); err != nil {
						t.Fatal(err)
					}
					quiet(t, pod)
					if d := changed(t, pod, before); d != "" {
						t.Errorf("-before +after:\n%s", d)
					}
					if lo, err := readLoopback(pod.NS); err != nil || !cmp.Equal(lo, rec.Loopback) {
						t.Errorf("settings of the loopback: %v, %v, before %v", lo, err, rec.Loopback)
					}
				}
			})
		})
	}
}

// The rules that localhost leads by say what they do, and come before the others.
func TestLocalhostIsShown(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	spec := dualStack()
	spec.Addrs, spec.Routes = spec.Addrs[:1], nil
	pod, _ := addPod(t, node, spec)
	a := attach(t, pod, Options{Localhost: true})
	rules, err := Rules(pod.NS, a.rec.Joins)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rules["eth0"][:8] {
		got = append(got, fmt.Sprintf("%s: %s: %s %s%s", r.Hook, r.Match, r.Action, r.To, r.Reason))
	}
	honest := "ether saddr " + mac.String()
	want := []string{
		"ingress eth0: meta protocol ip ip saddr 169.254.0.67: drop cluster-own",
		"ingress eth0: meta protocol arp arp saddr ip 169.254.0.67: drop cluster-own",
		"ingress vlttap0: " + honest + " meta protocol ip ip saddr 198.51.100.2 ip daddr 169.254.0.67 ip frag-off & 0x3fff == 0 meta l4proto tcp tcp flags & (syn | ack) != syn: forward lo",
		"ingress vlttap0: " + honest + " meta protocol arp arp daddr ip 169.254.0.67 @nh,0,64 0x0001080006040001 arp saddr ip != 0.0.0.0: forward vlttap0",
		"ingress vlttap0: " + honest + " meta protocol ip ip saddr 198.51.100.2 ip daddr 169.254.0.67: drop own-address",
		"ingress vlttap0: " + honest + " meta protocol arp arp daddr ip 169.254.0.67: drop own-address",
		"ingress lo: meta mark 0x766c7474: accept ",
		"ingress lo: meta protocol ip meta l4proto tcp ip saddr 127.0.0.1 ip daddr 127.0.0.1: forward vlttap0",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// A forward is a rule without a reason, that says where to.
func TestForwardsAreShown(t *testing.T) {
	for _, kind := range []string{"redirect", "nftables"} {
		t.Run(kind, func(t *testing.T) { t.Parallel(); testForwardsAreShown(t, kind) })
	}
}

func testForwardsAreShown(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4)
	pod, _ := addPodOf(t, kind, node, dualStack())
	a := attach(t, pod, Options{})
	rules, err := Rules(pod.NS, a.rec.Joins)
	if err != nil {
		t.Fatal(err)
	}
	var last []Rule
	for i, r := range rules["eth0"] {
		if r.Hook == "egress eth0" {
			continue // which forwards nothing
		}
		if i+1 == len(rules["eth0"]) || rules["eth0"][i+1].Hook != r.Hook {
			last = append(last, r)
		}
		if r.Action == Accept {
			t.Errorf("%+v leads to the namespace's stack", r)
		}
	}
	want := []Rule{{Hook: "ingress eth0", Action: Forward, To: "vlttap0"}, {Hook: "ingress vlttap0", Action: Forward, To: "eth0"}}
	if d := cmp.Diff(want, last); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if _, is := Dropped(rules["eth0"])[""]; is {
		t.Error("a forward is counted as dropped")
	}
	if kind != "nftables" {
		return
	}
	out := pod.MustRun("nft", "list", "table", "netdev", table.Name)
	for _, want := range []string{`fwd to "vlttap0"`, `fwd to "eth0"`} {
		if !strings.Contains(out, want) {
			t.Errorf("nft does not show %q:\n%s", want, out)
		}
	}
}

// What is wrong with a TAP is said before anything is lost.
func TestTapOfAnother(t *testing.T) {
	for name, c := range map[string]struct {
		shape func(*testing.T, *testnet.Namespace) // before Attach looks
		then  func(*testing.T, *testnet.Namespace) // after it
		want  string
	}{
		"held by a program": {
			then: func(t *testing.T, pod *testnet.Namespace) {
				var taps []*os.File
				pod.Must(func() (err error) { taps, err = openTap("eth0", 1, false); return err })
				t.Cleanup(func() { taps[0].Close() })
			},
			want: "open TAP eth0: queue 0: device or resource busy: another program",
		},
		"moved by tc": {
			then: func(_ *testing.T, pod *testnet.Namespace) {
				pod.MustRun("tc", "qdisc", "add", "dev", "eth0", "ingress")
				pod.MustRun("tc", "filter", "add", "dev", "eth0", "parent", "ffff:", "protocol", "all", "u32", "match", "u8", "0", "0",
					"action", "mirred", "egress", "redirect", "dev", "lo")
			},
			want: "TAP eth0 has a filter of tc at its ingress",
		},
		"gone": {
			then: func(_ *testing.T, pod *testnet.Namespace) { pod.MustRun("ip", "link", "del", "eth0") },
			want: "set TAP eth0 down",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := testnet.New(t, "pod")
			pod.MustRun("ip", "tuntap", "add", "eth0", "mode", "tap")
			pod.MustRun("ip", "link", "set", "eth0", "up")
			before := observe(t, pod)
			c.then(t, pod)
			after := observe(t, pod)
			_, err := Attach(t.Context(), pod.NS, before, plainNICs(before), Options{Queues: 2}, noJournal)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if name == "held by a program" && !errors.Is(err, unix.EBUSY) {
				t.Errorf("%v is not EBUSY", err)
			}
			settle := func(s nic.Snapshot) nic.Snapshot { // the holder's carrier brings an address, in its time
				for i := range s.Links {
					s.Links[i].Addrs, s.Links[i].Routes = nil, nil
				}
				return s
			}
			if d := cmp.Diff(settle(after), settle(observe(t, pod)), settled); d != "" {
				t.Errorf("-before +after:\n%s", d)
			}
		})
	}
}

// The kinds of TAPs are seen as what they are.
func TestObserveTaps(t *testing.T) {
	t.Parallel()
	pod := testnet.New(t, "pod")
	pod.MustRun("ip", "tuntap", "add", "single", "mode", "tap")
	pod.MustRun("ip", "tuntap", "add", "many", "mode", "tap", "multi_queue")
	pod.MustRun("ip", "tuntap", "add", "three", "mode", "tun")
	var taps []*os.File
	pod.Must(func() error {
		for _, name := range []string{"many", "ours"} {
			more, err := openTap(name, 1, name == "many")
			taps = append(taps, more...)
			if err != nil {
				return err
			}
		}
		return nil
	})
	t.Cleanup(func() {
		for _, f := range taps {
			f.Close()
		}
	})
	got := map[string]string{}
	for _, l := range observe(t, pod).Links {
		got[l.Name] = fmt.Sprint(l.Kind, " ", l.Mode, " ", l.MultiQueue, " ", l.InUse)
	}
	want := map[string]string{
		"single": "tun tap false false", "many": "tun tap true true", "three": "tun tun false false", "ours": "tun tap false true",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// A kernel that lacks something is told what it needs for these joins.
func TestFilterConfigs(t *testing.T) {
	for kind, want := range map[string][]string{
		"veth": nil, "macvlan": {"CONFIG_NFT_FWD_NETDEV"}, "ipvlan": {"CONFIG_NFT_FWD_NETDEV", "CONFIG_NETFILTER_EGRESS"}, "tun": {"CONFIG_NETFILTER_EGRESS"},
	} {
		c, err := choose(&nic.Link{Kind: kind}, WishAuto, lacking{needEBPF: {needEBPF, errNoEBPF}})
		if err != nil {
			t.Fatal(err)
		}
		got := filterConfigs([]Join{newJoin(&nic.Link{Kind: kind}, nic.NIC{Name: "eth0", MAC: mac}, 0, c)})
		if !slices.Equal(got[2:], want) {
			t.Errorf("%s: %v, want %v beside the usual", kind, got, want)
		}
	}
	var old Join // as records were before there was more than one way
	if old.Bridge = "vltbr0"; old.datapath() != Bridged {
		t.Errorf("an old record is taken for %q", old.datapath())
	}
}

// tc takes a frame before nftables' ingress has seen it, and what it redirects the kernel spares nftables' egress, too. So what
// mirred redirects meets no rule of ours, at neither device: see docs/decisions/0015-redirect-by-ebpf.md. A kernel that has it
// otherwise fails here.
func TestMirredGoesPastRules(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, host := addPodOf(t, "veth", node, dualStack())
	const tap = "vlttap0"
	pod.Sysctl("ipv6/conf/default/disable_ipv6", "1")
	var taps []*os.File
	pod.Must(func() (err error) { taps, err = openTap(tap, 1, false); return err })
	pod.MustRun("ip", "link", "set", tap, "up")
	guest := testnet.NewGuest(t, nic.NIC{Name: "eth0", MAC: mac, MTU: 1450}, taps[0])
	var chains []string
	for from, to := range map[string]string{"eth0": tap, tap: "eth0"} {
		pod.MustRun("tc", "qdisc", "add", "dev", from, "clsact")
		pod.MustRun("tc", "filter", "add", "dev", from, "ingress", "protocol", "all", "u32", "match", "u32", "0", "0", "action", "mirred", "egress", "redirect", "dev", to)
		for _, hook := range []string{"ingress", "egress"} {
			chain := hook + "-" + from
			chains = append(chains, chain)
			pod.MustRun("nft", fmt.Sprintf("add table netdev seen; add chain netdev seen %s { type filter hook %s device %s priority 0; }; add rule netdev seen %[1]s udp dport 9 counter drop", chain, hook, from))
		}
	}
	met := func(chain string) bool {
		return !strings.Contains(pod.MustRun("nft", "list", "chain", "netdev", "seen", chain), "counter packets 0 ")
	}
	wire, inside, heard := testnet.NewCapture(t, node.Namespace, host), testnet.NewCapture(t, guest, "eth0"), testnet.NewCapture(t, pod, tap)
	awaitForwarding(t, node, host, inside)
	mark := []byte("a frame of the guest")
	sample := datagram{src: 9, dst: 9}.frame(t, mac.HardwareAddr(), mark)
	guest.Send("eth0", sample)
	if !wire.Await(patience, has(mark)) || !heard.Await(patience, has(mark)) {
		t.Error("the guest's frame does not leave, or a socket on the TAP does not hear it")
	}
	for _, chain := range chains {
		if met(chain) {
			t.Errorf("redirected frames meet %s", chain)
		}
	}
	// What does not come by tc meets all of them: the namespace's own frames, and the others where tc does nothing.
	for _, dev := range []string{"eth0", tap} {
		pod.Must(func() error {
			ifi, err := net.InterfaceByName(dev)
			if err != nil {
				return err
			}
			conn, err := packet.Listen(ifi, packet.Raw, 0, nil)
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err = conn.WriteTo(sample, &packet.Addr{HardwareAddr: broadcast}); errors.Is(err, unix.ENOBUFS) { // as of all that is dropped there
				return nil
			}
			return fmt.Errorf("the namespace's own frame at %s: %v, want it dropped", dev, err)
		})
		pod.MustRun("tc", "qdisc", "del", "dev", dev, "clsact")
	}
	guest.Send("eth0", sample)
	node.Send(host, sample)
	for end := time.Now().Add(patience); slices.ContainsFunc(chains, func(c string) bool { return !met(c) }); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("of %v some are met by nothing at all: the test proves nothing", chains)
		}
	}
}
