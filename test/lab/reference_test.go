package lab

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

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

// eachVersion runs a test for every CNI version and the families of a network.
func eachVersion(t *testing.T, test func(t *testing.T, version, families string)) {
	for _, v := range versions {
		for _, f := range []string{"v4", "v6", "dual"} {
			t.Run(v+"/"+f, func(t *testing.T) {
				t.Parallel()
				test(t, v, f)
			})
		}
	}
}

// The whole chain: the bridge reflects frames, tuning changes MAC and MTU after the bridge plugin has set them.
func TestBridge(t *testing.T) {
	eachVersion(t, func(t *testing.T, version, families string) {
		r := tested(t, "bridge, portmap, bandwidth, tuning, firewall", real, families)
		n := newNode(t, "node")
		const mtu = 1400
		chain := []map[string]any{
			{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": true, "ipam": hostLocal(families)},
			{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
			{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
			{"type": "tuning", "mac": "02:00:00:00:00:42", "mtu": mtu},
		}
		if version >= "0.4.0" { // that plugin's first
			chain = append(chain, map[string]any{"type": "firewall"})
		}
		conf := list(version, "lab", chain...)
		net := n.network(t, conf)
		v := n.start(t, request{networks: ns(net), caps: map[string]any{
			"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
			"bandwidth":    map[string]any{"ingressRate": 400e6, "ingressBurst": 8e6, "egressRate": 400e6, "egressBurst": 8e6},
		}})
		if got := v.nics[0]; got.MTU != mtu || got.MAC.String() != "02:00:00:00:00:42" {
			t.Errorf("the guest has MAC %s and MTU %d, not what tuning set", got.MAC, got.MTU)
		}
		other := n.addPod(t, request{networks: ns(n.network(t, strings.Replace(conf, `"mac":"02:00:00:00:00:42",`, "", 1)))})
		world := n.world(t)
		for _, f := range each(families) {
			r.talk(t, v.guest, v.addr(t, 0, f), other.Namespace, other.addr(t, "eth0", f), mtu, "")
			own := v.addr(t, 0, f)
			testnet.TransferBy(t, world, v.guest, netip.AddrPortFrom(own, 80), netip.AddrPortFrom(uplink[f], 8080), 300_000)
			r.mark(t, hostPort)
		}
		if out := n.MustRun("tc", "qdisc", "show"); strings.Count(out, "tbf") < 2 {
			t.Errorf("no limits of bandwidth:\n%s", out)
		}
	})
}
