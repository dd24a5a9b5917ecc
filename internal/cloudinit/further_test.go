package cloudinit

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// dhclientApplier is the applier of eni with what dhclient needs: it writes to /etc and /var/lib/dhcp, which are the
// guest's own here.
const dhclientApplier = `mkdir "$1/lib"
	mount -t tmpfs none "$1/lib"
	mkdir "$1/lib/up" "$1/lib/work"
	mount -t overlay -o "lowerdir=/etc,upperdir=$1/lib/up,workdir=$1/lib/work" none /etc
	mount -t tmpfs none /var/lib/dhcp
	mount -t tmpfs none /run
`

// TestFurtherAddressBesideDHCP has the programs that cloud-init renders for ask a real DHCP server for the first address,
// and take the fixed second one beside it.
func TestFurtherAddressBesideDHCP(t *testing.T) {
	testnet.NeedRoot(t)
	d := debian(t)
	for _, program := range []string{"dnsmasq", "dhclient"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs ", program)
		}
	}
	n := nic.NIC{MTU: 1400, Addrs: prefixes("10.1.0.5/24", "10.2.0.5/24"), Routes: routes("0.0.0.0/0 via 10.1.0.1")}
	for _, applier := range []string{"networkd", "netplan", "eni"} {
		t.Run(applier, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := forms["v1"].files(t, dhcp(static(n), 0, true, false))["network-config"]
			in := filepath.Join(dir, "in")
			if err := os.WriteFile(in, file, 0o600); err != nil {
				t.Fatal(err)
			}
			job, err := json.Marshal([][]string{{"-p", in, "-k", "yaml", "-d", dir, "-D", renderers[applier], "-O", applier}})
			if err != nil {
				t.Fatal(err)
			}
			python(t, job, "testdata/convert.py")
			guest, server := testnet.New(t, "ci"), testnet.New(t, "cid")
			guest.MustRun("ip", "link", "add", "eth0", "address", mac(1).String(), "type", "veth", "peer", "name", "far")
			guest.MustRun("ip", "link", "set", "far", "netns", server.Name)
			server.MustRun("ip", "addr", "add", "10.1.0.1/24", "dev", "far")
			server.MustRun("ip", "link", "set", "far", "up")
			serve(t, server)
			script := appliers[applier]
			if applier == "eni" {
				script = dhclientApplier + script
			}
			apply(t, guest, applierStart+script, dir, d)
			want := []string{"mtu 1400", "10.1.0.5/24", "10.2.0.5/24"}
			var got []string
			for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				got = kernelState(t, guest, "eth0")
				missing := slices.ContainsFunc(want, func(s string) bool { return !slices.Contains(got, s) })
				if route := slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "0.0.0.0/0 via 10.1.0.1 ") }); !missing && route {
					return
				}
			}
			t.Errorf("the kernel has %q, want %q and a default route", got, want)
		})
	}
}

// serve answers DHCP on far until the test ends.
func serve(t *testing.T, server *testnet.Namespace) {
	t.Helper()
	cmd := exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0", "--interface=far", "--bind-interfaces",
		"--leasefile-ro", "--dhcp-option=option:mtu,1400", // what ifupdown does not set on such an interface
		"--dhcp-authoritative", "--no-ping", "--dhcp-range=10.1.0.5,10.1.0.5,255.255.255.0,1h", "--user=root", "--log-facility=-")
	server.Must(cmd.Start)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}
