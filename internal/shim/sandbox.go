package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// What a VM has when nobody says how large it should be.
const (
	defaultCPUs   = 1
	defaultMemory = 1024 // MiB
)

// prepare takes the pod's network over: what Create of a sandbox means.
func (d *daemon) prepare(ctx context.Context, b *bundle) error {
	ns, err := b.netns()
	if err != nil {
		return err
	}
	cfg := vm.Config{Name: vmName(d.namespace, d.id), NetNS: ns, Inside: true, NetNSEnds: true, Localhost: true, Pod: b.pod(), Hostname: b.spec.Hostname, Log: d.log}
	if d.told, err = cfg.FindResults(d.CNI, d.id); err != nil {
		return err
	}
	d.podOurs = b.ours()
	w, err := readWishes(d.told, d.podOurs)
	if err != nil {
		return err
	}
	cfg.NTP, cfg.NoSpoofCheck, cfg.ExternalDHCP, cfg.ExternalRA = w.cfg.NTP, w.cfg.NoSpoofCheck, w.cfg.ExternalDHCP, w.cfg.ExternalRA
	cfg.AllowPhysical, cfg.Datapath = w.cfg.AllowPhysical, w.cfg.Datapath
	cfg.CPUs, cfg.Memory = w.size(podResources(b.spec.Annotations))
	if path := b.mounted("/etc/resolv.conf"); path != "" {
		text, err := readSmall(path)
		if err != nil {
			return fmt.Errorf("read the pod's resolvers: %w", err)
		}
		cfg.DNS, cfg.Search = vm.ParseResolvConf(text)
	}
	d.pod, err = vm.Prepare(ctx, d.Store, cfg, nil)
	if err != nil {
		return err
	}
	for _, n := range d.pod.Notes() {
		d.log.Warn(n, "vm", cfg.Name)
	}
	return nil
}

