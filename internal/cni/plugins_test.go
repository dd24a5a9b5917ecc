package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/testnet"
)

// lab is a node, a pod and a Runtime for the reference plugins, whose every file is the test's.
type lab struct {
	*Runtime
	node, pod *testnet.Namespace
	leases    string // host-local's dataDir
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{
		Runtime: &Runtime{BinDirs: []string{testnet.Plugins(t)}, CacheDir: t.TempDir()},
		node:    testnet.New(t, "node"), pod: testnet.New(t, "pod"), leases: t.TempDir(),
	}
	// The plugins wait until addresses are not tentative any more; nobody else can have them here.
	l.node.Sysctl("ipv6/conf/default/accept_dad", "0")
	l.pod.Sysctl("ipv6/conf/default/accept_dad", "0")
	return l
}

// Every verb is called on the node.
func (l *lab) add(t *testing.T, a Attachment) *types100.Result {
	t.Helper()
	var res *types100.Result
	l.node.Must(func() (err error) { res, err = l.Add(t.Context(), a); return err })
	return res
}

func (l *lab) del(t *testing.T, a Attachment) {
	t.Helper()
	l.node.Must(func() error { return l.Del(t.Context(), a) })
}

// reach waits until the pod reaches an address: ports of a new bridge come up a moment after the plugin's end.
func (l *lab) reach(t *testing.T, to netip.Addr) {
	t.Helper()
	var out string
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); {
		var err error
		if out, err = l.pod.Run("ping", "-c", "1", "-W", "1", to.String()); err == nil {
			return
		}
	}
	t.Errorf("the pod does not reach %s: %s", to, out)
}

// leased gives host-local's files that stand for an address.
func (l *lab) leased(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(l.leases, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if base := filepath.Base(f); base != "lock" && !strings.HasPrefix(base, "last_reserved_ip") {
			out = append(out, base)
		}
	}
	return out
}

// clean reports what an attachment left: leases, links, rules, cache entries. The bridge and the frame of the rules
// belong to the network and stay.
func (l *lab) clean(t *testing.T, id string) {
	t.Helper()
	if left := l.leased(t); len(left) > 0 {
		t.Errorf("addresses stay leased: %v", left)
	}
	if out := l.node.MustRun("ip", "-o", "link", "show", "type", "veth"); out != "" {
		t.Errorf("links stay on the node: %s", out)
	}
	if netns.Exists(l.pod.Path()) {
		if out := l.pod.MustRun("ip", "-o", "link", "show", "type", "veth"); out != "" {
			t.Errorf("links stay in the pod: %s", out)
		}
	}
	rules := l.node.MustRun("nft", "list", "ruleset")
	for _, s := range []string{id, "10.231.86.2", "fd09:9101:b46e:56::2", "198.51.100.2", "2001:db8:100::2"} {
		if strings.Contains(rules, s) {
			t.Errorf("rules with %q stay:\n%s", s, rules)
		}
	}
	if cached, err := l.Cached(); len(cached) > 0 || err != nil {
		t.Errorf("cached: %v, %v", cached, err)
	}
}

