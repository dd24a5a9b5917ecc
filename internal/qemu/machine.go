// Package qemu turns a guest, given as data, into a running QEMU process and talks to it.
//
// [NewCommand] is pure: a [Machine] goes in, a [Command] comes out that can be printed, compared and run by hand.
// [Start] runs it as an unprivileged child that holds the given descriptors and no others, and that the kernel kills
// when the calling process dies. [NewMonitor] waits on QEMU's monitor (QMP) until all devices are there; from then on
// the guest runs and its [Monitor.Events] tell how it ends. [KillPID] ends what a killed supervisor may have left.
//
// The caller owns every *os.File of a Machine and may close its copies after Start: QEMU has its own. The caller
// closes the Monitor and waits for the [Process]; neither ends the other.
//
// QEMU is given open descriptors instead of paths, wherever it can take them, and formats are never probed. A qcow2
// image whose header names a data file would still have QEMU open that path: whoever hands over an image has checked
// its header.
package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Accel is how guest code is run.
type Accel string

// The accelerators that are served.
const (
	KVM Accel = "kvm" // by the CPU
	TCG Accel = "tcg" // by translation, anywhere, slowly
)

// Machine is a guest as data. Nothing in it is opened or closed here; the caller owns the files.
type Machine struct {
	Binary string // path or name of qemu-system-*; "": that of Arch
	Arch   string // as GOARCH: amd64 (q35) or arm64 (virt)
	Name   string // for people: printable UTF-8 of at most 255 bytes
	UUID   string // the guest's SMBIOS system UUID; optional
	Accel  Accel
	CPUs   int   // 1 to MaxCPUs
	Memory int64 // MiB

	// Kernel and Initrd are booted directly; nil: the firmware boots the first drive. QEMU opens both again through
	// /proc/self/fd, so its uid needs the right to read the files, but no right on the directories above them.
	Kernel, Initrd *os.File
	Append         string   // kernel command line, only with Kernel
	Firmware       *os.File // read like Kernel; nil: SeaBIOS on amd64. arm64 has no other way to boot from a drive.

	Drives  []Drive  // the first is the boot disk; at most MaxDrives
	DiskBus DiskBus  // of all drives
	NICs    []Netdev // at most MaxNICs, in the guest's order, as far as Slot says no other
	VFIO    []VFIO   // PCI functions of the host; with NICs at most MaxNICs
	Console *os.File // one end of a socketpair: the first serial port; nil: none
	QMP     *os.File // one end of a socketpair: the monitor; nil: none
	Agent   *os.File // one end of a socketpair: the virtio-serial port of a guest agent ([AgentPort]); nil: none
	Balloon bool     // memory can be taken from the guest while it runs, and given back
}

// AgentPort is the name by which agents in guests know their port (QEMU, docs/interop/qemu-ga.rst).
const AgentPort = "org.qemu.guest_agent.0"

// Drive is a disk of the guest. An ID has a lower-case letter followed by up to 23 of [a-z0-9-], and no other drive,
// lower layer or NIC has the same.
type Drive struct {
	ID     string
	Format string // raw or qcow2: never probed
	// File is a regular file, or with Device a block device, opened read-write, or read-only when ReadOnly or CDROM is set: QEMU looks for a descriptor of
	// exactly that mode. QEMU locks it against a second writer for as long as any copy of it is open.
	File     *os.File
	Device   bool // File is a block device of the host
	ReadOnly bool
	Backing  *Drive // read-only lower layer of a qcow2 overlay whose header names none; its Serial is not used
	// CDROM marks a seed: always read-only, never booted. On virtio and SCSI it is a disk all the same: cloud-init finds it
	// by its file system's label, and an IDE controller would be one more emulated device for the guest to attack.
	CDROM  bool
	Serial string // what the guest reads as the disk's serial number: at most 20 printable ASCII bytes; optional
}

