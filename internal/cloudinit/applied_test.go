package cloudinit

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// appliers take what a renderer wrote below $1 and give it to the kernel. $2 is the directory of hack/cloudinit.sh. They
// run in a guest's namespace with mounts of their own, and end with their standard input.
var appliers = map[string]string{
	"networkd": `networkd "$1"/etc/systemd/network`,
	"netplan": `LD_LIBRARY_PATH=$(echo "$2"/usr/lib/*-linux-gnu) "$2"/usr/libexec/netplan/generate --root-dir "$1"
		networkd "$1"/run/systemd/network`,
	"eni": `PATH=$2/sbin:$PATH
		mount -t overlay -o lowerdir="$2/lib:/usr/lib" none /usr/lib
		ifup --no-scripts --state-dir "$1" -i "$1"/etc/network/interfaces.d/50-cloud-init --allow=auto --all --exclude=lo
		read -r _ || :`,
	// The program in user-data is for those that take nothing else.
	"user-data": `sh "$1"/boothook; read -r _ || :`,
}

// applierStart is what they share. systemd-networkd takes a /sys that it cannot write to for a container's, where no udev
// is to be waited for.
const applierStart = `set -e
mount --make-rprivate /
mount -t sysfs sysfs /sys
networkd() {
	mount -t tmpfs none /run
	mkdir -p /run/systemd/network /run/systemd/netif
	cp "$1"/* /run/systemd/network/
	sed -i s/^PermanentMACAddress/MACAddress/ /run/systemd/network/* # a veth has none
	chown -R systemd-network: /run/systemd/netif
	mount -o remount,bind,ro /sys
	SYSTEMD_LOG_TARGET=console /lib/systemd/systemd-networkd &
	read -r _ || :
	kill $!
	wait
}
`

// TestKernelHasWhatWasRendered gives what the real cloud-init rendered to the programs that it is for, and compares what
// the kernel then has with what the CNI result said.
func TestKernelHasWhatWasRendered(t *testing.T) {
	testnet.NeedRoot(t)
	d := debian(t)
	for _, name := range []string{"plain-dual", "ipv6-only", "calico-dual", "ptp", "on-link-route", "several-addresses", "two-with-metrics", "largest-mtu", "layer-2"} {
		c := netCases[name]
		for applier, script := range appliers {
			f := forms["v1"]
			if c.refusesV1 {
				f = forms["v2"]
			}
			if applier == "user-data" {
				f = form{version: InUserData, kind: NoCloud, file: "user-data"}
			} else if !slices.Contains(f.renderers, applier) {
				continue
			}
			t.Run(name+"/"+applier, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				file := f.files(t, c.interfaces)[f.file]
				if f.version == InUserData {
					n, _, err := NewNetwork(f.version, c.interfaces)
					if err != nil {
						t.Fatal(err)
					}
					// A veth is no device, and the machine's resolv.conf is not the guest's.
					hook := strings.NewReplacer(`[ -e "$d/device" ] &&`, "", "/etc/resolv.conf", dir+"/resolv.conf", "/run/systemd/resolve", dir).Replace(string(n.bootHook()))
					file = []byte(hook)
				}
				if err := os.WriteFile(filepath.Join(dir, "boothook"), file, 0o600); err != nil {
					t.Fatal(err)
				}
				if f.version != InUserData {
					job, err := json.Marshal([][]string{{"-p", filepath.Join(dir, "boothook"), "-k", f.input, "-d", dir, "-D", renderers[applier], "-O", applier}})
					if err != nil {
						t.Fatal(err)
					}
					python(t, job, "testdata/convert.py")
				}
				guest := testnet.New(t, "ci")
				for _, in := range c.interfaces {
					guest.MustRun("ip", "link", "add", in.NIC.Name, "mtu", "65535", "address", in.NIC.MAC.String(), "type", "veth", "peer", "name", "p-"+in.NIC.Name)
					guest.MustRun("ip", "link", "set", "p-"+in.NIC.Name, "up")
					guest.MustRun("ip", "link", "set", in.NIC.Name, "mtu", "1500")
				}
				apply(t, guest, applierStart+script, dir, d)
				for _, in := range c.interfaces {
					checkKernel(t, guest, in.NIC)
				}
			})
		}
	}
}

func apply(t *testing.T, guest *testnet.Namespace, script, dir, debian string) {
	t.Helper()
	cmd := exec.Command("unshare", "--mount-proc", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", dir, debian)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	guest.Must(cmd.Start)
	t.Cleanup(func() {
		stdin.Close()
		err := cmd.Wait()
		if t.Failed() {
			t.Logf("%v\n%s\n%s", err, out.String(), guest.MustRun("ip", "addr"))
		}
	})
}

// checkKernel waits until a guest's kernel has the MTU, the addresses and the routes of a NIC, and nothing else.
func checkKernel(t *testing.T, guest *testnet.Namespace, n nic.NIC) {
	t.Helper()
	want := []string{fmt.Sprintf("mtu %d", n.MTU)}
	for _, a := range n.Addrs {
		want = append(want, a.String())
	}
	for _, r := range n.Routes {
		if r.OnLink() && within(r.Dst, n) {
			continue
		}
		if r.Dst.Addr().Is6() && r.Metric == 0 {
			r.Metric = kernelMetric6
		}
		gw := ""
		if r.Gw.IsValid() {
			gw = r.Gw.String()
		}
		want = append(want, routeText(r.Dst.String(), gw, fmt.Sprint(r.Metric)))
	}
	slices.Sort(want)
	diff := ""
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if diff = cmp.Diff(want, kernelState(t, guest, n.Name)); diff == "" {
			return
		}
	}
	t.Errorf("%s (-want +got):\n%s", n.Name, diff)
}

// kernelState gives what the kernel has on an interface, but for what it makes itself.
func kernelState(t *testing.T, guest *testnet.Namespace, name string) (state []string) {
	t.Helper()
	var links []struct {
		MTU   int
		Infos []struct {
			Local, Scope string
			Bits         int `json:"prefixlen"`
		} `json:"addr_info"`
	}
	query := func(into any, args ...string) {
		if err := json.Unmarshal([]byte(guest.MustRun("ip", append([]string{"-j"}, args...)...)), into); err != nil {
			t.Fatal(err)
		}
	}
	query(&links, "addr", "show", "dev", name)
	state = append(state, fmt.Sprintf("mtu %d", links[0].MTU))
	for _, i := range links[0].Infos {
		if i.Scope == "global" {
			state = append(state, fmt.Sprintf("%s/%d", i.Local, i.Bits))
		}
	}
	for _, family := range []string{"-4", "-6"} {
		var all []struct {
			Dst, Gateway, Protocol string
			Metric                 int
		}
		query(&all, family, "route", "show", "dev", name)
		for _, r := range all {
			if r.Protocol == "kernel" || strings.HasPrefix(r.Dst, "fe80:") || strings.HasPrefix(r.Dst, "ff00:") {
				continue
			}
			switch {
			case r.Dst == "default" && family == "-4":
				r.Dst = "0.0.0.0/0"
			case r.Dst == "default":
				r.Dst = "::/0"
			case !strings.Contains(r.Dst, "/"):
				a := netip.MustParseAddr(r.Dst)
				r.Dst = netip.PrefixFrom(a, a.BitLen()).String()
			}
			if family == "-6" && r.Metric == 1 { // what route(8) says where nothing else is said
				r.Metric = kernelMetric6
			}
			state = append(state, routeText(r.Dst, r.Gateway, fmt.Sprint(r.Metric)))
		}
	}
	slices.Sort(state)
	return state
}
