package lab

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// node is a machine with CNI plugins, whose every file is the test's.
type node struct {
	*testnet.Namespace
	cni *cni.Runtime
	dir string // of the test; $DIR in configurations
	ids int
}

// newNode makes a node. bin are directories of plugins beside the reference ones.
func newNode(t *testing.T, label string, bin ...string) *node {
	t.Helper()
	n := &node{Namespace: testnet.New(t, label), dir: t.TempDir()}
	n.cni = &cni.Runtime{BinDirs: append(bin, testnet.Plugins(t)), CacheDir: filepath.Join(n.dir, "cache")}
	// The plugins wait until addresses are not tentative any more; nobody else can have them here.
	n.Sysctl("ipv6/conf/default/accept_dad", "0")
	t.Cleanup(func() { n.empty(t) })
	return n
}

// network reads a network configuration, in which $DIR stands for the node's directory.
func (n *node) network(t *testing.T, conf string) *cni.Network {
	t.Helper()
	conf = strings.ReplaceAll(conf, "$DIR", n.dir)
	net, err := cni.Parse("lab.conflist", []byte(conf))
	if err != nil {
		t.Fatalf("%v in:\n%s", err, conf)
	}
	return net
}

// empty reports what pods have left on the node: links that only a pod's plugins make.
func (n *node) empty(t *testing.T) {
	t.Helper()
	for _, kind := range []string{"macvlan", "ifb"} {
		if out := n.MustRun("ip", "-br", "link", "show", "type", kind); out != "" {
			t.Errorf("%s: left behind: %s", n.Name, out)
		}
	}
	if cached, err := n.cni.Cached(); err != nil || len(cached) > 0 {
		t.Errorf("%s: still attached: %v, %v", n.Name, cached, err)
	}
}

// request is what is asked of a node's networks for one pod.
type request struct {
	networks []*cni.Network // eth0, eth1, ... in that order
	caps     map[string]any // capability arguments, for every network that has the capability
	args     [][2]string    // CNI_ARGS
	dead     bool           // DEL fails: what the plugin does then is the test's to look at
}

// pod is a namespace that plugins have configured.
type pod struct {
	*testnet.Namespace
	node        *node
	attachments []cni.Attachment
	results     []nic.Attachment
	request     request
	deleted     bool
}

