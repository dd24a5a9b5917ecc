package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
	"github.com/virtlet/virtlet/test/guest"
)

// Boot tests: a real kernel under QEMU on networks made by real plugins. The node is the network namespace of this
// process.

// bootTime is how long a guest may take to report. Without KVM, beside other tests, it needs some ten seconds.
const bootTime = 3 * time.Minute

// lab is a machine with virtlet on it.
type lab struct {
	t       *testing.T
	bin     string
	flags   []string
	plugins string
	boot    []string // flags that boot the test guest
	cmdline string
}

// newLab is a machine for the test guest.
func newLab(t *testing.T) *lab {
	t.Helper()
	l := bareLab(t)
	kernel, initrd, cmdline := guest.Artifacts(t)
	l.cmdline = cmdline
	l.boot = []string{"--kernel", kernel, "--initrd", initrd, "--memory", "192M"}
	return l
}

// bareLab is a machine without a guest. Its VMs are removed at the end.
func bareLab(t *testing.T) *lab {
	t.Helper()
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	dir := t.TempDir()
	l := &lab{
		t: t, bin: filepath.Join(programs(t), "real", "virtlet"), plugins: testnet.Plugins(t),
		flags: []string{"--run-dir", filepath.Join(dir, "run"), "--data-dir", filepath.Join(dir, "data")},
	}
	t.Cleanup(func() {
		if names := strings.Fields(l.virtlet("ps", "-q")); len(names) > 0 {
			if t.Failed() {
				for _, name := range names {
					t.Logf("console of %s:\n%s", name, l.virtlet("logs", name))
				}
			}
			l.virtlet(append([]string{"rm", "-f"}, names...)...)
		}
	})
	return l
}

func (l *lab) command(args ...string) *exec.Cmd {
	return exec.Command(l.bin, append(slices.Clone(l.flags), args...)...)
}

// virtlet runs the command and gives its standard output; it must succeed.
func (l *lab) virtlet(args ...string) string {
	l.t.Helper()
	var stderr bytes.Buffer
	cmd := l.command(args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		l.t.Fatalf("virtlet %q: %v\n%s", args, err, stderr.String())
	}
	return string(out)
}

// run gives the arguments that boot the test guest on networks of confDir; "" is a directory without any.
func (l *lab) run(confDir, appended string, args ...string) []string {
	if confDir == "" {
		confDir = "/nonexistent"
	}
	all := append([]string{"run", "--cni-conf-dir", confDir, "--cni-bin-dir", l.plugins}, l.boot...)
	return append(append(all, "--append", strings.TrimSpace(l.cmdline+" "+appended)), args...)
}

// report waits for what the guest of that name says of itself.
func (l *lab) report(name string) guest.Report {
	l.t.Helper()
	for end := time.Now().Add(bootTime); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if r, ok := guest.ParseReport([]byte(l.virtlet("logs", name))); ok {
			return r
		}
	}
	l.t.Fatalf("%s did not report within %s", name, bootTime)
	return guest.Report{}
}

func (l *lab) state(name string) vm.State {
	l.t.Helper()
	var st vm.State
	if err := json.Unmarshal([]byte(l.virtlet("inspect", "--json", name)), &st); err != nil {
		l.t.Fatal(err)
	}
	return st
}