// Netdev is a virtio network card of the guest on TAPs that are open.
type Netdev struct {
	ID    string // as a Drive's
	MAC   string // unicast Ethernet address
	MTU   int    // bytes, told to the guest (host_mtu); 0: nothing is told
	Taps  []*os.File
	Vhost []*os.File // open /dev/vhost-net: none, or one for every TAP
	Slot  int        // PCI slot on the root bus: NICSlot(i)
}

// VFIO is a PCI function of the host that is the guest's own, a network card. It is given as two descriptors, or where
// kernel or QEMU are too old for that ([TakesVFIODescriptors]) by its address; then QEMU opens Group and /dev/vfio/vfio.
type VFIO struct {
	ID    string // as a Drive's
	BDF   string // the host's address of it
	Group string // device file of its IOMMU group, which QEMU's uid may open
	// Device is the function's own device file, open, and IOMMU /dev/iommu, of which QEMU uses that of the first function
	// for all.
	Device, IOMMU *os.File
	Slot          int // as a Netdev's
}

// MemoryLock gives how many bytes QEMU may have to lock in memory for m: a device reads and writes the guest's memory by
// itself, so that none of it can be swapped out. A GiB more is for what else it can reach, as libvirt does it.
func (m *Machine) MemoryLock() int64 {
	if len(m.VFIO) == 0 {
		return 0
	}
	const beside = 1 << 10 // MiB
	return (m.Memory + beside) << 20
}

// Bounds of a Machine.
const (
	MaxNICs   = 15
	MaxDrives = 13 // without lower layers
	// MaxCPUs is what 8-bit APIC ids can name (0xff is the broadcast): more would need an emulated IOMMU.
	MaxCPUs   = 255
	MinMemory = 16       // MiB: less holds no firmware and kernel
	MaxMemory = 16 << 20 // MiB
)

// PCI slots of the root bus, all fixed, so that a guest finds every device where it was, whatever else it is given.
// 0 is the host bridge; 0x1f is q35's LPC bridge.
const (
	slotOwn     = 0x01 // the machine's own devices, as functions of one
	slotPanic   = 0x02
	slotDrive   = 0x03 // to 0x0f
	slotNIC     = 0x10 // to 0x1e
	slotNICLast = slotNIC + MaxNICs - 1
)

// Functions in slotOwn. A guest looks for others where there is a function 0.
const (
	fnRNG = iota
	fnAgent
	fnBalloon
)

const (
	maxName   = 255
	maxSerial = 20 // VIRTIO_BLK_ID_BYTES
	maxQueues = 256
	minMTU    = 68 // IPv4's least, RFC 791; also the least of virtio_net's host_mtu
	maxMTU    = 65535
	// maxAppend is the shortest limit of the architectures served (COMMAND_LINE_SIZE of x86 and arm64 Linux: 2048).
	maxAppend = 2047
)

var (
	validID = regexp.MustCompile(`^[a-z][a-z0-9-]{0,23}$`) // with "-file", QEMU's 31 bytes of a node name hold it
	// hostAddress is a PCI address as QEMU's vfio-pci takes it.
	hostAddress = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)
	uuidRE      = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// NICSlot gives the PCI slot of the caller's i-th NIC, counted from 0. Only the first MaxNICs have one.
func NICSlot(i int) int { return slotNIC + i }

// Find gives the absolute path of the program of that name or path, or of the one for arch when program is "".
func Find(program, arch string) (string, error) {
	if program == "" {
		program = DefaultBinary(arch)
	}
	path, err := exec.LookPath(program)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("find QEMU: %w (install it: Debian's packages are qemu-system-x86 and qemu-system-arm; or name another program)", err)
	}
	return path, nil
}

// DefaultBinary gives the name of QEMU's program for an architecture in GOARCH's terms.
func DefaultBinary(arch string) string {
	switch arch {
	case "amd64":
		return "qemu-system-x86_64"
	case "arm64":
		return "qemu-system-aarch64"
	}
	return "qemu-system-" + arch
}

