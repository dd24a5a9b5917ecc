package podnet

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// The node's side of a pod is found by the kernel's own references, whatever the links are called and beside other pods
// with links of the same index; also while a guest has the pod.
func TestObserveHost(t *testing.T) {
	t.Parallel()
	node := testnet.NewNode(t, gw4, gw6)
	addPod(t, node, dualStack())
	var before []NodeLink
	node.Must(func() (err error) { before, err = NodeLinks(); return err })
	pod, port := addPod(t, node, dualStack())
	routed := node.AddLink(t, pod, testnet.PodSpec{Name: "net1", NoPort: true, Addrs: []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}})
	node.Sysctl("ipv4/conf/"+routed+"/proxy_arp", "1")
	node.MustRun("ip", "route", "add", "203.0.113.9/32", "dev", routed)
	node.MustRun("ip", "neigh", "add", "203.0.113.9", "lladdr", "02:00:00:00:00:09", "dev", routed, "nud", "permanent")
	node.MustRun("ip", "neigh", "add", "proxy", "2001:db8::9", "dev", routed)
	node.MustRun("bridge", "link", "set", "dev", port, "hairpin", "on", "learning", "off")
	pod.MustRun("ip", "link", "set", "net1", "up")
	pod.Must(func() error { return testnet.ChecksumsOff("net1") })
	node.MustRun("ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1") // of nobody's pod

	node.MustRun("ip", "link", "add", "mv0", "link", "other0", "type", "macvlan", "mode", "bridge")
	node.MustRun("ip", "link", "set", "mv0", "netns", pod.Name, "name", "net2")

	snap, err := Observe(pod.NS)
	if err != nil {
		t.Fatal(err)
	}
	var host *nic.Host
	var off []string
	node.Must(func() (err error) { host, off, err = ObserveHost(pod.NS, snap); return err })
	if !slices.Equal(off, []string{"net1"}) {
		t.Errorf("without checksums: %v, want net1", off)
	}
	links := map[string]nic.HostLink{}
	for _, l := range host.Links {
		links[l.Name] = l
	}
	if len(links) != 4 || links[port].PodLink != "eth0" || links[routed].PodLink != "net1" || links["other0"].PodLink != "net2" || links[testnet.Bridge].Kind != "bridge" {
		t.Fatalf("links %+v", host.Links)
	}
	if l := links[port]; l.Master != testnet.Bridge || !l.Hairpin || !l.NoLearning {
		t.Errorf("the port: %+v", l)
	}
	l := links[routed]
	if l.Sysctls["ipv4/conf/"+routed+"/proxy_arp"] != "1" || l.Hairpin || l.NoLearning {
		t.Errorf("the routed link: %+v", l)
	}
	if !slices.ContainsFunc(l.Routes, func(r nic.KernelRoute) bool { return r.Dst.String() == "203.0.113.9/32" }) {
		t.Errorf("routes of it: %+v", l.Routes)
	}
	if len(l.Neighbours) != 2 || l.Neighbours[0].MAC.String() != "02:00:00:00:00:09" || !l.Neighbours[1].Proxy {
		t.Errorf("neighbours of it: %+v", l.Neighbours)
	}
	if len(links[testnet.Bridge].Addrs) < len(node.Gateways) || host.Sysctls["ipv4/ip_forward"] == "" {
		t.Errorf("the bridge: %+v, the node: %v", links[testnet.Bridge], host.Sysctls)
	}

	// What came since and is the pod's: its two links, and one that a result names.
	var made, left []NodeLink
	node.Must(func() (err error) { made, err = Made(pod.NS, before, []string{"other0", testnet.Bridge}); return err })
	names := func(all []NodeLink) []string {
		var out []string
		for _, l := range all {
			out = append(out, l.Name)
		}
		slices.Sort(out)
		return out
	}
	if want := []string{"other0", port, routed}; !slices.Equal(names(made), want) {
		t.Errorf("made %v, want %v", names(made), want)
	}
	node.MustRun("ip", "link", "del", port)
	node.MustRun("ip", "link", "del", "other0")
	node.MustRun("ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1") // not the one that was made
	node.Must(func() (err error) { left, err = Left(made); return err })
	if !slices.Equal(names(left), []string{routed}) {
		t.Errorf("left %v, want %s", names(left), routed)
	}
}