func TestDefaultNetwork(t *testing.T) {
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("the firewall plugin needs iptables")
	}
	l := newLab(t)
	n := Default(l.leases)
	if m := l.Missing(n); len(m) > 0 {
		t.Fatalf("missing: %v", m)
	}
	l.node.Must(func() error { return l.Status(t.Context(), n) })
	a := n.Attachment("vm-1", l.pod.Path(), "eth0")
	a.CapabilityArgs = map[string]any{
		"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
		"mac":          "02:00:00:00:00:42",
	}
	res := l.add(t, a)
	var addrs []string
	for _, ip := range res.IPs {
		addrs = append(addrs, ip.Address.String()+" "+ip.Gateway.String())
	}
	if got := strings.Join(addrs, ", "); got != "10.231.86.2/24 10.231.86.1, fd09:9101:b46e:56::2/64 fd09:9101:b46e:56::1" {
		t.Errorf("addresses: %s", got)
	}
	if out := l.pod.MustRun("ip", "link", "show", "eth0"); !strings.Contains(out, "02:00:00:00:00:42") {
		t.Errorf("the MAC asked for is not there: %s", out)
	}
	for _, gw := range []string{"10.231.86.1", "fd09:9101:b46e:56::1"} {
		l.reach(t, netip.MustParseAddr(gw))
	}
	if out := l.node.MustRun("bridge", "-d", "link", "show"); !strings.Contains(out, "master virtlet0") || !strings.Contains(out, "hairpin on") {
		t.Errorf("no hairpin port of virtlet0: %s", out)
	}
	rules := l.node.MustRun("nft", "list", "ruleset")
	for _, s := range []string{"masquerade", "8080", "dnat to 10.231.86.2:80", "CNI-FORWARD", "fd09:9101:b46e:56::2"} {
		if !strings.Contains(rules, s) {
			t.Errorf("no %q in the rules:\n%s", s, rules)
		}
	}
	l.node.Must(func() error { return l.Check(t.Context(), a) })
	for range 2 {
		l.del(t, a)
		l.clean(t, "vm-1")
	}
	l.node.Must(func() error { return l.GC(t.Context(), n, nil) })
}

// Two guests of the default network and the world behind the node.
func TestDefaultNetworkForwards(t *testing.T) {
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("the firewall plugin needs iptables")
	}
	l := newLab(t)
	n := Default(l.leases)
	world, second := testnet.New(t, "world"), testnet.New(t, "pod")
	l.node.MustRun("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", world.Name)
	l.node.MustRun("ip", "addr", "add", "192.0.2.1/24", "dev", "up0")
	l.node.MustRun("ip", "link", "set", "up0", "up")
	world.MustRun("ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
	world.MustRun("ip", "link", "set", "eth0", "up")
	// As on a machine with Docker.
	l.node.MustRun("iptables", "-P", "FORWARD", "DROP")
	l.add(t, n.Attachment("vm-1", l.pod.Path(), "eth0"))
	res := l.add(t, n.Attachment("vm-2", second.Path(), "eth0"))
	// The world has no route back: the node masquerades.
	l.reach(t, netip.MustParseAddr("192.0.2.2"))
	to, _ := netip.AddrFromSlice(res.IPs[0].Address.IP)
	l.reach(t, to.Unmap())
}

