package qemu

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden command lines of testdata anew")

// file gives an open file with a name of its own; command lines hold its number alone.
func file(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func files(t testing.TB, name string, n int) []*os.File {
	t.Helper()
	var all []*os.File
	for i := range n {
		all = append(all, file(t, fmt.Sprintf("%s%d", name, i)))
	}
	return all
}

// kernelVM and diskVM are the least that boots; tests change what they are about.
func kernelVM(t testing.TB) Machine {
	return Machine{Arch: "amd64", Name: "vm", Accel: TCG, CPUs: 1, Memory: 128, Kernel: file(t, "kernel")}
}

func diskVM(t testing.TB) Machine {
	return Machine{
		Arch: "amd64", Name: "vm", Accel: KVM, CPUs: 2, Memory: 1024,
		Drives: []Drive{{ID: "disk0", Format: "raw", File: file(t, "disk.raw")}},
	}
}

func overlay(t testing.TB) Drive {
	return Drive{
		ID: "disk0", Format: "qcow2", File: file(t, "overlay.qcow2"), Serial: "root",
		Backing: &Drive{ID: "base0", Format: "qcow2", File: file(t, "base.qcow2"), ReadOnly: true},
	}
}

var goldens = []struct {
	name string
	make func(t testing.TB) Machine
}{
	{"kernel-amd64", func(t testing.TB) Machine {
		m := kernelVM(t)
		m.Initrd, m.Append = file(t, "initrd"), "console=ttyS0 panic=-1 a,b"
		m.Console, m.QMP, m.Agent, m.Balloon = file(t, "console"), file(t, "qmp"), file(t, "agent"), true
		m.NICs = []Netdev{{ID: "net0", MAC: "0A:58:0A:F4:01:05", MTU: 1450, Taps: files(t, "tap", 1), Slot: NICSlot(0)}}
		return m
	}},
	{"kernel-arm64", func(t testing.TB) Machine {
		m := kernelVM(t)
		m.Arch, m.Append, m.Console, m.QMP = "arm64", "console=ttyAMA0", file(t, "console"), file(t, "qmp")
		return m
	}},
	{"disk-amd64", func(t testing.TB) Machine {
		m := diskVM(t)
		m.Name, m.UUID, m.CPUs = "web,0", "6b1d8e26-5a0e-4c0f-9a52-0d3f0f6d3c11", 4
		m.Drives = []Drive{
			overlay(t),
			{ID: "data0", Format: "raw", File: file(t, "data.raw"), Serial: "a,b"},
			{ID: "data1", Format: "qcow2", File: file(t, "data.qcow2"), ReadOnly: true},
			{ID: "seed", Format: "raw", File: file(t, "seed.iso"), CDROM: true},
		}
		m.NICs = []Netdev{
			{ID: "net0", MAC: "02:00:5e:10:00:01", MTU: 9000, Taps: files(t, "tap", 4), Vhost: files(t, "vhost", 4), Slot: NICSlot(0)},
			{ID: "net1", MAC: "02:00:5e:10:00:02", Taps: files(t, "tap", 1), Vhost: files(t, "vhost", 1), Slot: NICSlot(1)},
		}
		return m
	}},
	{"disk-scsi", func(t testing.TB) Machine {
		m := diskVM(t)
		m.DiskBus = VirtioSCSI
		m.Drives = append(m.Drives, Drive{ID: "data0", Format: "qcow2", File: file(t, "data"), ReadOnly: true, Serial: "x"}, Drive{ID: "seed", Format: "raw", File: file(t, "seed"), CDROM: true})
		return m
	}},
	{"disk-sata", func(t testing.TB) Machine {
		m := diskVM(t)
		m.DiskBus = SATA
		for i := range 6 {
			m.Drives = append(m.Drives, Drive{ID: fmt.Sprintf("data%d", i), Format: "raw", File: file(t, "data")})
		}
		m.Drives = append(m.Drives, Drive{ID: "seed", Format: "raw", File: file(t, "seed"), CDROM: true})
		return m
	}},
	{"disk-arm64", func(t testing.TB) Machine {
		m := diskVM(t)
		m.Arch, m.Firmware, m.Drives = "arm64", file(t, "uefi"), []Drive{overlay(t)}
		m.NICs = []Netdev{{ID: "net0", MAC: "02:00:5e:10:00:01", MTU: 1500, Taps: files(t, "tap", 4), Slot: NICSlot(0)}}
		return m
	}},
	{"vfio-group", func(t testing.TB) Machine {
		m := kernelVM(t)
		m.NICs = []Netdev{{ID: "net0", MAC: "02:00:5e:10:00:01", MTU: 1500, Taps: files(t, "tap", 1), Slot: NICSlot(0)}}
		m.VFIO = []VFIO{
			{ID: "net1", BDF: "0000:01:10.0", Group: "/dev/vfio/15", Slot: NICSlot(1)},
			{ID: "net2", BDF: "10000:81:02.1", Group: "/dev/vfio/32", Slot: NICSlot(2)},
		}
		return m
	}},
	{"vfio-iommufd", func(t testing.TB) Machine {
		m := kernelVM(t)
		m.VFIO = []VFIO{
			{ID: "net0", Device: file(t, "vfio0"), IOMMU: file(t, "iommu"), Slot: NICSlot(0)},
			{ID: "net1", Device: file(t, "vfio1"), IOMMU: file(t, "iommu"), Slot: NICSlot(1)},
		}
		return m
	}},
}

func TestGoldenCommandLines(t *testing.T) {
	for _, tt := range goldens {
		t.Run(tt.name, func(t *testing.T) {
			c, err := NewCommand(tt.make(t))
			if err != nil {
				t.Fatal(err)
			}
			got := c.Path
			for _, a := range c.Args {
				if strings.HasPrefix(a, "-") {
					got += "\n" + a
				} else {
					got += " " + quote(a)
				}
			}
			for i, f := range c.Files {
				got += fmt.Sprintf("\nfd %d: %s", firstFD+i, filepath.Base(f.Name()))
			}
			got += fmt.Sprintf("\ndevices: %v\n", c.Devices)
			golden := filepath.Join("testdata", tt.name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("-want +got; go test -update writes it anew:\n%s", d)
			}
		})
	}
}

func TestBlockDevice(t *testing.T) {
	m := diskVM(t)
	for device, want := range map[bool]string{false: `"driver":"file"`, true: `"driver":"host_device"`} {
		m.Drives[0].Device = device
		c, err := NewCommand(m)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(strings.Join(c.Args, " "), want) {
			t.Errorf("Device %v: no %s in %q", device, want, c.Args)
		}
	}
}

func TestNewCommandRefuses(t *testing.T) {
	tap := func(t *testing.T, n int) []Netdev {
		return []Netdev{{ID: "net0", MAC: "02:00:5e:10:00:01", MTU: 1500, Taps: files(t, "tap", n), Slot: NICSlot(0)}}
	}
	function := func(m *Machine) *VFIO {
		m.VFIO = []VFIO{{ID: "net5", BDF: "0000:01:10.0", Group: "/dev/vfio/15", Slot: NICSlot(5)}}
		return &m.VFIO[0]
	}
	for _, tt := range []struct {
		name, want string
		spoil      func(t *testing.T, m *Machine)
	}{
		{"architecture", `architecture "mips"`, func(_ *testing.T, m *Machine) { m.Arch = "mips" }},
		{"accelerator", `accelerator "hvf"`, func(_ *testing.T, m *Machine) { m.Accel = "hvf" }},
		{"no name", `name ""`, func(_ *testing.T, m *Machine) { m.Name = "" }},
		{"name with a line break", `name "a\nb"`, func(_ *testing.T, m *Machine) { m.Name = "a\nb" }},
		{"name with a NUL", `name "a\x00b"`, func(_ *testing.T, m *Machine) { m.Name = "a\x00b" }},
		{"name not UTF-8", `name "\xff"`, func(_ *testing.T, m *Machine) { m.Name = "\xff" }},
		{"long name", `255 bytes`, func(_ *testing.T, m *Machine) { m.Name = strings.Repeat("n", 256) }},
		{"UUID", `UUID "x,y"`, func(_ *testing.T, m *Machine) { m.UUID = "x,y" }},
		{"no CPU", "0 CPUs", func(_ *testing.T, m *Machine) { m.CPUs = 0 }},
		{"many CPUs", "256 CPUs", func(_ *testing.T, m *Machine) { m.CPUs = 256 }},
		{"little memory", "memory of 15 MiB", func(_ *testing.T, m *Machine) { m.Memory = 15 }},
		{"much memory", "memory of", func(_ *testing.T, m *Machine) { m.Memory = 1 << 60 }},
		{"initrd alone", "initrd without", func(t *testing.T, m *Machine) { *m = diskVM(t); m.Initrd = file(t, "i") }},
		{"command line alone", "command line without", func(t *testing.T, m *Machine) { *m = diskVM(t); m.Append = "quiet" }},
		{"kernel and firmware", "use one", func(t *testing.T, m *Machine) { m.Firmware = file(t, "f") }},
		{"command line with a NUL", "without NUL", func(_ *testing.T, m *Machine) { m.Append = "a\x00b" }},
		{"long command line", "up to 2047", func(_ *testing.T, m *Machine) { m.Append = strings.Repeat("a", 2048) }},
		{"nothing to boot", "nothing to boot", func(_ *testing.T, m *Machine) { m.Kernel = nil }},
		{"arm64 without firmware", "UEFI", func(t *testing.T, m *Machine) { *m = diskVM(t); m.Arch = "arm64" }},
		{"seed first", "seed cannot be", func(t *testing.T, m *Machine) { *m = diskVM(t); m.Drives[0].CDROM = true }},
		{"drive id with a comma", `id "a,b"`, func(t *testing.T, m *Machine) { m.Drives = []Drive{{ID: "a,b", Format: "raw", File: file(t, "d")}} }},
		{"drive id too long", `use a lower-case letter`, func(t *testing.T, m *Machine) {
			m.Drives = []Drive{{ID: strings.Repeat("a", 25), Format: "raw", File: file(t, "d")}}
		}},
		{"drive id of our own", `id "rng0" is taken`, func(t *testing.T, m *Machine) { m.Drives = []Drive{{ID: "rng0", Format: "raw", File: file(t, "d")}} }},
		{"drive id of a file node", `id "a-file" is taken`, func(t *testing.T, m *Machine) {
			m.Drives = []Drive{{ID: "a", Format: "raw", File: file(t, "d")}, {ID: "a-file", Format: "raw", File: file(t, "d")}}
		}},
		{"format", `format ""`, func(t *testing.T, m *Machine) { m.Drives = []Drive{{ID: "a", File: file(t, "d")}} }},
		{"no file", `drive "a": no file`, func(_ *testing.T, m *Machine) { m.Drives = []Drive{{ID: "a", Format: "raw"}} }},
		{"serial number", `serial number`, func(t *testing.T, m *Machine) {
			m.Drives = []Drive{{ID: "a", Format: "raw", File: file(t, "d"), Serial: strings.Repeat("s", 21)}}
		}},
		{"lower layer of raw", `a raw image`, func(t *testing.T, m *Machine) { d := overlay(t); d.Format = "raw"; m.Drives = []Drive{d} }},
		{"lower layer writable", `"base0" is not read-only`, func(t *testing.T, m *Machine) { d := overlay(t); d.Backing.ReadOnly = false; m.Drives = []Drive{d} }},
		{"lower layer of itself", `"base0" is taken`, func(t *testing.T, m *Machine) { d := overlay(t); d.Backing.Backing = d.Backing; m.Drives = []Drive{d} }},
		{"lower layer's format", `drive "base0": format "vmdk"`, func(t *testing.T, m *Machine) { d := overlay(t); d.Backing.Format = "vmdk"; m.Drives = []Drive{d} }},
		{"many drives", "14 drives", func(t *testing.T, m *Machine) {
			for i := range 14 {
				m.Drives = append(m.Drives, Drive{ID: fmt.Sprintf("d%d", i), Format: "raw", File: file(t, "d")})
			}
		}},
		{"many NICs", "16 NICs", func(t *testing.T, m *Machine) {
			for i := range 16 {
				m.NICs = append(m.NICs, Netdev{ID: fmt.Sprintf("n%d", i), MAC: "02:00:5e:10:00:01", Taps: files(t, "t", 1), Slot: NICSlot(i)})
			}
		}},
		{"NIC id twice", `id "net0" is taken`, func(t *testing.T, m *Machine) { m.NICs = append(tap(t, 1), tap(t, 1)...) }},
		{"group MAC", `MAC address "03:`, func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].MAC = "03:00:5e:10:00:01" }},
		{"MAC of zeros", `MAC address "00:`, func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].MAC = "00:00:00:00:00:00" }},
		{"MAC of 8 bytes", `MAC address`, func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].MAC = "02:00:5e:10:00:01:02:03" }},
		{"MAC with options", `MAC address`, func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].MAC = "02:00:5e:10:00:01,romfile=/x" }},
		{"MTU", "MTU of 67", func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].MTU = 67 }},
		{"no TAP", "0 TAPs", func(t *testing.T, m *Machine) { m.NICs = tap(t, 0) }},
		{"vhost for some", "1 vhost descriptors for 2 TAPs", func(t *testing.T, m *Machine) { m.NICs = tap(t, 2); m.NICs[0].Vhost = files(t, "v", 1) }},
		{"nil TAP", "is missing", func(t *testing.T, m *Machine) { m.NICs = tap(t, 2); m.NICs[0].Taps[1] = nil }},
		{"low slot", "PCI slot 0xf", func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].Slot = 0xf }},
		{"slot of the LPC bridge", "PCI slot 0x1f", func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); m.NICs[0].Slot = NICSlot(MaxNICs) }},
		{"slot twice", "another NIC's", func(t *testing.T, m *Machine) { m.NICs = append(tap(t, 1), tap(t, 1)...); m.NICs[1].ID = "net1" }},
		{"function's address with options", `address "0000:01:10.0,x`, func(_ *testing.T, m *Machine) { function(m).BDF = "0000:01:10.0,x-y=z" }},
		{"function's group", `device file "15"`, func(_ *testing.T, m *Machine) { function(m).Group = "15" }},
		{"function's id", `id "iommu0" is taken`, func(_ *testing.T, m *Machine) { function(m).ID = "iommu0" }},
		{"function in a NIC's slot", "another NIC's", func(t *testing.T, m *Machine) { m.NICs = tap(t, 1); function(m).Slot = NICSlot(0) }},
		{"function in a drive's slot", "PCI slot 0x3", func(_ *testing.T, m *Machine) { function(m).Slot = 3 }},
		{"function without its IOMMU", "a descriptor is missing", func(t *testing.T, m *Machine) { function(m).Device = file(t, "vfio0") }},
		{"functions in two ways", "or of none", func(t *testing.T, m *Machine) {
			function(m)
			m.VFIO = append(m.VFIO, VFIO{ID: "net6", Device: file(t, "vfio0"), IOMMU: file(t, "iommu"), Slot: NICSlot(6)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := kernelVM(t)
			tt.spoil(t, &m)
			c, err := NewCommand(m)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q; command %v", err, tt.want, c)
			}
		})
	}
}

