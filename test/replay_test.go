package test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// Guests on Calico as it was recorded, one by each datapath of a veth: an address without a subnet, and a gateway on the link that
// nobody has.
func TestBootOnCalico(t *testing.T) {
	l := newLab(t)
	world := calicoWorld(t)
	recording, err := filepath.Abs("lab/testdata/calico-dual.json")
	if err != nil {
		t.Fatal(err)
	}
	calico := testnet.ReplayAs(t, "calico", map[string]any{"recording": recording, "dataDir": t.TempDir()})
	conf := t.TempDir()
	list := `{"cniVersion":"1.0.0","name":"k8s-pod-network","plugins":[{"type":"calico"},{"type":"portmap","capabilities":{"portMappings":true}}]}`
	if err := os.WriteFile(filepath.Join(conf, "10-calico.conflist"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	guests := []struct {
		name     string
		wish     podnet.Wish
		engine   podnet.Engine
		datapath podnet.Datapath
		addrs    []string
	}{
		{"bridged", podnet.WishBridge, podnet.Nftables, podnet.Bridged, []string{"10.10.192.128/32", "fd00:10::9380:634f:1c91:e300/128"}},
		{"redirected", podnet.WishRedirect, podnet.EBPF, podnet.Redirected, []string{"10.10.192.129/32", "fd00:10::9380:634f:1c91:e301/128"}},
	}
	for _, g := range guests {
		l.virtlet(l.run(conf, "virtlet.wait6", "-d", "--name", g.name, "--hostname", g.name, "--datapath", string(g.wish), "--cni-bin-dir", calico)...)
	}
	for _, g := range guests {
		st, r := l.state(g.name), l.report(g.name)
		same(t, st, r)
		answered(t, st, r)
		n := r.NICs[0]
		if got := fmt.Sprint(n.Addrs); !strings.Contains(got, g.addrs[0]) || !strings.Contains(got, g.addrs[1]) || n.MTU != 1440 {
			t.Errorf("%s: addresses %s, MTU %d", g.name, got, n.MTU)
		}
		if got := fmt.Sprint(n.Routes); !strings.Contains(got, "169.254.1.1/32") || !strings.Contains(got, "fe80::ecee:eeff:feee:eeee") {
			t.Errorf("%s: routes %s", g.name, got)
		}
		if p := st.Ports[0]; p.Datapath != g.datapath || p.Engine != g.engine || p.Lacks != "" {
			t.Errorf("%s is joined by %+v", g.name, p.Join)
		}
	}

	// A plain pod beside them, the other guest, and the world behind the node.
	pod := testnet.New(t, "pod")
	net, err := cni.Parse("10-calico.conflist", []byte(list))
	if err != nil {
		t.Fatal(err)
	}
	plugins := cni.Runtime{BinDirs: []string{calico, l.plugins}, CacheDir: t.TempDir()}
	a := net.Attachment("plain-pod", pod.Path(), "eth0")
	if _, err := plugins.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := plugins.Del(t.Context(), a); err != nil {
			t.Error(err)
		}
	}()
	seen, err := podnet.Observe(pod.NS)
	if err != nil {
		t.Fatal(err)
	}
	for i, far := range []string{"192.0.2.2", "2001:db8:c::2"} {
		for k, g := range guests {
			own, other := netip.MustParsePrefix(g.addrs[i]).Addr(), netip.MustParsePrefix(guests[1-k].addrs[i]).Addr()
			for _, to := range []string{seen.Link("eth0").Addrs[i].Prefix.Addr().String(), other.String(), far} {
				if out := l.type_(g.name, "ping -c 1 -W 10 -s 1300 "+to); !strings.Contains(out, " 0% packet loss") {
					t.Errorf("%s does not reach %s: %q", g.name, to, out)
				}
			}
			if !pod.Ping(own) || !world.Ping(own) {
				t.Errorf("%s of %s is not reached", own, g.name)
			}
			url := "http://" + netip.AddrPortFrom(own, 80).String() + "/"
			if page := pod.MustRun("curl", "-sSf", "--max-time", "30", url); !strings.Contains(page, g.name) {
				t.Errorf("the page of %s is %q", g.name, page)
			}
		}
	}
	for _, g := range guests {
		for why, c := range l.dropped(g.name) {
			if strings.HasPrefix(string(why), "spoofed") {
				t.Errorf("%s: %d frames were dropped as %s", g.name, c.Packets, why)
			}
		}
		l.virtlet("rm", "-f", g.name)
	}
}

// calicoWorld gives the node what is behind it, with ways to the pods of the recording, and a default route there: so the node
// answers for the pods' gateway.
func calicoWorld(t *testing.T) *testnet.Namespace {
	t.Helper()
	sh := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", args, err, out)
		}
	}
	world := testnet.New(t, "world")
	sh("link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", world.Name)
	t.Cleanup(func() { exec.Command("ip", "link", "del", "up0").Run() })
	for i, a := range []string{"192.0.2.1/24", "2001:db8:c::1/64"} {
		sh("addr", "add", a, "dev", "up0")
		peer := netip.MustParsePrefix(a)
		world.MustRun("ip", "addr", "add", netip.PrefixFrom(peer.Addr().Next(), peer.Bits()).String(), "dev", "eth0")
		sh("link", "set", "up0", "up")
		world.MustRun("ip", "link", "set", "eth0", "up")
		sh([]string{"-4", "-6"}[i], "route", "add", "default", "via", peer.Addr().Next().String(), "dev", "up0")
		world.MustRun("ip", "route", "add", []string{"10.10.192.0/24", "fd00:10::/64"}[i], "via", peer.Addr().String())
	}
	return world
}
