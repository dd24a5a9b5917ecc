package shim

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

func TestWishes(t *testing.T) {
	line := "console=ttyS0 quiet"
	tests := []struct {
		name    string
		sources []map[string]string
		want    wishes
		err     string
	}{
		{"none", []map[string]string{{"other.io/x": "1"}}, wishes{}, ""},
		{"all", []map[string]string{{
			"virtlet.cloud/cpus": "2", "virtlet.cloud/memory": "512Mi", "virtlet.cloud/accel": "tcg", "virtlet.cloud/user-data": "#cloud-config\n",
			"virtlet.cloud/ssh-keys": "ssh-ed25519 AAAA", "virtlet.cloud/ntp": "192.0.2.1, 192.0.2.2", "virtlet.cloud/image": "/disk/a.img",
			"virtlet.cloud/image-format": "raw", "virtlet.cloud/seed": "nocloud", "virtlet.cloud/network-config": "v2", "virtlet.cloud/guest-network": "static", "virtlet.cloud/instance-id": "i1",
			"virtlet.cloud/kernel": "/k", "virtlet.cloud/initrd": "/i", "virtlet.cloud/cmdline": line,
			"virtlet.cloud/disk-bus": "scsi", "virtlet.cloud/allow-physical": "true",
		}}, wishes{
			cfg: vm.Config{
				DiskBus: "scsi", AllowPhysical: true, CPUs: 2, Memory: 512, Accel: "tcg", UserData: []byte("#cloud-config\n"), SSHKeys: []string{"ssh-ed25519 AAAA"},
				Seed: "nocloud", NetworkConfig: "v2", GuestNetwork: "static", InstanceID: "i1",
				NTP: []string{"192.0.2.1", "192.0.2.2"}, Image: &vm.Disk{Format: "raw"},
			}, image: "/disk/a.img", kernel: "/k", initrd: "/i", append: &line,
		}, ""},
		{"the container has the last word", []map[string]string{{"virtlet.cloud/cpus": "2"}, {"virtlet.cloud/cpus": "3"}}, wishes{cfg: vm.Config{CPUs: 3}}, ""},
		{"no check where others give addresses", []map[string]string{{"virtlet.cloud/allow-external-ra": "true", "virtlet.cloud/spoof-check": "true"}}, wishes{cfg: vm.Config{ExternalRA: true, NoSpoofCheck: true}}, ""},
		{"off", []map[string]string{{"virtlet.cloud/spoof-check": "false", "virtlet.cloud/allow-external-dhcp": "false"}}, wishes{cfg: vm.Config{NoSpoofCheck: true}}, ""},
		{"a mistyped one", []map[string]string{{"virtlet.cloud/spoofcheck": "false"}}, wishes{}, "virtlet.cloud/spoofcheck"},
		{"half a truth", []map[string]string{{"virtlet.cloud/spoof-check": "yes"}}, wishes{}, `use "true" or "false"`},
		{"no number", []map[string]string{{"virtlet.cloud/cpus": "two"}}, wishes{}, "virtlet.cloud/cpus"},
		{"no amount", []map[string]string{{"virtlet.cloud/memory": "2e9"}}, wishes{}, "virtlet.cloud/memory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readWishes(tt.sources...)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(wishes{})); err == nil && d != "" {
				t.Error(d)
			}
		})
	}
}

// Every annotation is documented, and none that is not there.
func TestAnnotationsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `virtlet\\.cloud/([a-z-]+)` \\|").FindAllSubmatch(text, -1) {
		documented = append(documented, string(m[1]))
	}
	var known []string
	for name := range annotations {
		known = append(known, name)
	}
	slices.Sort(documented)
	slices.Sort(known)
	if d := cmp.Diff(known, documented); d != "" {
		t.Errorf("docs/kubernetes.md (-in the code +documented):\n%s", d)
	}
}

