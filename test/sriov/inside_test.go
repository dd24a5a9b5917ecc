package sriov

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
	"github.com/virtlet/virtlet/test/guest"
)

const (
	pfAddr   = "0000:01:00.0"
	blueVF   = "0000:01:10.0"
	redVF    = "0000:01:10.2"
	worldMAC = "02:00:00:aa:00:02"
	blueMAC  = "02:00:00:00:01:64"
	redMAC   = "02:00:00:00:02:c8"
	falseMAC = "02:00:00:00:66:66"
)

// inside is level 1.
type inside struct {
	*testing.T
	pf    string   // the card's network device
	lab   string   // the lab's directory
	dir   string   // of networks
	net   []string // flags that say so
	boot  []string // a small guest's
	flags []string // of every command
}

// newInside prepares level 1 after its boot.
func newInside(t *testing.T, part string) *inside {
	lab := os.Getenv(insideEnv)
	if lab == "" || os.Getenv(partEnv) != part {
		t.Skip("it runs in the lab's machine alone")
	}
	l := &inside{T: t, lab: lab, dir: "/run/networks"} // the same after a reboot: DEL wants the plugin where it was
	if err := os.Mkdir(l.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l.net = []string{"--cni-conf-dir", l.dir, "--cni-bin-dir", l.dir, "--cni-bin-dir", os.Getenv("VIRTLET_CNI_BIN")}
	l.boot = append([]string{
		"--kernel", filepath.Join(lab, "vmlinuz"), "--initrd", filepath.Join(lab, "guest"), "--append", "console=ttyS0 quiet no_timer_check panic=-1",
		"--memory", "256M",
	}, l.net...)
	l.prepare()
	return l
}

// TestInside is the lab itself, in level 1. It ends with VMs that run, for level 1 to be killed.
func TestInside(t *testing.T) {
	l := newInside(t, firstBoot)
	for _, part := range []struct {
		name string
		run  func()
	}{
		{"Check", l.check},
		{"Guest", l.guest},
		{"Killed", l.killed},
		{"QEMUKilled", l.qemuKilled},
		{"Mixed", l.mixed},
		{"Pool", l.pool},
		{"Physical", l.physical},
		{"Node", l.node},
		{"Datapath", l.datapath},
		{"CloudInit", l.cloudInit},
		{"BeforeReboot", l.beforeReboot},
	} {
		t.Run(part.name, func(t *testing.T) {
			l.T = t
			part.run()
		})
	}
}

// TestInsideAgain is what comes after the crash of level 1, whose state is there still.
func TestInsideAgain(t *testing.T) {
	l := newInside(t, secondBoot)
	l.afterReboot()
}

func (l *inside) sh(format string, a ...any) string {
	l.Helper()
	return run(l.T, "sh", "-c", fmt.Sprintf(format, a...))
}

func (l *inside) command(args ...string) *exec.Cmd {
	return exec.Command(os.Getenv("VIRTLET_BIN"), append(slices.Clone(l.flags), args...)...)
}

func (l *inside) virtlet(args ...string) string {
	l.Helper()
	return run(l.T, os.Getenv("VIRTLET_BIN"), append(slices.Clone(l.flags), args...)...)
}

func (l *inside) state(name string) (st vm.State) {
	l.Helper()
	if err := json.Unmarshal([]byte(l.virtlet("inspect", "--json", name)), &st); err != nil {
		l.Fatal(err)
	}
	return st
}

// until waits for what comes by itself, as long as there is time for all of the lab: its machine may be a busy one.
func (l *inside) until(what string, ok func() bool) {
	l.Helper()
	end, _ := l.Deadline()
	for end = end.Add(-30 * time.Second); !ok(); time.Sleep(time.Second / 2) { // a look costs the guests processor time
		if time.Now().After(end) {
			l.Fatal("waited too long: ", what)
		}
	}
}

// prepare leaves the card as an SR-IOV operator does, and makes the world: one namespace on the card's wire, with a VLAN
// for each network, and the untagged one.
func (l *inside) prepare() {
	dev := "/sys/bus/pci/devices/" + pfAddr
	l.pf = l.sh("ls %s/net", dev)
	l.sh("ip link set %s up; echo 0 >%s/sriov_drivers_autoprobe; echo 2 >%s/sriov_numvfs", l.pf, dev, dev)
	world := l.sh("grep -l %s /sys/class/net/*/address | cut -d/ -f5", worldMAC)
	l.sh(`set -e
ip netns add world; ip link set %[1]s netns world name w; ip -n world link set w up; ip -n world addr add 203.0.113.1/24 dev w
for v in 100 200; do ip -n world link add link w name w.$v type vlan id $v; ip -n world link set w.$v up; done
ip -n world addr add 192.0.2.1/24 dev w.100; ip -n world addr add 198.51.100.1/24 dev w.200`, world)
	l.until("carrier of the card", func() bool { return l.sh("cat /sys/class/net/%s/carrier", l.pf) == "1" })
	for _, vf := range []string{blueVF, redVF} {
		// Where probing is switched off, a VF gets the driver that overrides the choice, or none.
		l.sh("o=/sys/bus/pci/devices/%[1]s/driver_override; echo igbvf >$o; echo %[1]s >/sys/bus/pci/drivers_probe; echo >$o; test -d /sys/bus/pci/devices/%[1]s/net", vf)
	}
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(l.dir, "standin"))
	}
	if err != nil {
		l.Fatal(err)
	}
	for name, c := range map[string]string{
		"blue": fmt.Sprintf(`"type":"standin","deviceID":%q,"vlan":100,"mac":%q,"address":"192.0.2.10/24","gateway":"192.0.2.1"`, blueVF, blueMAC),
		"red":  fmt.Sprintf(`"type":"standin","deviceID":%q,"vlan":200,"mac":%q,"address":"198.51.100.10/24"`, redVF, redMAC),
		"pool": fmt.Sprintf(`"type":"standin","pool":%q,"vlan":200,"mac":%q,"address":"198.51.100.10/24"`, redVF, redMAC),
	} {
		l.network(name, "{"+c+"}")
	}
}

