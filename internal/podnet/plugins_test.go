package podnet

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// The reference plugins that make no veth, from ADD to DEL.
func TestReferencePlugins(t *testing.T) {
	ipam := `"ipam":{"type":"static","addresses":[{"address":"198.51.100.2/24","gateway":"198.51.100.1"},{"address":"2001:db8:100::2/64"}],"routes":[{"dst":"0.0.0.0/0"}]}`
	bridged := func(t *testing.T, node *testnet.Node, pod *testnet.Namespace) *testnet.Namespace {
		node.AddLink(t, pod, testnet.PodSpec{Name: "up0"})
		pod.MustRun("ip", "link", "add", "br0", "type", "bridge")
		pod.MustRun("ip", "link", "set", "br0", "up")
		pod.MustRun("ip", "link", "set", "up0", "master", "br0")
		return testnet.New(t, "host")
	}
	for name, c := range map[string]struct {
		conf    string
		prepare func(t *testing.T, node *testnet.Node, pod *testnet.Namespace) (caller *testnet.Namespace)
	}{
		"macvlan": {
			conf: `{"type":"macvlan","master":"up0","mode":"bridge","mtu":1400,` + ipam + `}`,
			prepare: func(t *testing.T, node *testnet.Node, _ *testnet.Namespace) *testnet.Namespace {
				host := testnet.New(t, "host")
				node.AddLink(t, host, testnet.PodSpec{Name: "up0"})
				return host
			},
		},
		"tap": {
			conf:    `{"type":"tap","bridge":"br0","mtu":1400,"multiQueue":true,` + ipam + `}`,
			prepare: bridged,
		},
		"tap of one queue": {
			conf:    `{"type":"tap","bridge":"br0","mtu":1400,` + ipam + `}`,
			prepare: bridged,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			runtime := cni.Runtime{BinDirs: []string{testnet.Plugins(t)}, CacheDir: t.TempDir()}
			node, pod := testnet.NewNode(t, gw4, gw6), testnet.New(t, "pod")
			pod.Sysctl("ipv6/conf/default/accept_dad", "0")
			caller := c.prepare(t, node, pod)
			bare := observe(t, pod)
			n, err := cni.Parse("test", []byte(fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","plugins":[%s]}`, c.conf)))
			if err != nil {
				t.Fatal(err)
			}
			add := n.Attachment("vm", pod.Path(), "eth0")
			as := nic.Attachment{Network: add.Name, Plugin: add.Plugin, IfName: add.IfName}
			caller.Must(func() (err error) { as.Result, err = runtime.Add(context.Background(), add); return err })
			t.Cleanup(func() { // also after a failure: leases are the test's, links go with the namespace
				if err := caller.Do(func() error { return runtime.Del(context.Background(), add) }); err != nil {
					t.Error(err)
				}
			})
			quiet(t, pod)
			a := attached{before: observe(t, pod)}
			if a.nics, _, err = nic.Plan([]nic.Attachment{as}, a.before); err != nil || len(a.nics) != 1 {
				t.Fatalf("%d NICs: %v", len(a.nics), err)
			}
			a.ports, err = Attach(t.Context(), pod.NS, a.before, a.nics, Options{Queues: 2}, func(r Record) error { a.rec = r; return nil })
			if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]int{true: 1, false: 2}[name == "tap of one queue"]; len(a.ports[0].Taps) != want {
				t.Errorf("%d queues, want %d", len(a.ports[0].Taps), want)
			}
			guest := newBigGuest(t, a.nics[0], a.ports[0])
			guest.Configure(a.nics[0])
			for to, head := range map[netip.Addr]int{gw4.Addr(): 28, gw6.Addr(): 48} {
				if !guest.Ping(to) || !guest.Ping(to, "-M", "do", "-s", fmt.Sprint(1400-head)) {
					t.Errorf("guest does not reach %s", to)
				}
			}
			testnet.Transfer(t, guest.Namespace, node.Namespace, gw4.Addr(), 1e6)
			testnet.Transfer(t, node.Namespace, guest.Namespace, ip6.Addr(), 1e6)
			if err := Check(pod.NS, a.rec); err != nil {
				t.Error(err)
			}
			for _, p := range a.ports {
				p.Close()
			}
			if err := Detach(pod.NS, a.rec); err != nil {
				t.Fatal(err)
			}
			quiet(t, pod)
			if d := changed(t, pod, a.before); d != "" {
				t.Errorf("-before +after:\n%s", d)
			}
			caller.Must(func() error { return runtime.Del(context.Background(), add) })
			quiet(t, pod)
			if d := changed(t, pod, bare); d != "" {
				t.Errorf("after DEL (-before +after):\n%s", d)
			}
		})
	}
}
