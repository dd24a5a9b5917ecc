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

// A guest on Calico as it was recorded: an address without a subnet, and a gateway on the link that nobody has.
func TestBootOnCalico(t *testing.T) {
	l := newLab(t)
	sh := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", args, err, out)
		}
	}
	// The node answers for the gateway as it has a default route.
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
	l.virtlet(l.run(conf, "virtlet.wait6", "-d", "--name", "calico", "--cni-bin-dir", calico)...)
	st, r := l.state("calico"), l.report("calico")
	same(t, st, r)
	answered(t, st, r)
	n := r.NICs[0]
	if got := fmt.Sprint(n.Addrs); !strings.Contains(got, "10.10.192.128/32") || !strings.Contains(got, "fd00:10::9380:634f:1c91:e300/128") || n.MTU != 1440 {
		t.Errorf("addresses %s, MTU %d", got, n.MTU)
	}
	if got := fmt.Sprint(n.Routes); !strings.Contains(got, "169.254.1.1/32") || !strings.Contains(got, "fe80::ecee:eeff:feee:eeee") {
		t.Errorf("routes %s", got)
	}

	// A plain pod beside it, and the world behind the node.
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
		for _, to := range []string{seen.Link("eth0").Addrs[i].Prefix.Addr().String(), far} {
			if out := l.type_("calico", "ping -c 2 -W 10 -s 1300 "+to); !strings.Contains(out, " 0% packet loss") {
				t.Errorf("the guest does not reach %s: %q", to, out)
			}
		}
		own := st.NICs[0].Addrs[i].Addr()
		if !pod.Ping(own) || !world.Ping(own) {
			t.Errorf("%s is not reached", own)
		}
		url := "http://" + netip.AddrPortFrom(own, 80).String() + "/"
		if page := pod.MustRun("curl", "-sSf", "--max-time", "30", url); !strings.Contains(page, "calico") {
			t.Errorf("the guest's page is %q", page)
		}
	}
	for why, c := range l.dropped("calico") {
		if strings.HasPrefix(string(why), "spoofed") {
			t.Errorf("%d frames were dropped as %s", c.Packets, why)
		}
	}
	l.virtlet("rm", "-f", "calico")
}