func TestSize(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	u := func(v uint64) *uint64 { return &v }
	tests := []struct {
		name      string
		wishes    wishes
		resources *specs.LinuxResources
		cpus      int
		memory    int64
	}{
		{"nothing said", wishes{}, nil, 1, 1024},
		{"limits", wishes{}, &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: n(250000), Period: u(100000)}, Memory: &specs.LinuxMemory{Limit: n(512<<20 + 7)}}, 3, 512},
		{"no limits", wishes{}, &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: n(-1)}, Memory: &specs.LinuxMemory{Limit: n(0)}}, 1, 1024},
		{"a fraction", wishes{}, &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: n(5000)}}, 1, 1024},
		{"annotations win", wishes{cfg: vm.Config{CPUs: 4, Memory: 256}}, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: n(1 << 30)}}, 4, 256},
		{"of the pod", wishes{}, podResources(map[string]string{
			"io.kubernetes.cri.sandbox-cpu-quota": "200000", "io.kubernetes.cri.sandbox-cpu-period": "100000", "io.kubernetes.cri.sandbox-memory": "268435456",
		}), 2, 256},
		{"of a pod without limits", wishes{}, podResources(map[string]string{"io.kubernetes.cri.sandbox-cpu-quota": "x"}), 1, 1024},
	}
	for _, tt := range tests {
		if cpus, memory := tt.wishes.size(tt.resources); cpus != tt.cpus || memory != tt.memory {
			t.Errorf("%s: got %d CPUs, %d MiB, want %d, %d", tt.name, cpus, memory, tt.cpus, tt.memory)
		}
	}
}

