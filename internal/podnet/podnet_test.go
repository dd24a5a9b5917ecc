package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

func TestAttachGivesTheGuestThePodsNetwork(t *testing.T) {
	forEveryJoin(t, testAttachGivesTheGuestThePodsNetwork)
}

func testAttachGivesTheGuestThePodsNetwork(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPodOf(t, kind, node, dualStack())
	peer, _ := addPod(t, node, testnet.PodSpec{Addrs: []netip.Prefix{netip.MustParsePrefix("198.51.100.3/24"), netip.MustParsePrefix("2001:db8:100::3/64")}})
	a := attach(t, pod, Options{})
	guest := testnet.NewGuest(t, a.nics[0], a.ports[0].Taps[0])
	guest.Configure(a.nics[0])
	quiet(t, guest)
	for _, to := range []netip.Addr{gw4.Addr(), gw6.Addr(), netip.MustParseAddr("198.51.100.3"), netip.MustParseAddr("2001:db8:100::3")} {
		if !guest.Ping(to) {
			t.Errorf("guest does not reach %s", to)
		}
	}
	for _, from := range []*testnet.Namespace{node.Namespace, peer} {
		for _, to := range []netip.Addr{ip4.Addr(), ip6.Addr()} {
			if !from.Ping(to) {
				t.Errorf("%s does not reach the guest's %s", from.Name, to)
			}
		}
	}
	// A full-size frame passes.
	if !guest.Ping(gw4.Addr(), "-M", "do", "-s", "1422") {
		t.Error("a don't-fragment ping of exactly the MTU is lost")
	}
	testnet.Transfer(t, guest, node.Namespace, gw4.Addr(), 1e6)
	testnet.Transfer(t, node.Namespace, guest, ip6.Addr(), 1e6)
	// The neighbour entry that the node had for the pod still holds: the guest has the pod's MAC.
	if out := node.MustRun("ip", "neigh", "show", ip4.Addr().String()); !strings.Contains(out, mac.String()) {
		t.Errorf("the node resolved the guest to %q, want %s", out, mac)
	}
}

func TestAttachState(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, _ := addPod(t, node, dualStack())
	a := attach(t, pod, Options{Queues: 4, Vhost: true})
	if n := len(a.ports[0].Taps); n != 4 {
		t.Errorf("%d TAP descriptors, want 4", n)
	}
	if n := len(a.ports[0].Vhost); n != 0 && n != 4 {
		t.Errorf("%d vhost descriptors, want as many as queues or none", n)
	}
	now := observe(t, pod)
	for _, l := range now.Links {
		if len(l.Addrs) != 0 || len(l.Routes) != 0 {
			t.Errorf("%s still has addresses %v and routes %v", l.Name, l.Addrs, l.Routes)
		}
		if l.MAC == mac {
			t.Errorf("%s has the guest's MAC", l.Name)
		}
		if l.MTU != 1450 {
			t.Errorf("%s has MTU %d, want 1450", l.Name, l.MTU)
		}
		if !l.Up {
			t.Errorf("%s is down", l.Name)
		}
		if l.Sysctls["ipv6/conf/"+l.Name+"/disable_ipv6"] != "1" {
			t.Errorf("%s is not silenced: %v", l.Name, l.Sysctls)
		}
	}
	if now.Sysctls["ipv4/conf/default/arp_ignore"] != "8" {
		t.Errorf("the namespace answers ARP: %v", now.Sysctls)
	}
	join := a.rec.Joins[0]
	for _, port := range []string{join.Link, join.Tap} {
		l := now.Link(port)
		if l == nil || l.Master != join.Bridge {
			t.Fatalf("%s is not on the bridge: %+v", port, l)
		}
	}
	if out := pod.MustRun("bridge", "-d", "link", "show", "dev", join.Link); !strings.Contains(out, "learning off") {
		t.Errorf("%s learns: %s", join.Link, out)
	}
	if out := pod.MustRun("tc", "qdisc", "show", "dev", join.Tap); !strings.Contains(out, "noqueue") {
		t.Errorf("TAP queues by %s", out)
	}
	if out := pod.MustRun("ip", "-d", "link", "show", join.Bridge); !strings.Contains(out, "mcast_snooping 0") || !strings.Contains(out, "stp_state 0") || !strings.Contains(out, "ageing_time 0") {
		t.Errorf("bridge is more than a wire: %s", out)
	}
}

