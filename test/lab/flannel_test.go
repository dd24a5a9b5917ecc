package lab

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// underlay is what the two nodes of a flannel are known by to each other, by family.
var underlay = [2]map[int]netip.Addr{
	{4: netip.MustParseAddr("192.0.2.11"), 6: netip.MustParseAddr("2001:db8:2::11")},
	{4: netip.MustParseAddr("192.0.2.12"), 6: netip.MustParseAddr("2001:db8:2::12")},
}

// flannel is two nodes on one segment: etcd on the first, flanneld on both.
type flannel struct {
	nodes   [2]*node
	daemons [2]*daemon
	pod     int         // MTU of pods
	way     map[int]int // MTU between pods on different nodes, by family
}

// newFlannel makes the nodes and waits until they know each other. It goes with the test.
func newFlannel(t *testing.T, backend, families string) *flannel {
	t.Helper()
	f := &flannel{pod: 1500, way: map[int]int{4: 1500, 6: 1500}}
	if backend == "vxlan" {
		// flanneld counts 50 bytes for its tunnels, but with IPv6 outside they take 70: routers say so to who sends more.
		f.pod, f.way = 1450, map[int]int{4: 1450, 6: 1430}
	}
	for i := range f.nodes {
		f.nodes[i] = newFlannelNode(t, i)
	}
	a, b := f.nodes[0], f.nodes[1]
	a.MustRun("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.Name)
	for i, n := range f.nodes {
		n.MustRun("ip", "addr", "add", underlay[i][4].String()+"/24", "dev", "eth0")
		n.MustRun("ip", "addr", "add", underlay[i][6].String()+"/64", "dev", "eth0")
		n.MustRun("ip", "link", "set", "eth0", "up")
	}
	a.Ready("eth0")
	b.Ready("eth0")

	etcd := "http://" + netip.AddrPortFrom(underlay[0][4], 2379).String()
	db := a.daemon(t, filepath.Join(testnet.Fetch(t, "etcd.sh"), "etcd"), "--data-dir", filepath.Join(a.dir, "etcd"),
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", "http://127.0.0.1:2380")
	network, err := json.Marshal(map[string]any{
		"Network": "10.244.0.0/16", "EnableIPv6": families == "dual", "IPv6Network": "2001:db8:244::/48",
		"Backend": map[string]any{"Type": backend},
	})
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	put := fmt.Sprintf(`{"key":%q,"value":%q}`, b64([]byte("/coreos.com/network/config")), b64(network))
	db.until(t, "answers", func() bool {
		_, err := a.Run("curl", "-sSf", "--max-time", "5", "-d", put, etcd+"/v3/kv/put")
		return err == nil
	})

	f.start(t)
	for i, n := range f.nodes {
		for _, family := range each(families) {
			subnet := f.nodes[1-i].subnetEnv(map[int]string{4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}[family])
			to := netip.MustParsePrefix(subnet).Masked().String()
			f.daemons[i].until(t, "has a route to "+to, func() bool {
				out, err := n.Run("ip", fmt.Sprintf("-%d", family), "route", "show", to)
				return err == nil && out != ""
			})
		}
	}
	return f
}

// start starts flanneld on both nodes and waits until each has a subnet.
func (f *flannel) start(t *testing.T) {
	t.Helper()
	etcd := "http://" + netip.AddrPortFrom(underlay[0][4], 2379).String()
	program := filepath.Join(testnet.Tools(t, "test/lab/flanneld"), "flannel")
	for i, n := range f.nodes {
		f.daemons[i] = n.daemon(t, program, "-etcd-endpoints", etcd, "-iface", "eth0", "-public-ip", underlay[i][4].String(),
			"-public-ipv6", underlay[i][6].String(), "-ip-masq", "-subnet-file", n.subnetFile())
	}
	for i, n := range f.nodes {
		// Its last word at the start, also when there is a subnet file already.
		f.daemons[i].until(t, "has a subnet", func() bool {
			return n.subnetEnv("FLANNEL_MTU") != "" && strings.Contains(string(f.daemons[i].said()), "Running backend")
		})
	}
}

// newFlannelNode makes a node on which nothing runs yet.
func newFlannelNode(t *testing.T, i int) *node {
	t.Helper()
	n := newNode(t, fmt.Sprintf("node%d", i), testnet.Tools(t, "test/lab/flannel-cni"))
	if err := os.Mkdir(filepath.Dir(n.subnetFile()), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.nothingLeft(t) })
	return n
}

// subnetFile is where flanneld says what the node's subnet is.
func (n *node) subnetFile() string { return filepath.Join(n.dir, "flannel", "subnet.env") }

// subnetEnv gives a variable of the subnet file, "" if that has not been written.
func (n *node) subnetEnv(name string) string {
	b, _ := os.ReadFile(n.subnetFile())
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k == name {
			return v
		}
	}
	return ""
}