func TestFindMedia(t *testing.T) {
	line := "root=/dev/vda"
	tests := []struct {
		name  string
		files []string // "NAME -> TARGET" is a link
		w     wishes
		want  vm.Config // paths without the root's
		err   string
	}{
		{"containerDisk", []string{"disk/debian.qcow2", "disk/README"}, wishes{}, vm.Config{Image: &vm.Disk{Path: "/disk/debian.qcow2"}}, ""},
		{"kernel", []string{"boot/vmlinuz", "boot/initrd.img", "boot/cmdline"}, wishes{}, vm.Config{Kernel: "/boot/vmlinuz", Initrd: "/boot/initrd.img", Append: "boot/cmdline"}, ""},
		{"kernel alone", []string{"boot/vmlinuz"}, wishes{}, vm.Config{Kernel: "/boot/vmlinuz", Append: "console=ttyS0"}, ""},
		{"command line as asked", []string{"boot/vmlinuz", "boot/cmdline"}, wishes{append: &line}, vm.Config{Kernel: "/boot/vmlinuz", Append: line}, ""},
		{"a disk beside a system", []string{"disk/a.raw", "boot/vmlinuz"}, wishes{}, vm.Config{Image: &vm.Disk{Path: "/disk/a.raw"}}, ""},
		{"both, as asked", []string{"disk/a.raw", "k"}, wishes{kernel: "/k", append: &line}, vm.Config{Image: &vm.Disk{Path: "/disk/a.raw"}, Kernel: "/k", Append: line}, ""},
		{"another place", []string{"vm/b.bin", "disk/a.raw"}, wishes{image: "vm/b.bin", cfg: vm.Config{Image: &vm.Disk{Format: "raw"}}}, vm.Config{Image: &vm.Disk{Path: "/vm/b.bin", Format: "raw"}}, ""},
		{"nothing", []string{"bin/sh"}, wishes{}, vm.Config{}, "not a VM's"},
		{"two disks", []string{"disk/a.raw", "disk/b.img"}, wishes{}, vm.Config{}, "virtlet.cloud/image"},
		{"missing", []string{"disk/a.raw"}, wishes{image: "/disk/b.raw"}, vm.Config{}, "/disk/b.raw"},
		{"a link as a disk", []string{"disk/a.raw -> /etc/shadow"}, wishes{}, vm.Config{}, "no links"},
		{"a link as a directory", []string{"disk -> /etc"}, wishes{image: "/disk/shadow"}, vm.Config{}, "no links"},
		{"out of the image", nil, wishes{image: "/../../../../etc/passwd"}, vm.Config{}, "no such file"},
		{"a kernel that is a link", []string{"boot/vmlinuz -> vmlinuz-6.1"}, wishes{}, vm.Config{}, "no links"},
		{"a command line that is a link", []string{"boot/vmlinuz", "boot/cmdline -> /etc/passwd"}, wishes{}, vm.Config{}, "no links"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for _, f := range tt.files {
				name, target, link := strings.Cut(f, " -> ")
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				var err error
				if link {
					err = os.Symlink(target, path)
				} else {
					err = os.WriteFile(path, []byte(name+"\n"), 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			var cfg vm.Config
			err := findMedia(root, tt.w, &cfg)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			for _, p := range []*string{&cfg.Kernel, &cfg.Initrd} {
				*p = strings.TrimPrefix(*p, root)
			}
			if cfg.Image != nil {
				cfg.Image.Path = strings.TrimPrefix(cfg.Image.Path, root)
			}
			if d := cmp.Diff(tt.want, cfg); err == nil && d != "" {
				t.Error(d)
			}
		})
	}
}

func TestMounts(t *testing.T) {
	const kubelet = "/var/lib/kubelet/pods/1/"
	tests := []struct {
		source, destination, option string
		refused                     bool
	}{
		{kubelet + "etc-hosts", "/etc/hosts", "rw", false},
		{"/run/x/resolv.conf", "/etc/resolv.conf", "rw", false},
		{"/run/x/shm", "/dev/shm", "rw", false},
		{kubelet + "containers/vm/1a", "/dev/termination-log", "rw", false},
		{kubelet + "containers/vm/1a", "/elsewhere", "rw", false},
		{kubelet + "volumes/kubernetes.io~projected/token", "/var/run/secrets/kubernetes.io/serviceaccount", "ro", false},
		{kubelet + "volumes/kubernetes.io~configmap/c", "/etc/app", "ro", false},
		{kubelet + "volumes/kubernetes.io~empty-dir/e", "/scratch", "rw", false},
		{"/var/lib/containerd/io.containerd.grpc.v1.cri/containers/1/volumes/2", "/data", "rw", false},
		{kubelet + "volumes/kubernetes.io~csi/pvc-1/mount", "/data", "rw", true},
		{"/srv", "/data", "rw", true},
		{"/srv", "/data", "ro", false},
	}
	for _, tt := range tests {
		b := &bundle{spec: specs.Spec{Mounts: []specs.Mount{{Type: "bind", Source: tt.source, Destination: tt.destination, Options: []string{"rbind", tt.option}}}}}
		if err := checkMounts(b); (err != nil) != tt.refused || err != nil && !strings.Contains(err.Error(), tt.destination) {
			t.Errorf("%s at %s: %v, want it refused: %t", tt.source, tt.destination, err, tt.refused)
		}
	}
}

func TestMountArgs(t *testing.T) {
	const always = unix.MS_NODEV | unix.MS_NOSUID
	tests := []struct {
		options []string
		flags   uintptr
		data    string
		err     string
	}{
		{[]string{"workdir=/w", "upperdir=/u", "lowerdir=/l:/k"}, always, "workdir=/w,upperdir=/u,lowerdir=/l:/k", ""},
		{[]string{"rbind", "ro"}, always | unix.MS_BIND | unix.MS_REC | unix.MS_RDONLY, "", ""},
		{[]string{"ro", "rw", "dev", "suid", "noexec"}, always | unix.MS_NOEXEC, "", ""},
		{[]string{"loop"}, 0, "", "loop"},
		{[]string{"lowerdir=" + strings.Repeat("/l:", 5000)}, 0, "", "too many layers"},
	}
	for _, tt := range tests {
		flags, data, err := mountArgs(&types.Mount{Type: "overlay", Options: tt.options})
		if flags != tt.flags || data != tt.data || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%.40q: got %#x %q %v", tt.options, flags, data, err)
		}
	}
}

func TestBlockDevices(t *testing.T) {
	major, minor := int64(1<<11), int64(1<<19)
	b := &bundle{spec: specs.Spec{Linux: &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/data", Type: "b", Major: major, Minor: minor}}}}}
	if _, _, err := blockDevices(b); err == nil || !strings.Contains(err.Error(), "/dev/data") {
		t.Errorf("a device that is not there: %v", err)
	}
	b.spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/kmsg", Type: "c"}, {Path: "/dev/null", Type: "c"}}
	if _, _, err := blockDevices(b); err == nil || !strings.Contains(err.Error(), "privileged") {
		t.Errorf("privileged: %v", err)
	}
	dev := specs.LinuxDevice{Type: "b", Major: 8, Minor: 1}
	rule := func(access string) { // of one device
		b.spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "b", Major: &dev.Major, Minor: &dev.Minor, Access: access}}}
	}
	for access, want := range map[string]bool{"rwm": true, "rm": false} {
		if rule(access); writes(b, dev) != want {
			t.Errorf("%s: writes %t", access, !want)
		}
	}
}