// network configures one, of one plugin.
func (l *inside) network(name, plugin string) {
	l.Helper()
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, name, plugin)
	if err := os.WriteFile(filepath.Join(l.dir, name+".conflist"), []byte(conf), 0o600); err != nil {
		l.Fatal(err)
	}
}

// check looks at what `virtlet check` says of the card.
func (l *inside) check() {
	out, _ := l.command("check").CombinedOutput() // 1 for warnings of other things
	for _, want := range []string{pfAddr, "2 of 7 VFs", "IOMMU group"} {
		if !strings.Contains(string(out), want) {
			l.Errorf("check does not say %q:\n%s", want, out)
		}
	}
}

// start runs a VM and waits for its shell.
func (l *inside) start(name string, networks ...string) vm.State {
	l.Helper()
	args := append([]string{"run", "-d", "--name", name}, l.boot...)
	for _, n := range networks {
		args = append(args, "--network", n)
	}
	l.virtlet(args...)
	l.until("shell of "+name, func() bool { return strings.Contains(l.virtlet("logs", name), "guest#") })
	return l.state(name)
}

// in types a line in a guest, and gives what it says.
func (l *inside) in(name, format string, a ...any) string {
	l.Helper()
	return guest.Type(l.T, l.command("console", name), fmt.Sprintf(format, a...))
}

// done says whether the line ended well.
func done(said string) bool { return strings.Contains(said, "\ndone 0") }

// device gives the name of the guest's NIC with a MAC.
func (l *inside) device(name, mac string) string {
	l.Helper()
	said := l.in(name, "grep -l %s /sys/class/net/*/address", mac)
	m := regexp.MustCompile(`/sys/class/net/([a-z0-9]+)/address`).FindStringSubmatch(said)
	if m == nil {
		l.Fatalf("the guest has no NIC with MAC %s: %s\n%s", mac, said, l.in(name, "ip link; dmesg | tail -20"))
	}
	return m[1]
}

func (l *inside) driver(vf string) string {
	return l.sh("basename $(readlink -f /sys/bus/pci/devices/%s/driver)", vf)
}

// passed looks at a VF that is with a guest.
func (l *inside) passed(st vm.State, i int, vf, mac string, number, vlan int) {
	l.Helper()
	n := st.NICs[i]
	if n.VF == nil || n.VF.BDF != vf || n.VF.PF != l.pf || n.VF.Index != number || n.VF.VLAN != vlan || n.MAC.String() != mac || n.MTU != 1400 {
		l.Errorf("NIC %+v, VF %+v", n, n.VF)
	}
	if d := l.driver(vf); d != "vfio-pci" {
		l.Errorf("%s is with driver %s", vf, d)
	}
	want := fmt.Sprintf("link/ether %s", mac)
	if said := l.sh("ip link show %s | grep 'vf %d '", l.pf, number); !strings.Contains(said, want) || !strings.Contains(said, fmt.Sprintf("vlan %d", vlan)) {
		l.Errorf("at the PF: %s", said)
	}
	if said, want := l.virtlet("inspect", st.Config.Name), fmt.Sprintf("PCI %s, VF %d of %s, VLAN %d, IOMMU group %d, by /dev/vfio/%[5]d", vf, number, l.pf, vlan, n.VF.Group); !strings.Contains(said, want) {
		l.Errorf("inspect does not say %q:\n%s", want, said)
	}
}

// returned looks at a VF that is back: what DEL found, and what there is after it.
func (l *inside) returned(vf, mac, addr string, vlan int) {
	l.Helper()
	seen, err := os.ReadFile(seenAtDel + vf)
	if err != nil {
		l.Fatal(err)
	}
	os.Remove(seenAtDel + vf)
	for _, want := range []string{addr, "198.18.0.0/24", "mtu 1400", "state UP", "link/ether " + mac, fmt.Sprintf("vlan %d", vlan)} {
		if !strings.Contains(string(seen), want) {
			l.Errorf("DEL did not find %q:\n%s", want, seen)
		}
	}
	if d := l.driver(vf); d != "igbvf" {
		l.Errorf("%s is with driver %s", vf, d)
	}
	if o := l.sh("cat /sys/bus/pci/devices/%s/driver_override", vf); o != "(null)" {
		l.Errorf("%s has the override %s", vf, o)
	}
	l.sh("test -d /sys/bus/pci/devices/%s/net/back*", vf)
	if left := l.sh("ip netns list | cut -d\" \" -f1"); left != "world" {
		l.Errorf("namespaces: %s", left)
	}
}