// same compares what the CNI plugins configured with what the guest has.
func same(t *testing.T, st vm.State, r guest.Report) {
	t.Helper()
	if r.Hostname != st.Config.Hostname {
		t.Errorf("host name %q, want %q", r.Hostname, st.Config.Hostname)
	}
	if len(r.NICs) != len(st.NICs) {
		t.Fatalf("the guest has %d NICs, want %d", len(r.NICs), len(st.NICs))
	}
	for i, want := range st.NICs {
		got := r.NICs[i]
		if got.Name != want.Name || got.MAC != want.MAC.String() || got.MTU != want.MTU {
			t.Errorf("NIC %d: %s %s mtu %d, want %s %s mtu %d", i, got.Name, got.MAC, got.MTU, want.Name, want.MAC, want.MTU)
		}
		if slot := fmt.Sprintf("0000:00:%02x.0", 0x10+i); got.PCI != slot {
			t.Errorf("%s is at %s, want %s", want.Name, got.PCI, slot)
		}
		for _, p := range want.Addrs {
			if p.Addr().Is4() && !slices.Contains(got.Addrs, p) {
				t.Errorf("%s: addresses %v, want %s", want.Name, got.Addrs, p)
			}
		}
		for _, r := range want.Routes {
			if r.Dst.Addr().Is4() && !slices.ContainsFunc(got.Routes, func(g guest.Route) bool { return g.Dst == r.Dst && g.Gw == r.Gw }) {
				t.Errorf("%s: routes %+v, want %s via %s", want.Name, got.Routes, r.Dst, r.Gw)
			}
		}
		for _, s := range want.DNS.Servers {
			if s.Is4() && !slices.Contains(got.DNS, s.String()) {
				t.Errorf("%s: DNS %v, want %s", want.Name, got.DNS, s)
			}
		}
		if strings.Contains(r.Cmdline, "virtlet.wait6") {
			same6(t, st, want, got)
		}
		for _, d := range want.DNS.Search {
			if !slices.Contains(got.Search, d) {
				t.Errorf("%s: search domains %v, want %s", want.Name, got.Search, d)
			}
		}
	}
}

// same6 compares the IPv6 part of a NIC. The guest has its addresses by DHCPv6, and the gateway by the address that stands
// for it.
func same6(t *testing.T, st vm.State, want nic.NIC, got guest.NIC) {
	t.Helper()
	for _, p := range want.Addrs {
		if p.Addr().Is6() && !slices.ContainsFunc(got.Addrs, func(g netip.Prefix) bool { return g.Addr() == p.Addr() }) {
			t.Errorf("%s: addresses %v, want %s", want.Name, got.Addrs, p.Addr())
		}
	}
	for _, l := range st.Leases6 {
		if l.MAC != want.MAC {
			continue
		}
		for _, r := range l.Routers {
			if r.Default && !slices.ContainsFunc(got.Routes, func(g guest.Route) bool { return g.Dst == defaultRoute6 && g.Gw == r.Source }) {
				t.Errorf("%s: routes %+v, want a default one via %s", want.Name, got.Routes, r.Source)
			}
		}
		for _, s := range l.DNS.Servers {
			if !slices.Contains(got.DNS, s.String()) {
				t.Errorf("%s: DNS %v, want %s", want.Name, got.DNS, s)
			}
		}
	}
}

var defaultRoute6 = netip.MustParsePrefix("::/0")

// answered checks that the guest has every IPv4 address that the networks' plugins answered with, whatever was planned.
func answered(t *testing.T, st vm.State, r guest.Report) {
	t.Helper()
	b, err := json.Marshal(st.Results)
	if err != nil {
		t.Fatal(err)
	}
	var results []struct {
		IfName string `json:"ifName"`
		Result struct {
			IPs []struct {
				Address netip.Prefix `json:"address"`
			} `json:"ips"`
		} `json:"result"`
	}
	if err := json.Unmarshal(b, &results); err != nil {
		t.Fatal(err)
	}
	if len(results) != len(r.NICs) {
		t.Fatalf("%d results for %d NICs", len(results), len(r.NICs))
	}
	for i, res := range results {
		n := 0
		for _, ip := range res.Result.IPs {
			if !ip.Address.Addr().Is4() {
				continue
			}
			if n++; !slices.Contains(r.NICs[i].Addrs, ip.Address) || r.NICs[i].Name != res.IfName {
				t.Errorf("%s has %v, its CNI result says %s on %s", r.NICs[i].Name, r.NICs[i].Addrs, ip.Address, res.IfName)
			}
		}
		if n == 0 {
			t.Errorf("the CNI result of %s has no IPv4 address", res.IfName)
		}
	}
}

