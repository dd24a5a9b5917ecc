package lab

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// recording is a file of testdata: what a plugin was recorded to make and to answer. The documentation of command replay
// says how it is made again.
type recording struct {
	nic.Recording
	Answers map[string]struct { // by verb
		Error  string
		Leaves []string
	}
	path string
}

// request asks for a pod on networks of the recording; what its DEL answers is no surprise.
func (r recording) request(nets ...*cni.Network) request {
	return request{networks: nets, dead: r.Answers["DEL"].Error != ""}
}

// left is what of the recording stays after DEL.
func (r recording) left() nic.Recording {
	gone := func(link string) bool { return !slices.Contains(r.Answers["DEL"].Leaves, link) }
	out := r.Recording
	out.Snapshot.Links = slices.DeleteFunc(slices.Clone(r.Snapshot.Links), func(l nic.Link) bool { return gone(l.Name) })
	out.NoTxChecksum = slices.DeleteFunc(slices.Clone(r.NoTxChecksum), gone)
	host := *r.Host
	masters := map[string]bool{}
	host.Links = slices.DeleteFunc(slices.Clone(r.Host.Links), func(l nic.HostLink) bool {
		stays := !gone(l.PodLink)
		masters[l.Master] = masters[l.Master] || stays
		return l.PodLink != "" && !stays
	})
	host.Links = slices.DeleteFunc(host.Links, func(l nic.HostLink) bool { return l.PodLink == "" && !masters[l.Name] })
	out.Host = &host
	return out
}

func record(t *testing.T, file string) recording {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", file+".json"))
	if err != nil {
		t.Fatal(err)
	}
	r := recording{path: path}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// version gives the CNI version of the recorded answer, the last with which CNI-Genie works where there is none.
func (r recording) version() string {
	var result struct{ CNIVersion string }
	if json.Unmarshal(r.Attachments[0].Result, &result) != nil {
		return "0.3.1"
	}
	return result.CNIVersion
}

// list is a configuration in which the recording takes the recorded plugin's place, with others behind it. first is the number
// of the node's first pod.
func (r recording) list(first int, more ...map[string]any) string {
	chain := []map[string]any{{"type": "replay", "recording": r.path, "dataDir": "$DIR/replay", "first": first}}
	return list(r.version(), r.Attachments[0].Network, append(chain, more...)...)
}

// portmap publishes ports behind a recorded plugin, for real.
var portmap = map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true}

// newReplayNode is a node with the replay plugin, and with a way to the world, which is a default route: a node answers
// ARP for what it can route alone, such as Calico's gateway.
func newReplayNode(t *testing.T) (n *node, world *testnet.Namespace) {
	t.Helper()
	n = newNode(t, "node", testnet.Replay(t))
	world = n.world(t)
	for family, a := range uplink {
		n.MustRun("ip", fmt.Sprintf("-%d", family), "route", "add", "default", "via", a.Next().String(), "dev", "up0")
	}
	return n, world
}

// Every recording is made again exactly: what is then observed is what was recorded, on the pod's side and on the node's. Its
// second pod differs where it has to. A file of a user's cluster is tried when it is put there.
func TestReplay(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := record(t, name)
			n, _ := newReplayNode(t)
			net := n.network(t, r.list(0))
			first, err := n.tryPod(t, r.request(net))
			if want := r.Answers["ADD"].Error; err != nil && want != "" {
				// What failed has been undone, as far as the plugin does.
				if d := gocmp.Diff(normal(r.left(), r.Recording), normal(first.look(t), r.Recording), equal); d != "" || !strings.Contains(err.Error(), want) {
					t.Errorf("ADD: %v, -recorded +left:\n%s", err, d)
				}
				return
			} else if err != nil || want != "" {
				t.Fatalf("ADD: %v, recorded: %q", err, want)
			}
			observed := first.look(t)
			if d := gocmp.Diff(normal(r.Recording, r.Recording), normal(observed, r.Recording), equal); d != "" {
				t.Errorf("-recorded +replayed:\n%s", d)
			}
			nics, notes, err := nic.Plan(first.results, observed.Snapshot)
			got := nic.Want{NICs: nics, Notes: notes}
			if d := gocmp.Diff(r.Want, got, equal); err != nil || d != "" {
				b, _ := json.Marshal(got)
				t.Errorf("the plan: %v, -want +got:\n%s\ngot, to copy where it is right:\n%s", err, d, b)
			}
			second := n.addPod(t, r.request(net)).look(t)
			for i, l := range second.Snapshot.Links {
				if l.MAC == observed.Snapshot.Links[i].MAC || l.Addrs[0] == observed.Snapshot.Links[i].Addrs[0] {
					t.Errorf("both pods have %s %s", l.MAC, l.Addrs[0].Prefix)
				}
			}
			first.delete(t)
			if d := gocmp.Diff(normal(r.left(), r.Recording), normal(first.look(t), r.Recording), equal); d != "" {
				t.Errorf("after DEL, -recorded +left:\n%s", d)
			}
		})
	}
}

