package sriov

import (
	"fmt"
	"regexp"
	"strings"
)

const (
	wholeAddr = "0000:02:00.0" // behind the second root port
	wholeMAC  = "02:00:00:aa:00:03"
)

// pool has a VF that is with VFIO, and of which device info alone tells. It stays with VFIO.
func (l *inside) pool() {
	dev := "/sys/bus/pci/devices/" + redVF
	l.sh("set -e; echo %[2]s >%[1]s/driver/unbind; echo vfio-pci >%[1]s/driver_override; echo %[2]s >/sys/bus/pci/drivers_probe", dev, redVF)
	as := func() string {
		return l.sh("basename $(readlink -f %[1]s/driver); cat %[1]s/driver_override; stat -c '%%a %%u %%g' /dev/vfio/$(basename $(readlink -f %[1]s/iommu_group))", dev)
	}
	before := as()
	st := l.start("pool", "pool")
	if n := st.NICs[0]; n.VF == nil || n.VF.BDF != redVF || !n.VF.Detached || n.MAC.String() != redMAC {
		l.Errorf("NIC %+v, VF %+v", n, n.VF)
	}
	dev1 := l.device("pool", redMAC)
	if said := l.in("pool", "ip link set %[1]s up && ip addr add 198.51.100.10/24 dev %[1]s && sleep 3; ping -c 3 -w 30 198.51.100.1", dev1); !done(said) {
		l.Errorf("the network is not reached: %s", said)
	}
	// While it is with one VM, another is refused.
	if out, err := l.command(append([]string{"run", "-d", "--name", "pool2", "--network", "pool"}, l.boot...)...).CombinedOutput(); err == nil || !strings.Contains(string(out), "another VM has it") {
		l.Errorf("a second VM: %v: %s", err, out)
	}
	l.virtlet("rm", "-f", "pool")
	if now := as(); now != before {
		l.Errorf("it was %q and is %q", before, now)
	}
	if said := l.sh("ip link show %s | grep 'vf 1 '; ls %s", l.pf, infoDir); strings.Contains(said, redMAC) || strings.Contains(said, "pool") {
		l.Errorf("DEL has not been: %s", said)
	}
	l.sh("set -e; echo %[2]s >%[1]s/driver/unbind; echo igbvf >%[1]s/driver_override; echo %[2]s >/sys/bus/pci/drivers_probe; echo >%[1]s/driver_override; test -d %[1]s/net", dev, redVF)
}

// physical has a whole card without SR-IOV, which host-device moves to the pod.
func (l *inside) physical() {
	name := l.sh("ls /sys/bus/pci/devices/%s/net", wholeAddr)
	l.network("whole", fmt.Sprintf(`{"type":"host-device","device":%q,"ipam":{"type":"static","addresses":[{"address":"203.0.113.10/24"}]}}`, name))
	as := func() string {
		return l.sh("ls %[1]s/net; basename $(readlink -f %[1]s/driver); cat %[1]s/driver_override; cat %[1]s/net/*/address", "/sys/bus/pci/devices/"+wholeAddr)
	}
	before := as()
	args := append([]string{"run", "-d", "--name", "whole", "--network", "whole"}, l.boot...)
	if out, err := l.command(args...).CombinedOutput(); err == nil || !strings.Contains(string(out), "--allow-physical") || !strings.Contains(string(out), wholeAddr) {
		l.Errorf("a card without SR-IOV: %v: %s", err, out)
	}
	if now := as(); now != before {
		l.Errorf("refused, it was %q and is %q", before, now)
	}
	l.virtlet(append(args, "--allow-physical")...)
	l.until("shell of whole", func() bool { return strings.Contains(l.virtlet("logs", "whole"), "guest#") })
	if d := l.driver(wholeAddr); d != "vfio-pci" {
		l.Errorf("%s is with driver %s", wholeAddr, d)
	}
	st := l.state("whole")
	if n := st.NICs[0]; n.VF == nil || n.VF.BDF != wholeAddr || n.VF.PF != "" || n.MAC.String() != wholeMAC {
		l.Errorf("NIC %+v, VF %+v", n, n.VF)
	}
	dev := l.device("whole", wholeMAC)
	if said := l.in("whole", "ip link set %[1]s up && ip addr add 203.0.113.10/24 dev %[1]s && sleep 5; ping -c 3 -w 30 203.0.113.1", dev); !done(said) {
		l.Errorf("the network is not reached: %s", said)
	}
	l.virtlet("rm", "-f", "whole")
	if now := as(); now != before {
		l.Errorf("it was %q and is %q", before, now)
	}
}

