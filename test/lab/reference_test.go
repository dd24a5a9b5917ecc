package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// versions are the CNI versions that plugins are asked to speak.
var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// subnets are those of a network, by the families that it has.
var subnets = map[string][]string{
	"v4": {"198.51.100.0/24"}, "v6": {"2001:db8:100::/64"}, "dual": {"198.51.100.0/24", "2001:db8:100::/64"},
}

// hostLocal is the address management of a network: addresses from subnets, and default routes.
func hostLocal(families string) map[string]any {
	var ranges [][]map[string]string
	var routes []map[string]string
	for _, s := range subnets[families] {
		ranges = append(ranges, []map[string]string{{"subnet": s}})
		dst := "0.0.0.0/0"
		if strings.Contains(s, ":") {
			dst = "::/0"
		}
		routes = append(routes, map[string]string{"dst": dst})
	}
	return map[string]any{"type": "host-local", "dataDir": "$DIR/leases", "ranges": ranges, "routes": routes}
}

// list is a configuration of plugins in a chain.
func list(version, name string, plugins ...map[string]any) string {
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": name, "plugins": plugins})
	if err != nil {
		panic(err) // of what is written here
	}
	return string(b)
}

// trial is what a test is run with.
type trial struct {
	version, families string
	datapath          podnet.Datapath // of veths
}

// eachTrial runs a test for every CNI version, the families of a network and some datapaths, beside other tests.
func eachTrial(t *testing.T, families []string, datapaths []podnet.Datapath, test func(t *testing.T, as trial)) {
	for _, v := range versions {
		for _, f := range families {
			for _, d := range datapaths {
				t.Run(v+"/"+f+"/"+string(d), func(t *testing.T) {
					t.Parallel()
					test(t, trial{v, f, d})
				})
			}
		}
	}
}

var allFamilies = []string{"v4", "v6", "dual"}