func TestDetachRestoresExactly(t *testing.T) {
	shapes := map[string]func(t *testing.T, node *testnet.Node, pod *testnet.Namespace){
		"dual stack": func(*testing.T, *testnet.Node, *testnet.Namespace) {},
		"several addresses": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "addr", "add", "198.51.100.7/24", "dev", "eth0", "label", "eth0:second")
			pod.MustRun("ip", "addr", "add", "203.0.113.9/28", "brd", "+", "dev", "eth0")
			pod.MustRun("ip", "addr", "add", "2001:db8:200::9/128", "dev", "eth0")
			pod.MustRun("ip", "addr", "add", "203.0.113.65", "peer", "203.0.113.66/32", "dev", "eth0")
		},
		"ptp: no connected route": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "route", "flush", "table", "main")
			pod.MustRun("ip", "route", "add", "198.51.100.1", "dev", "eth0", "scope", "link", "src", "198.51.100.2")
			pod.MustRun("ip", "route", "add", "198.51.100.0/24", "via", "198.51.100.1", "src", "198.51.100.2")
			pod.MustRun("ip", "route", "add", "default", "via", "198.51.100.1", "metric", "50", "mtu", "1400")
		},
		"Calico": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "addr", "flush", "dev", "eth0", "scope", "global")
			pod.MustRun("ip", "addr", "add", "198.51.100.2/32", "dev", "eth0")
			pod.MustRun("ip", "addr", "add", "2001:db8:100::2/128", "dev", "eth0", "nodad")
			pod.MustRun("ip", "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
			pod.MustRun("ip", "route", "add", "default", "via", "169.254.1.1")
			pod.MustRun("ip", "-6", "route", "replace", "default", "via", "fe80::ecee:eeff:feee:eeee", "dev", "eth0")
		},
		"another table, on-link gateway": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "route", "add", "192.0.2.0/24", "via", "203.0.113.1", "dev", "eth0", "onlink", "table", "100")
			pod.MustRun("ip", "route", "add", "default", "via", "198.51.100.1", "table", "100", "advmss", "1300")
		},
		"IPv4 by an IPv6 gateway": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "route", "add", "192.0.2.0/24", "via", "inet6", "fe80::1", "dev", "eth0")
			pod.MustRun("ip", "route", "replace", "default", "via", "inet6", "2001:db8:100::1", "dev", "eth0", "metric", "7")
		},
		"several next hops": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "route", "add", "192.0.2.0/24", "metric", "5",
				"nexthop", "via", "198.51.100.1", "dev", "eth0", "weight", "3",
				"nexthop", "via", "198.51.100.9", "dev", "eth0",
				"nexthop", "via", "inet6", "fe80::1", "dev", "eth0")
			pod.MustRun("ip", "-6", "route", "add", "2001:db8:300::/64",
				"nexthop", "via", "2001:db8:100::1", "dev", "eth0", "nexthop", "via", "2001:db8:100::9", "dev", "eth0")
		},
		"next hops on two links": func(t *testing.T, node *testnet.Node, pod *testnet.Namespace) {
			node.AddLink(t, pod, testnet.PodSpec{Name: "net1", Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")}})
			pod.MustRun("ip", "route", "add", "192.0.2.0/24",
				"nexthop", "via", "198.51.100.1", "dev", "eth0", "nexthop", "via", "203.0.113.1", "dev", "net1", "onlink")
		},
		"no IPv6": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.Sysctl("ipv6/conf/eth0/disable_ipv6", "1")
		},
		"MAC changed after the link-local address": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "link", "set", "eth0", "address", "02:ab:cd:ef:00:01")
		},
		"down, no addresses": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.MustRun("ip", "addr", "flush", "dev", "eth0")
			pod.MustRun("ip", "link", "set", "eth0", "down")
		},
		"two links": func(t *testing.T, node *testnet.Node, pod *testnet.Namespace) {
			node.AddLink(t, pod, testnet.PodSpec{
				Name: "net1", Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")},
				Routes: []netlink.Route{testnet.Via("192.0.2.0/24", "203.0.113.1")},
			})
		},
		"arp_ignore of its own": func(t *testing.T, _ *testnet.Node, pod *testnet.Namespace) {
			pod.Sysctl("ipv4/conf/eth0/arp_ignore", "1")
		},
	}
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) { testDetachRestoresExactly(t, kind, shape) })
		})
	}
}

func testDetachRestoresExactly(t *testing.T, kind string, shape func(*testing.T, *testnet.Node, *testnet.Namespace)) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPodOf(t, kind, node, dualStack())
	shape(t, node, pod)
	quiet(t, pod)
	a := attach(t, pod, Options{})
	for _, p := range a.ports {
		p.Close()
	}
	// The record makes the way over the disk, as after a crash.
	b, err := json.Marshal(a.rec)
	if err != nil {
		t.Fatal(err)
	}
	var rec Record
	if err := json.Unmarshal(b, &rec); err != nil {
		t.Fatal(err)
	}
	for _, again := range []string{"first", "second"} {
		if err := Detach(pod.NS, rec); err != nil {
			t.Fatalf("%s Detach: %v", again, err)
		}
		quiet(t, pod)
		if d := changed(t, pod, a.before); d != "" {
			t.Errorf("after the %s Detach (-before +after):\n%s", again, d)
		}
	}
	if out := pod.MustRun("nft", "list", "ruleset"); out != "" {
		t.Errorf("rules stay: %s", out)
	}
}