var vhostThread = regexp.MustCompile(`(?m)^vhost-\d+$`)

// node has what the kernels of other test machines may lack: vhost-net, a bridge's VLANs, and ipvlan, which is on a VLAN here.
func (l *inside) node() {
	l.sh(`set -e
ip link add up0 type veth peer name far0; ip netns add far; ip link set far0 netns far; ip link set up0 up
ip link add link up0 name up0.7 type vlan id 7; ip link set up0.7 up
ip -n far link set far0 up; ip -n far link add link far0 name far0.7 type vlan id 7; ip -n far link set far0.7 up
ip -n far addr add 198.18.7.1/24 dev far0.7`)
	l.network("tagged", `{"type":"bridge","bridge":"cni7","vlan":100,"preserveDefaultVlan":false,"isGateway":true,"ipam":{"type":"host-local","dataDir":"/run/leases","ranges":[[{"subnet":"198.18.5.0/24"}]]}}`)
	l.network("ipvlan", `{"type":"ipvlan","master":"up0.7","mode":"l2","ipam":{"type":"static","addresses":[{"address":"198.18.7.2/24"}]}}`)
	st := l.start("node", "tagged", "ipvlan")
	if len(st.NICs) != 2 || len(st.Ports) != 2 {
		l.Fatalf("NICs %+v, ports %+v", st.NICs, st.Ports)
	}
	for i, p := range st.Ports {
		if !p.Vhost {
			l.Errorf("%s is without vhost: %+v", st.NICs[i].Name, p)
		}
	}
	line := l.sh("tr '\\0' '\\n' </proc/%d/cmdline", st.QEMU.PID)
	if n := strings.Count(line, "vhost=on,vhostfd="); n != 2 {
		l.Errorf("vhost-net is on for %d NICs of 2:\n%s", n, line)
	}
	if said := l.sh("ls -l /proc/%d/fd | grep -c /dev/vhost-net", st.QEMU.PID); said != "2" {
		l.Errorf("QEMU has %s descriptors of vhost-net", said)
	}
	for i, gw := range []string{"198.18.5.1", "198.18.7.1"} {
		n := st.NICs[i]
		dev, addr := l.device("node", n.MAC.String()), n.Addrs[0]
		if said := l.in("node", "ip link set %[1]s up; udhcpc -i %[1]s -n -q -s /bin/true", dev); !strings.Contains(said, addr.Addr().String()) {
			l.Errorf("%s has no lease: %s", n.Name, said)
		}
		if said := l.in("node", "ip addr add %s dev %s; ping -c 3 -w 30 %s", addr, dev, gw); !done(said) {
			l.Errorf("%s is not reached: %s", gw, said)
		}
		from := []string{"", "ip netns exec far "}[i]
		l.sh("%sping -c 3 -i 0.2 -w 30 %s", from, addr.Addr())
	}
	// It is the kernel that works there, in threads of QEMU (Linux 6.4) or of its own.
	if said := l.sh("cat /proc/%d/task/*/comm /proc/[0-9]*/comm", st.QEMU.PID); len(vhostThread.FindAllString(said, -1)) < 2 {
		l.Errorf("no threads of vhost-net for two NICs: %q", said)
	}
	if said := l.sh("ip -d link show up0.7; bridge vlan show"); !strings.Contains(said, "802.1Q id 7") || strings.Count(said, "100 PVID Egress Untagged") != 2 {
		l.Errorf("no VLAN: %s", said)
	}
	if said := l.virtlet("inspect", "--check", "node"); !strings.Contains(said, "joined as it was") {
		l.Error(said)
	}
	l.virtlet("rm", "-f", "node")
	l.sh("ip netns del far; ip link del cni7; ip link del up0 2>/dev/null || true")
}

// datapath runs tests of internal/podnet on this kernel: that of ipvlan, which other kernels skip, and some that all run.
func (l *inside) datapath() {
	tests := []string{"TestIPvlan", "TestMacvlanModes", "TestFramesOfTheGuest"}
	said := l.sh("cd /tmp && %s/podnet.test -test.v -test.timeout 5m -test.run '^(%s)$' 2>&1; true", shareDir, strings.Join(tests, "|"))
	for _, want := range tests {
		if !strings.Contains(said, "--- PASS: "+want+" ") {
			l.Errorf("%s did not pass on this kernel:\n%s", want, said)
		}
	}
}