func TestAllFaultsAtOnce(t *testing.T) {
	_, err := NewCommand(Machine{})
	for _, want := range []string{"architecture", "accelerator", "name", "CPUs", "memory", "nothing to boot"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error %v says nothing of %s", err, want)
		}
	}
}

func TestFullMachine(t *testing.T) {
	m := diskVM(t)
	for i := 1; i < MaxDrives; i++ {
		m.Drives = append(m.Drives, Drive{ID: fmt.Sprintf("data%d", i), Format: "raw", File: m.Drives[0].File})
	}
	for i := range MaxNICs {
		m.NICs = append(m.NICs, Netdev{ID: fmt.Sprintf("net%d", i), MAC: fmt.Sprintf("02:00:5e:10:00:%02x", i), Taps: files(t, "tap", 1), Slot: NICSlot(i)})
	}
	c, err := NewCommand(m)
	if err != nil {
		t.Fatal(err)
	}
	slots := map[string]bool{"addr=0x1f": true}
	for _, a := range c.Args {
		for p := range strings.SplitSeq(a, ",") {
			if strings.HasPrefix(p, "addr=") {
				if slots[p] {
					t.Errorf("two devices at %s", p)
				}
				slots[p] = true
			}
		}
	}
	if want := 1 + 1 + MaxDrives + MaxNICs; len(slots) != want { // the LPC bridge, the random numbers
		t.Errorf("%d slots used, want %d", len(slots), want)
	}
}