// guest has one VF: its MAC and its VLAN, on the wire and in no other way.
func (l *inside) guest() {
	st := l.start("one", "blue")
	l.passed(st, 0, blueVF, blueMAC, 0, 100)
	if said := l.sh("ip -n virtlet-one -br link"); strings.Contains(said, "eth0") {
		l.Errorf("the namespace still has it: %s", said)
	}
	if uid := l.sh("stat -c %%u /proc/%d", st.QEMU.PID); uid == "0" {
		l.Error("QEMU runs as root")
	}
	if said := l.virtlet("inspect", "--check", "one"); !strings.Contains(said, "joined as it was") {
		l.Error(said)
	}
	dev := l.device("one", blueMAC)
	wire := listen(l.T, "world", "w")
	// As cloud-init would.
	if said := l.in("one", "ip link set %[1]s up && ip addr add 192.0.2.10/24 dev %[1]s && ip addr add 203.0.113.10/24 dev %[1]s && sleep 3; ping -c 3 -w 30 192.0.2.1", dev); !done(said) {
		l.Errorf("the network is not reached: %s", said)
	}
	if said := l.in("one", "ping -c 3 -w 5 203.0.113.1"); done(said) {
		l.Errorf("the untagged network is reached: %s", said)
	}
	tagged := wire.stop()
	if tagged[frame{blueMAC, 100}] == 0 || len(tagged) != 1 {
		l.Errorf("frames of guests on the wire: %v; all have to be of %s on VLAN 100", tagged, blueMAC)
	}
	l.Logf("on the wire: %v", tagged)

	wire = listen(l.T, "world", "w")
	said := l.in("one", "ip link set %[1]s down; ip link set %[1]s address %[2]s; ip link set %[1]s up; ip addr add 192.0.2.10/24 dev %[1]s; ping -c 2 -w 5 192.0.2.1; true", dev, falseMAC)
	for f := range wire.stop() {
		if f.mac == falseMAC {
			l.Errorf("a frame with the false MAC is on the wire: %v: %s", f, said)
		}
	}
	l.passed(st, 0, blueVF, blueMAC, 0, 100)
	l.virtlet("rm", "-f", "one")
	l.returned(blueVF, blueMAC, "192.0.2.10/24", 100)
}

// killed loses its supervisor; gc brings all back.
func (l *inside) killed() {
	st := l.start("two", "blue")
	if err := unix.Kill(st.Supervisor.PID, unix.SIGKILL); err != nil {
		l.Fatal(err)
	}
	l.until("the end of QEMU", func() bool { return unix.Kill(st.QEMU.PID, 0) == unix.ESRCH })
	if d := l.driver(blueVF); d != "vfio-pci" {
		l.Errorf("%s is with driver %s", blueVF, d)
	}
	if said := l.virtlet("gc", "--dry-run"); !strings.Contains(said, blueVF) {
		l.Errorf("gc does not name %s:\n%s", blueVF, said)
	}
	l.virtlet("gc")
	l.returned(blueVF, blueMAC, "192.0.2.10/24", 100)
}

// mixed has a veth and two VFs.
func (l *inside) mixed() {
	st := l.start("three", "virtlet", "blue", "red")
	if len(st.NICs) != 3 || st.NICs[0].VF != nil {
		l.Fatalf("NICs %+v", st.NICs)
	}
	l.passed(st, 1, blueVF, blueMAC, 0, 100)
	l.passed(st, 2, redVF, redMAC, 1, 200)
	veth := l.device("three", st.NICs[0].MAC.String())
	if said := l.in("three", "ip link set %[1]s up; udhcpc -i %[1]s -n -q -s /bin/true", veth); !strings.Contains(said, st.NICs[0].Addrs[0].Addr().String()) {
		l.Errorf("the veth's NIC has no lease: %s", said)
	}
	for _, n := range []struct{ mac, addr, gw string }{{blueMAC, "192.0.2.10/24", "192.0.2.1"}, {redMAC, "198.51.100.10/24", "198.51.100.1"}} {
		dev := l.device("three", n.mac)
		if said := l.in("three", "ip link set %[1]s up && ip addr add %[2]s dev %[1]s && sleep 3; ping -c 3 -w 30 -I %[1]s %[3]s", dev, n.addr, n.gw); !done(said) {
			l.Errorf("%s is not reached: %s", n.gw, said)
		}
	}
	l.virtlet("rm", "-f", "three")
	l.returned(blueVF, blueMAC, "192.0.2.10/24", 100)
	l.returned(redVF, redMAC, "198.51.100.10/24", 200)
}