// nothingLeft reports what the plugins have kept of pods that are gone.
func (n *node) nothingLeft(t *testing.T) {
	t.Helper()
	for pattern, allowed := range map[string]string{"data/*": "", "leases/cbr0/*": "last_reserved_ip lock"} {
		files, err := filepath.Glob(filepath.Join(n.dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name, _, _ := strings.Cut(filepath.Base(f), ".")
			if !strings.Contains(allowed, name) {
				t.Errorf("%s: left behind: %s", n.Name, f)
			}
		}
	}
	if out := n.MustRun("ip", "-br", "link", "show", "type", "bridge_slave"); out != "" {
		t.Errorf("%s: left behind on the bridge: %s", n.Name, out)
	}
}

// flannelConf is a network of the flannel plugin, whose every file is the node's.
func (n *node) flannelConf(t *testing.T, version string) request {
	t.Helper()
	conf := list(version, "cbr0",
		map[string]any{
			"type": "flannel", "subnetFile": n.subnetFile(), "dataDir": "$DIR/data", "ipam": map[string]any{"dataDir": "$DIR/leases"},
			"delegate": map[string]any{"hairpinMode": true, "isDefaultGateway": true},
		},
		map[string]any{"type": "portmap", "snat": true, "capabilities": map[string]bool{"portMappings": true}})
	return request{networks: ns(n.network(t, conf))}
}

// daemon is a program that runs on a node until the test ends.
type daemon struct {
	cmd   *exec.Cmd
	log   string
	ended chan struct{}
}

// daemon starts one. What it says is in a file of the node, and in the test's log if the test fails.
func (n *node) daemon(t *testing.T, program string, args ...string) *daemon {
	t.Helper()
	d := &daemon{log: filepath.Join(n.dir, filepath.Base(program)+".log"), ended: make(chan struct{})}
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	d.cmd = exec.Command(program, args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// Debian's etcd 3.4 wants to be told that it is really to run on arm64.
	d.cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH=arm64")
	d.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL} // of the node's thread, which ends after all daemons
	err = n.Do(d.cmd.Start)
	log.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() { d.cmd.Wait(); close(d.ended) }()
	t.Cleanup(func() {
		d.kill()
		if t.Failed() {
			t.Logf("%s on %s said:\n%s", filepath.Base(program), n.Name, d.said())
		}
	})
	return d
}

// kill ends the daemon without a word to it.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.ended
}

func (d *daemon) said() []byte {
	b, _ := os.ReadFile(d.log)
	return b[max(0, len(b)-8<<10):]
}

// until waits until something has come of the daemon; the test ends if nothing does, or the daemon ends.
func (d *daemon) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		select {
		case <-d.ended:
			t.Fatalf("%s has ended, before it %s", d.cmd.Path, what)
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("%s runs, but it never %s", d.cmd.Path, what)
		}
	}
}

func TestFlannel(t *testing.T) {
	for _, backend := range []string{"vxlan", "host-gw"} {
		// IPv6 alone flanneld has with Kubernetes as its store, not with etcd (flannel's pull request 1539).
		for _, families := range []string{"v4", "dual"} {
			t.Run(backend+"/"+families, func(t *testing.T) {
				t.Parallel()
				f := newFlannel(t, backend, families)
				for _, version := range []string{"0.3.1", "0.4.0"} { // the plugin's newest
					for _, d := range datapaths {
						t.Run(version+"/"+string(d), func(t *testing.T) {
							r := tested(t, "flannel, portmap ("+backend+")", real, families, d)
							f.test(t, r, trial{version, families, d})
						})
					}
				}
			})
		}
	}
}