// bridgeNet is a network of the bridge plugin and some others.
func (l *lab) bridgeNet(t *testing.T, version string, subnets []string, more ...string) *Network {
	t.Helper()
	var ranges [][]map[string]string
	for _, s := range subnets {
		ranges = append(ranges, []map[string]string{{"subnet": s}})
	}
	plugins := []any{map[string]any{
		"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true, "ipMasqBackend": "nftables",
		"ipam": map[string]any{"type": "host-local", "dataDir": l.leases, "ranges": ranges},
	}}
	for _, m := range more {
		plugins = append(plugins, map[string]any{"type": m})
	}
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": "lab", "plugins": plugins})
	if err != nil {
		t.Fatal(err)
	}
	n, err := Parse("lab", b)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestReferencePlugins(t *testing.T) {
	for _, version := range versions {
		for family, subnets := range map[string][]string{
			"v4": {"198.51.100.0/24"}, "v6": {"2001:db8:100::/64"}, "dual": {"198.51.100.0/24", "2001:db8:100::/64"},
		} {
			t.Run(version+"/"+family, func(t *testing.T) {
				l := newLab(t)
				n := l.bridgeNet(t, version, subnets, "portmap", "tuning")
				a := n.Attachment("pod-1", l.pod.Path(), "eth0")
				res := l.add(t, a)
				if res.CNIVersion != types100.ImplementedSpecVersion || len(res.IPs) != len(subnets) || len(res.Interfaces) != 3 {
					t.Errorf("result: %+v", res)
				}
				for _, ip := range res.IPs {
					gw, _ := netip.AddrFromSlice(ip.Gateway)
					l.reach(t, gw.Unmap())
				}
				if got := len(l.leased(t)); got != len(subnets) {
					t.Errorf("%d leases, want %d", got, len(subnets))
				}
				err := l.node.Do(func() error { return l.Check(t.Context(), a) })
				if old := !atLeast(version, "0.4.0"); old != errors.Is(err, ErrUnsupported) || !old && err != nil {
					t.Errorf("CHECK: %v", err)
				}
				if atLeast(version, "0.4.0") {
					l.pod.MustRun("ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
					if err := l.node.Do(func() error { return l.Check(t.Context(), a) }); err == nil {
						t.Error("CHECK does not see another MAC")
					}
				}
				for range 2 {
					l.del(t, a)
					l.clean(t, "pod-1")
				}
			})
		}
	}
}

// Somebody takes the interface's MAC and addresses away, as virtlet does; and then what the plugin made on the node.
func TestCheckEach(t *testing.T) {
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			l := newLab(t)
			n := l.bridgeNet(t, version, []string{"198.51.100.0/24", "2001:db8:100::/64"}, "portmap", "tuning")
			a := n.Attachment("pod-1", l.pod.Path(), "eth0")
			l.add(t, a)
			now := func(r *types100.Result) {
				r.Interfaces[2].Mac, r.IPs, r.Routes = "02:00:00:00:00:99", nil, nil
			}
			check := func(want string) {
				t.Helper()
				var verdicts []Verdict
				l.node.Must(func() (err error) { verdicts, err = l.CheckEach(t.Context(), a, now); return err })
				var got []string
				for _, v := range verdicts {
					got = append(got, fmt.Sprintf("%s %t %t", v.Plugin, v.Err == nil, v.Moved))
				}
				if got := strings.Join(got, ", "); got != want {
					t.Errorf("got %s, want %s: %+v", got, want, verdicts)
				}
			}
			check("bridge true false, portmap true false, tuning true false")
			l.pod.MustRun("ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
			l.pod.MustRun("ip", "addr", "flush", "dev", "eth0")
			check("bridge false true, portmap true false, tuning true false")
			l.node.MustRun("ip", "link", "del", "cni0")
			check("bridge false false, portmap true false, tuning true false")
			l.del(t, a)
		})
	}
}

func TestDelAfterTheNamespaceIsGone(t *testing.T) {
	l := newLab(t)
	n := l.bridgeNet(t, "1.1.0", []string{"198.51.100.0/24"})
	gone, err := netns.Create(l.pod.Name + "-2")
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Remove(gone.Path())
	defer gone.Close()
	a := n.Attachment("pod-1", gone.Path(), "eth0")
	l.add(t, a)
	gone.Close()
	if err := netns.Remove(gone.Path()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l.del(t, a)
		if left := l.leased(t); len(left) > 0 {
			t.Errorf("addresses stay leased: %v", left)
		}
	}
	if cached, err := l.Cached(); len(cached) > 0 || err != nil {
		t.Errorf("cached: %v, %v", cached, err)
	}
	// The kernel takes the veth with the namespace, at its leisure.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if l.node.MustRun("ip", "-o", "link", "show", "type", "veth") == "" {
			return
		}
	}
	t.Error("the veth stays on the node")
}

// A plugin at the end of the chain fails, after the others have done their work.
func TestFailedAddLeavesNothing(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	l.BinDirs = append(l.BinDirs, dir)
	script(t, dir, "fails", onAdd(`echo '{"code":100,"msg":"no"}'; exit 1`))
	n := l.bridgeNet(t, "1.0.0", []string{"198.51.100.0/24", "2001:db8:100::/64"}, "fails")
	err := l.node.Do(func() error {
		_, err := l.Add(t.Context(), n.Attachment("pod-1", l.pod.Path(), "eth0"))
		return err
	})
	if err == nil || !strings.Contains(err.Error(), `plugin "fails": no (code 100)`) {
		t.Error(err)
	}
	l.clean(t, "pod-1")
}

