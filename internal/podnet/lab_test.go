package podnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

var (
	gw4, gw6 = netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:100::1/64")
	ip4, ip6 = netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:100::2/64")
	mac      = nic.MAC{0x02, 0x11, 0x22, 0x33, 0x44, 0x55}
)

func dualStack() testnet.PodSpec {
	return testnet.PodSpec{
		MAC: mac, MTU: 1450, Addrs: []netip.Prefix{ip4, ip6},
		Routes: []netlink.Route{testnet.Via("0.0.0.0/0", "198.51.100.1"), testnet.Via("::/0", "2001:db8:100::1")},
	}
}

// addPod is node.AddPod without duplicate address detection, which would take a second or two of every test.
func addPod(t testing.TB, node *testnet.Node, spec testnet.PodSpec) (pod *testnet.Namespace, host string) {
	t.Helper()
	pod = testnet.New(t, "pod")
	pod.Sysctl("ipv6/conf/default/accept_dad", "0")
	return pod, node.AddLink(t, pod, spec)
}

// linkKinds are what a pod's eth0 is in tests, and how it is joined: a veth by a bridge, a veth and a macvlan by eBPF.
var linkKinds = []string{"veth", "redirect", "macvlan", "tap"}

// kinds are those of the pods that tests have made, by the pod's name.
var kinds sync.Map

// optionsFor gives options that a pod of its kind is attached with.
func optionsFor(pod *testnet.Namespace, o Options) Options {
	kind, _ := kinds.Load(pod.Name)
	switch kind {
	case "redirect":
		o.Datapath = WishRedirect
	case "nftables":
		o.Datapath = WishRedirect
		o.fail = func(n need) error {
			if n == needEBPF {
				return errNoEBPF
			}
			return nil
		}
	}
	return o
}

// engines are what joins of each kind of pod go by; anything else would be a fallback that a test does not know of.
var engines = map[string]Engine{"veth": Nftables, "redirect": EBPF, "nftables": Nftables, "macvlan": EBPF, "tap": Nftables}

var errNoEBPF = errors.New("a test has none")

// isVeth says whether pods of that kind have one.
func isVeth(kind string) bool { return kind == "veth" || kind == "redirect" || kind == "nftables" }

// forLinkKinds runs a test for each, beside other tests.
func forLinkKinds(t *testing.T, test func(t *testing.T, kind string)) {
	t.Helper()
	t.Parallel()
	forEach(t, linkKinds, test)
}

// forEveryJoin runs it also for a veth that nftables redirects, as where there is no eBPF.
func forEveryJoin(t *testing.T, test func(t *testing.T, kind string)) {
	t.Helper()
	t.Parallel()
	forEach(t, append(slices.Clone(linkKinds), "nftables"), test)
}

func forEach(t *testing.T, kinds []string, test func(t *testing.T, kind string)) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) { t.Parallel(); test(t, kind) })
	}
}

// addPodOf is addPod with a link of that kind, which leads to the node by a veth: that is the macvlan's parent on another
// host, or, in the pod, a port of the bridge that has the TAP.
func addPodOf(t testing.TB, kind string, node *testnet.Node, spec testnet.PodSpec) (pod *testnet.Namespace, host string) {
	t.Helper()
	pod = testnet.New(t, "pod")
	pod.Sysctl("ipv6/conf/default/accept_dad", "0")
	return pod, addLinkOf(t, kind, node, pod, spec)
}