func TestCgroupPaths(t *testing.T) {
	for named, want := range map[string]string{
		"/kubepods/burstable/pod1/2":                     "/kubepods/burstable/pod1/2",
		"kubepods-burstable-pod1.slice:cri-containerd:2": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-2.scope",
		"": "", "/": "", "/../../etc": "/etc",
	} {
		if got := (Shim{}).cgroup(named).path; got != want {
			t.Errorf("%q: got %q, want %q", named, got, want)
		}
	}
}

// Values as they were read of a group of cgroup v2, which this machine may not have.
func TestStats2(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"cpu.stat": "usage_usec 70\nuser_usec 50\nsystem_usec 20\n", "memory.current": "4096\n", "memory.max": "max\n",
		"memory.stat": "anon 1024\ninactive_file 512\n", "pids.current": "3\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := cgroup{root: dir}.stats2()
	if m.CPU.UsageUsec != 70 || m.Memory.Usage != 4096 || m.Memory.UsageLimit != 1<<64-1 || m.Memory.Anon != 1024 || m.Memory.InactiveFile != 512 || m.Pids.Current != 3 {
		t.Errorf("%v", m)
	}
}

func TestVMNames(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	if got := vmName("k8s.io", id); got != "pod-"+id[:20] {
		t.Errorf("got %s", got)
	}
	for _, odd := range []string{"x", "../../etc", strings.Repeat("Z", 64)} {
		if got := vmName("k8s.io", odd); vm.CheckName(got) != nil || got == vmName("other", odd) {
			t.Errorf("%q: %s", odd, got)
		}
	}
}

// A volume at / is booted, and comes before the others.
func TestRootVolume(t *testing.T) {
	var loops []specs.LinuxDevice
	for i, path := range []string{"/dev/data", "/"} {
		var st unix.Stat_t
		if err := unix.Stat("/dev/loop"+string(rune('0'+i)), &st); err != nil {
			t.Skip("needs block devices: ", err)
		}
		loops = append(loops, specs.LinuxDevice{Path: path, Type: "b", Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev))})
	}
	disks, root, err := blockDevices(&bundle{spec: specs.Spec{Linux: &specs.Linux{Devices: loops}}})
	want := []vm.Disk{{Path: "/dev/loop1", Format: "raw"}, {Path: "/dev/loop0", Format: "raw"}}
	if d := cmp.Diff(want, disks); err != nil || !root || d != "" {
		t.Errorf("root %t, %v: %s", root, err, d)
	}
}
