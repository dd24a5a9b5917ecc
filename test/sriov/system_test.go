package sriov

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// cloudInit boots two whole systems, each with a VF that the real cloud-init configures by its MAC: one by version 1 of the
// network configuration, one by version 2.
func (l *inside) cloudInit() {
	user := filepath.Join(l.dir, "user-data")
	// What it has when cloud-init has the network, on the console.
	const say = "#cloud-config\nbootcmd:\n- [sh, -c, \"(echo; echo told-begin; ip link; ip -br addr; ip route; echo told-end) >/dev/ttyS0\"]\n"
	if err := os.WriteFile(user, []byte(say), 0o600); err != nil {
		l.Fatal(err)
	}
	guests := []struct {
		name, network, version, vf, mac, addr, route string
		vlan                                         int
	}{
		{"v1", "blue", "v1", blueVF, blueMAC, "192.0.2.10/24", "198.18.0.0/24 via 192.0.2.1 dev eth0", 100},
		{"v2", "red", "v2", redVF, redMAC, "198.51.100.10/24", "198.18.0.0/24 dev eth0", 200}, // version 1 has no routes on the link
	}
	begin := time.Now()
	wire := listen(l.T, "world", "w")
	for _, g := range guests {
		l.virtlet(append([]string{
			"run", "-d", "--name", g.name, "--network", g.network, "--network-config", g.version, "--user-data", user,
			"--kernel", filepath.Join(l.lab, "vmlinuz"), "--initrd", filepath.Join(l.lab, "system"),
			"--append", "console=ttyS0 quiet no_timer_check panic=-1 systemd.show_status=0", "--memory", "512M",
			filepath.Join(os.Getenv(debianEnv), "disk.qcow2"),
		}, l.net...)...)
	}
	defer func() {
		if l.Failed() {
			for _, g := range guests {
				out, _ := l.command("logs", g.name).CombinedOutput()
				l.Logf("console of %s:\n%s", g.name, out)
			}
		}
	}()
	for i, g := range guests {
		told := ""
		l.until("cloud-init of "+g.name, func() bool {
			time.Sleep(2 * time.Second) // it is slow already
			_, after, begun := strings.Cut(l.virtlet("logs", g.name), "told-begin")
			var ended bool
			told, _, ended = strings.Cut(after, "told-end")
			return begun && ended
		})
		l.Logf("%s has told after %s", g.name, time.Since(begin).Round(time.Second))
		for _, want := range []string{"eth0", g.mac, g.addr, g.route, "mtu 1400"} {
			if !strings.Contains(told, want) {
				l.Errorf("%s does not have %q:\n%s", g.name, want, told)
			}
		}
		addr, _, _ := strings.Cut(g.addr, "/")
		l.sh("ip netns exec world ping -c 3 -i 0.2 -w 30 %s", addr)
		l.passed(l.state(g.name), 0, g.vf, g.mac, i, g.vlan)
	}
	seen := wire.stop()
	for f := range seen {
		if f != (frame{blueMAC, 100}) && f != (frame{redMAC, 200}) {
			l.Errorf("frames of %v are on the wire", f)
		}
	}
	l.Logf("on the wire: %s", fmt.Sprint(seen))
	l.virtlet("rm", "-f", guests[0].name, guests[1].name)
	for _, g := range guests {
		l.returned(g.vf, g.mac, g.addr, g.vlan)
	}
}