func addLinkOf(t testing.TB, kind string, node *testnet.Node, pod *testnet.Namespace, spec testnet.PodSpec) (host string) {
	t.Helper()
	const uplink = "up0"
	up := testnet.PodSpec{Name: uplink, MTU: spec.MTU, Hairpin: spec.Hairpin, NoPort: spec.NoPort}
	if spec.Name == "" {
		spec.Name = "eth0"
	}
	mtu := fmt.Sprint(cmp.Or(spec.MTU, 1500))
	kinds.Store(pod.Name, kind)
	switch kind {
	case "veth", "redirect", "nftables":
		return node.AddLink(t, pod, spec)
	case "macvlan":
		parent := testnet.New(t, "parent")
		parent.Sysctl("ipv6/conf/default/disable_ipv6", "1")
		host = node.AddLink(t, parent, up)
		parent.MustRun("ip", "link", "add", "link", uplink, "name", "mv0", "mtu", mtu, "type", "macvlan", "mode", "bridge")
		parent.MustRun("ip", "link", "set", "mv0", "netns", pod.Name, "name", spec.Name)
	case "tap":
		pod.Sysctl("ipv6/conf/default/disable_ipv6", "1")
		host = node.AddLink(t, pod, up)
		pod.MustRun("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
		pod.MustRun("ip", "link", "set", "br0", "up")
		pod.MustRun("ip", "link", "set", uplink, "master", "br0")
		pod.Sysctl("ipv6/conf/default/disable_ipv6", "0")
		pod.MustRun("ip", "tuntap", "add", spec.Name, "mode", "tap", "multi_queue")
		pod.MustRun("ip", "link", "set", spec.Name, "mtu", mtu, "master", "br0")
	}
	if !spec.MAC.IsZero() {
		pod.MustRun("ip", "link", "set", spec.Name, "address", spec.MAC.String())
	}
	link, err := pod.Link().LinkByName(spec.Name)
	if err == nil {
		err = pod.Link().LinkSetUp(link)
	}
	for _, a := range spec.Addrs {
		err = errors.Join(err, pod.Link().AddrAdd(link, testnet.Address(a)))
	}
	for _, r := range spec.Routes {
		r.LinkIndex = link.Attrs().Index
		err = errors.Join(err, pod.Link().RouteAdd(&r))
	}
	if err != nil {
		t.Fatal(err)
	}
	if kind != "tap" { // which has no carrier yet
		pod.Ready(spec.Name)
	}
	return host
}

func noJournal(Record) error { return nil }

// patience is how long a test waits for what is to happen: a loaded machine is slow, and only a failing test waits it out.
const patience = 30 * time.Second

// attached is a pod after Attach.
type attached struct {
	before nic.Snapshot
	nics   []nic.NIC
	rec    Record
	ports  []*Port
}

func attach(t testing.TB, pod *testnet.Namespace, o Options) attached {
	t.Helper()
	a, err := tryAttach(pod, o)
	if err != nil {
		t.Fatal(err)
	}
	if kind, ok := kinds.Load(pod.Name); ok {
		if j := a.rec.Joins[0]; j.Link == "eth0" && j.Engine != engines[kind.(string)] || j.Lacks != "" && kind != "nftables" {
			t.Fatalf("a pod of kind %v is joined by %+v", kind, j)
		}
	}
	t.Cleanup(func() {
		for _, p := range a.ports {
			p.Close()
		}
	})
	return a
}

func tryAttach(pod *testnet.Namespace, o Options) (a attached, err error) {
	if a.before, err = Observe(pod.NS); err != nil {
		return a, err
	}
	a.nics = plainNICs(a.before)
	a.ports, err = Attach(context.Background(), pod.NS, a.before, a.nics, optionsFor(pod, o), func(r Record) error { a.rec = r; return nil })
	return a, err
}

// plainNICs is as much of a plan as these tests need, so that they do not depend on package nic's rules.
func plainNICs(s nic.Snapshot) []nic.NIC {
	var out []nic.NIC
	for _, l := range s.Links {
		if l.Kind == "bridge" || l.Master != "" && l.Kind != "tun" {
			continue // a TAP's way to the node
		}
		n := nic.NIC{Name: l.Name, MAC: l.MAC, MTU: min(l.MTU, 65521)}
		for _, a := range l.Addrs {
			if !a.Prefix.Addr().IsLinkLocalUnicast() {
				n.Addrs = append(n.Addrs, a.Prefix)
			}
		}
		for _, gateway := range []bool{false, true} {
			for _, r := range l.Routes {
				if r.Protocol != 2 && r.Gw.IsValid() == gateway {
					n.Routes = append(n.Routes, nic.Route{Dst: r.Dst, Gw: r.Gw})
				}
			}
		}
		out = append(out, n)
	}
	return out
}

// settled compares snapshots but for what the kernel changes by itself: the order of addresses.
var settled = gocmp.Options{
	gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	gocmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmpopts.SortSlices(func(a, b nic.Addr) bool { return a.Prefix.String() < b.Prefix.String() }),
	cmpopts.SortSlices(func(a, b nic.KernelRoute) bool {
		return a.Dst.String()+a.Gw.String()+string(rune(a.Table)) < b.Dst.String()+b.Gw.String()+string(rune(b.Table))
	}),
}

func observe(t testing.TB, n *testnet.Namespace) nic.Snapshot {
	t.Helper()
	s, err := Observe(n.NS)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// changed says how the namespace differs from what it was, when it has had its time to settle: see quiet.
func changed(t testing.TB, n *testnet.Namespace, was nic.Snapshot) (diff string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if diff = gocmp.Diff(was, observe(t, n), settled); diff == "" {
			return ""
		}
	}
	return diff
}

// quiet waits until the addresses of the namespace have settled. The kernel gives a link its IPv6 link-local address when
// the link watch has seen it up, a moment after it is, and then looks whether another host has that address. Whoever
// compares two observations calls it before each of them.
func quiet(t testing.TB, n *testnet.Namespace) {
	t.Helper()
	ready(n)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if n.MustRun("ip", "-6", "addr", "show", "tentative") == "" {
			return
		}
	}
	t.Fatal("addresses stay tentative")
}

// ready waits for every link but TAPs, which have no carrier while nobody holds them.
func ready(n *testnet.Namespace) {
	n.Ready(strings.Fields(n.MustRun("sh", "-c", "ip -o -d link | grep -v ' tun type tap ' | sed 's/^[0-9]*: \\([^:@]*\\).*/\\1/'"))...)
}

// droppedBy gives what the rules of every NIC have dropped, by the name of its link.
func droppedBy(ns *netns.NS, joins []Join) (map[string]map[Reason]Counter, error) {
	rules, err := Rules(ns, joins)
	if err != nil {
		return nil, err
	}
	all := map[string]map[Reason]Counter{}
	for link, rs := range rules {
		all[link] = Dropped(rs)
	}
	return all, nil
}

func TestMain(m *testing.M) {
	before, _ := os.ReadDir("/run/netns")
	code := m.Run()
	if after, _ := os.ReadDir("/run/netns"); code == 0 && len(after) > len(before) {
		for _, e := range after {
			os.Stderr.WriteString("namespace left behind or made meanwhile: " + e.Name() + "\n")
		}
	}
	os.Exit(code)
}