// addPod makes a pod by ADD of every network. It goes with the test, by DEL.
func (n *node) addPod(t *testing.T, r request) *pod {
	t.Helper()
	p, err := n.tryPod(t, r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tryPod is addPod that leaves an ADD's error to the test.
func (n *node) tryPod(t *testing.T, r request) (*pod, error) {
	t.Helper()
	n.ids++
	p := &pod{Namespace: testnet.New(t, "pod"), node: n, request: r}
	p.Sysctl("ipv6/conf/default/accept_dad", "0")
	t.Cleanup(func() { p.delete(t) })
	for i, net := range r.networks {
		a := net.Attachment(fmt.Sprintf("%04d-%s", n.ids, p.Name), p.Path(), fmt.Sprintf("eth%d", i))
		a.Args = r.args
		for name, value := range r.caps {
			if slices.Contains(net.Capabilities(), name) {
				if a.CapabilityArgs == nil {
					a.CapabilityArgs = map[string]any{}
				}
				a.CapabilityArgs[name] = value
			}
		}
		err := n.Do(func() error {
			result, err := n.cni.Add(t.Context(), a)
			p.results = append(p.results, nic.Attachment{Network: a.Name, IfName: a.IfName, Result: result})
			return err
		})
		if err != nil {
			return p, err
		}
		p.attachments = append(p.attachments, a)
		more, err := a.Delegates(cni.DeviceInfoDir)
		if err != nil {
			return p, err
		}
		for _, d := range more {
			p.results = append(p.results, nic.Attachment{Network: d.Network, IfName: d.IfName, Result: d.Result})
		}
	}
	return p, nil
}

// delete detaches the pod from its networks, once.
func (p *pod) delete(t *testing.T) {
	t.Helper()
	if p.deleted {
		return
	}
	p.deleted = true
	for _, a := range slices.Backward(p.attachments) {
		err := p.node.Do(func() error { return p.node.cni.Del(context.Background(), a) })
		if (err != nil) != p.request.dead {
			t.Errorf("DEL of %s: %v", a.Name, err)
		}
		if p.request.dead {
			if err := p.node.cni.Forget(a); err != nil {
				t.Error(err)
			}
		}
	}
}

// datapaths are those that join a pod's veth to a guest, and wishes what has to be asked for to have them: other links than
// veths are in the same pods at times, and know one of them.
var (
	datapaths = []podnet.Datapath{podnet.Bridged, podnet.Redirected}
	wishes    = map[podnet.Datapath]podnet.Wish{podnet.Bridged: podnet.WishAuto, podnet.Redirected: podnet.WishRedirect}
)

// eachDatapath runs a test of pods with a veth for each of them, beside other tests.
func eachDatapath(t *testing.T, test func(t *testing.T, d podnet.Datapath)) {
	t.Helper()
	for _, d := range datapaths {
		t.Run(string(d), func(t *testing.T) {
			t.Parallel()
			test(t, d)
		})
	}
}

// joined checks that a VM's links are joined as was asked for, and by no fallback: veths by d, others as nothing else can.
func joined(t *testing.T, d podnet.Datapath, links nic.Snapshot, joins []podnet.Join) {
	t.Helper()
	engines := map[podnet.Datapath]podnet.Engine{podnet.Bridged: podnet.Nftables, podnet.Redirected: podnet.EBPF}
	for _, j := range joins {
		want := d
		if kind := links.Link(j.Link).Kind; kind != "veth" {
			want = podnet.Redirected
		}
		if j.Datapath != want || j.Engine != engines[want] || j.Lacks != "" {
			t.Fatalf("%s is joined by %s of %s, not by %s of %s: %s", j.Link, j.Datapath, j.Engine, want, engines[want], j.Lacks)
		}
	}
	if len(joins) == 0 {
		t.Fatal("no link is joined")
	}
}

// vm is a pod that virtlet has taken over, and its guest.
type vm struct {
	*pod
	before nic.Snapshot
	nics   []nic.NIC
	notes  []string
	guest  *testnet.Namespace
	record podnet.Record
	ports  []*podnet.Port
}

// start makes a VM: a pod that is taken over.
func (n *node) start(t *testing.T, d podnet.Datapath, r request) *vm {
	t.Helper()
	return n.addPod(t, r).boot(t, d)
}

// boot takes a pod over, its veths by datapath d, and gives it a guest, which has the addresses and routes of the plan. It
// goes with the test.
func (p *pod) boot(t *testing.T, d podnet.Datapath) *vm {
	t.Helper()
	v := &vm{pod: p}
	var err error
	if v.before, err = podnet.Observe(p.NS); err != nil {
		t.Fatal(err)
	}
	if v.nics, v.notes, err = nic.Plan(p.results, v.before); err != nil {
		t.Fatal(err)
	}
	o := podnet.Options{Datapath: wishes[d]}
	v.ports, err = podnet.Attach(t.Context(), p.NS, v.before, v.nics, o, func(r podnet.Record) error { v.record = r; return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.stop(t) })
	joined(t, d, v.before, v.record.Joins)
	for i, n := range v.nics {
		if i == 0 {
			v.guest = testnet.NewGuest(t, n, v.ports[i].Taps[0])
		} else {
			v.guest.Plug(n, v.ports[i].Taps[0])
		}
		v.guest.Ready(n.Name)
		v.guest.Configure(n)
	}
	return v
}

// passesCheck asks the plugins of the first network whether all is as ADD has left it, of a link that keeps MAC and addresses while
// the guest has them.
func (v *vm) passesCheck(t *testing.T) {
	t.Helper()
	if v.request.networks[0].Version < "0.4.0" || v.record.Joins[0].Datapath != podnet.Redirected {
		return // no CHECK before; and what a bridge has taken away is missed
	}
	if err := v.node.Do(func() error { return v.node.cni.Check(t.Context(), v.attachments[0]) }); err != nil {
		t.Errorf("CHECK while the guest runs: %v", err)
	}
}

// stop ends the guest and gives the namespace back to its plugins, once.
func (v *vm) stop(t *testing.T) {
	t.Helper()
	for _, p := range v.ports {
		p.Close()
	}
	if v.ports == nil {
		return
	}
	v.ports = nil
	if err := podnet.Detach(v.NS, v.record); err != nil {
		t.Error(err)
	}
}

// addr gives the first address of that family of the i-th NIC.
func (v *vm) addr(t *testing.T, i, family int) netip.Addr {
	t.Helper()
	return testnet.Addr(t, v.nics[i], family)
}

// addr gives the address of that family that the pod's link has.
func (p *pod) addr(t *testing.T, link string, family int) netip.Addr {
	t.Helper()
	s, err := podnet.Observe(p.NS)
	if err != nil {
		t.Fatal(err)
	}
	if l := s.Link(link); l != nil {
		for _, a := range l.Addrs {
			if a := a.Prefix.Addr(); a.Is4() == (family == 4) && !a.IsLinkLocalUnicast() {
				return a
			}
		}
	}
	t.Fatalf("%s of %s has no IPv%d address", link, p.Name, family)
	return netip.Addr{}
}

// ns is several networks in a row.
func ns(nets ...*cni.Network) []*cni.Network { return nets }

// uplink is what a node is known by in the world, by family.
var uplink = map[int]netip.Addr{4: netip.MustParseAddr("192.0.2.1"), 6: netip.MustParseAddr("2001:db8:2::1")}

// world gives a node an uplink, and what is behind it: a namespace that knows no way to pods but by the node's address.
func (n *node) world(t *testing.T) *testnet.Namespace {
	t.Helper()
	w := testnet.New(t, "world")
	w.Sysctl("ipv6/conf/default/accept_dad", "0")
	n.MustRun("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", w.Name)
	for family, a := range uplink {
		bits := map[int]int{4: 24, 6: 64}[family]
		n.MustRun("ip", "addr", "add", netip.PrefixFrom(a, bits).String(), "dev", "up0")
		w.MustRun("ip", "addr", "add", netip.PrefixFrom(a.Next(), bits).String(), "dev", "eth0")
	}
	n.MustRun("ip", "link", "set", "up0", "up")
	w.MustRun("ip", "link", "set", "eth0", "up")
	n.Ready("up0")
	w.Ready("eth0")
	return w
}
