package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// wanted are the drivers of the guest, in the order in which they are loaded; what they need goes before them. A driver
// that is part of the kernel is left out. virtio_pci is last: it is the bus, and with it the devices appear.
var wanted = []string{
	"af_packet", // udhcpc's socket
	"virtio_net", "virtio_blk", "virtio_rng", "virtio_console",
	"evdev", "button", // the power button
	"pvpanic_mmio", // tells QEMU of a panic; the ISA device is its too
	"isofs",        // the cloud-init seed
	"virtio_pci",
}

// further are the drivers of what only some tests give their guests, before those above: a balloon, disks on SCSI, a file
// system. The kernel has none for SATA.
var further = []string{"virtio_balloon", "virtio_scsi", "sd_mod", "sr_mod", "ext4"}

// modules are the loadable modules of a kernel, by name.
type modules struct {
	files   map[string]string
	builtin map[string]bool
}

// readModules finds the modules below dir (lib/modules/RELEASE). A package that is not installed has no modules.dep.
func readModules(dir string) (modules, error) {
	m := modules{files: map[string]string{}, builtin: map[string]bool{}}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return m, err
	}
	for path := range strings.Lines(string(list)) {
		m.builtin[moduleName(strings.TrimSpace(path))] = true
	}
	return m, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), ".ko") {
			m.files[moduleName(path)] = path
		}
		return err
	})
}

// moduleName gives the name by which the kernel knows the module of a file: "_" and "-" are the same to it.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// module is one driver, ready to be loaded.
type module struct {
	name string
	data []byte
}

// resolve gives the named modules and all that they depend on, in the order of loading.
func (m modules) resolve(ctx context.Context, names []string) ([]module, error) {
	var out []module
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if seen[name] || m.builtin[name] {
			return nil
		}
		seen[name] = true
		path, ok := m.files[name]
		if !ok {
			return fmt.Errorf("find kernel module %s: the kernel has none of that name", name)
		}
		data, err := readModule(ctx, path)
		if err != nil {
			return err
		}
		deps, err := depends(data)
		if err != nil {
			return fmt.Errorf("read kernel module %s: %w", path, err)
		}
		for _, d := range deps {
			if err := add(d); err != nil {
				return fmt.Errorf("%w (needed by %s)", err, name)
			}
		}
		out = append(out, module{name, data})
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readModule reads a module, which newer Debian kernels compress.
func readModule(ctx context.Context, path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".ko":
		return os.ReadFile(path)
	case ".xz":
		out, err := exec.CommandContext(ctx, "xz", "-dc", path).Output()
		if err != nil {
			return nil, fmt.Errorf("unpack %s with xz: %w", path, err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("read kernel module %s: unknown compression", path)
}

// depends gives the names in the field "depends" of the section .modinfo, which is NUL-separated key=value text.
func depends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