// check refuses what QEMU would refuse, or worse, would take for something else. It gives all faults at once.
func (m *Machine) check() error {
	var errs []error
	bad := func(is bool, format string, a ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, a...))
		}
	}
	bad(m.Arch != "amd64" && m.Arch != "arm64", "architecture %q: use amd64 or arm64", m.Arch)
	bad(m.Accel != KVM && m.Accel != TCG, "accelerator %q: use kvm or tcg", m.Accel)
	bad(strings.ContainsRune(m.Binary, 0), "binary %q: has a NUL", m.Binary)
	bad(m.Name == "" || len(m.Name) > maxName || !printable(m.Name), "name %q: use 1 to %d bytes of printable text", m.Name, maxName)
	bad(m.UUID != "" && !uuidRE.MatchString(m.UUID), "UUID %q: use 8-4-4-4-12 hex digits", m.UUID)
	bad(m.CPUs < 1 || m.CPUs > MaxCPUs, "%d CPUs: use 1 to %d", m.CPUs, MaxCPUs)
	bad(m.Memory < MinMemory || m.Memory > MaxMemory, "memory of %d MiB: use %d to %d", m.Memory, MinMemory, MaxMemory)
	bad(m.Kernel == nil && m.Initrd != nil, "an initrd without a kernel")
	bad(m.Kernel == nil && m.Append != "", "a kernel command line without a kernel")
	bad(m.Kernel != nil && m.Firmware != nil, "a kernel and a firmware: use one")
	bad(len(m.Append) > maxAppend || strings.ContainsRune(m.Append, 0), "kernel command line: use up to %d bytes without NUL", maxAppend)
	bad(m.Kernel == nil && len(m.Drives) == 0, "nothing to boot: give a kernel or a drive")
	bad(m.Arch == "arm64" && m.Kernel == nil && m.Firmware == nil, "arm64 boots a drive only with a UEFI firmware: give one, or a kernel")
	bad(len(m.Drives) > 0 && m.Drives[0].CDROM && m.Kernel == nil, "drive %q: a seed cannot be the boot disk", m.firstDrive())
	bad(len(m.Drives) > MaxDrives, "%d drives: use at most %d", len(m.Drives), MaxDrives)
	bad(len(m.NICs)+len(m.VFIO) > MaxNICs, "%d NICs: use at most %d", len(m.NICs)+len(m.VFIO), MaxNICs)
	if err := m.checkBus(); err != nil {
		errs = append(errs, err)
	}
	ids := map[string]bool{
		idSCSI: true, idSATA + "0": true, idSATA + "1": true, idSATA + "2": true,
		idRNG: true, idPanic: true, idConsole: true, idQMP: true, idIOMMU: true, idSerial: true, idAgent: true, idBalloon: true,
	}
	for i := range m.Drives {
		errs = append(errs, m.Drives[i].check(ids))
	}
	slots := map[int]bool{}
	for i := range m.NICs {
		errs = append(errs, m.NICs[i].check(ids, slots))
	}
	for i := range m.VFIO {
		errs = append(errs, m.VFIO[i].check(ids, slots, m.VFIO[0].Device != nil))
	}
	return errors.Join(errs...)
}

func (m *Machine) firstDrive() string {
	if len(m.Drives) == 0 {
		return ""
	}
	return m.Drives[0].ID
}

func (d *Drive) check(ids map[string]bool) error {
	if err := claimID(ids, d.ID); err != nil {
		return fmt.Errorf("drive: %w", err) // and a lower layer that is its own lower layer ends here
	}
	var err error
	switch {
	case d.Format != "raw" && d.Format != "qcow2":
		err = fmt.Errorf("format %q: use raw or qcow2", d.Format)
	case d.File == nil:
		err = errors.New("no file")
	case len(d.Serial) > maxSerial || !printable(d.Serial) || !ascii(d.Serial):
		err = fmt.Errorf("serial number %q: use up to %d bytes of printable ASCII", d.Serial, maxSerial)
	case d.Backing != nil && d.Format != "qcow2":
		err = fmt.Errorf("a %s image has no lower layer", d.Format)
	case d.Backing != nil && !d.Backing.ReadOnly:
		err = fmt.Errorf("its lower layer %q is not read-only", d.Backing.ID)
	case d.Backing != nil:
		err = d.Backing.check(ids)
	}
	if err != nil {
		return fmt.Errorf("drive %q: %w", d.ID, err)
	}
	return nil
}

