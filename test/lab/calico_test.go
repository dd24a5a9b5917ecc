package lab

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// Calico has no bridge: every pod is routed to by itself, its gateway is an address that nobody has, and on the node a
// neighbour entry that never ages says which MAC the pod has.
func TestCalico(t *testing.T) {
	for file, families := range map[string]string{"calico-0.3.1": "v4", "calico-dual": "dual"} {
		test := func(t *testing.T, d podnet.Datapath) {
			rec := record(t, file)
			r := tested(t, "calico", replayed, families, d)
			mtu := rec.Snapshot.Links[0].MTU
			n, world := newReplayNode(t)
			net := n.network(t, rec.list(0, portmap))
			v := n.start(t, d, request{networks: ns(net), caps: ports})
			leased(t, v.nics[0], families)
			pod := n.addPod(t, request{networks: ns(net)})
			vm := n.start(t, d, request{networks: ns(net)})
			n2, _ := newReplayNode(t)
			net2 := n2.network(t, rec.list(64, portmap))
			far, farVM := n2.addPod(t, request{networks: ns(net2)}), n2.start(t, d, request{networks: ns(net2)})
			for _, f := range each(families) {
				own := v.addr(t, 0, f)
				r.talk(t, v.guest, own, pod.Namespace, pod.addr(t, "eth0", f), mtu, "")
				r.talk(t, v.guest, own, vm.guest, vm.addr(t, 0, f), mtu, "")
				connect(t, n, n2, f, []netip.Addr{own, vm.addr(t, 0, f)}, []netip.Addr{far.addr(t, "eth0", f), farVM.addr(t, 0, f)})
				r.talk(t, v.guest, own, far.Namespace, far.addr(t, "eth0", f), mtu, crossNode)
				r.talk(t, v.guest, own, farVM.guest, farVM.addr(t, 0, f), mtu, crossNode)
				r.published(t, v, world, uplink[f])
			}
		}
		t.Run(families, func(t *testing.T) { eachDatapath(t, test) })
	}
}

// ports publishes a guest's port 80 on the node.
var ports = map[string]any{"portMappings": port80}

// leased checks that the guest is told what the recording says of Calico: addresses without a subnet, and a gateway that is
// reached all the same.
func leased(t *testing.T, n nic.NIC, families string) {
	t.Helper()
	gw := netip.MustParseAddr("169.254.1.1")
	want := []nic.Route{{Dst: netip.PrefixFrom(gw, 32)}, {Dst: netip.MustParsePrefix("0.0.0.0/0"), Gw: gw}}
	l, notes, ok := dhcp.NewLease(n, "guest")
	if !ok || len(notes) > 0 || l.Addr != n.Addrs[0] || l.Addr.Bits() != 32 || !slices.Equal(l.Routes, want) || l.MTU != n.MTU {
		t.Errorf("lease %+v, notes %q, want %s, routes %+v", l, notes, n.Addrs[0], want)
	}
	if families != "dual" {
		return
	}
	gw6 := netip.MustParseAddr("fe80::ecee:eeff:feee:eeee")
	l6, notes, ok := dhcp.NewLease6(n, "guest")
	if !ok || len(notes) > 0 || len(l6.Addrs) != 1 || l6.Addrs[0] != n.Addrs[1].Addr() || len(l6.Prefixes) > 0 ||
		len(l6.Routers) != 1 || l6.Routers[0].Gateway != gw6 || l6.Routers[0].Source != gw6 || !l6.Routers[0].Default {
		t.Errorf("IPv6 lease %+v, notes %q, want %s by %s itself", l6, notes, n.Addrs[1], gw6)
	}
}

// connect joins two nodes by a wire, and routes pods over it one by one, as Calico's BIRD would.
func connect(t *testing.T, a, b *node, family int, ofA, ofB []netip.Addr) {
	t.Helper()
	wire := fmt.Sprintf("wire%d", family)
	a.MustRun("ip", "link", "add", wire, "type", "veth", "peer", "name", wire, "netns", b.Name)
	ends := map[int][2]string{4: {"203.0.113.1", "203.0.113.2"}, 6: {"2001:db8:ff::1", "2001:db8:ff::2"}}[family]
	bits := map[int]string{4: "/30", 6: "/126"}[family]
	for i, n := range []*node{a, b} {
		n.MustRun("ip", "addr", "add", ends[i]+bits, "dev", wire)
		n.MustRun("ip", "link", "set", wire, "up")
		for _, pod := range [][]netip.Addr{ofB, ofA}[i] {
			n.MustRun("ip", "route", "add", pod.String(), "via", ends[1-i])
		}
	}
	a.Ready(wire)
	b.Ready(wire)
}

// What would be, if the guest had another MAC than the pod: the node's neighbour entry leads nowhere.
func TestCalicoNeighbour(t *testing.T) {
	n, _ := newReplayNode(t)
	net := n.network(t, record(t, "calico-0.3.1").list(0))
	pod := n.addPod(t, request{networks: ns(net)})
	to := pod.addr(t, "eth0", 4)
	if !n.Ping(to) {
		t.Fatal("the node does not reach the pod")
	}
	entry := n.MustRun("ip", "neigh", "show", to.String())
	pod.MustRun("ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
	if n.Ping(to, "-w", "2") {
		t.Errorf("the node reaches another MAC all the same: %s", entry)
	}
	n.MustRun("ip", "neigh", "del", to.String(), "dev", record(t, "calico-0.3.1").Host.Links[0].Name)
	if !n.Ping(to) {
		t.Errorf("it is not the entry: %s", entry)
	}
}
