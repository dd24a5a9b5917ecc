package lab

import (
	"slices"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// Weave answers with an address alone, gives its pods the largest MTU there is, and turns their checksums off. Its bridge
// reflects frames.
func TestWeave(t *testing.T) {
	eachDatapath(t, testWeave)
}

func testWeave(t *testing.T, d podnet.Datapath) {
	rec := record(t, "weave")
	r := tested(t, "weave", replayed, "v4", d)
	n, world := newReplayNode(t)
	net := n.network(t, rec.list(0, portmap))
	v := n.start(t, d, request{networks: ns(net), caps: ports})
	if len(v.notes) != 1 || !strings.Contains(v.notes[0], "MTU") || v.nics[0].MTU != nic.MaxTapMTU {
		t.Errorf("MTU %d, notes %q: want %d, and a note", v.nics[0].MTU, v.notes, nic.MaxTapMTU)
	}
	own := v.addr(t, 0, 4)
	pod, vm := n.addPod(t, request{networks: ns(net)}), n.start(t, d, request{networks: ns(net)})
	if off := v.look(t).NoTxChecksum; !slices.Contains(off, "eth0") {
		t.Errorf("checksums are off on %v while the guest runs, not on eth0", off)
	}
	r.talk(t, v.guest, own, pod.Namespace, pod.addr(t, "eth0", 4), nic.MaxTapMTU, "")
	r.talk(t, v.guest, own, vm.guest, vm.addr(t, 0, 4), nic.MaxTapMTU, "")
	r.published(t, v, world, uplink[4])
}

// Who asks for CHECK is told that there is none; that is no sign of anything.
func TestWeaveCheck(t *testing.T) {
	n, _ := newReplayNode(t)
	pod := n.addPod(t, request{networks: ns(n.network(t, record(t, "weave").list(0)))})
	err := n.Do(func() error { return n.cni.Check(t.Context(), pod.attachments[0]) })
	if err == nil || !strings.Contains(err.Error(), "check not implemented") {
		t.Errorf("CHECK: %v", err)
	}
}
