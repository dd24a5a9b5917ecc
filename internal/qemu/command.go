package qemu

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Command is QEMU's command line with the descriptors that it speaks of. It holds no resource of its own.
type Command struct {
	Path    string
	Args    []string   // without the program's name
	Files   []*os.File // Files[i] is descriptor 3+i of the child; the caller's
	Devices []string   // device files that QEMU opens by itself and needs to read and write: /dev/kvm
}

// Identifiers inside QEMU that no drive and no NIC may have.
const (
	idConsole = "console"
	idQMP     = "qmp"
	idRNG     = "rng0"
	idPanic   = "panic0"
	idIOMMU   = "iommu0"
	idSerial  = "serial0"
	idAgent   = "agent"
	idBalloon = "balloon0"
)

// fileSuffix makes the name of the block node that holds a drive's file; the drive's id is that of the format layer.
const fileSuffix = "-file"

// firstFD is the descriptor of Command.Files[0] in the child: the first one after stdio.
const firstFD = 3

// NewCommand makes the command line of a guest. It opens, reads and changes nothing; the files of m are not looked
// into. The error names every fault of m.
func NewCommand(m Machine) (Command, error) {
	if err := m.check(); err != nil {
		return Command{}, fmt.Errorf("make QEMU's command line for %q: %w", m.Name, err)
	}
	b := &builder{Command: Command{Path: m.Binary}}
	if b.Path == "" {
		b.Path = DefaultBinary(m.Arch)
	}
	b.base(m)
	b.boot(m)
	b.drives(m)
	for _, n := range m.NICs {
		b.nic(n)
	}
	for i, v := range m.VFIO {
		b.vfio(v, i == 0)
	}
	return b.Command, nil
}

// builder collects arguments and numbers descriptors.
type builder struct{ Command }

func (b *builder) add(args ...string) { b.Args = append(b.Args, args...) }

// fd gives f a number in the child.
func (b *builder) fd(f *os.File) int {
	b.Files = append(b.Files, f)
	return firstFD + len(b.Files) - 1
}

// reopen gives a path by which the child can open f again: some options take no descriptor.
func (b *builder) reopen(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", b.fd(f)) }

// base is what every guest has.
func (b *builder) base(m Machine) {
	b.add(
		"-name", opts("guest="+m.Name),
		"-nodefaults",     // no VGA, NIC, floppy, CD-ROM, monitor: only what is named here
		"-no-user-config", // nothing from /etc/qemu
		"-display", "none",
		// What a guest that broke out of QEMU would reach for first: exec and fork, setuid, old system calls, and the
		// scheduling and priority of others. QEMU stays able to open files; the unprivileged uid is what stops that.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machineType(m), "-cpu", cpu(m),
		"-smp", strconv.Itoa(m.CPUs),
		"-m", fmt.Sprintf("%dM", m.Memory),
		// The guest's reboot is a reboot of the VM, its power-off the end; a panic ends the VM too, after an event that
		// says so: Kubernetes or the user decides what comes next. These are QEMU's defaults, said so that they stay.
		"-action", "reboot=reset,shutdown=poweroff,panic=shutdown",
	)
	if m.Accel == KVM {
		b.Devices = append(b.Devices, kvmDevice)
	}
	if m.UUID != "" {
		b.add("-uuid", m.UUID)
	}
	if m.QMP != nil {
		b.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", idQMP, b.fd(m.QMP)), "-mon", opts("chardev="+idQMP, "mode=control"))
	}
	if m.Console != nil {
		// -serial and not -device: the virt board has its serial port soldered on.
		b.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", idConsole, b.fd(m.Console)), "-serial", "chardev:"+idConsole)
	}
	// rng-builtin asks the kernel's getrandom: no file to open, and no guest waits for entropy at boot.
	b.add("-object", "rng-builtin,id="+idRNG, "-device", own("virtio-rng-pci", idRNG, fnRNG, "multifunction=on", "rng="+idRNG))
	if m.Agent != nil {
		b.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", idAgent, b.fd(m.Agent)),
			"-device", own("virtio-serial-pci", idSerial, fnAgent, "max_ports=2"), // port 0 is for consoles
			"-device", opts("virtserialport", "bus="+idSerial+".0", "nr=1", "chardev="+idAgent, "name="+AgentPort))
	}
	if m.Balloon {
		// A guest that runs out of memory takes back what it has given, rather than kill its programs.
		b.add("-device", own("virtio-balloon-pci", idBalloon, fnBalloon, "deflate-on-oom=on", "free-page-reporting=on"))
	}
	// Tells QEMU, and by its event us, that the guest's kernel panicked. On amd64 it is one I/O port that kernels have
	// known since 2013; arm64 has only the PCI form (Linux 5.13).
	if m.Arch == "amd64" {
		b.add("-device", "pvpanic,id="+idPanic)
	} else {
		b.add("-device", device("pvpanic-pci", idPanic, slotPanic))
	}
}