// The supervising process dies in the middle of ADD. Another one has nothing but the journal.
func TestDelAfterTheCallerWasKilled(t *testing.T) {
	for name, plugin := range map[string]string{"in the chain": "hangs", "in the address plugin": "slow-ipam"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			dir := t.TempDir()
			file := filepath.Join(dir, "pid")
			l.BinDirs = append(l.BinDirs, dir)
			n := l.bridgeNet(t, "1.1.0", []string{"198.51.100.0/24", "2001:db8:100::/64"}, "hangs")
			hang := `echo $$ >` + file + `; exec sleep 1000`
			script(t, dir, "hangs", onAdd(hang))
			// It takes the address, and then does not answer.
			script(t, dir, "slow-ipam", l.BinDirs[0]+"/host-local || exit 1\n[ $CNI_COMMAND = ADD ] || exit 0\n"+hang)
			if plugin == "slow-ipam" {
				var err error
				if n, err = Parse("lab", bytes.Replace(n.Bytes(), []byte(`"type":"host-local"`), []byte(`"type":"slow-ipam"`), 1)); err != nil {
					t.Fatal(err)
				}
			}
			journal, err := json.Marshal(n.Attachment("pod-1", l.pod.Path(), "eth0"))
			if err != nil {
				t.Fatal(err)
			}
			var a Attachment
			if err := json.Unmarshal(journal, &a); err != nil {
				t.Fatal(err)
			}
			var cmd *exec.Cmd
			l.node.Must(func() error { cmd = startCaller(t, l.Runtime, a); return nil })
			pid := await(t, file)
			if len(l.leased(t)) != 2 {
				t.Fatalf("leases: %v; the test would prove nothing", l.leased(t))
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if plugin == "hangs" && !gone(t, pid) {
				t.Error("the plugin outlived its caller")
			}
			if plugin == "slow-ipam" {
				endProcess(t, pid) // a plugin's plugin is not ours to kill; the bridge plugin is dead
			}
			for range 2 {
				l.del(t, a)
				l.clean(t, "pod-1")
			}
		})
	}
}

func TestGCOfReferencePlugins(t *testing.T) {
	l := newLab(t)
	n := l.bridgeNet(t, "1.1.0", []string{"198.51.100.0/24"})
	l.node.Must(func() error { return l.Status(t.Context(), n) })
	keep := n.Attachment("pod-1", l.pod.Path(), "eth0")
	l.add(t, keep)
	l.add(t, n.Attachment("pod-2", testnet.New(t, "pod").Path(), "eth0"))
	l.node.Must(func() error { return l.GC(t.Context(), n, []Attachment{keep}) })
	if cached, err := l.Cached(); err != nil || len(cached) != 1 || cached[0].ContainerID != "pod-1" {
		t.Errorf("cached: %v, %v", cached, err)
	}
	if left := l.leased(t); len(left) != 1 || left[0] != "198.51.100.2" {
		t.Errorf("leased: %v", left)
	}
	l.node.Must(func() error { return l.Check(t.Context(), keep) })
	l.node.Must(func() error { return l.GC(t.Context(), n, nil) })
	l.clean(t, "pod-1")
}

// Without iptables the firewall plugin fails in ADD and in DEL; the address must not stay leased for that.
func TestDefaultNetworkWithoutIptables(t *testing.T) {
	l := newLab(t)
	bin := t.TempDir()
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs nft")
	}
	if err := os.Symlink(nft, filepath.Join(bin, "nft")); err != nil {
		t.Fatal(err)
	}
	a := Default(l.leases).Attachment("vm-1", l.pod.Path(), "eth0")
	path := os.Getenv("PATH")
	t.Setenv("PATH", bin)
	err = l.node.Do(func() error { _, err := l.Add(t.Context(), a); return err })
	t.Setenv("PATH", path)
	if err == nil || !strings.Contains(err.Error(), `plugin "firewall"`) || !strings.Contains(err.Error(), "iptables") {
		t.Errorf("ADD: %v", err)
	}
	l.clean(t, "vm-1")
}
