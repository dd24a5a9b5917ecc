package lab

import (
	"encoding/json"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	cnitypes "github.com/containernetworking/cni/pkg/types"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// The configuration is that of docs/multiple-networks.md: the default network, a macvlan, and another bridge whose interface
// in the pod has a name of the pod's choice.
func TestMultus(t *testing.T) {
	eachTrial(t, []string{"v4", "dual"}, datapaths, testMultus)
}

func testMultus(t *testing.T, as trial) {
	r := tested(t, "Multus: bridge, macvlan, bridge", real, as.families, as.datapath)
	m := newMultus(t, as.version, as.families)
	lan, world := m.lan(t), m.world(t)
	v := m.start(t, as.datapath, m.request("vm", m.annotations, port80))
	other := m.addPod(t, m.request("other", m.annotations, nil))
	m.check(t, v, as.families)
	v.passesCheck(t)
	for _, f := range each(as.families) {
		r.talk(t, v.guest, v.addr(t, 0, f), other.Namespace, other.addr(t, "eth0", f), 1500, "")
		r.talk(t, v.guest, v.addr(t, 1, f), lan, lanAddr[f], 1500, secondNIC)
		r.talk(t, v.guest, v.addr(t, 2, f), other.Namespace, other.addr(t, "data0", f), 1400, secondNIC)
		if !v.guest.Ping(other.addr(t, "net1", f)) {
			t.Errorf("the guest does not reach another macvlan of its node by IPv%d", f)
		}
		r.published(t, v, world, uplink[f])
	}
	// Behind the router of data0, which knows no other way to the guest.
	behind := netip.MustParseAddr("10.99.0.1")
	m.MustRun("ip", "addr", "add", behind.String()+"/32", "dev", "lo")
	if !v.guest.Ping(behind, "-I", v.addr(t, 2, 4).String()) || !strings.Contains(v.guest.MustRun("ip", "route", "get", behind.String()), "dev data0") {
		t.Errorf("the guest does not reach %s by data0", behind)
	}
	if got := m.cluster.reported("vm"); got != "eth0 net1 data0" {
		t.Errorf("Multus told the cluster of %q", got)
	}
	m.ends(t, v, other)
}

// A pod may ask for its default route on a secondary network, and then results and namespace disagree: Multus answers with
// the route of the default network, puts another into the other's result, and v4.2.3 leaves that of the namespace
// alone (multus-cni#1552). The guest has the namespace's.
func TestMultusDefaultRoute(t *testing.T) {
	eachDatapath(t, testMultusDefaultRoute)
}

func testMultusDefaultRoute(t *testing.T, d podnet.Datapath) {
	m := newMultus(t, "1.0.0", "v4")
	m.lan(t)
	annotations := map[string]string{networksAnnotation: `[{"name":"lan"},{"name":"data","interface":"data0","default-route":["10.88.0.1"]}]`}
	v := m.start(t, d, m.request("vm", annotations, nil))
	var want []string
	for _, l := range v.before.Links {
		for _, r := range l.Routes {
			if r.Dst.Bits() == 0 {
				want = append(want, l.Name+" "+r.Gw.String())
			}
		}
	}
	if got := defaults(v); len(got) != 1 || !slices.Equal(got, want) {
		t.Errorf("default routes: %s; the namespace has %s", got, want)
	}
	hasDefault := func(r *cnitypes.Route) bool { ones, _ := r.Dst.Mask.Size(); return ones == 0 }
	for _, i := range []int{0, 2} {
		if r := v.results[i]; !slices.ContainsFunc(r.Result.Routes, hasDefault) {
			t.Errorf("the result of %s has no default route: look again at what this test is for", r.Network)
		}
	}
	m.ends(t, v)
}

// An interface that is moved into the pod brings its index from the node: only Multus knows that it was there first.
func TestMultusOrder(t *testing.T) {
	eachDatapath(t, testMultusOrder)
}

func testMultusOrder(t *testing.T, d podnet.Datapath) {
	m := newMultus(t, "1.0.0", "v4")
	m.cluster.networks["moved"] = `{"cniVersion":"1.0.0","name":"moved","type":"host-device","device":"moved0"}`
	m.MustRun("ip", "link", "add", "moved0", "index", "100", "type", "veth", "peer", "name", "moved1")
	m.MustRun("ip", "link", "set", "moved0", "up")
	annotations := map[string]string{networksAnnotation: "moved,data@data0"}
	v := m.start(t, d, m.request("vm", annotations, nil))
	if got := names(v.nics); got != "eth0 net1 data0" {
		t.Errorf("the guest has %s", got)
	}
	alone, _, err := nic.Plan(v.results[:1], v.before)
	if got := names(alone); err != nil || got != "eth0 data0 net1" {
		t.Errorf("by the namespace alone it would have %s, %v: look again at what this test is for", got, err)
	}
	m.ends(t, v)
}

// A real guest of the real command has three NICs on one network, by the configuration for machines without a cluster.
func TestMultusGuest(t *testing.T) {
	eachDatapath(t, testMultusGuest)
}

func testMultusGuest(t *testing.T, d podnet.Datapath) {
	r := tested(t, "Multus: bridge, macvlan, bridge", real, "v4", d)
	n := newNode(t, "node", testnet.Tools(t, "test/lab/multus"))
	lan, conf := n.lan(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(conf, "10-multus.conf"), []byte(sample(t, "10-multus.conf")), 0o644); err != nil {
		t.Fatal(err)
	}
	m := n.machine(t, conf, nil)
	m.run(t, "three", d, "--network", "three")
	nics := m.report(t, "three").NICs
	var st struct{ NICs []nic.NIC }
	if err := json.Unmarshal([]byte(m.virtlet(t, "inspect", "--json", "three")), &st); err != nil {
		t.Fatal(err)
	}
	if got := names(st.NICs); got != "eth0 net1 net2" || len(nics) != 3 {
		t.Fatalf("the guest has %s: %+v", got, nics)
	}
	for i, w := range []struct {
		routes, dns string
		mtu         int
		peer        *testnet.Namespace
		addr        string
	}{
		{"0.0.0.0/0 10.66.0.1", "10.66.0.1", 1500, n.Namespace, "10.66.0.1"},
		{"", "10.77.0.1", 1500, lan, lanAddr[4].String()},
		{"10.99.0.0/16 10.88.0.1", "", 1400, n.Namespace, "10.88.0.1"},
	} {
		got, want := nics[i], st.NICs[i]
		var routes []string
		for _, r := range got.Routes {
			if r.Gw.IsValid() {
				routes = append(routes, r.Dst.String(), r.Gw.String())
			}
		}
		if is := strings.Join(routes, " "); got.MAC != want.MAC.String() || got.MTU != w.mtu || is != w.routes || strings.Join(got.DNS, " ") != w.dns {
			t.Errorf("%s is %+v", want.Name, got)
		}
		own := testnet.Addr(t, want, 4)
		if !slices.ContainsFunc(got.Addrs, func(p netip.Prefix) bool { return p.Addr() == own }) {
			t.Errorf("%s has %v, not %s", want.Name, got.Addrs, own)
		}
		if page := w.peer.MustRun("curl", "-sSf", "--max-time", "30", "http://"+own.String()+"/"); page != "three" {
			t.Errorf("at %s is %q", own, page)
		}
		if out := m.type_(t, "three", "ping -c 2 -W 10 "+w.addr); !strings.Contains(out, " 0% packet loss") {
			t.Errorf("the guest does not reach %s: %s", w.addr, out)
		}
	}
	for _, c := range []string{ping, tcp, secondNIC} {
		r.mark(t, c)
	}
	m.virtlet(t, "rm", "-f", "three")
}

func names(nics []nic.NIC) string {
	var all []string
	for _, n := range nics {
		all = append(all, n.Name)
	}
	return strings.Join(all, " ")
}

// multus is a node whose pods' networks are Multus's, and a cluster.
type multus struct {
	*node
	cluster     *cluster
	conf        *cni.Network
	annotations map[string]string // of a pod of the documentation
}

const networksAnnotation = "k8s.v1.cni.cncf.io/networks"

func newMultus(t *testing.T, version, families string) *multus {
	t.Helper()
	m := &multus{node: newNode(t, "node", testnet.Tools(t, "test/lab/multus"))}
	m.cluster = newCluster(t, m.node)
	adapt := func(conf string) string {
		conf = strings.NewReplacer(
			`"cniVersion": "1.0.0"`, `"cniVersion": "`+version+`"`,
			`"/etc/cni/net.d/multus.d/multus.kubeconfig"`, `"`+m.cluster.kubeconfig+`"`,
			`"type": "multus",`, `"type": "multus", "cniDir": "`+m.kept()+`", "binDir": "`+testnet.Plugins(t)+`",`,
			`"type": "host-local",`, `"type": "host-local", "dataDir": "`+m.leases()+`",`,
		).Replace(conf)
		if families == "v4" {
			conf = without6(t, conf)
		}
		return conf
	}
	m.conf = m.network(t, adapt(sample(t, "00-multus.conf")))
	for _, object := range strings.Split(sample(t, "networks.yaml"), "---\n") {
		name, config := yaml(t, object, `(?m)^  name: (\S+)$`), yaml(t, object, `(?s)\n  config: \|\n(.*)`)
		m.cluster.networks[name] = adapt(config)
	}
	m.annotations = map[string]string{networksAnnotation: yaml(t, sample(t, "pod.yaml"), `(?m)^    `+regexp.QuoteMeta(networksAnnotation)+`: (.*)$`)}
	return m
}

// kept is where Multus keeps what it did.
func (m *multus) kept() string { return filepath.Join(m.dir, "multus") }

func (m *multus) leases() string { return filepath.Join(m.dir, "leases") }

func (m *multus) request(pod string, annotations map[string]string, ports any) request {
	r := request{networks: ns(m.conf), args: m.cluster.args(pod, annotations)}
	if ports != nil {
		r.caps = map[string]any{"portMappings": ports}
	}
	return r
}

// lanAddr are the addresses of a machine on the LAN.
var lanAddr = map[int]netip.Addr{4: netip.MustParseAddr("10.77.0.200"), 6: netip.MustParseAddr("fd00:77::200")}

// lan gives the node the link that the macvlans are on, and a machine at its other end.
func (n *node) lan(t *testing.T) *testnet.Namespace {
	t.Helper()
	l := testnet.New(t, "lan")
	n.MustRun("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "eth0", "netns", l.Name)
	for f, a := range lanAddr {
		l.MustRun("ip", "addr", "add", netip.PrefixFrom(a, map[int]int{4: 24, 6: 64}[f]).String(), "dev", "eth0", "nodad")
	}
	n.MustRun("ip", "link", "set", "lan0", "up")
	l.MustRun("ip", "link", "set", "eth0", "up")
	n.Ready("lan0")
	l.Ready("eth0")
	return l
}

// check compares a VM of the documentation with what the documentation says.
func (m *multus) check(t *testing.T, v *vm, families string) {
	t.Helper()
	for _, f := range v.results[0].Result.Interfaces {
		if f.Sandbox != "" && f.Name != "eth0" {
			t.Errorf("Multus answers with %s: this test was for its answering with eth0 alone", f.Name)
		}
	}
	want := []struct {
		name, network, subnets, routes, dns string
		mtu                                 int
	}{
		{"eth0", "default", "10.66.0.0/24 fd00:66::/64", "0.0.0.0/0 10.66.0.1 ::/0 fd00:66::1", "10.66.0.1", 1500},
		{"net1", "lan", "10.77.0.0/24 fd00:77::/64", "", "10.77.0.1", 1500},
		{"data0", "data", "10.88.0.0/24 fd00:88::/64", "10.99.0.0/16 10.88.0.1", "", 1400},
	}
	if len(v.nics) != len(want) {
		t.Fatalf("%d NICs: %v", len(v.nics), v.nics)
	}
	for i, w := range want {
		got, link := v.nics[i], v.before.Link(w.name)
		if got.Name != w.name || got.MTU != w.mtu || got.MAC != link.MAC {
			t.Errorf("NIC %d is %s, MAC %s, MTU %d; want %s, %s, %d", i, got.Name, got.MAC, got.MTU, w.name, link.MAC, w.mtu)
		}
		if i > 0 && got.Network != w.network {
			t.Errorf("%s is of network %q, not %q", got.Name, got.Network, w.network)
		}
		var subnets, routes, dns []string
		for _, a := range got.Addrs {
			subnets = append(subnets, a.Masked().String())
		}
		for _, r := range got.Routes {
			routes = append(routes, r.Dst.String(), r.Gw.String())
		}
		for _, s := range got.DNS.Servers {
			dns = append(dns, s.String())
		}
		if is, want := strings.Join(subnets, " "), of(families, w.subnets); is != want {
			t.Errorf("%s has addresses of %s, not %s", got.Name, is, want)
		}
		if is, want := strings.Join(routes, " "), of(families, w.routes); is != want {
			t.Errorf("%s has the routes %s, not %s", got.Name, is, want)
		}
		if is := strings.Join(dns, " "); is != w.dns {
			t.Errorf("%s has the name servers %q, not %q", got.Name, is, w.dns)
		}
	}
}

// ends stops a VM and deletes all pods: the namespaces are given back, and Multus finds all that it made.
func (m *multus) ends(t *testing.T, v *vm, others ...*pod) {
	t.Helper()
	v.stop(t)
	// Multus checks its default network only.
	if a := v.attachments[0]; m.conf.Version >= "0.4.0" {
		m.Must(func() error { return m.cni.Check(t.Context(), a) })
	}
	for _, p := range append(others, v.pod) {
		p.delete(t)
		after, err := podnet.Observe(p.NS)
		if err != nil {
			t.Fatal(err)
		}
		if left := slices.DeleteFunc(after.Links, func(l nic.Link) bool { return l.Name == "lo" }); len(left) > 0 {
			t.Errorf("DEL has left in %s: %+v", p.Name, left)
		}
	}
	if out := m.MustRun("ip", "-br", "link", "show", "type", "veth"); len(regexp.MustCompile(`(?m)^veth`).FindAllString(out, -1)) > 0 {
		t.Errorf("DEL has left on the node:\n%s", out)
	}
	for _, dir := range []string{m.kept(), m.leases()} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			// host-local keeps a lock and the last address of each network.
			if err == nil && !e.IsDir() && e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_reserved_ip") {
				t.Errorf("DEL has left %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// sample gives the text of docs/multiple-networks.md that belongs into a file: the block that follows its name.
func sample(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/multiple-networks.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(b), "`"+file+"`")
	_, after, ok2 := strings.Cut(after, "\n```")
	_, after, _ = strings.Cut(after, "\n")
	block, _, ok3 := strings.Cut(after, "```\n")
	if !ok || !ok2 || !ok3 {
		t.Fatalf("docs/multiple-networks.md has no %s", file)
	}
	return block
}

// yaml finds the one thing in a text that is wanted of it.
func yaml(t *testing.T, text, expr string) string {
	t.Helper()
	m := regexp.MustCompile(expr).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("no %q in:\n%s", expr, text)
	}
	return m[1]
}

// without6 takes IPv6 out of a configuration: every entry of a list that has an IPv6 address in it.
func without6(t *testing.T, conf string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(conf), &v); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(drop6(v))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// drop6 gives nil for what has nothing but IPv6 in it.
func drop6(v any) any {
	switch v := v.(type) {
	case string:
		if is6(v) {
			return nil
		}
	case []any:
		var kept []any
		for _, e := range v {
			if e = drop6(e); e != nil {
				kept = append(kept, e)
			}
		}
		if kept == nil {
			return nil
		}
		return kept
	case map[string]any:
		for k, e := range v {
			if v[k] = drop6(e); v[k] == nil {
				return nil
			}
		}
	}
	return v
}

func is6(s string) bool {
	a, _, _ := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(a)
	return err == nil && addr.Is6()
}

// of leaves of a list of addresses those of the families.
func of(families, list string) string {
	all := strings.Fields(list)
	if families == "v4" {
		all = slices.DeleteFunc(all, is6)
	}
	return strings.Join(all, " ")
}
