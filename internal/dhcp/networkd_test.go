package dhcp

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// systemd-networkd asks for a prefix beside the address, by rapid commit, and heeds the routes of a second router. It
// gets both families, from two servers on one TAP.
func TestNetworkd(t *testing.T) {
	const networkd = "/lib/systemd/systemd-networkd"
	if _, err := os.Stat(networkd); err != nil {
		t.Skip("needs systemd-networkd (Debian: systemd)")
	}
	n := nic.NIC{
		Name: "eth0", MAC: mac, MTU: 1450, Addrs: prefixes("198.51.100.2/24", "2001:db8::2/64"),
		Routes: routes("2001:db8:9::/48 via 2001:db8::9", "0.0.0.0/0 via 198.51.100.1", "::/0 via 2001:db8::1"), DNS: netDNS6,
	}
	l := serve6(t, n, 0, "2001:db8::1/64", "2001:db8::9/64", "198.51.100.1/24")
	lease, _, _ := NewLease(n, "vm-1")
	four := &Server{Lease: lease, Conn: l.listen(t)}
	start(t, four)
	l.node.MustRun("ip", "addr", "add", "2001:db8:9::1/128", "dev", "lo")
	outside := testnet.NewCapture(t, l.node.Namespace, l.veth)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "eth0.network"), "[Match]\nName=eth0\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n")
	// It keeps its files below /run, and takes a /sys that it cannot write to for a container's, where no udev is.
	p := l.client(t, "unshare", "--mount", "sh", "-c", `mount -t tmpfs none /run && mkdir -p /run/systemd/network /run/systemd/netif &&
		cp "$1" /run/systemd/network/ && chown systemd-network /run/systemd/netif && mount -o remount,bind,ro /sys &&
		SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console exec "$2"`, "sh", filepath.Join(dir, "eth0.network"), networkd)
	eventually(t, "address", func() bool { return strings.Contains(l.guest.MustRun("ip", "-6", "addr"), "2001:db8::2/128") })
	eventually(t, "IPv4 address", func() bool { return strings.Contains(l.guest.MustRun("ip", "-4", "addr"), "198.51.100.2/24") })
	second := "2001:db8:9::/48 via " + l.server.Lease.Routers[1].Source.String()
	eventually(t, "routes", func() bool {
		return strings.Contains(l.routes(), second) && strings.Contains(l.routes(), "default via")
	})
	l.reaches(t, far)
	l.reaches(t, netip.MustParseAddr("2001:db8:9::1"))
	if !l.guest.Ping(netip.MustParseAddr("198.51.100.1")) {
		t.Error("the guest does not reach its IPv4 gateway")
	}
	link, err := l.guest.Link().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	state := fmt.Sprintf("/proc/%d/root/run/systemd/netif/links/%d", p.Pid, link.Attrs().Index)
	eventually(t, "resolvers", func() bool {
		b, _ := os.ReadFile(state)
		return strings.Contains(string(b), "2001:db8::53") && strings.Contains(string(b), "192.0.2.53")
	})
	if s := four.Stats(); s.Acks == 0 || s.Ignored+s.Malformed+s.Unsent != 0 {
		t.Errorf("counters of IPv4: %+v", s)
	}
	if s := l.server.Stats(); s.Solicits != 1 || s.Replies == 0 || s.Ignored+s.Malformed+s.Unsent != 0 {
		t.Errorf("counters: %+v", s)
	}
	if leaked := outside.Match(l.inside); len(leaked) > 0 {
		t.Errorf("on the node's side:\n%s", testnet.Dump(leaked))
	}
}