// TestNoOptionFromAValue gives QEMU's parser names that try to add options; what a real QEMU makes of them is tested in
// TestNameWithCommas.
func TestNoOptionFromAValue(t *testing.T) {
	m := diskVM(t)
	m.Name = "a,debug-threads=on,,process=b"
	m.Drives[0].Serial = "s,bootindex=7"
	c, err := NewCommand(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"guest=a,,debug-threads=on,,,,process=b",
		"virtio-blk-pci,id=disk0,bus=pcie.0,addr=0x03,drive=disk0,serial=s,,bootindex=7,bootindex=0",
	} {
		if !slices.Contains(c.Args, want) {
			t.Errorf("no argument %q in %q", want, c.Args)
		}
	}
}

// TestStringIsForAShell has a shell read the line back.
func TestStringIsForAShell(t *testing.T) {
	const shell = "bash"
	if _, err := exec.LookPath(shell); err != nil {
		t.Skipf("needs %s: %v", shell, err)
	}
	f := file(t, "a\nb")
	c := Command{
		Path:  "printf",
		Args:  []string{`%s\0`, "", "plain", "two words", "it's", `back\slash`, "$HOME `id` $(id)", "a\nb\t'c'\\n", "#no", "~", `{"a":"b","c":null}`, "a;b&c|d>e", "é*?"},
		Files: []*os.File{f},
	}
	line := c.String()
	if strings.ContainsAny(line, "\n\r") {
		t.Errorf("more than one line: %q", line)
	}
	out, err := exec.Command(shell, "-c", line).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	if d := cmp.Diff(c.Args[1:], got); d != "" {
		t.Errorf("a shell reads (-want +got):\n%s\nof %s", d, line)
	}
	if !strings.Contains(line, "# fd 3: ") {
		t.Errorf("the descriptor is not named: %s", line)
	}
}
