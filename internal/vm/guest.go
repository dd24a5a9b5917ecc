package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/agent"
	"github.com/virtlet/virtlet/internal/cloudinit"
	"github.com/virtlet/virtlet/internal/image"
	"github.com/virtlet/virtlet/internal/qemu"
)

// media are the files that a guest boots from, open and checked.
type media struct {
	kernel, initrd *os.File
	firmware       *os.File // where the machine has none of its own
	base           *os.File // the image as given
	baseInfo       image.Info
	overlay        *os.File // what the guest writes
	seed           *os.File
	volumes        *os.File
	disks          []*os.File
	infos          []image.Info // of disks
}

// Close closes all files; a nil media has none.
func (m *media) Close() error {
	if m == nil {
		return nil
	}
	var errs []error
	for _, f := range append([]*os.File{m.kernel, m.initrd, m.firmware, m.base, m.overlay, m.seed, m.volumes}, m.disks...) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	*m = media{}
	return errors.Join(errs...)
}

// openMedia opens what the user named and checks it, before anything is changed.
func (v *VM) openMedia() (string, error) {
	m := &media{}
	v.media = m
	var err error
	if v.cfg.QEMU, err = qemu.Find(v.cfg.QEMU, arch); err != nil {
		return "", err
	}
	if _, _, err := v.accel(); err != nil {
		return "", err
	}
	result := v.cfg.Kernel
	if v.cfg.Kernel != "" {
		if m.kernel, err = image.StageKernel(v.cfg.Kernel); err != nil {
			return "", err
		}
		if err := image.CheckKernel(m.kernel, arch); err != nil {
			return "", err
		}
	}
	if v.cfg.Initrd != "" {
		if m.initrd, err = image.StageKernel(v.cfg.Initrd); err != nil {
			return "", err
		}
	}
	if d := v.cfg.Image; d != nil {
		if m.base, m.baseInfo, err = image.Open(d.Path, false, image.Format(d.Format)); err != nil {
			return "", err
		}
		result = fmt.Sprintf("%s (%s, %d MiB)", d.Path, m.baseInfo.Format, m.baseInfo.VirtualSize>>20)
	}
	if arch == "arm64" && v.cfg.Kernel == "" {
		if m.firmware, err = openFirmware(); err != nil {
			return "", err
		}
	}
	for _, d := range v.cfg.Disks {
		f, info, err := image.Open(d.Path, !d.ReadOnly, image.Format(d.Format))
		if err != nil {
			return "", err
		}
		m.disks, m.infos = append(m.disks, f), append(m.infos, info)
	}
	if v.cfg.Root {
		result = fmt.Sprintf("%s (%s, %d MiB), written in place", v.cfg.Disks[0].Path, m.infos[0].Format, m.infos[0].VirtualSize>>20)
	}
	return result, nil
}

// openFirmware opens the UEFI that an arm64 machine boots disks with; amd64 has SeaBIOS built in.
func openFirmware() (*os.File, error) {
	paths := []string{"/usr/share/qemu-efi-aarch64/QEMU_EFI.fd", "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/edk2/aarch64/QEMU_EFI.fd"}
	for _, p := range paths {
		if f, err := os.Open(p); err == nil {
			return f, nil
		}
	}
	return nil, fmt.Errorf("no UEFI firmware for arm64 in %q: install it (Debian: qemu-efi-aarch64), or boot by --kernel", paths)
}

// makeDisk makes the overlay, which takes what the guest writes to its image.
func (v *VM) makeDisk(ctx context.Context) (string, error) {
	m := v.media
	if m.base == nil {
		return "none needed", nil
	}
	path := v.overlay()
	var err error
	m.overlay, err = image.CreateOverlay(ctx, v.cfg.QEMUImg, path, m.baseInfo.VirtualSize)
	return path, err
}

// overlay is where the guest's writes go.
func (v *VM) overlay() string {
	if v.cfg.DiskDir != "" {
		return filepath.Join(v.cfg.DiskDir, "disk.qcow2")
	}
	return v.store.data(v.cfg.Name, "disk.qcow2")
}