// What is recorded here of a real plugin is replayed as what the file says of another: the way of a user's cluster into a test.
func TestRecordAndReplay(t *testing.T) {
	n := newNode(t, "node")
	conf := list("1.0.0", "lab",
		map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": hostLocal("dual")},
		map[string]any{"type": "tuning", "mac": "02:00:00:00:00:42", "mtu": 1400})
	pod := n.addPod(t, request{networks: ns(n.network(t, conf))})
	r := recording{Recording: pod.look(t), path: filepath.Join(t.TempDir(), "recorded.json")}
	result, err := n.cni.Answer(pod.attachments[0])
	if err != nil {
		t.Fatal(err)
	}
	r.Attachments = []nic.Answer{{Network: "lab", IfName: "eth0", Plugins: pod.attachments[0].Types(), Result: result}}
	b, err := json.Marshal(r.Recording)
	if err == nil {
		err = os.WriteFile(r.path, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	n2, _ := newReplayNode(t)
	again := n2.addPod(t, request{networks: ns(n2.network(t, r.list(0)))})
	if d := gocmp.Diff(normal(r.Recording, r.Recording), normal(again.look(t), r.Recording), equal); d != "" {
		t.Errorf("-real +replayed:\n%s", d)
	}
	was, is := pod.results[0].Result, again.results[0].Result
	for i := range is.Interfaces {
		if is.Interfaces[i].Sandbox == again.Path() {
			is.Interfaces[i].Sandbox = pod.Path()
		}
	}
	if d := gocmp.Diff(was, is, equal); d != "" {
		t.Errorf("the result, -real +replayed:\n%s", d)
	}
}

var equal = gocmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}

// look records the pod as `virtlet inspect --snapshot` does.
func (p *pod) look(t *testing.T) nic.Recording {
	t.Helper()
	var r nic.Recording
	var err error
	if r.Snapshot, err = podnet.Observe(p.NS); err != nil {
		t.Fatal(err)
	}
	p.node.Must(func() (err error) {
		r.Host, r.NoTxChecksum, err = podnet.ObserveHost(p.NS, r.Snapshot)
		return err
	})
	return r
}

// normal leaves out of a recording what has no meaning (order of routes, indices), what of is silent of (settings), and what
// is not looked at here.
func normal(r, of nic.Recording) nic.Recording {
	settings := map[string]bool{}
	keep := func(m map[string]string) {
		for k := range m {
			settings[k] = true
		}
	}
	keep(of.Host.Sysctls)
	keep(of.Snapshot.Sysctls)
	for _, l := range of.Host.Links {
		keep(l.Sysctls)
	}
	for _, l := range of.Snapshot.Links {
		keep(l.Sysctls)
	}
	link := func(l nic.Link) nic.Link {
		l.Index = 0
		l.Away = false // which recordings of old are silent of; a replayed veth always leads away
		l.Sysctls = only(l.Sysctls, settings)
		l.Routes = slices.SortedFunc(slices.Values(l.Routes), func(a, b nic.KernelRoute) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		l.Addrs = slices.SortedFunc(slices.Values(l.Addrs), func(a, b nic.Addr) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		return l
	}
	out := nic.Recording{NoTxChecksum: r.NoTxChecksum, Host: &nic.Host{Sysctls: only(r.Host.Sysctls, settings)}}
	out.Snapshot.Sysctls = only(r.Snapshot.Sysctls, settings)
	for _, l := range r.Snapshot.Links {
		out.Snapshot.Links = append(out.Snapshot.Links, link(l))
	}
	for _, l := range r.Host.Links {
		l.Link = link(l.Link)
		out.Host.Links = append(out.Host.Links, l)
	}
	slices.SortFunc(out.Host.Links, func(a, b nic.HostLink) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func only(m map[string]string, keys map[string]bool) map[string]string {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(k, _ string) bool { return !keys[k] })
	return m
}