// test tries VMs on both nodes, a pod beside one, and the nodes themselves.
func (f *flannel) test(t *testing.T, r *row, as trial) {
	home, away := f.nodes[0], f.nodes[1]
	published := home.flannelConf(t, as.version)
	pod := home.addPod(t, published)
	published.caps = ports
	a, b := home.start(t, as.datapath, published), away.start(t, as.datapath, away.flannelConf(t, as.version))
	a.passesCheck(t)
	if got := a.nics[0].MTU; got != f.pod {
		t.Errorf("the guest has MTU %d, not flannel's %d", got, f.pod)
	}
	for _, family := range each(as.families) {
		own := a.addr(t, 0, family)
		r.talk(t, a.guest, own, b.guest, b.addr(t, 0, family), f.way[family], crossNode)
		r.talk(t, a.guest, own, pod.Namespace, pod.addr(t, "eth0", family), f.pod, "")

		// The other node comes to the VM by its address and by the port of its node; the VM comes there.
		testnet.Transfer(t, away.Namespace, a.guest, own, 300_000)
		testnet.Transfer(t, a.guest, away.Namespace, underlay[1][family], 300_000)
		r.published(t, a, away.Namespace, underlay[0][family])
	}
}

// flanneld sets up ways and then is not in them: VMs do not need it to talk, nor to end, nor to start, and it comes back.
func TestFlannelWithoutItsDaemon(t *testing.T) {
	f := newFlannel(t, "vxlan", "v4")
	start := func(node int) (vms []*vm) { // one for each datapath
		t.Helper()
		for _, d := range datapaths {
			vms = append(vms, f.nodes[node].start(t, d, f.nodes[node].flannelConf(t, "0.4.0")))
		}
		return vms
	}
	home, away := start(0), start(1)
	talk := func() {
		t.Helper()
		for i, d := range datapaths {
			r, a, b := tested(t, "flannel, portmap (vxlan)", real, "v4", d), home[i], away[i]
			r.talk(t, a.guest, a.addr(t, 0, 4), b.guest, b.addr(t, 0, 4), f.way[4], "")
		}
	}
	talk()
	for _, d := range f.daemons {
		d.kill()
	}
	talk()
	for _, v := range home {
		v.stop(t)
		v.delete(t)
	}
	f.nodes[0].nothingLeft(t)
	home = start(0)
	talk()
	f.start(t)
	talk()
}

// flannelDocs has the configuration that users are told to write.
const flannelDocs = "../../docs/multiple-nodes.md"