// A route may have an address as its source only when the kernel knows that nobody else has it. The ptp plugin makes such.
func TestDetachRestoresRoutesWithASource(t *testing.T) {
	node := testnet.NewNode(t, gw4, gw6)
	pod := testnet.New(t, "pod") // with duplicate address detection
	node.AddLink(t, pod, testnet.PodSpec{MAC: mac, Addrs: []netip.Prefix{ip4, ip6}})
	for _, r := range []string{"2001:db8:100::1/128", "::/0 via 2001:db8:100::1"} {
		args := append([]string{"-6", "route", "add"}, strings.Fields(r)...)
		pod.MustRun("ip", append(args, "dev", "eth0", "src", ip6.Addr().String())...)
	}
	quiet(t, pod)
	a := attach(t, pod, Options{})
	for range 2 {
		if err := Detach(pod.NS, a.rec); err != nil {
			t.Fatal(err)
		}
		quiet(t, pod)
		if diff := changed(t, pod, a.before); diff != "" {
			t.Errorf("-before +after:\n%s", diff)
		}
	}
}

// The device that a driver makes of a function that is given back has no alias, where host-device keeps its name on the node.
func TestDetachRestoresTheAlias(t *testing.T) {
	t.Parallel()
	pod, _ := addPod(t, testnet.NewNode(t, gw4, gw6), dualStack())
	pod.MustRun("ip", "link", "set", "eth0", "alias", "enp1s0f1")
	quiet(t, pod)
	a := attach(t, pod, Options{})
	pod.MustRun("ip", "link", "set", "eth0", "alias", "")
	if err := Detach(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	quiet(t, pod)
	if diff := changed(t, pod, a.before); diff != "" || !strings.Contains(pod.MustRun("ip", "link", "show", "eth0"), "alias enp1s0f1") {
		t.Errorf("-before +after:\n%s", diff)
	}
}

// Next hops that are not one gateway of the route's own family are seen as what they are.
func TestObserveNextHops(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPod(t, node, dualStack())
	quiet(t, pod)
	pod.MustRun("ip", "route", "add", "192.0.2.0/25", "via", "inet6", "fe80::1", "dev", "eth0")
	pod.MustRun("ip", "route", "add", "192.0.2.128/25",
		"nexthop", "via", "198.51.100.1", "dev", "eth0", "weight", "3", "nexthop", "via", "198.51.100.9", "dev", "eth0")
	type hop struct {
		Gw     string
		Weight int
	}
	got := map[string][]hop{}
	snap := observe(t, pod)
	for _, r := range snap.Link("eth0").Routes {
		got[r.Dst.String()] = append(got[r.Dst.String()], hop{r.Gw.String(), r.Weight})
	}
	for dst, want := range map[string][]hop{
		"192.0.2.0/25":   {{"fe80::1", 0}},
		"192.0.2.128/25": {{"198.51.100.1", 3}, {"198.51.100.9", 1}},
		"0.0.0.0/0":      {{"198.51.100.1", 0}},
	} {
		if d := cmp.Diff(want, got[dst]); d != "" {
			t.Errorf("%s (-want +got):\n%s", dst, d)
		}
	}
}

func TestDetachOfALivingTap(t *testing.T) { forLinkKinds(t, testDetachOfALivingTap) }

func testDetachOfALivingTap(t *testing.T, kind string) {
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPodOf(t, kind, node, dualStack())
	quiet(t, pod)
	a := attach(t, pod, Options{}) // the descriptors stay open, as with a QEMU that outlived its supervisor
	if err := Detach(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	quiet(t, pod)
	want := a.before
	if kind == "tap" { // it stays, and so does who holds it
		want.Links = slices.Clone(want.Links)
		want.Link("eth0").InUse = true
	}
	if d := changed(t, pod, want); d != "" {
		t.Error(d)
	}
}

func TestFailedAttachLeavesTheNamespaceAsItWas(t *testing.T) {
	stop := errors.New("disk full")
	cases := map[string]struct {
		spoil   func(*testing.T, *testnet.Namespace, []nic.NIC)
		journal func(Record) error
		want    string
	}{
		"journal fails":       {journal: func(Record) error { return stop }, want: "disk full"},
		"MTU too big for TAP": {spoil: func(_ *testing.T, _ *testnet.Namespace, n []nic.NIC) { n[1].MTU = 65535 }, want: "MTU"},
		"link vanished":       {spoil: func(_ *testing.T, _ *testnet.Namespace, n []nic.NIC) { n[1].Name = "net9" }, want: "net9"},
		"name taken after the look": {
			journal: noJournal, want: "bridge vltbr",
			spoil: func(t *testing.T, pod *testnet.Namespace, n []nic.NIC) {
				i := slices.IndexFunc(n, func(n nic.NIC) bool { return n.Name == "net1" })
				pod.MustRun("ip", "link", "add", fmt.Sprintf("vltbr%d", i), "type", "veth", "peer", "name", "other")
			},
		},
		"VF": {spoil: func(_ *testing.T, _ *testnet.Namespace, n []nic.NIC) { n[1].VF = &nic.VF{BDF: "0000:01:10.0"} }, want: "0000:01:10.0"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			forLinkKinds(t, func(t *testing.T, kind string) {
				node := testnet.NewNode(t, gw4, gw6)
				pod, _ := addPodOf(t, kind, node, dualStack())
				node.AddLink(t, pod, testnet.PodSpec{Name: "net1", Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.5/24")}})
				quiet(t, pod)
				before := observe(t, pod)
				nics := plainNICs(before)
				if c.spoil != nil {
					c.spoil(t, pod, nics)
				}
				quiet(t, pod)
				after := observe(t, pod)
				journal := c.journal
				if journal == nil {
					journal = noJournal
				}
				ports, err := Attach(context.Background(), pod.NS, before, nics, Options{}, journal)
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("ports %v, error %v, want one with %q", ports, err, c.want)
				}
				quiet(t, pod)
				if d := changed(t, pod, after); d != "" {
					t.Errorf("-before +after:\n%s", d)
				}
			})
		})
	}
}

func TestCancelledAttach(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4, gw6)
	pod, _ := addPod(t, node, dualStack())
	quiet(t, pod)
	before := observe(t, pod)
	ctx, cancel := context.WithCancel(context.Background())
	_, err := Attach(ctx, pod.NS, before, plainNICs(before), Options{}, func(Record) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	quiet(t, pod)
	if d := changed(t, pod, before); d != "" {
		t.Error(d)
	}
}

func TestSecondAttachIsRefused(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, _ := addPod(t, node, dualStack())
	quiet(t, pod)
	a := attach(t, pod, Options{})
	quiet(t, pod)
	between := observe(t, pod)
	nics := plainNICs(a.before)
	if _, err := Attach(context.Background(), pod.NS, between, nics, Options{}, noJournal); err == nil || !strings.Contains(err.Error(), "gc") {
		t.Errorf("second Attach: %v, want advice", err)
	}
	if d := changed(t, pod, between); d != "" {
		t.Errorf("the refused Attach changed something: %s", d)
	}
}

func TestJournalComesFirst(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, _ := addPod(t, node, dualStack())
	quiet(t, pod)
	before := observe(t, pod)
	called := 0
	ports, err := Attach(context.Background(), pod.NS, before, plainNICs(before), Options{}, func(r Record) error {
		called++
		if d := changed(t, pod, before); d != "" {
			t.Errorf("changed before the record was kept: %s", d)
		}
		if len(r.Joins) != 1 || r.Joins[0].Link != "eth0" || len(r.Snapshot.Links) != 1 {
			t.Errorf("thin record: %+v", r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ports {
		p.Close()
	}
	if called != 1 {
		t.Errorf("journal called %d times", called)
	}
}

// A namespace that somebody took apart meanwhile is no reason to fail.
func TestDetachWithoutTheLink(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4)
	pod, host := addPod(t, node, dualStack())
	a := attach(t, pod, Options{})
	node.MustRun("ip", "link", "del", host)
	if err := Detach(pod.NS, a.rec); err != nil {
		t.Fatal(err)
	}
	if s := observe(t, pod); len(s.Links) != 0 {
		t.Errorf("left: %+v", s.Links)
	}
}

func TestOwnMAC(t *testing.T) {
	for _, guest := range []nic.MAC{mac, {0x0a, 0x58, 1, 2, 3, 4}, {0x42, 0, 0, 0, 0, 1}, {0x00, 0x1b, 0x21, 1, 2, 3}, {0xfe, 1, 1, 1, 1, 1}} {
		own := ownMAC(guest)
		if own == guest || own[0]&1 != 0 || own[0]&2 == 0 {
			t.Errorf("ownMAC(%s) = %s: must differ, be unicast and locally administered", guest, own)
		}
		if own[1] != guest[1] || own[5] != guest[5] {
			t.Errorf("ownMAC(%s) = %s does not resemble it", guest, own)
		}
	}
}