// address gives the first IPv4 address of the i-th NIC.
func address(t *testing.T, st vm.State, i int) netip.Addr {
	t.Helper()
	return testnet.Addr(t, st.NICs[i], 4)
}

// get fetches a page over HTTP from the node.
func get(t *testing.T, host string) string {
	t.Helper()
	client := http.Client{Timeout: 30 * time.Second}
	res, err := client.Get("http://" + host + "/")
	if err != nil {
		t.Error(err)
		return ""
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("GET %s: %s, %v", host, res.Status, err)
	}
	return string(b)
}

func TestBootOnTheEmbeddedNetwork(t *testing.T) {
	l := newLab(t)
	l.virtlet(l.run("", "virtlet.wait6", "-d", "--name", "web", "--hostname", "web-1", "-p", "8080:80", "-p", "5353:53/udp", "--cpus", "2",
		"--dns", "192.0.2.53", "--dns", "2001:db8::53", "--dns-search", "example.test")...)
	st, r := l.state("web"), l.report("web")
	same(t, st, r)
	answered(t, st, r)
	if st.Ports[0].Queues != 2 {
		t.Errorf("%d queues for 2 CPUs", st.Ports[0].Queues)
	}
	if !slices.Equal(r.NICs[0].DNS, []string{"192.0.2.53", "2001:db8::53"}) || !slices.Contains(r.NICs[0].Search, "example.test") {
		t.Errorf("DNS %v, search %v", r.NICs[0].DNS, r.NICs[0].Search)
	}
	if kib := resident(t, st.Supervisor.PID); kib > 16<<10 {
		t.Errorf("the supervisor has %d KiB resident, want at most 16 MiB", kib)
	}
	to := address(t, st, 0)
	if out, err := exec.Command("ping", "-c", "3", "-i", "0.2", "-W", "5", to.String()).CombinedOutput(); err != nil {
		t.Errorf("ping from the node: %v\n%s", err, out)
	}
	if page := get(t, to.String()); !strings.Contains(page, "web-1") {
		t.Errorf("the guest's page is %q", page)
	}
	to6 := testnet.Addr(t, st.NICs[0], 6)
	if page := get(t, "["+to6.String()+"]"); !strings.Contains(page, "web-1") {
		t.Errorf("the guest's page by IPv6 is %q", page)
	}
	// The published port is for those outside of the node.
	client := testnet.New(t, "client")
	sh := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", args, err, out)
		}
	}
	sh("link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", client.Name)
	sh("addr", "add", "192.0.2.1/24", "dev", "up0")
	sh("link", "set", "up0", "up")
	sh("addr", "add", "2001:db8:c::1/64", "dev", "up0", "nodad")
	client.MustRun("ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
	client.MustRun("ip", "addr", "add", "2001:db8:c::2/64", "dev", "eth0", "nodad")
	client.MustRun("ip", "link", "set", "eth0", "up")
	if page := client.MustRun("curl", "-sSf", "--max-time", "30", "http://192.0.2.1:8080/"); !strings.Contains(page, "web-1") {
		t.Errorf("at the published port is %q", page)
	}
	// A second guest reaches the first, and the world behind the node (masqueraded).
	l.virtlet(l.run("", "virtlet.wait6", "-d", "--name", "second")...)
	same(t, l.state("second"), l.report("second"))
	if out := l.type_("second", "wget -q -O - http://"+to.String()+"/"); !strings.Contains(out, "web-1") {
		t.Errorf("the second guest got %q from the first", out)
	}
	if out := l.type_("second", "wget -q -O - http://["+to6.String()+"]/"); !strings.Contains(out, "web-1") {
		t.Errorf("the second guest got %q from the first by IPv6", out)
	}
	if out := l.type_("second", "ping -6 -c 2 -W 10 2001:db8:c::2"); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("the second guest does not reach the client by IPv6: %q", out)
	}
	if out := l.type_("second", "ping -c 2 -W 5 192.0.2.2"); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("the second guest does not reach the client: %q", out)
	}
	// All of that was honest.
	for _, name := range []string{"web", "second"} {
		for why, n := range l.dropped(name) {
			if strings.HasPrefix(string(why), "spoofed") || strings.HasPrefix(string(why), "rogue") || why == podnet.OtherProtocol {
				t.Errorf("%s: %d frames were dropped as %s", name, n.Packets, why)
			}
		}
	}
	// This is not.
	l.type_("second", "ip addr add 10.231.86.250/32 dev eth0; ping -c 1 -W 1 -I 10.231.86.250 "+to.String())
	if l.dropped("second")[podnet.SpoofedIPv4].Packets+l.dropped("second")[podnet.SpoofedARP].Packets == 0 {
		t.Errorf("a foreign address was not noticed: %+v", l.dropped("second"))
	}
	l.virtlet("stop", "-t", "60s", "web", "second")
	for _, name := range []string{"web", "second"} {
		if st := l.state(name); st.Status != vm.Stopped || st.Exit.Reason != vm.Shutdown {
			t.Errorf("%s ended as %s, %+v", name, st.Status, st.Exit)
		}
	}
}

