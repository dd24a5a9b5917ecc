package qemu

import (
	"strings"
	"testing"
)

// QEMU takes drives on each bus, what is read-only among them, also where the controllers take several slots. That it boots
// from them is shown by test/script/images.txtar.
func TestDiskBuses(t *testing.T) {
	for _, bus := range []DiskBus{VirtioBlock, VirtioSCSI, SATA} {
		m := Machine{Kernel: guestKernel(t), DiskBus: bus}
		for _, id := range []string{"a", "b", "c", "d", "e", "f", "g"} {
			m.Drives = append(m.Drives, Drive{ID: id, Format: "raw", File: sized(t, id, 1<<20), Serial: "disk-" + id})
		}
		m.Drives = append(m.Drives, Drive{ID: "seed", Format: "raw", File: content(t, "seed", make([]byte, 1<<20)), CDROM: true})
		if bus != SATA {
			m.Drives = append(m.Drives, Drive{ID: "ro", Format: "raw", File: content(t, "ro", make([]byte, 1<<20)), ReadOnly: true})
		}
		g := boot(t, m)
		if out := g.hmp("info block"); strings.Count(out, "Attached to:") != len(m.Drives) {
			t.Errorf("bus %q:\n%s", bus, out)
		}
		g.quit()
	}
	m := Machine{Arch: "amd64", Accel: TCG, Name: "vm", CPUs: 1, Memory: 64, Kernel: guestKernel(t), DiskBus: "ide"}
	if _, err := NewCommand(m); err == nil || !strings.Contains(err.Error(), `"ide"`) {
		t.Errorf("IDE: %v", err)
	}
	m.DiskBus, m.Drives = SATA, []Drive{{ID: "ro", Format: "raw", File: content(t, "ro", nil), ReadOnly: true}}
	if _, err := NewCommand(m); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("a read-only SATA disk: %v", err)
	}
}

// The port of an agent that no guest has opened, and a balloon that no guest heeds. With a real agent: test/pods.
func TestAgentPortAndBalloon(t *testing.T) {
	m := Machine{Kernel: guestKernel(t), Balloon: true}
	_, m.Agent = socketPair(t, "agent")
	g := boot(t, m)
	if open, err := g.AgentOpen(within(t)); open || err != nil {
		t.Errorf("the port is open: %t, %v", open, err)
	}
	if err := g.SetMemory(within(t), 32<<20); err != nil {
		t.Error(err)
	}
	if got, err := g.MemoryActual(within(t)); got != 64<<20 || err != nil {
		t.Errorf("the guest has %d bytes, %v", got, err)
	}
	g.quit()
}
