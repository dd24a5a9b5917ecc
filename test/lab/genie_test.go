package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// CNI-Genie calls several plugins and merges their results into one; the namespace has as many links, and the default routes
// that the plugins' configurations make.
func TestGenie(t *testing.T) {
	for file, want := range map[string]struct {
		order    string
		mtus     []int
		defaults []bool // by NIC
	}{
		"genie-calico-flannel":              {"calico, flannel", []int{1500, 1450}, []bool{true, false}},
		"genie-calico-flannel-two-defaults": {"calico, flannel as gateway", []int{1500, 1450}, []bool{true, true}},
		"genie-flannel-calico":              {"flannel, calico", []int{1450, 1500}, []bool{false, true}},
	} {
		test := func(t *testing.T, d podnet.Datapath) {
			rec := record(t, file)
			r := tested(t, "genie ("+want.order+")", replayed, "v4", d)
			n, world := newReplayNode(t)
			net := n.network(t, rec.list(0))
			v := n.start(t, d, rec.request(net))
			pod, vm := n.addPod(t, rec.request(net)), n.start(t, d, rec.request(net))
			for i := range v.nics {
				if has := v.nics[i].Gateway(4).IsValid(); has != want.defaults[i] {
					t.Errorf("eth%d: a default route: %t, in the namespace: %t", i, has, want.defaults[i])
				}
				column := ""
				if i > 0 {
					column = secondNIC
				}
				r.talk(t, v.guest, v.addr(t, i, 4), pod.Namespace, pod.addr(t, fmt.Sprintf("eth%d", i), 4), want.mtus[i], column)
				r.talk(t, v.guest, v.addr(t, i, 4), vm.guest, vm.addr(t, i, 4), want.mtus[i], column)
			}
			sameDefaults(t, v)
			byTheOtherNIC(t, v, world)
		}
		t.Run(strings.TrimPrefix(file, "genie-"), func(t *testing.T) { eachDatapath(t, test) })
	}
}

// byTheOtherNIC asks a guest from afar by the address of each NIC. It answers by its default route, and the spoof check lets
// through only what has the address of the NIC that the route leads out by.
func byTheOtherNIC(t *testing.T, v *vm, world *testnet.Namespace) {
	t.Helper()
	world.MustRun("ip", "route", "add", "10.0.0.0/8", "via", uplink[4].String())
	out := slices.IndexFunc(v.nics, func(n nic.NIC) bool { return n.Gateway(4).IsValid() }) // the first
	for i := range v.nics {
		if i == out {
			if !world.Ping(v.addr(t, i, 4)) {
				t.Errorf("%s is not reached from afar, though the default route is there", v.nics[i].Name)
			}
			continue
		}
		if world.Ping(v.addr(t, i, 4), "-w", "1") {
			t.Errorf("%s is reached from afar: the documentation says otherwise", v.nics[i].Name)
		}
		rules, err := podnet.Rules(v.NS, v.record.Joins)
		if err != nil {
			t.Fatal(err)
		}
		if podnet.Dropped(rules[v.nics[out].Name])[podnet.SpoofedIPv4].Packets == 0 {
			t.Errorf("nothing was dropped on %s", v.nics[out].Name)
		}
	}
}

// sameDefaults compares the default routes of a guest with those that the namespace had: as many, by the same gateways, with the
// same metrics.
func sameDefaults(t *testing.T, v *vm) {
	t.Helper()
	var had []nic.Route
	for _, l := range v.before.Links {
		for _, r := range l.Routes {
			if r.Dst.Bits() == 0 {
				had = append(had, nic.Route{Dst: r.Dst, Gw: r.Gw, Metric: r.Metric})
			}
		}
	}
	guest, err := podnet.Observe(v.guest.NS)
	if err != nil {
		t.Fatal(err)
	}
	var has []nic.Route
	for _, l := range guest.Links {
		for _, r := range l.Routes {
			if r.Dst.Bits() == 0 {
				has = append(has, nic.Route{Dst: r.Dst, Gw: r.Gw, Metric: r.Metric})
			}
		}
	}
	if !slices.Equal(had, has) {
		t.Errorf("the guest has the default routes %v, the namespace had %v", has, had)
	}
}

// What a DEL that fails leaves in the namespace goes with the namespace, on the node too.
func TestGenieLeaves(t *testing.T) {
	rec := record(t, "genie-calico-flannel")
	n, _ := newReplayNode(t)
	p := n.addPod(t, rec.request(n.network(t, rec.list(0))))
	var made, left []podnet.NodeLink
	n.Must(func() (err error) { made, err = podnet.Made(p.NS, nil, nil); return err })
	p.delete(t)
	n.Must(func() (err error) { left, err = podnet.Left(made); return err })
	if len(made) != 2 || len(left) != 1 {
		t.Errorf("made %v, after DEL %v are left, want one of the two", made, left)
	}
}

// The configuration in the documentation, as it is written there.
func TestGenieAsDocumented(t *testing.T) {
	eachDatapath(t, testGenieAsDocumented)
}

func testGenieAsDocumented(t *testing.T, d podnet.Datapath) {
	conf := t.TempDir()
	files := map[string]string{}
	for _, name := range []string{"00-genie.conf", "10-calico.conf", "20-flannel.conf"} {
		files[name] = sample(t, "/etc/cni/net.d/"+name)
		if err := os.WriteFile(filepath.Join(conf, name), []byte(files[name]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	nets, bad, err := cni.Load(conf)
	if err != nil || len(bad) > 0 || len(nets) != 3 || nets[0].Name != "genie" {
		t.Fatalf("%v, %v, %v: want three networks, genie first", nets, bad, err)
	}
	// Genie finds a network by what is behind the first dash of its file's name, and speaks no version after 0.4.0.
	var genie struct {
		Default string `json:"default_plugin"`
	}
	if err := json.Unmarshal([]byte(files["00-genie.conf"]), &genie); err != nil {
		t.Fatal(err)
	}
	for i, plugin := range strings.Split(genie.Default, ",") {
		if base := filepath.Base(nets[i+1].File); !strings.HasSuffix(strings.TrimSuffix(base, filepath.Ext(base)), "-"+plugin) {
			t.Errorf("%s is not the file of %q", base, plugin)
		}
		if nets[i+1].Version > "0.4.0" {
			t.Errorf("%s is of CNI version %s", nets[i+1].File, nets[i+1].Version)
		}
	}
	if genie.Default != "calico,flannel" {
		t.Fatalf("default_plugin %q: what is recorded is Calico first", genie.Default)
	}
	rec := record(t, "genie-calico-flannel")
	n := newNode(t, "node", testnet.ReplayAs(t, "genie", map[string]any{"recording": rec.path, "dataDir": t.TempDir()}))
	w := n.world(t)
	n.MustRun("ip", "route", "add", "default", "via", uplink[4].Next().String(), "dev", "up0")
	req := rec.request(nets[0])
	req.args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", "vm"}}
	v := n.start(t, d, req)
	if len(v.nics) != 2 || v.nics[0].Gateway(4) != netip.MustParseAddr("169.254.1.1") || v.nics[1].Gateway(4).IsValid() {
		t.Errorf("NICs %+v, want Calico's with a gateway, Flannel's without", v.nics)
	}
	w.MustRun("ip", "route", "add", "10.0.0.0/8", "via", uplink[4].String())
	if !v.guest.Ping(uplink[4].Next()) {
		t.Error("the guest does not reach the world")
	}
}