// documentedConf gives a directory with the configuration that the documentation has, as it is written there.
func documentedConf(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(flannelDocs)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "```json\n")
	conf, _, ok := strings.Cut(rest, "```\n")
	if !ok {
		t.Fatalf("%s has no configuration: a code block of JSON", flannelDocs)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "10-flannel.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sha256 matches what sha256sum prints.
var sha256 = regexp.MustCompile(`[0-9a-f]{64}`)

// Real guests of the real command on both nodes, on the documented configuration: one is joined by redirect, one by a bridge,
// and each does all that there is to do with the other.
func TestFlannelGuests(t *testing.T) {
	f := newFlannel(t, "vxlan", "v4")
	var machines [2]*machine
	var addrs [2]netip.Addr
	for i, n := range f.nodes {
		m := n.machine(t, documentedConf(t), map[string]string{"/run/flannel": filepath.Dir(n.subnetFile())})
		name := []string{"home", "away"}[i]
		m.run(t, name, []podnet.Datapath{podnet.Redirected, podnet.Bridged}[i], "--network", "cbr0", "-p", "8080:80", "--hostname", name)
		report := m.report(t, name).NICs[0]
		subnet := netip.MustParsePrefix(n.subnetEnv("FLANNEL_SUBNET")).Masked()
		if len(report.Addrs) == 0 || !subnet.Contains(report.Addrs[0].Addr()) || report.MTU != f.pod {
			t.Fatalf("the guest has addresses %v and MTU %d, want one of %s and %d", report.Addrs, report.MTU, subnet, f.pod)
		}
		machines[i], addrs[i] = m, report.Addrs[0].Addr()
	}
	guests := [2]flannelGuest{{machines[0], "home", addrs[0], addrs[1]}, {machines[1], "away", addrs[1], addrs[0]}}
	for i, g := range guests {
		g.wholeMTU(t, f.way[4])
		g.fetches(t, guests[1-i])
		published := netip.AddrPortFrom(underlay[i][4], 8080).String()
		if page := f.nodes[1-i].MustRun("curl", "-sSf", "--max-time", "30", "http://"+published+"/"); page != g.name {
			t.Errorf("at the published port of %s is %q", g.name, page)
		}
	}
	for _, d := range datapaths {
		for _, c := range []string{ping, tcp, hostPort, crossNode} {
			tested(t, "flannel, portmap (vxlan)", real, "v4", d).mark(t, c)
		}
	}
	for _, d := range f.daemons {
		d.kill()
	}
	for _, g := range guests {
		g.pings(t, f.way[4])
	}
	for _, g := range guests {
		g.virtlet(t, "rm", "-f", g.name)
	}
}

// flannelGuest is a guest on one of two nodes.
type flannelGuest struct {
	*machine
	name     string
	own, far netip.Addr // its address, and that of the other node's guest
}

// pings sends the other guest what fills a way of that MTU.
func (g flannelGuest) pings(t *testing.T, mtu int) {
	t.Helper()
	if out := g.type_(t, g.name, fmt.Sprintf("ping -c 3 -W 10 -s %d %s", mtu-headers(g.far), g.far)); !strings.Contains(out, " 0% packet loss") {
		t.Errorf("a ping of the whole MTU does not reach the other node's guest: %s", out)
	}
}

// wholeMTU checks that a way is of that MTU: what fills it passes whole, and one byte more does not. Linux sends pings with DF
// where they fit, and cuts them where its own link is too short.
func (g flannelGuest) wholeMTU(t *testing.T, mtu int) {
	t.Helper()
	before := g.fragments(t)
	g.pings(t, mtu)
	if now := g.fragments(t); now != before {
		t.Errorf("%s made or got %d fragments of pings of %d bytes", g.name, now-before, mtu)
	}
	g.type_(t, g.name, fmt.Sprintf("ping -c 1 -W 10 -s %d %s", mtu-headers(g.far)+1, g.far))
	if g.fragments(t) == before {
		t.Errorf("the MTU of %s is more than %d", g.name, mtu)
	}
}

// fragments counts those that a guest has made or got.
func (g flannelGuest) fragments(t *testing.T) int {
	t.Helper()
	const count = `awk '/^Ip: [^0-9]*$/ { split($0, name) } /^Ip: [0-9]/ { for (i in name) if (name[i] ~ /^(FragCreates|ReasmReqds)$/) sum += $i } END { print "frag" "ments", sum }' /proc/net/snmp`
	out := g.type_(t, g.name, count)
	_, number, _ := strings.Cut(out, "fragments ")
	n, err := strconv.Atoi(digits.FindString(number))
	if err != nil {
		t.Fatalf("%s does not count its fragments: %s", g.name, out)
	}
	return n
}

var digits = regexp.MustCompile(`^[0-9]+`)

// fetches gets 10 MiB from the other guest.
func (g flannelGuest) fetches(t *testing.T, from flannelGuest) {
	t.Helper()
	sent := from.type_(t, from.name, "until [ -e /run/www/big ]; do sleep 1; done; sha256sum </run/www/big")
	got := g.type_(t, g.name, "wget -q -O - http://"+from.own.String()+"/big | sha256sum")
	if digest := sha256.FindString(sent); digest == "" || digest != sha256.FindString(got) {
		t.Errorf("10 MiB by HTTP: sent\n%s\ngot\n%s", sent, got)
	}
}

// Without flanneld there is no subnet file, and a VM does not start, which it says.
func TestFlannelIsNotReady(t *testing.T) {
	n := newFlannelNode(t, 0)
	m := n.machine(t, documentedConf(t), map[string]string{"/run/flannel": filepath.Dir(n.subnetFile())})
	disk := filepath.Join(n.dir, "disk.raw")
	if err := errors.Join(os.WriteFile(disk, nil, 0o644), os.Truncate(disk, 1<<20)); err != nil {
		t.Fatal(err)
	}
	out, err := m.start("early", "--network", "cbr0", disk).CombinedOutput()
	const want = `virtlet: ADD network "cbr0": plugin "flannel": open /run/flannel/subnet.env: no such file or directory`
	if err == nil || !strings.Contains(string(out), want) {
		t.Errorf("without a subnet file: %v\n%s", err, out)
	}
	if out := m.virtlet(t, "ps", "-q"); out != "" {
		t.Errorf("a VM that could not start is still there: %s", out)
	}
}
