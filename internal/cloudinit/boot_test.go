package cloudinit

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/testnet"
)

// bootScript is a machine that boots twice, as far as cloud-init's first two stages go: $1 is an empty directory, $2 that
// of hack/cloudinit.sh, $3 and $4 are the two boots' MACs and seeds ($5, $6). Its root is a copy of ours in memory, with
// nothing in /dev, and no module of cloud-init runs in it, so the real machine is not touched. The kernels of test
// machines seldom have ISO 9660: the seed is a directory, which is the same data source.
const bootScript = `set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
mkdir "$1/up" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" none "$1/root"
root=$1/root
for d in dev run tmp var/lib/cloud mnt; do mkdir -p "$root/$d"; mount -t tmpfs none "$root/$d"; done
touch "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
mkdir "$root/run/5" "$root/run/6" "$root/run/debian"
mount --bind "$5" "$root/run/5"
mount --bind "$6" "$root/run/6"
mount --bind "$2" "$root/mnt"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
rm -rf "$root/etc/cloud"
cp -r "$2/etc/cloud" "$root/etc/cloud"
cat >"$root/etc/cloud/cloud.cfg.d/99-test.cfg" <<END
datasource_list: [NoCloud]
cloud_init_modules: []
output: {}
system_info: {network: {renderers: [networkd]}}
END
boot() { # MAC SEED
	ip link add ens16 address "$1" type veth peer name far
	rm -rf "$root/run/cloud-init"
	mkdir -p "$root/var/lib/cloud/seed"
	rm -rf "$root/var/lib/cloud/seed/nocloud"
	cp -r "$root/run/$2" "$root/var/lib/cloud/seed/nocloud"
	for stage in --local ""; do
		chroot "$root" env PATH="$PATH" PYTHONPATH=/mnt/usr/lib/python3/dist-packages PYTHONDONTWRITEBYTECODE=1 \
			python3 /mnt/usr/bin/cloud-init init $stage >"$1.log" 2>&1 </dev/null || { cat "$1.log"; exit 1; }
	done
	echo "--- boot"
	ip -br link show type veth dev eth0 2>/dev/null || true
	cat "$root"/etc/systemd/network/10-cloud-init-*.network
	ip link del far
}
cd "$1"
boot "$3" 5
boot "$4" 6
`

// TestRealCloudInitOnADiskThatStays has the real cloud-init boot one disk twice. The pod's address and MAC are others the
// second time.
func TestRealCloudInitOnADiskThatStays(t *testing.T) {
	testnet.NeedRoot(t)
	d := debian(t)
	boot := func(name string, i byte, change func(*Seed)) (string, string) {
		n, _, err := NewNetwork(V1, []Interface{{NIC: nic.NIC{
			Name: "eth0", MAC: mac(i), MTU: 1400, Addrs: prefixes("198.51.100." + name + "/24"), Routes: routes("0.0.0.0/0 via 198.51.100.1"),
		}}})
		if err != nil {
			t.Fatal(err)
		}
		s := Seed{Kind: NoCloud, InstanceID: "root-1", Hostname: "vm-1", Network: n}
		change(&s)
		files, err := s.Files()
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for file, b := range files {
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return n.links[0].mac.String(), dir
	}
	tests := map[string]struct {
		first, second func(*Seed)
		follows       bool // the guest has the second address in the end
	}{
		"every boot": {every, every, true},
		"with a script as user-data": {
			func(s *Seed) { every(s); s.UserData = []byte("#!/bin/sh\ntrue\n") },
			func(s *Seed) { every(s); s.UserData = []byte("#!/bin/sh\ntrue\n") }, true,
		},
		"first boot only":    {func(*Seed) {}, func(*Seed) {}, false},
		"another instance":   {func(*Seed) {}, func(s *Seed) { s.InstanceID = "root-2" }, true},
		"the user wants not": {unwanted, unwanted, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mac1, seed1 := boot("10", 1, tt.first)
			mac2, seed2 := boot("20", 2, tt.second)
			cmd := exec.Command("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child",
				"sh", "-c", bootScript, "sh", t.TempDir(), d, mac1, mac2, seed1, seed2)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			boots := strings.Split(string(out), "--- boot")
			if len(boots) != 3 || !strings.Contains(boots[1], "198.51.100.10/24") || !strings.Contains(boots[1], "eth0@far") {
				t.Fatalf("the first boot: %s", out)
			}
			if got := strings.Contains(boots[2], "198.51.100.20/24") && strings.Contains(boots[2], mac2); got != tt.follows {
				t.Errorf("the second boot has the second address: %t, want %t\n%s", got, tt.follows, boots[2])
			}
			if tt.follows && !strings.Contains(boots[2], "eth0@far") {
				t.Errorf("the interface has another name at the second boot\n%s", boots[2])
			}
		})
	}
}

func every(s *Seed) { s.EveryBoot = true }

func unwanted(s *Seed) {
	every(s)
	s.UserData = []byte("#cloud-config\nupdates: {network: {when: [boot-new-instance]}}\n")
}