// machineType names the board and leaves out what nothing here uses.
func machineType(m Machine) string {
	common := []string{
		"accel=" + string(m.Accel),
		"usb=off",
		"dump-guest-core=off", // a core dump of QEMU must not hold the guest's memory
	}
	if m.Arch == "arm64" {
		// The newest interrupt controller that the accelerator has. The default, version 2, ends at 8 CPUs.
		return opts(append([]string{"virt", "gic-version=max"}, common...)...)
	}
	return opts(append([]string{
		"q35",
		"vmport=off",   // VMware's backdoor port, on by default
		"sata=off",     // all disks are virtio
		"smbus=off",    // only serves emulated memory modules' EEPROMs
		"hpet=off",     // a slow clock that guests fall for; there are better ones (kvm-clock, TSC, ACPI PM timer)
		"graphics=off", // there is no screen: the firmware speaks on the serial console
	}, common...)...)
}

func cpu(m Machine) string {
	switch {
	case m.Accel == KVM:
		return "host"
	case m.Arch == "arm64":
		// Emulating the architected pointer authentication algorithm takes half of a kernel's boot time; QEMU's own is
		// as good for a guest that is emulated anyway.
		return "max,pauth-impdef=on"
	}
	return "max"
}

// boot says what is started.
func (b *builder) boot(m Machine) {
	if m.Kernel == nil {
		if m.Firmware != nil {
			b.add("-bios", b.reopen(m.Firmware))
		}
		b.add("-boot", "strict=on") // the boot disk or nothing: never a data disk, the seed or the network
		return
	}
	b.add("-kernel", b.reopen(m.Kernel))
	if m.Initrd != nil {
		b.add("-initrd", b.reopen(m.Initrd))
	}
	if m.Append != "" {
		b.add("-append", m.Append) // taken whole: QEMU does not split it
	}
}

// blockdev is QAPI's BlockdevOptions, as far as it is used. It is given to QEMU as JSON: only there can "no lower
// layer" be said (null). Without it QEMU would open the path that the image's header names.
type blockdev struct {
	Driver       string           `json:"driver"`
	NodeName     string           `json:"node-name"`
	Filename     string           `json:"filename,omitempty"`
	File         string           `json:"file,omitempty"`
	Backing      *json.RawMessage `json:"backing,omitempty"` // a node's name, or null
	ReadOnly     bool             `json:"read-only"`
	AutoReadOnly bool             `json:"auto-read-only"`    // a disk that cannot be written must fail, not turn read-only
	Discard      string           `json:"discard,omitempty"` // unmap: what the guest trims is freed in the file
}

// nodes is a drive's chain of block nodes, from the lowest layer up.
func (b *builder) nodes(d Drive) {
	if d.Backing != nil {
		b.nodes(*d.Backing)
	}
	readOnly := d.ReadOnly || d.CDROM
	discard := "unmap"
	if readOnly {
		discard = "" // QEMU's default: ignore
	}
	// A set of one descriptor, numbered like it. QEMU opens /dev/fdset/N by copying the descriptor: it needs no right on
	// the file or its directory.
	fd := b.fd(d.File)
	b.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, fd))
	protocol := "file"
	if d.Device {
		protocol = "host_device" // "file" takes regular files alone
	}
	b.blockdev(blockdev{
		Driver: protocol, NodeName: d.ID + fileSuffix, Filename: fmt.Sprintf("/dev/fdset/%d", fd), ReadOnly: readOnly, Discard: discard,
	})
	layer := blockdev{Driver: d.Format, NodeName: d.ID, File: d.ID + fileSuffix, ReadOnly: readOnly, Discard: discard}
	if d.Format == "qcow2" {
		backing := json.RawMessage("null")
		if d.Backing != nil {
			backing = json.RawMessage(strconv.Quote(d.Backing.ID)) // an id needs no escapes
		}
		layer.Backing = &backing
	}
	b.blockdev(layer)
}

func (b *builder) blockdev(n blockdev) {
	j, err := json.Marshal(n)
	if err != nil {
		panic("qemu: marshal block node: " + err.Error()) // strings and booleans: cannot fail
	}
	b.add("-blockdev", string(j))
}