// readSmall reads a file that a manager made.
func readSmall(path string) (string, error) {
	const most = 64 << 10 // bytes
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(b) > most {
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return string(b), err
}

// podResources reads the annotations by which containerd tells the sum of a pod's limits.
func podResources(annotations map[string]string) *specs.LinuxResources {
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	number := func(key string) *int64 {
		n, err := strconv.ParseInt(annotations["io.kubernetes.cri.sandbox-"+key], 10, 64)
		if err != nil || n <= 0 {
			return nil
		}
		return &n
	}
	r.CPU.Quota, r.Memory.Limit = number("cpu-quota"), number("memory")
	if p := number("cpu-period"); p != nil {
		period := uint64(*p)
		r.CPU.Period = &period
	}
	return r
}

// size gives the CPUs and the memory (MiB) of a VM: as annotations say, or as much as its limits allow. A fraction of a
// CPU is one: the cgroup sees to the rest.
func (w wishes) size(r *specs.LinuxResources) (cpus int, memory int64) {
	if r != nil && r.CPU != nil && r.CPU.Quota != nil && *r.CPU.Quota > 0 {
		period := uint64(100000) // µs, the kernel's default
		if r.CPU.Period != nil && *r.CPU.Period > 0 {
			period = *r.CPU.Period
		}
		cpus = int(min(math.Ceil(float64(*r.CPU.Quota)/float64(period)), math.MaxInt32))
	}
	if r != nil && r.Memory != nil && r.Memory.Limit != nil && *r.Memory.Limit > 0 {
		memory = *r.Memory.Limit >> 20
	}
	return cmp.Or(w.cfg.CPUs, cpus, defaultCPUs), cmp.Or(w.cfg.Memory, memory, defaultMemory)
}

// guestConfig completes the pod's configuration with what one container says of the guest. Its image is mounted.
func (d *daemon) guestConfig(b *bundle, rootfs string) (vm.Config, error) {
	cfg := d.pod.Config()
	w, err := readWishes(d.told, d.podOurs, b.ours())
	if err != nil {
		return cfg, err
	}
	if err := checkMounts(b); err != nil {
		return cfg, err
	}
	if cfg.Volumes, err = volumes(b); err != nil {
		return cfg, err
	}
	cfg.CPUs, cfg.Memory = w.size(b.spec.Linux.Resources)
	cfg.DiskBus = w.cfg.DiskBus
	cfg.Accel, cfg.UserData, cfg.SSHKeys = w.cfg.Accel, w.cfg.UserData, w.cfg.SSHKeys
	cfg.Seed, cfg.NetworkConfig, cfg.GuestNetwork, cfg.InstanceID = w.cfg.Seed, w.cfg.NetworkConfig, w.cfg.GuestNetwork, w.cfg.InstanceID
	if cfg.Disks, cfg.Root, err = blockDevices(b); err != nil {
		return cfg, err
	}
	empty, err := emptyDirs(b)
	if cfg.Disks = append(cfg.Disks, empty...); err != nil || cfg.Root {
		return cfg, err
	}
	return cfg, findMedia(rootfs, w, &cfg)
}

// checkMounts refuses volumes whose data the user would think safe and lose. What every pod has is left out: the guest does
// not need it.
func checkMounts(b *bundle) error {
	var errs []error
	for _, m := range b.spec.Mounts {
		if m.Type != "bind" || readOnly(m) || ephemeral(m) {
			continue
		}
		errs = append(errs, fmt.Errorf("volume at %s: a guest cannot have a directory of the node; give it a block volume (volumeMode: Block, volumeDevices), or mount it read-only, as a copy", m.Destination))
	}
	return errors.Join(errs...)
}

// everyPod says whether a mount is one that every container has, of the kubelet's or the manager's own.
func everyPod(m specs.Mount) bool {
	switch m.Destination {
	case "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/dev/termination-log", "/run/.containerenv":
		return true
	}
	return false
}

// ephemeral says whether a mount is one that every pod has, or that ends with its pod.
func ephemeral(m specs.Mount) bool {
	if everyPod(m) {
		return true
	}
	if isEmptyDir(m) || strings.HasPrefix(m.Destination, "/var/run/secrets/kubernetes.io/") {
		return true
	}
	if strings.Contains(m.Source, "/pods/") && strings.Contains(m.Source, "/containers/") { // a termination log elsewhere
		return true
	}
	return strings.Contains(m.Source, "/io.containerd.grpc.v1.cri/containers/") && strings.Contains(m.Source, "/volumes/") // VOLUME of the image
}

// blockDevices gives the block volumes of a container as disks, in its order. One that the container wants at / comes
// first: the guest boots from it and not from the image. A privileged container has all devices of the node, whose disks
// are nobody's volumes.
func blockDevices(b *bundle) (disks []vm.Disk, root bool, err error) {
	privileged := false
	for _, dev := range b.spec.Linux.Devices {
		switch {
		case dev.Type == "b":
			path, err := blockPath(dev.Major, dev.Minor)
			if err != nil {
				return nil, false, fmt.Errorf("volume at %s: %w", dev.Path, err)
			}
			disk := vm.Disk{Path: path, Format: "raw", ReadOnly: !writes(b, dev)}
			if dev.Path == "/" {
				disks, root = append([]vm.Disk{disk}, disks...), true
			} else {
				disks = append(disks, disk)
			}
		case dev.Path == "/dev/kmsg", dev.Path == "/dev/mem", dev.Path == "/dev/loop-control":
			privileged = true
		}
	}
	if privileged {
		return nil, false, errors.New("the container is privileged: that would give all disks of the node to the guest; a VM needs no privileges (privileged: false)")
	}
	return disks, root, nil
}

// blockPath finds a block device by its numbers, which are all that a manager gives: by udev's links where there are some,
// or by the name that the kernel has for it.
func blockPath(major, minor int64) (string, error) {
	path := fmt.Sprintf("/dev/block/%d:%d", major, minor)
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	} else if text, err := readSmall(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", major, minor)); err == nil {
		for line := range strings.Lines(text) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
				path = filepath.Join("/dev", name)
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("find block device %d:%d: %s: %w", major, minor, path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(uint32(major), uint32(minor)) {
		return "", fmt.Errorf("find block device %d:%d: %s is another", major, minor, path)
	}
	return path, nil
}

// writes says whether the container's device rules let it write to a device.
func writes(b *bundle, dev specs.LinuxDevice) bool {
	if b.spec.Linux.Resources == nil {
		return true
	}
	found := true
	for _, r := range b.spec.Linux.Resources.Devices {
		if r.Allow && r.Type == "b" && r.Major != nil && *r.Major == dev.Major && r.Minor != nil && *r.Minor == dev.Minor {
			found = strings.Contains(r.Access, "w")
		}
	}
	return found
}

// settle moves QEMU to the container's cgroup, and gives it the container's place in the order of those that the kernel
// kills when memory runs out.
func settle(b *bundle, group cgroup, pid int) error {
	if err := group.join(pid); err != nil {
		return fmt.Errorf("move QEMU to the container's cgroup: %w", err)
	}
	p := b.spec.Process
	if p == nil || p.OOMScoreAdj == nil {
		return nil
	}
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(*p.OOMScoreAdj)), 0)
	if err != nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) { // lowering takes CAP_SYS_RESOURCE
		return fmt.Errorf("set the OOM score of QEMU: %w", err)
	}
	return nil
}
