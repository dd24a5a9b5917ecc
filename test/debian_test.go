package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
	"github.com/virtlet/virtlet/internal/vm"
)

// Tests with a whole Debian system that cloud-init configures (hack/debian.sh). A boot takes the better part of a
// minute without KVM, so there are few of them, and each has many things looked at.

// debianBootTime is how long its SSH server may take to answer on a busy machine.
const debianBootTime = 5 * time.Minute

// debian is a lab with that system.
type debian struct {
	*lab
	dir string // the image's
	key string // a private SSH key; .pub is beside it
}

func newDebian(t *testing.T) *debian {
	t.Helper()
	dir := os.Getenv("VIRTLET_DEBIAN")
	if dir == "" {
		t.Skip("needs the Debian image: run `make test-guest`")
	}
	for _, program := range []string{"ssh", "ssh-keygen"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs openssh-client: ", err)
		}
	}
	d := &debian{lab: bareLab(t), dir: dir, key: filepath.Join(t.TempDir(), "key")}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", d.key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	return d
}

// ssh runs a command in a guest by `virtlet ssh` and gives what it printed, its errors, and the exit code.
func (d *debian) ssh(stdin string, args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	var out, said bytes.Buffer
	// The tests' machine may have keys and an agent of its own.
	cmd := d.command(append([]string{"ssh", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "--timeout", debianBootTime.String()}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &said
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	return out.String(), said.String(), cmd.ProcessState.ExitCode()
}

// must is ssh of a command that succeeds.
func (d *debian) must(args ...string) string {
	d.t.Helper()
	out, said, code := d.ssh("", args...)
	if code != 0 {
		d.t.Fatalf("virtlet ssh %q: exit code %d\n%s", args, code, said)
	}
	return out
}

// settled waits until cloud-init has done all that it has to do.
func (d *debian) settled(name string) {
	d.t.Helper()
	// Exit code 1 is an error, told by the status itself; ssh's own is 255.
	if out, said, code := d.ssh("", name, "--", "cloud-init status --wait --long"); code != 0 || !strings.Contains(out, "status: done") {
		d.t.Fatalf("cloud-init: exit code %d\n%s\n%s", code, out, said)
	}
}

// ipLink is a link as `ip -j addr` shows it, with its routes and resolvers.
type ipLink struct {
	Name  string `json:"ifname"`
	MAC   string `json:"address"`
	MTU   int    `json:"mtu"`
	Addrs []struct {
		Local netip.Addr `json:"local"`
		Bits  int        `json:"prefixlen"`
	} `json:"addr_info"`
}

type ipRoute struct {
	Dst string `json:"dst"` // "default", an address or a prefix
	Gw  string `json:"gateway"`
	Dev string `json:"dev"`
}

// sameInDebian compares what the CNI plugins configured with what the guest has.
func (d *debian) sameInDebian(st vm.State) {
	t, name := d.t, st.Config.Name
	t.Helper()
	// IPv6 comes in its own time.
	const count = `for i in $(seq 60); do [ $(ip -br -6 addr show scope global -tentative | wc -l) -ge %d ] && break; sleep 1; done; `
	six := 0
	for _, n := range st.NICs {
		if slices.ContainsFunc(n.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
			six++
		}
	}
	out := d.must(name, "--", fmt.Sprintf(count, six)+"hostname -f; ip -j addr; ip -j route; ip -j -6 route; grep -v ^# /run/systemd/resolve/resolv.conf")
	host, out, _ := strings.Cut(out, "\n")
	if host != st.Config.Hostname {
		t.Errorf("host name %q, want %q", host, st.Config.Hostname)
	}
	var links []ipLink
	var routes, routes6 []ipRoute
	dec := json.NewDecoder(strings.NewReader(out))
	for _, v := range []any{&links, &routes, &routes6} {
		if err := dec.Decode(v); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
	}
	routes = append(routes, routes6...)
	resolv := strings.Fields(out[dec.InputOffset():])
	if len(links) != len(st.NICs)+1 {
		t.Fatalf("the guest has %d links, want lo and %d", len(links), len(st.NICs))
	}
	for _, want := range st.NICs {
		i := slices.IndexFunc(links, func(l ipLink) bool { return l.MAC == want.MAC.String() })
		if i < 0 {
			t.Errorf("no link has %s of %s: %+v", want.MAC, want.Name, links)
			continue
		}
		got := links[i]
		if seeded := st.Config.NetworkConfig != "none" && st.Config.Seed != "none"; seeded && got.Name != want.Name {
			t.Errorf("%s is called %s", want.Name, got.Name)
		}
		if got.MTU != want.MTU {
			t.Errorf("%s: mtu %d, want %d", want.Name, got.MTU, want.MTU)
		}
		for _, p := range want.Addrs {
			has := false
			for _, a := range got.Addrs {
				// By DHCPv6 an address comes without its prefix.
				has = has || a.Local == p.Addr() && (a.Bits == p.Bits() || p.Addr().Is6())
			}
			if !has {
				t.Errorf("%s: addresses %+v, want %s", want.Name, got.Addrs, p)
			}
		}
		if wrong := missing(st, want, got.Name, routes); len(wrong) > 0 {
			t.Errorf("%s: no routes %q among %+v", want.Name, wrong, routes)
		}
		for _, s := range want.DNS.Servers {
			if !slices.Contains(resolv, s.String()) {
				t.Errorf("%s: resolv.conf %q, want %s", want.Name, resolv, s)
			}
		}
		for _, s := range want.DNS.Search {
			// netplan takes none by DHCP: docs/networking.md.
			if st.Config.GuestNetwork == "static" && !slices.Contains(resolv, s) {
				t.Errorf("%s: resolv.conf %q, want %s", want.Name, resolv, s)
			}
		}
	}
	defaults := 0
	for _, r := range routes {
		if r.Dst == "default" {
			defaults++
		}
	}
	wanted := 0
	for _, n := range st.NICs {
		for _, r := range n.Routes {
			if r.Dst.Bits() == 0 {
				wanted++
			}
		}
	}
	if defaults != wanted {
		t.Errorf("%d default routes, want %d: %+v", defaults, wanted, routes)
	}
}

// missing gives the routes of a NIC that the guest does not have.
func missing(st vm.State, want nic.NIC, dev string, got []ipRoute) (wrong []string) {
	for _, r := range want.Routes {
		gw := r.Gw
		for _, l := range st.Leases6 { // the address that stands for the gateway
			for _, via := range l.Routers {
				if l.MAC == want.MAC && via.Gateway == gw {
					gw = via.Source
				}
			}
		}
		dst := r.Dst.String()
		if r.Dst.Bits() == 0 {
			dst = "default"
		}
		// What the seed says has the gateway itself.
		by := []string{gw.String(), r.Gw.String()}
		if !slices.ContainsFunc(got, func(g ipRoute) bool { return g.Dst == dst && g.Dev == dev && slices.Contains(by, g.Gw) }) {
			wrong = append(wrong, fmt.Sprintf("%s via %s dev %s", dst, gw, dev))
		}
	}
	return wrong
}

// reached checks that each address of the guest answers the node.
func (d *debian) reached(st vm.State) {
	d.t.Helper()
	for _, n := range st.NICs {
		for _, p := range n.Addrs {
			if out, err := exec.Command("ping", "-c", "2", "-i", "0.2", "-w", "30", p.Addr().String()).CombinedOutput(); err != nil {
				d.t.Errorf("ping %s of %s: %v\n%s", p.Addr(), n.Name, err, out)
			}
		}
	}
}

// static boots a VM whose addresses are in its seed, and checks that it has them without having asked by DHCP.
func (d *debian) static(name string, run []string) vm.State {
	d.t.Helper()
	d.virtlet(append(slices.Clone(run), "-d", "--name", name, "--guest-network", "static", "--ssh-key", d.key+".pub", "--dns-search", "example.test")...)
	st := d.state(name)
	d.must(name, "--", "true")
	d.settled(name)
	d.sameInDebian(st)
	d.reached(st)
	d.honest(name)
	for _, c := range d.counters(name) {
		if c.DHCP != nil && c.DHCP.Discovers > 0 {
			d.t.Errorf("%s was asked for by DHCP: %+v", c.NIC, *c.DHCP)
		}
	}
	return st
}

// Debian is configured in each way that virtlet has. A row is one VM on two networks; its boots may be several.
func TestDebian(t *testing.T) {
	tests := []struct {
		name  string
		boots func(d *debian, on ...string) // on: flags that attach the networks
	}{
		{"nocloud", func(d *debian, on ...string) {
			user := filepath.Join(d.t.TempDir(), "user-data")
			if err := os.WriteFile(user, []byte("#cloud-config\nruncmd:\n- [touch, /run/user-data]\n"), 0o644); err != nil {
				d.t.Fatal(err)
			}
			d.virtlet(append(on, "-d", "--name", "deb", "--hostname", "deb.example.test", "--ssh-key", d.key+".pub", "--user-data", user,
				"--dns", "192.0.2.53", "--dns-search", "example.test", filepath.Join(d.dir, "disk.qcow2"))...)
			st := d.state("deb")
			// The key is found beside the public one.
			if out, said, code := d.ssh("to the guest", "deb", "--", "cat; echo error >&2; exit 7"); out != "to the guest" || code != 7 || !strings.HasSuffix(said, "error\n") {
				d.t.Fatalf("exit code %d, output %q, error %q", code, out, said)
			}
			d.settled("deb")
			d.sameInDebian(st)
			d.reached(st)
			d.must("deb", "--", "test -e /run/user-data && sudo -n true && cloud-id | grep -qx nocloud")
			// By each address, and not as somebody else; the key that the guest showed first is expected of all.
			to6 := testnet.Addr(d.t, st.NICs[1], 6)
			if out := d.must("--address", to6.String(), "deb", "--", "echo $SSH_CONNECTION"); !strings.Contains(out, to6.String()) {
				d.t.Errorf("connected by %q, want %s", out, to6)
			}
			if _, said, code := d.ssh("", "-l", "nobody", "deb"); code != 255 || !strings.Contains(said, "Permission denied") {
				d.t.Errorf("as nobody: exit code %d, %q", code, said)
			}
			known := filepath.Join(d.flags[3], "deb", "known_hosts")
			if b, err := os.ReadFile(known); err != nil || bytes.Count(b, []byte("\n")) != 1 || !bytes.Contains(b, []byte(" ssh-ed25519 ")) {
				d.t.Errorf("known hosts %q, %v", b, err)
			}
			other, err := os.ReadFile(d.key + ".pub")
			if err == nil {
				err = os.WriteFile(known, append([]byte("deb "), other...), 0o600)
			}
			if err != nil {
				d.t.Fatal(err)
			}
			if _, said, code := d.ssh("", "deb", "--", "true"); code != 255 || !strings.Contains(said, "IDENTIFICATION HAS CHANGED") {
				d.t.Errorf("with another host key: exit code %d, %q", code, said)
			}
			d.honest("deb")
			d.virtlet("stop", "-t", "120s", "deb")
			if st := d.state("deb"); st.Status != vm.Stopped || st.Exit.Reason != vm.Shutdown {
				d.t.Errorf("ended as %s, %+v", st.Status, st.Exit)
			}
			d.virtlet("rm", "deb")
			if _, err := os.Stat(known); err == nil {
				d.t.Error("the host key is still there")
			}
		}},
		// Without an image of ours cloud-init has no seed: the system asks by DHCP, and lets nobody in.
		{"DHCP alone", func(d *debian, on ...string) {
			d.virtlet(append(on, "-d", "--name", "deb", "--seed", "none", filepath.Join(d.dir, "disk.qcow2"))...)
			if _, said, code := d.ssh("", "-i", d.key, "deb"); code != 255 || !strings.Contains(said, "Permission denied (publickey).") {
				d.t.Fatalf("exit code %d, %q", code, said)
			}
			d.reached(d.state("deb"))
			d.honest("deb")
			d.virtlet("rm", "-f", "deb")
		}},
		{"v2 static", func(d *debian, on ...string) {
			d.static("deb", append(on, "--network-config", "v2", filepath.Join(d.dir, "disk.qcow2")))
			d.must("deb", "--", "cloud-id | grep -qx nocloud")
			d.virtlet("rm", "-f", "deb")
		}},
		{"ConfigDrive", func(d *debian, on ...string) {
			d.static("deb", append(on, "--seed", "configdrive", filepath.Join(d.dir, "disk.qcow2")))
			d.must("deb", "--", "grep -q DataSourceConfigDrive /run/cloud-init/result.json")
			d.virtlet("rm", "-f", "deb")
		}},
		// What a guest writes stays, and at its next boot it has the pod's new addresses and MACs.
		{"v1 static on a disk that stays", func(d *debian, on ...string) {
			disk := filepath.Join(d.t.TempDir(), "disk.qcow2")
			if out, err := exec.Command("cp", filepath.Join(d.dir, "disk.qcow2"), disk).CombinedOutput(); err != nil {
				d.t.Fatalf("%v: %s", err, out)
			}
			on = append(on, "--disk", disk, "--root")
			first := d.static("first", on)
			d.must("first", "--", "cat /etc/ssh/ssh_host_ed25519_key.pub >kept; sync")
			d.virtlet("stop", "-t", "120s", "first")
			d.virtlet("rm", "first")
			second := d.static("second", on)
			for i := range first.NICs {
				if a, b := first.NICs[i], second.NICs[i]; slices.Equal(a.Addrs, b.Addrs) || a.MAC == b.MAC {
					d.t.Fatalf("%s has what it had, so this shows nothing: %+v", a.Name, b)
				}
			}
			d.must("second", "--", "cmp kept /etc/ssh/ssh_host_ed25519_key.pub")
			d.virtlet("rm", "-f", "second")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDebian(t)
			begin := time.Now()
			tt.boots(d, "run", "--cni-conf-dir", twoNetworks(t), "--cni-bin-dir", d.plugins, "--network", "red", "--network", "blue", "--memory", "512M", "--cpus", "2")
			t.Logf("%s took %s", tt.name, time.Since(begin).Round(time.Second))
		})
	}
}

// honest checks that nothing of what the guest sent was dropped as false.
func (l *lab) honest(name string) {
	l.t.Helper()
	for why, n := range l.dropped(name) {
		if strings.HasPrefix(string(why), "spoofed") || strings.HasPrefix(string(why), "rogue") {
			l.t.Errorf("%s: %d frames were dropped as %s", name, n.Packets, why)
		}
	}
}
