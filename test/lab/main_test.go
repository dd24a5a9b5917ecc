// Package lab runs the CNI plugins of the field and shows that a VM works on each. Real plugins run where they can be
// built (the reference plugins, Flannel, Multus); of the others a replay plugin makes again what was recorded.
//
// A lab is a [node] or two, in network namespaces of the test's own; a [pod] that the plugins have configured on it; and a
// [vm], which is that pod after virtlet has taken it over, with a guest that is a namespace of the same kernel: its TAP is
// cross-connected to the pod's, as QEMU would. Where the pod's link is a veth each lab runs on both datapaths, and a test says
// which one its VMs are joined by: a fallback fails it. What was seen to work is marked in a table, which is in
// docs/networking.md and must be the one of this run.
package lab

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/virtlet/virtlet/internal/testnet"
)

var update = flag.Bool("update", false, "write the table of this run to docs/networking.md")

func TestMain(m *testing.M) {
	flag.Parse()
	testnet.Isolate(m, func(code int) int {
		chosen := flag.Lookup("test.run").Value.String() + flag.Lookup("test.skip").Value.String()
		if code != 0 || chosen != "" {
			return code // what was not run is not in the table
		}
		if err := table.compare(*update); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	})
}