// nic is a TAP back end and a virtio card on it.
func (b *builder) nic(n Netdev) {
	hw, _ := net.ParseMAC(n.MAC) // was checked
	// QEMU takes one descriptor under one name and several under another, and with several it sets the queues up.
	fds, vhostfds := "fd", "vhostfd"
	if len(n.Taps) > 1 {
		fds, vhostfds = "fds", "vhostfds"
	}
	back := []string{"tap", "id=" + n.ID, fds + "=" + b.fdList(n.Taps)}
	if len(n.Vhost) > 0 {
		back = append(back, "vhost=on", vhostfds+"="+b.fdList(n.Vhost))
	}
	front := []string{"netdev=" + n.ID, "mac=" + hw.String()}
	if n.MTU != 0 {
		front = append(front, fmt.Sprintf("host_mtu=%d", n.MTU))
	}
	if q := len(n.Taps); q > 1 {
		// A vector for each queue's two directions, one for the control queue, one for changes of configuration.
		front = append(front, "mq=on", fmt.Sprintf("vectors=%d", 2*q+2))
	}
	front = append(front, "romfile=") // no option ROM: nothing boots from the network, and iPXE is 256 kB of guest memory
	b.add("-netdev", opts(back...), "-device", device("virtio-net-pci", n.ID, n.Slot, front...))
}

// vfio is a function of the host. QEMU takes descriptors of it with the kernel's iommufd alone (QEMU 9.0).
func (b *builder) vfio(v VFIO, first bool) {
	const vfioContainer = "/dev/vfio/vfio"
	how := []string{"host=" + v.BDF}
	if v.Device != nil {
		if first {
			b.add("-object", fmt.Sprintf("iommufd,id=%s,fd=%d", idIOMMU, b.fd(v.IOMMU)))
		}
		how = []string{"iommufd=" + idIOMMU, fmt.Sprintf("fd=%d", b.fd(v.Device))}
	} else {
		b.Devices = append(b.Devices, v.Group)
		if first {
			b.Devices = append(b.Devices, vfioContainer)
		}
	}
	// Nothing boots from the network, and a card's ROM is code of whoever had it before.
	b.add("-device", device("vfio-pci", v.ID, v.Slot, append(how, "rombar=0")...))
}

func (b *builder) fdList(files []*os.File) string {
	var s []string
	for _, f := range files {
		s = append(s, strconv.Itoa(b.fd(f)))
	}
	return strings.Join(s, ":")
}

// device makes the value of -device for a PCI device on the root bus, which both boards call pcie.0.
func device(driver, id string, slot int, args ...string) string {
	return opts(append([]string{driver, "id=" + id, "bus=pcie.0", fmt.Sprintf("addr=0x%02x", slot)}, args...)...)
}

// own makes the value of -device for one of the machine's own devices.
func own(driver, id string, function int, args ...string) string {
	return opts(append([]string{driver, "id=" + id, "bus=pcie.0", fmt.Sprintf("addr=0x%02x.%d", slotOwn, function)}, args...)...)
}

// opts joins the parts of one option. QEMU's parser splits at commas and takes two for one that is meant (qemu(1),
// "-name" and "-drive file"), so no value can add an option.
func opts(parts ...string) string {
	quoted := make([]string, len(parts))
	for i, p := range parts {
		quoted[i] = strings.ReplaceAll(p, ",", ",,")
	}
	return strings.Join(quoted, ",")
}

// named puts the files' names in the place of /dev/fdset/N, which is all that QEMU knows of them.
func (c Command) named(said string) string {
	for i, f := range slices.Backward(c.Files) { // 12 before 1
		said = strings.ReplaceAll(said, fmt.Sprintf("/dev/fdset/%d", firstFD+i), f.Name())
	}
	return said
}

// String gives the command as one line for a shell. A comment at its end says what the descriptors are, which a shell
// has to be given for a reproduction: `3<>disk.qcow2`.
func (c Command) String() string {
	words := []string{quote(c.Path)}
	for _, a := range c.Args {
		words = append(words, quote(a))
	}
	for i, f := range c.Files {
		if i == 0 {
			words = append(words, "#")
		}
		words = append(words, fmt.Sprintf("fd %d: %q", firstFD+i, f.Name()))
	}
	return strings.Join(words, " ")
}

// quote makes one word of s for a POSIX shell, on one line.
func quote(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=/.,:+@%"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	if strings.ContainsAny(s, "\n\r\t") { // only a kernel command line can have them; a shell's $'...' keeps the one line
		r := strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\n", `\n`, "\r", `\r`, "\t", `\t`)
		return "$'" + r.Replace(s) + "'"
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
