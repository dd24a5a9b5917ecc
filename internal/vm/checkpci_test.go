package vm

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/pci"
	"github.com/virtlet/virtlet/internal/testpci"
)

func TestCheckFunctions(t *testing.T) {
	drivers := []string{"igb", "igbvf", "nvme", pci.VFIO}
	pf := testpci.Device{BDF: "0000:01:00.0", Driver: "igb", Total: 7, Group: 14, Net: []testpci.Net{{Name: "enp1s0"}}}
	m := testpci.New(t, drivers, pf,
		testpci.Device{BDF: "0000:01:10.0", Driver: "igbvf", PF: pf.BDF, Index: 0, Group: 15, Net: []testpci.Net{{Name: "enp1s0v0"}}},
		testpci.Device{BDF: "0000:01:10.2", Driver: pci.VFIO, PF: pf.BDF, Index: 1, Group: 16},
		testpci.Device{BDF: "0000:01:10.4", PF: pf.BDF, Index: 2, Group: 17},
		testpci.Device{BDF: "0000:02:00.0", Driver: "nvme", Class: 0x010802, Group: 17},
		testpci.Device{BDF: "0000:03:00.0", Driver: "igb", Total: 3, Group: 18},
	).IOMMU()
	show := func(fs pci.FS) (lines []string) {
		for _, f := range (CheckRequest{PCI: fs}).functions(context.Background()) {
			do, _, _ := strings.Cut(f.Do, ";")
			lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s: %s. %s", f.Level, f.What, f.Is, do)))
		}
		return lines
	}
	want := []string{
		"ok SR-IOV card 0000:01:00.0: 3 of 7 VFs, driver igb, network device enp1s0.",
		"ok SR-IOV VF 0000:01:10.0: VF 0, driver igbvf, network device enp1s0v0, IOMMU group 15.",
		"ok SR-IOV VF 0000:01:10.2: VF 1, driver vfio-pci, IOMMU group 16.",
		"warn SR-IOV VF 0000:01:10.4: VF 2, no driver, IOMMU group 17: pass on PCI function 0000:01:10.4: its IOMMU group is shared. group 17 has also 0000:02:00.0 (nvme), which would go to the guest",
		"ok SR-IOV card 0000:03:00.0: 0 of 3 VFs, driver igb. to make VFs: echo N >/sys/bus/pci/devices/0000:03:00.0/sriov_numvfs",
	}
	if diff := cmp.Diff(want, show(m.FS)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := show(pci.FS{Root: t.TempDir()}); got != nil {
		t.Errorf("a machine without PCI: %q", got)
	}
}
