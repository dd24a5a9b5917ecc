package vm

import (
	"context"
	"fmt"
	"strings"

	"github.com/virtlet/virtlet/internal/pci"
)

// functions looks at what can have SR-IOV virtual functions, and at those that are there. A machine without is in order.
func (r CheckRequest) functions(context.Context) []Finding {
	all, err := r.PCI.All()
	if err != nil {
		return []Finding{{Warn, "SR-IOV", err.Error(), "look after the PCI bus: dmesg"}}
	}
	var out []Finding
	for _, pf := range all {
		if pf.TotalVFs == 0 {
			continue
		}
		f := Finding{Level: OK, What: "SR-IOV card " + pf.BDF, Is: fmt.Sprintf("%d of %d VFs, %s", pf.NumVFs, pf.TotalVFs, r.held(pf))}
		if pf.NumVFs == 0 {
			f.Do = fmt.Sprintf("to make VFs: echo N >/sys/bus/pci/devices/%s/sriov_numvfs", pf.BDF)
		}
		out = append(out, f)
		for _, vf := range all {
			if vf.PF == pf.BDF {
				out = append(out, r.vf(vf))
			}
		}
	}
	return out
}

// vf says whether a virtual function can go to a guest.
func (r CheckRequest) vf(f pci.Function) Finding {
	out := Finding{Level: OK, What: "SR-IOV VF " + f.BDF, Is: fmt.Sprintf("VF %d, %s", f.Index, r.held(f))}
	if f.Group != pci.NoGroup {
		out.Is += fmt.Sprintf(", IOMMU group %d", f.Group)
	}
	if err := r.PCI.Passable(f, nil, false); err != nil {
		// The cause, and what to do: the last part.
		why, do := err.Error(), ""
		if i := strings.LastIndex(why, ": "); i > 0 {
			why, do = why[:i], why[i+2:]
		}
		out.Level, out.Is, out.Do = Warn, out.Is+": "+why, do
	}
	return out
}

// held says who has a function.
func (r CheckRequest) held(f pci.Function) string {
	if f.Driver == "" {
		return "no driver"
	}
	held := "driver " + f.Driver
	if name, err := r.PCI.Netdev(f.BDF); err == nil && name != "" {
		held += ", network device " + name
	}
	return held
}