// The whole chain: the bridge reflects frames, tuning changes MAC and MTU after the bridge plugin has set them.
func TestBridge(t *testing.T) {
	eachTrial(t, allFamilies, datapaths, func(t *testing.T, as trial) {
		r := tested(t, "bridge, portmap, bandwidth, tuning, firewall", real, as.families, as.datapath)
		n := newNode(t, "node")
		const mtu = 1400
		chain := []map[string]any{
			{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": true, "ipam": hostLocal(as.families)},
			{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
			{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
			{"type": "tuning", "mac": "02:00:00:00:00:42", "mtu": mtu},
		}
		if as.version >= "0.4.0" { // that plugin's first
			chain = append(chain, map[string]any{"type": "firewall"})
		}
		conf := list(as.version, "lab", chain...)
		net := n.network(t, conf)
		v := n.start(t, as.datapath, request{networks: ns(net), caps: map[string]any{
			"portMappings": port80,
			"bandwidth":    map[string]any{"ingressRate": 400e6, "ingressBurst": 8e6, "egressRate": 400e6, "egressBurst": 8e6},
		}})
		if got := v.nics[0]; got.MTU != mtu || got.MAC.String() != "02:00:00:00:00:42" {
			t.Errorf("the guest has MAC %s and MTU %d, not what tuning set", got.MAC, got.MTU)
		}
		v.passesCheck(t)
		other := n.addPod(t, request{networks: ns(n.network(t, strings.Replace(conf, `"mac":"02:00:00:00:00:42",`, "", 1)))})
		world := n.world(t)
		for _, f := range each(as.families) {
			r.talk(t, v.guest, v.addr(t, 0, f), other.Namespace, other.addr(t, "eth0", f), mtu, "")
			r.published(t, v, world, uplink[f])
		}
	})
}

// A pod of its own link to the node: what is on its subnet is reached by the gateway, which is on the link.
func TestPtp(t *testing.T) {
	eachTrial(t, allFamilies, datapaths, func(t *testing.T, as trial) {
		r := tested(t, "ptp, portmap", real, as.families, as.datapath)
		n := newNode(t, "node")
		const mtu = 1450
		net := n.network(t, list(as.version, "lab",
			map[string]any{"type": "ptp", "mtu": mtu, "ipam": hostLocal(as.families)},
			map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
		))
		v := n.start(t, as.datapath, request{networks: ns(net), caps: map[string]any{"portMappings": port80}})
		v.passesCheck(t)
		other := n.addPod(t, request{networks: ns(net)})
		world := n.world(t)
		for _, f := range each(as.families) {
			r.talk(t, v.guest, v.addr(t, 0, f), other.Namespace, other.addr(t, "eth0", f), mtu, "")
			r.published(t, v, world, uplink[f])
		}
	})
}

// A macvlan has the node's uplink under it: two of them talk by the kernel, and each with what is behind the uplink.
func TestMacvlan(t *testing.T) {
	eachTrial(t, allFamilies, []podnet.Datapath{podnet.Redirected}, func(t *testing.T, as trial) {
		r := tested(t, "macvlan", real, as.families, as.datapath)
		n := newNode(t, "node")
		world := n.world(t)
		const mtu = 1450
		net := n.network(t, list(as.version, "lab", map[string]any{
			"type": "macvlan", "master": "up0", "mode": "bridge", "mtu": mtu, "ipam": hostLocal(as.families),
		}))
		v, other := n.start(t, as.datapath, request{networks: ns(net)}), n.addPod(t, request{networks: ns(net)})
		outside := map[int]string{4: "198.51.100.200/24", 6: "2001:db8:100::200/64"}
		for _, f := range each(as.families) {
			world.MustRun("ip", "addr", "add", outside[f], "dev", "eth0")
			to := netip.MustParsePrefix(outside[f]).Addr()
			r.talk(t, v.guest, v.addr(t, 0, f), other.Namespace, other.addr(t, "eth0", f), mtu, "")
			r.talk(t, v.guest, v.addr(t, 0, f), world, to, mtu, "")
		}
	})
}

// Limits of the bandwidth plugin hold for a guest as for a pod: what is sent takes as long as they say, at least.
func TestBandwidth(t *testing.T) {
	eachDatapath(t, testBandwidth)
}

func testBandwidth(t *testing.T, d podnet.Datapath) {
	n := newNode(t, "node")
	net := n.network(t, list("1.1.0", "lab",
		map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": hostLocal("v4")},
		map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
	))
	const rate, burst, size = 16e6, 800e3, 2e6 // bit/s, bits, bytes
	v := n.start(t, d, request{networks: ns(net), caps: map[string]any{
		"bandwidth": map[string]any{"ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst},
	}})
	other := n.addPod(t, request{networks: ns(net)})
	if out := n.MustRun("tc", "qdisc", "show"); strings.Count(out, "tbf") != 2 {
		t.Fatalf("not two limits of bandwidth:\n%s", out)
	}
	least := time.Duration((size*8 - burst) / rate * float64(time.Second))
	for name, way := range map[string]func(){
		"from the guest": func() { testnet.Transfer(t, v.guest, other.Namespace, other.addr(t, "eth0", 4), size) },
		"to the guest":   func() { testnet.Transfer(t, other.Namespace, v.guest, v.addr(t, 0, 4), size) },
	} {
		begin := time.Now()
		way()
		if took := time.Since(begin); took < least {
			t.Errorf("%s: %.0f bytes took %s; at %.0f bit/s they need %s", name, size, took, rate, least)
		}
	}
}

// second is another bridge network, beside that of hostLocal. Its gateway is no default route.
var second = map[string]any{
	"type": "bridge", "bridge": "cni1", "isGateway": true,
	"ipam": map[string]any{"type": "host-local", "dataDir": "$DIR/leases", "ranges": [][]map[string]string{
		{{"subnet": "203.0.113.0/24"}}, {{"subnet": "2001:db8:113::/64"}},
	}, "routes": []map[string]string{{"dst": "192.0.2.128/25", "gw": "203.0.113.9"}}},
}

// defaults gives the default routes of a VM's guest, each with its NIC.
func defaults(v *vm) (all []string) {
	for _, n := range v.nics {
		for _, r := range n.Routes {
			if r.IsDefault() {
				all = append(all, n.Name+" "+r.Gw.String())
			}
		}
	}
	slices.Sort(all)
	return all
}

func TestSeveralNetworks(t *testing.T) {
	eachDatapath(t, testSeveralNetworks)
}

func testSeveralNetworks(t *testing.T, d podnet.Datapath) {
	r := tested(t, "bridge, twice", real, "dual", d)
	n := newNode(t, "node")
	first := n.network(t, list("1.1.0", "first", map[string]any{
		"type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1400, "hairpinMode": true, "ipam": hostLocal("dual"),
	}))
	nets := ns(first, n.network(t, list("0.4.0", "second", second)))
	v := n.start(t, d, request{networks: nets})
	other := n.addPod(t, request{networks: nets})
	if got := strings.Join(defaults(v), ", "); got != "eth0 198.51.100.1, eth0 2001:db8:100::1" {
		t.Errorf("default routes: %s", got)
	}
	if i := slices.IndexFunc(v.nics[1].Routes, func(r nic.Route) bool { return r.Gw.String() == "203.0.113.9" }); i < 0 {
		t.Errorf("eth1 lacks the route of its network: %v", v.nics[1].Routes)
	}
	for i, mtu := range []int{1400, 1500} {
		if got := v.nics[i]; got.Name != fmt.Sprintf("eth%d", i) || got.MTU != mtu || got.Network != nets[i].Name {
			t.Errorf("NIC %d is %s of %s with MTU %d", i, got.Name, got.Network, got.MTU)
		}
		for _, f := range []int{4, 6} {
			r.talk(t, v.guest, v.addr(t, i, f), other.Namespace, other.addr(t, v.nics[i].Name, f), mtu, []string{"", secondNIC}[i])
		}
	}
}

// Routing by source address needs rules, which a guest is not told of: that is said, and the rest works.
func TestSbr(t *testing.T) {
	eachDatapath(t, testSbr)
}

func testSbr(t *testing.T, d podnet.Datapath) {
	r := tested(t, "bridge, and bridge with sbr", real, "v4", d)
	n := newNode(t, "node")
	if out, err := n.Run("ip", "rule", "add", "from", "192.0.2.200", "table", "200"); err != nil {
		t.Skipf("the kernel has no routing rules: %s", out)
	}
	first := n.network(t, list("1.1.0", "first", map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": hostLocal("v4")}))
	bySource := n.network(t, list("1.1.0", "second", second, map[string]any{"type": "sbr"}))
	v := n.start(t, d, request{networks: ns(first, bySource)})
	other := n.addPod(t, request{networks: ns(first, n.network(t, list("1.1.0", "second", second)))})
	rules := v.MustRun("ip", "rule")
	if !slices.ContainsFunc(v.notes, func(s string) bool { return strings.Contains(s, "eth1") && strings.Contains(s, "table 100") }) {
		t.Errorf("nothing says that eth1's table of routes is not carried over: %q\nthe rules are:\n%s", v.notes, rules)
	}
	if got := strings.Join(defaults(v), ", "); got != "eth0 198.51.100.1" {
		t.Errorf("default routes: %s", got)
	}
	for i, column := range []string{"", secondNIC} {
		r.talk(t, v.guest, v.addr(t, i, 4), other.Namespace, other.addr(t, v.nics[i].Name, 4), 1500, column)
	}
	v.stop(t)
	if got := v.MustRun("ip", "rule"); got != rules {
		t.Errorf("rules after the guest:\n%s\nbefore:\n%s", got, rules)
	}
	if got := v.MustRun("ip", "route", "show", "table", "100"); !strings.Contains(got, "default via 203.0.113.1 dev eth1") {
		t.Errorf("table 100 after the guest:\n%s", got)
	}
}
