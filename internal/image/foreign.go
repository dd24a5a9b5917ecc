package image

import (
	"fmt"
	"io"
	"strings"
)

// signature is how a file shows that it is no raw disk.
type signature struct {
	offset int // from the start; negative: from the end
	magic  string
	what   string
	advice string
}

const (
	headSize = 1024   // reaches the last of the signatures at the start
	tailSize = sector // a VHD or DMG trailer
	convert  = "make a copy that is: qemu-img convert -O qcow2 IN OUT"
	unpack   = "unpack it first: "
	boot     = "a kernel is no disk: give it with --kernel"
)

// signatures come from the formats' own descriptions and QEMU's drivers (block/*.c). An ISO 9660 image is not among
// them: to a guest it is a raw disk.
var signatures = []signature{
	{0, "KDMV", "a VMDK image", convert},
	{0, "COWD", "a VMDK image of ESX", convert},
	{0, "# Disk Descriptor", "a VMDK descriptor, which only names the files with the data", convert},
	{0, "vhdxfile", "a VHDX image", convert},
	{0, "conectix", "a VHD image", convert},
	{-sector, "conectix", "a VHD image", convert},
	{0x40, "\x7f\x10\xda\xbe", "a VDI image", convert},
	{0, "QED\x00", "a QED image", convert},
	{0, "WithoutFreeSpace", "a Parallels image", convert},
	{0, "WithouFreSpacExt", "a Parallels image", convert},
	{-sector, "koly", "a DMG image", convert},
	{
		0, "LUKS\xba\xbe", "an encrypted (LUKS) image",
		"decrypt it: qemu-img convert --object secret,id=s,file=KEYFILE --image-opts driver=luks,key-secret=s,file.filename=IN -O qcow2 OUT",
	},
	{0, "\x1f\x8b\x08", "compressed with gzip", unpack + "gunzip -k FILE"},
	{0, "\xfd7zXZ\x00", "compressed with xz", unpack + "unxz -k FILE"},
	{0, "\x28\xb5\x2f\xfd", "compressed with zstd", unpack + "unzstd FILE"},
	{4, "1AY&SY", "compressed with bzip2", unpack + "bunzip2 -k FILE"},
	{0, "\x04\x22\x4d\x18", "compressed with lz4", unpack + "unlz4 FILE"},
	{0, "PK\x03\x04", "a ZIP archive", unpack + "unzip FILE"},
	{257, "ustar", "a tar archive (an OVA is one)", unpack + "tar -xf FILE"},
	{0, "070701", "an initrd (a cpio archive)", "an initrd is no disk: give it with --initrd"},
	{0, "\x7fELF", "an ELF program or kernel", boot},
	{0x202, "HdrS", "a Linux kernel for x86 (bzImage)", boot},
	{56, "ARM\x64", "a Linux kernel for arm64", boot},
}

// checkForeign refuses what is known not to be a raw disk.
func checkForeign(r io.ReaderAt, size int64, head []byte) error {
	tail, err := readUpTo(r, max(0, size-tailSize), size, tailSize)
	if err != nil {
		return fmt.Errorf("read trailer: %w", err)
	}
	for _, s := range signatures {
		if s.in(head, tail) {
			return fmt.Errorf("%w: it is %s: %s (if it is a raw disk all the same, say so: format raw)", ErrUnsupported, s.what, s.advice)
		}
	}
	return nil
}

func (s signature) in(head, tail []byte) bool {
	part, at := head, s.offset
	if at < 0 {
		part, at = tail, len(tail)+at
	}
	return at >= 0 && at <= len(part) && strings.HasPrefix(string(part[at:]), s.magic)
}
