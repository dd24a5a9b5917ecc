package sriov

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// What the ends of VMs leave, other than a clean one and that of the supervisor.

// qemuKilled loses QEMU; the supervisor brings the VF back.
func (l *inside) qemuKilled() {
	st := l.start("qk", "blue")
	if err := unix.Kill(st.QEMU.PID, unix.SIGKILL); err != nil {
		l.Fatal(err)
	}
	l.until("the end of the VM", func() bool { return l.state("qk").Status == vm.Stopped })
	l.returned(blueVF, blueMAC, "192.0.2.10/24", 100)
	if st := l.state("qk"); st.Exit == nil || st.Exit.Reason == vm.Shutdown {
		l.Errorf("ended as %+v", st.Exit)
	}
	l.virtlet("rm", "qk")
}

// lostDir keeps the data of VMs that a reboot takes. What is below /run does not outlive one.
const lostDir = shareDir + "/data"

// lostVMs run when level 1 is killed.
var lostVMs = []struct{ name, network string }{{"lost-blue", "blue"}, {"lost-red", "red"}}

// beforeReboot starts what will be lost.
func (l *inside) beforeReboot() {
	l.flags = []string{"--data-dir", lostDir}
	for _, v := range lostVMs {
		l.start(v.name, v.network)
	}
	l.sh("sync")
	if err := os.WriteFile("/run/wait", nil, 0o600); err != nil {
		l.Fatal(err)
	}
}

// afterReboot finds journals of VMs of which nothing else is left. The VFs are new ones: one is free, and the other somebody's.
func (l *inside) afterReboot() {
	const owner = "02:00:00:00:77:77"
	l.flags = []string{"--data-dir", lostDir}
	l.sh("ip link set %s vf 1 mac %s vlan 300", l.pf, owner)
	if said := l.virtlet("ps"); !strings.Contains(said, "lost-blue") || !strings.Contains(said, "lost-red") {
		l.Errorf("ps does not know of them:\n%s", said)
	}
	l.Log(l.virtlet("gc", "--dry-run"))
	l.virtlet("rm", "-f", "lost-blue")
	l.virtlet("gc")
	if said := l.virtlet("ps"); strings.Contains(said, "lost-") {
		l.Errorf("ps still knows of them:\n%s", said)
	}
	l.sh("! ls %s/*/journal.json", lostDir)
	for _, vf := range []string{blueVF, redVF} {
		if d := l.driver(vf); d != "igbvf" {
			l.Errorf("%s is with driver %s", vf, d)
		}
		if o := l.sh("cat /sys/bus/pci/devices/%s/driver_override", vf); o != "(null)" {
			l.Errorf("%s has the override %s", vf, o)
		}
	}
	if said := l.sh("ip link show %s | grep 'vf 1 '", l.pf); !strings.Contains(said, owner) || !strings.Contains(said, "vlan 300") {
		l.Errorf("the new owner's VF has changed: %s", said)
	}
	if said := l.sh("ip link show %s | grep 'vf 0 '", l.pf); strings.Contains(said, blueMAC) || strings.Contains(said, "vlan") {
		l.Errorf("the free VF has changed: %s", said)
	}
	// It is as good as before.
	st := l.start("again", "blue")
	l.passed(st, 0, blueVF, blueMAC, 0, 100)
	dev := l.device("again", blueMAC)
	if said := l.in("again", "ip link set %[1]s up && ip addr add 192.0.2.10/24 dev %[1]s && sleep 3; ping -c 3 -w 30 192.0.2.1", dev); !done(said) {
		l.Errorf("the network is not reached: %s", said)
	}
	l.virtlet("rm", "-f", "again")
	l.returned(blueVF, blueMAC, "192.0.2.10/24", 100)
}