// dropped gives the frames of the first NIC that were dropped, by reason; those with none are left out.
func (l *lab) dropped(name string) map[podnet.Reason]podnet.Counter {
	l.t.Helper()
	d := l.counters(name)[0].Dropped
	maps.DeleteFunc(d, func(_ podnet.Reason, c podnet.Counter) bool { return c.Packets == 0 })
	return d
}

// counters gives those of every NIC.
func (l *lab) counters(name string) []vm.Counters {
	l.t.Helper()
	var st struct{ Counters []vm.Counters }
	if err := json.Unmarshal([]byte(l.virtlet("inspect", "--json", name)), &st); err != nil {
		l.t.Fatal(err)
	}
	if len(st.Counters) == 0 {
		l.t.Fatalf("no counters of %s", name)
	}
	return st.Counters
}

// resident gives the resident memory of a process in KiB.
func resident(t *testing.T, pid int) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib
		}
	}
	t.Fatalf("no VmRSS of process %d", pid)
	return 0
}

// type_ types a line at a guest's console and gives what the console says until it is done.
func (l *lab) type_(name, line string) string {
	l.t.Helper()
	return guest.Type(l.t, l.command("console", name), line)
}

// twoNetworks gives a directory with the configurations of two networks: blue, dual-stack and with the default routes,
// and red.
func twoNetworks(t *testing.T) string {
	t.Helper()
	conf := t.TempDir()
	for name, is := range map[string]struct{ ranges, routes string }{
		"blue": {`[{"subnet":"198.51.100.0/24"}],[{"subnet":"2001:db8:b::/64"}]`, `{"dst":"0.0.0.0/0"},{"dst":"::/0"}`},
		"red":  {`[{"subnet":"203.0.113.0/24"}]`, `{"dst":"192.0.2.0/24"}`},
	} {
		list := fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[{"type":"bridge","bridge":"br-%[1]s","isGateway":true,"mtu":1400,
			"ipam":{"type":"host-local","dataDir":%q,"ranges":[%s],"routes":[%s]}}]}`, name, filepath.Join(t.TempDir(), "ipam"), is.ranges, is.routes)
		if err := os.WriteFile(filepath.Join(conf, name+".conflist"), []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return conf
}

func TestBootOnTwoNetworks(t *testing.T) {
	l := newLab(t)
	conf := twoNetworks(t)
	l.virtlet(l.run(conf, "", "-d", "--name", "router", "--network", "red", "--network", "blue")...)
	st, r := l.state("router"), l.report("router")
	same(t, st, r)
	answered(t, st, r)
	if st.NICs[0].Network != "red" || st.NICs[1].Network != "blue" {
		t.Errorf("networks in the order %s, %s", st.NICs[0].Network, st.NICs[1].Network)
	}
	defaults := func(n guest.NIC) bool {
		return slices.ContainsFunc(n.Routes, func(r guest.Route) bool { return r.Dst == netip.MustParsePrefix("0.0.0.0/0") })
	}
	if defaults(r.NICs[0]) || !defaults(r.NICs[1]) {
		t.Errorf("the default route is not on eth1 alone: %+v", r.NICs)
	}
	for i := range st.NICs {
		to := address(t, st, i)
		if out, err := exec.Command("ping", "-c", "2", "-i", "0.2", "-W", "5", "-M", "do", "-s", "1372", to.String()).CombinedOutput(); err != nil {
			t.Errorf("a full-size ping to %s: %v\n%s", to, err, out)
		}
	}
	l.virtlet("rm", "-f", "router")
}

// A veth that is joined by redirect keeps MAC and addresses for CNI CHECK, and the guest has the same network as on a bridge.
func TestBootByRedirect(t *testing.T) {
	l := newLab(t)
	l.virtlet(l.run("", "virtlet.wait6", "-d", "--name", "red", "--hostname", "red-1", "--cpus", "2", "--datapath", "redirect", "-p", "8081:80")...)
	st, r := l.state("red"), l.report("red")
	same(t, st, r)
	answered(t, st, r)
	same6(t, st, st.NICs[0], r.NICs[0])
	if p := st.Ports[0]; p.Datapath != podnet.Redirected || p.Engine != podnet.EBPF || p.Lacks != "" || p.Queues != 2 {
		t.Errorf("joined by %+v", p)
	}
	if kib := resident(t, st.Supervisor.PID); kib > 16<<10 {
		t.Errorf("the supervisor has %d KiB resident, want at most 16 MiB", kib)
	}
	for _, to := range []string{address(t, st, 0).String(), "[" + testnet.Addr(t, st.NICs[0], 6).String() + "]"} {
		if page := get(t, to); !strings.Contains(page, "red-1") {
			t.Errorf("the guest's page at %s is %q", to, page)
		}
	}
	checked := l.virtlet("inspect", "--check", "red")
	if strings.Contains(checked, "it misses what the guest has") || !strings.Contains(checked, "in order: the guest is joined as it was") {
		t.Errorf("inspect --check: %s", checked)
	}
	shown := l.virtlet("inspect", "--rules", "red")
	for _, want := range []string{"redirect to and from eth0 by ebpf (asked for)", "ingress vlttap0: every frame: forward to eth0", "(guest-dhcpv4)"} {
		if !strings.Contains(shown, want) {
			t.Errorf("inspect does not show %q:\n%s", want, shown)
		}
	}
	l.virtlet("rm", "-f", "red")
}

// A macvlan keeps its MAC, and is joined without a bridge.
func TestBootOnMacvlan(t *testing.T) {
	l := newLab(t)
	conf := t.TempDir()
	for _, args := range []string{ // addresses that no other test's bridge has: those stay
		"link add up0 type veth peer name lan0", "link set up0 up", "link set lan0 up", "addr add 192.0.2.1/24 dev lan0",
		"addr add 2001:db8:2::1/64 dev lan0 nodad",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { exec.Command("ip", "link", "del", "lan0").Run() })
	list := `{"cniVersion":"1.0.0","name":"lan","plugins":[{"type":"macvlan","master":"up0","mode":"bridge","mtu":1400,"ipam":{"type":"static",
		"addresses":[{"address":"192.0.2.2/24","gateway":"192.0.2.1"},{"address":"2001:db8:2::2/64","gateway":"2001:db8:2::1"}],
		"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}]}`
	if err := os.WriteFile(filepath.Join(conf, "lan.conflist"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	l.virtlet(l.run(conf, "virtlet.wait6", "-d", "--name", "mac")...)
	st, r := l.state("mac"), l.report("mac")
	same(t, st, r)
	answered(t, st, r)
	same6(t, st, st.NICs[0], r.NICs[0])
	if p := st.Ports[0]; p.Datapath != podnet.Redirected || p.Bridge != "" {
		t.Errorf("joined by %+v", p.Join)
	}
	for _, to := range []string{testnet.Addr(t, st.NICs[0], 4).String(), "[" + testnet.Addr(t, st.NICs[0], 6).String() + "]"} {
		if get(t, to) == "" {
			t.Errorf("the guest has no page at %s", to)
		}
	}
	shown := l.virtlet("inspect", "--rules", "mac")
	for _, want := range []string{"redirect to and from eth0", "ingress vlttap0: every frame: forward to eth0"} {
		if !strings.Contains(shown, want) {
			t.Errorf("inspect does not show %q:\n%s", want, shown)
		}
	}
	if checked := l.virtlet("inspect", "--check", "mac"); !strings.Contains(checked, "in order: the guest is joined as it was") {
		t.Errorf("inspect --check: %s", checked)
	}
	l.virtlet("rm", "-f", "mac")
}

// A pod without any IPv4.
func TestBootOnIPv6Alone(t *testing.T) {
	l := newLab(t)
	conf := t.TempDir()
	list := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"six","plugins":[{"type":"bridge","bridge":"br-six","isGateway":true,"mtu":1400,
		"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"2001:db8:6::/64"}]],"routes":[{"dst":"::/0"}]}}]}`, filepath.Join(t.TempDir(), "ipam"))
	if err := os.WriteFile(filepath.Join(conf, "six.conflist"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	l.virtlet(l.run(conf, "virtlet.wait6 virtlet.no_dhcp", "-d", "--name", "six", "--dns", "2001:db8::53")...)
	st, r := l.state("six"), l.report("six")
	if len(st.Leases) != 0 || len(st.Leases6) != 1 {
		t.Errorf("leases %+v, %+v", st.Leases, st.Leases6)
	}
	if n := r.NICs[0]; n.MAC != st.NICs[0].MAC.String() || n.MTU != 1400 {
		t.Errorf("%s mtu %d, want %s mtu 1400", n.MAC, n.MTU, st.NICs[0].MAC)
	}
	same6(t, st, st.NICs[0], r.NICs[0])
	if page := get(t, "["+testnet.Addr(t, st.NICs[0], 6).String()+"]"); page == "" {
		t.Error("the guest has no page")
	}
	l.virtlet("rm", "-f", "six")
}

// A guest that still boots when its power button is pressed powers down once it can.
func TestStopWhileBooting(t *testing.T) {
	l := newLab(t)
	l.virtlet(l.run("", "", "-d", "--name", "early")...)
	l.virtlet("stop", "-t", bootTime.String(), "early")
	if st := l.state("early"); st.Exit == nil || st.Exit.Reason != vm.Shutdown {
		t.Errorf("it ended as %s, %+v", st.Status, st.Exit)
	}
}

// The guest's end is the command's exit code.
func TestExitCodes(t *testing.T) {
	l := newLab(t)
	for appended, want := range map[string]int{"virtlet.poweroff": 0, "virtlet.panic": 3} {
		t.Run(appended, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			cmd := l.command(l.run("", appended, "--rm", "--name", strings.ReplaceAll(appended, ".", "-"))...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			limit := time.AfterFunc(bootTime, func() { cmd.Process.Signal(vm.KillSignal) })
			defer limit.Stop()
			err := cmd.Wait()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if code := cmd.ProcessState.ExitCode(); code != want {
				t.Errorf("exit code %d, want %d\n%s", code, want, stderr.String())
			}
			if _, ok := guest.ParseReport(stdout.Bytes()); !ok && want == 0 {
				t.Errorf("no report on standard output:\n%s", stdout.String())
			}
		})
	}
}