// dropDisk removes the files that only a running guest needs.
func (v *VM) dropDisk() error {
	var errs []error
	for _, path := range []string{v.overlay(), v.store.data(v.cfg.Name, "seed.iso")} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// machine puts the guest together. The socket ends are QEMU's.
func (v *VM) machine(consoleEnd, qmpEnd, agentEnd *os.File) (qemu.Machine, error) {
	accel, why, err := v.accel()
	if err != nil {
		return qemu.Machine{}, err
	}
	v.state.Accel = fmt.Sprintf("%s: %s", accel, why)
	m := qemu.Machine{
		Binary: v.cfg.QEMU, Arch: arch, Name: v.cfg.Name, Accel: accel, CPUs: v.cfg.CPUs, Memory: v.cfg.Memory,
		Kernel: v.media.kernel, Initrd: v.media.initrd, Firmware: v.media.firmware, Append: v.cfg.Append, Console: consoleEnd, QMP: qmpEnd,
		Agent: agentEnd, DiskBus: diskBuses[v.cfg.DiskBus],
	}
	// The first drive is the one that is booted: the image, or with Root the first disk.
	if v.media.base != nil {
		m.Drives = append(m.Drives, qemu.Drive{
			ID: "disk0", Format: string(image.QCOW2), File: v.media.overlay,
			Backing: &qemu.Drive{ID: "base0", Format: string(v.media.baseInfo.Format), File: v.media.base, Device: v.media.baseInfo.Device, ReadOnly: true},
		})
	}
	for i, f := range v.media.disks {
		m.Drives = append(m.Drives, qemu.Drive{
			ID: fmt.Sprintf("data%d", i), Format: string(v.media.infos[i].Format), File: f,
			Device: v.media.infos[i].Device, ReadOnly: v.cfg.Disks[i].ReadOnly, Serial: v.cfg.Disks[i].Serial,
		})
	}
	if v.media.seed != nil {
		m.Drives = append(m.Drives, qemu.Drive{ID: "seed", Format: string(image.Raw), File: v.media.seed, ReadOnly: true, CDROM: true})
	}
	if v.media.volumes != nil {
		m.Drives = append(m.Drives, qemu.Drive{
			ID: "volumes", Format: string(image.Raw), File: v.media.volumes, ReadOnly: true, CDROM: true, Serial: cloudinit.VolumesLabel,
		})
	}
	for i, p := range v.ports {
		if vf := p.VF; vf != nil {
			m.VFIO = append(m.VFIO, qemu.VFIO{
				ID: fmt.Sprintf("net%d", i), BDF: vf.BDF, Group: vf.Group, Device: vf.Device, IOMMU: vf.IOMMU, Slot: qemu.NICSlot(i),
			})
			continue
		}
		m.NICs = append(m.NICs, qemu.Netdev{
			ID: fmt.Sprintf("net%d", i), MAC: p.NIC.MAC.String(), MTU: p.NIC.MTU, Taps: p.Taps, Vhost: p.Vhost, Slot: qemu.NICSlot(i),
		})
	}
	// A device that reads and writes the guest's memory by itself holds all of it.
	v.memory, v.fixed = m.Memory, len(m.VFIO) > 0
	m.Balloon = !v.fixed
	return m, nil
}

func (v *VM) accel() (qemu.Accel, string, error) {
	found, why := qemu.DetectAccel("/")
	switch asked := qemu.Accel(v.cfg.Accel); {
	case asked == qemu.KVM && found != qemu.KVM:
		return "", "", fmt.Errorf("--accel kvm: not on this machine: %s; use --accel auto", why)
	case asked == qemu.KVM, asked == qemu.TCG:
		return asked, "as asked for", nil
	}
	return found, why, nil
}

// startQEMU starts the guest's process with the open files and nothing else of ours.
func (v *VM) startQEMU() (string, error) {
	console, consoleEnd, err := socketPair("console")
	if err != nil {
		return "", err
	}
	defer consoleEnd.Close()
	if v.console, err = newConsole(v.store, v.cfg.Name, console); err != nil {
		console.Close()
		return "", err
	}
	qmp, qmpEnd, err := socketPair("qmp")
	if err != nil {
		return "", err
	}
	defer qmpEnd.Close()
	talk, agentEnd, err := socketPair("guest agent")
	if err != nil {
		qmp.Close()
		return "", err
	}
	defer agentEnd.Close()
	v.agent = agent.New(talk)
	m, err := v.machine(consoleEnd, qmpEnd, agentEnd)
	if err != nil {
		qmp.Close()
		return "", err
	}
	cmd, err := qemu.NewCommand(m)
	if err != nil {
		qmp.Close()
		return "", err
	}
	v.state.Command = cmd.String()
	uid := unprivileged(v.id)
	if v.proc, err = qemu.Start(cmd, qemu.ProcOptions{UID: uid, GID: uid, Dir: "/", MemoryLock: m.MemoryLock()}); err != nil {
		qmp.Close()
		return "", err
	}
	v.qmp = qmp
	pid := Process{PID: v.proc.PID(), Start: v.proc.StartTime()}
	v.state.QEMU = pid
	// After the fact, for once: until it is written the kernel ends QEMU with us.
	if err := v.record(func(j *Journal) { j.QEMU = &pid }); err != nil {
		return "", err
	}
	if v.cfg.Started != nil {
		if err := v.cfg.Started(pid.PID); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("pid %d, %s", pid.PID, v.state.Accel), nil
}

// greetingTimeout is how long QEMU may take to open its devices and speak on its monitor. It does so before the guest
// runs, in well below a second on an idle machine.
const greetingTimeout = 30 * time.Second

// awaitQEMU waits until QEMU answers on its monitor: all devices are there and the guest runs.
func (v *VM) awaitQEMU(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, greetingTimeout)
	defer cancel()
	died := v.proc.Done()
	go func() { // a QEMU that died does not keep us waiting
		select {
		case <-died:
			cancel()
		case <-ctx.Done():
		}
	}()
	var err error
	if v.monitor, err = qemu.NewMonitor(ctx, v.qmp); err != nil {
		// When it closed its monitor it is about to end, and its last words say more.
		const dying = 2 * time.Second
		select {
		case <-v.proc.Done():
			if e := v.proc.Wait().Err(); e != nil {
				err = e
			}
		case <-time.After(dying):
		}
		return "", err
	}
	if v.execs, err = newExecServer(v.store, v.cfg.Name, v.Guest); err != nil {
		return "", err
	}
	// QEMU has its copies of all files. The TAPs are kept: our sockets on them end in their own time.
	if err := v.media.Close(); err != nil {
		return "", err
	}
	v.state.Status, v.state.Started = Running, time.Now()
	return "running", v.save()
}

// unprivileged gives the user and group id that QEMU runs as: one for each VM, so that a guest that broke out of its
// QEMU cannot touch another's. The ids from 0x70000000 on are used by nobody (systemd's UIDS-GIDS); they need no name.
func unprivileged(id string) uint32 {
	const first, count = 0x70000000, 1 << 24
	var n uint32
	for _, c := range []byte(id) {
		n = n*31 + uint32(c)
	}
	return first + n%count
}

// socketPair gives two connected stream sockets: one for us, one for QEMU.
func socketPair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open %s socket: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" of QEMU")
	defer ours.Close() // FileConn makes its own copy
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("open %s socket: %w", name, err)
	}
	return conn, theirs, nil
}