func (n *Netdev) check(ids map[string]bool, slots map[int]bool) error {
	if err := claimID(ids, n.ID); err != nil {
		return fmt.Errorf("NIC: %w", err)
	}
	hw, err := net.ParseMAC(n.MAC)
	const group = 0x01 // IEEE 802: bit of the first byte
	switch {
	case err != nil || len(hw) != 6 || hw[0]&group != 0 || hw.String() == "00:00:00:00:00:00":
		err = fmt.Errorf("MAC address %q: use a unicast Ethernet address", n.MAC)
	case n.MTU != 0 && (n.MTU < minMTU || n.MTU > maxMTU):
		err = fmt.Errorf("MTU of %d: use %d to %d", n.MTU, minMTU, maxMTU)
	case len(n.Taps) == 0 || len(n.Taps) > maxQueues:
		err = fmt.Errorf("%d TAPs: use 1 to %d, one for each queue", len(n.Taps), maxQueues)
	case len(n.Vhost) != 0 && len(n.Vhost) != len(n.Taps):
		err = fmt.Errorf("%d vhost descriptors for %d TAPs: use none, or one for each", len(n.Vhost), len(n.Taps))
	case hasNil(n.Taps) || hasNil(n.Vhost):
		err = errors.New("a TAP or vhost descriptor is missing")
	default:
		err = claimSlot(slots, n.Slot)
	}
	if err != nil {
		return fmt.Errorf("NIC %q: %w", n.ID, err)
	}
	return nil
}

// check refuses also a function that is given in another way than the first one: QEMU cannot have both.
func (v *VFIO) check(ids map[string]bool, slots map[int]bool, opened bool) error {
	if err := claimID(ids, v.ID); err != nil {
		return fmt.Errorf("PCI function: %w", err)
	}
	var err error
	switch {
	case (v.Device != nil) != opened:
		err = errors.New("give the descriptors of every function, or of none")
	case (v.Device != nil) != (v.IOMMU != nil):
		err = errors.New("a descriptor is missing: give Device and IOMMU, or neither")
	case v.Device == nil && !hostAddress.MatchString(v.BDF):
		err = fmt.Errorf("address %q: use the form 0000:01:10.0", v.BDF)
	case v.Device == nil && !filepath.IsAbs(v.Group):
		err = fmt.Errorf("device file %q: use an absolute path", v.Group)
	default:
		err = claimSlot(slots, v.Slot)
	}
	if err != nil {
		return fmt.Errorf("PCI function %q: %w", v.ID, err)
	}
	return nil
}

func claimSlot(slots map[int]bool, slot int) error {
	switch {
	case slot < slotNIC || slot > slotNICLast:
		return fmt.Errorf("PCI slot %#x: use %#x to %#x", slot, slotNIC, slotNICLast)
	case slots[slot]:
		return fmt.Errorf("PCI slot %#x is another NIC's", slot)
	}
	slots[slot] = true
	return nil
}

func claimID(ids map[string]bool, id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("id %q: use a lower-case letter and up to 23 of a-z, 0-9 and -", id)
	}
	if ids[id] || ids[strings.TrimSuffix(id, fileSuffix)] || ids[id+fileSuffix] {
		return fmt.Errorf("id %q is taken", id)
	}
	ids[id] = true
	return nil
}

func hasNil(files []*os.File) bool {
	for _, f := range files {
		if f == nil {
			return true
		}
	}
	return false
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

func ascii(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r > unicode.MaxASCII }) < 0
}
