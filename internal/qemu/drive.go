package qemu

import "fmt"

// DiskBus is how the guest reaches its drives.
type DiskBus string

// The buses. Guests without virtio drivers have those of SATA.
const (
	VirtioBlock DiskBus = "" // virtio-blk: a PCI device for each drive
	VirtioSCSI  DiskBus = "scsi"
	SATA        DiskBus = "sata"
)

const (
	idSCSI    = "scsi0"
	idSATA    = "sata" // and a number
	sataPorts = 6      // of one AHCI controller
)

// checkBus says which drives cannot be on the bus.
func (m *Machine) checkBus() error {
	switch m.DiskBus {
	case VirtioBlock, VirtioSCSI:
		return nil
	case SATA:
		for _, d := range m.Drives {
			if d.ReadOnly && !d.CDROM {
				return fmt.Errorf("drive %q: a SATA disk cannot be read-only: use another bus", d.ID)
			}
		}
		return nil
	}
	return fmt.Errorf("disk bus %q: use %s or %s, or none for virtio", m.DiskBus, VirtioSCSI, SATA)
}

// drives is every drive with its bus. Controllers take the slots that drives of virtio would have.
func (b *builder) drives(m Machine) {
	for i, d := range m.Drives {
		switch {
		case m.DiskBus == VirtioSCSI && i == 0:
			b.add("-device", device("virtio-scsi-pci", idSCSI, slotDrive))
		case m.DiskBus == SATA && i%sataPorts == 0:
			b.add("-device", device("ich9-ahci", fmt.Sprintf("%s%d", idSATA, i/sataPorts), slotDrive+i/sataPorts))
		}
		b.nodes(d)
		args := []string{"drive=" + d.ID}
		if d.Serial != "" {
			args = append(args, "serial="+d.Serial)
		}
		if i == 0 && m.Kernel == nil {
			args = append(args, "bootindex=0")
		}
		switch m.DiskBus {
		case VirtioSCSI:
			args = append([]string{"scsi-hd", "id=" + d.ID, "bus=" + idSCSI + ".0", fmt.Sprintf("scsi-id=%d", i), "lun=0"}, args...)
			b.add("-device", opts(args...))
		case SATA:
			kind := "ide-hd"
			if d.CDROM {
				kind = "ide-cd" // the only one that takes what is read-only
			}
			args = append([]string{kind, "id=" + d.ID, fmt.Sprintf("bus=%s%d.%d", idSATA, i/sataPorts, i%sataPorts)}, args...)
			b.add("-device", opts(args...))
		default:
			b.add("-device", device("virtio-blk-pci", d.ID, slotDrive+i, args...))
		}
	}
}
