package main

import (
	"bufio"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// consoles are the serial consoles of QEMU's machines: the kernel's names for them.
var consoles = map[string]string{"amd64": "ttyS0", "arm64": "ttyAMA0"}

// assemble makes the guest's files in the directory out, from the unpacked packages in tree.
func assemble(ctx context.Context, tree, out, arch string) error {
	kernel, err := one(tree, "boot/vmlinuz-*")
	if err != nil {
		return err
	}
	if err := copyFile(filepath.Join(out, "vmlinuz"), kernel); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "cmdline"), []byte(cmdline(arch)+"\n"), 0o644); err != nil {
		return err
	}
	for name, write := range map[string]func(context.Context, io.Writer, string) error{"initrd": initramfs, "extra": extra} {
		if err := writeFile(filepath.Join(out, name), func(w io.Writer) error { return write(ctx, w, tree) }); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Close()
}

// cmdline is the kernel command line that a guest is best started with (Linux, kernel-parameters.txt). Without the
// self-tests of the cipher code and the probe for a PS/2 keyboard it boots a fifth faster under emulation; whether the
// initramfs is compressed and whether mitigations are on makes no difference there.
func cmdline(arch string) string {
	return strings.Join([]string{
		"console=" + consoles[arch],
		"quiet",
		"panic=-1",       // a panic is a reboot at once, which QEMU's -no-reboot turns into its end
		"no_timer_check", // a busy machine emulates timers too late for this check, whose failure is a panic
		"cryptomgr.notests",
		"i8042.noaux",
		"i8042.nokbd",
	}, " ")
}

// place says where a script of root/ is put; others go to /bin, and libraries (*.awk) to /lib.
var place = map[string]string{
	"init":         "init",
	"dhcp-event":   "lib/dhcp-event",
	"dhcp6-event":  "lib/dhcp6-event",
	"power-button": "etc/acpi/PWRF/00000080", // busybox acpid's name for the event of the power button
}

// initramfs writes the guest's file system.
func initramfs(ctx context.Context, w io.Writer, tree string) error {
	a := &archive{w: w}
	for _, dir := range []string{
		"bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp",
	} {
		a.dir(dir)
	}
	a.symlink("etc/resolv.conf", "/run/resolv.conf")
	for _, name := range []string{"busybox", "dhcpcd"} {
		if err := addProgram(a, tree, name); err != nil {
			return err
		}
	}
	if err := addModules(ctx, a, tree, wanted); err != nil {
		return err
	}
	scripts, err := fs.ReadDir(inputs, "root")
	if err != nil {
		return err
	}
	for _, s := range scripts {
		b, err := inputs.ReadFile(path.Join("root", s.Name()))
		if err != nil {
			return err
		}
		name, ok := place[s.Name()]
		switch {
		case !ok && path.Ext(s.Name()) == ".awk":
			name = "lib/" + s.Name()
		case !ok:
			name = "bin/" + s.Name()
		}
		a.file(name, 0o755, b)
	}
	return a.close()
}

// extra writes what can be put behind the initramfs, and into the same file system: a guest agent, and drivers that only some
// tests want. Others boot faster without.
func extra(ctx context.Context, w io.Writer, tree string) error {
	a := &archive{w: w}
	if err := addProgram(a, tree, "qemu-ga"); err != nil {
		return err
	}
	if err := addModules(ctx, a, tree, append(slices.Clone(further), wanted...)); err != nil {
		return err
	}
	return a.close()
}

// addModules adds the drivers and the list of them in the order of loading.
func addModules(ctx context.Context, a *archive, tree string, names []string) error {
	dir, err := one(tree, "lib/modules/*", "usr/lib/modules/*")
	if err != nil {
		return err
	}
	all, err := readModules(dir)
	if err != nil {
		return err
	}
	loaded, err := all.resolve(ctx, names)
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, m := range loaded {
		a.file("lib/modules/"+m.name+".ko", 0o644, m.data)
		fmt.Fprintln(&list, m.name)
	}
	a.file("etc/modules", 0o644, []byte(list.String()))
	return nil
}

// addProgram adds a program, with the libraries and the dynamic linker that it needs when it is not a static one.
func addProgram(a *archive, tree, name string) error {
	program, err := one(tree, "bin/"+name, "sbin/"+name, "usr/bin/"+name, "usr/sbin/"+name)
	if err != nil {
		return err
	}
	linker, names, err := linked(program)
	if err != nil {
		return fmt.Errorf("read %s: %w", program, err)
	}
	if err := addFile(a, "bin/"+name, program); err != nil {
		return err
	}
	if linker == "" {
		return nil
	}
	if dir := path.Dir(linker); dir != "lib" {
		a.dir(dir)
	}
	names = append(names, path.Base(linker))
	for i := 0; i < len(names); i++ { // which grows by what they need themselves
		file, err := one(tree, "lib/*/"+names[i], "usr/lib/*/"+names[i])
		if err != nil {
			return fmt.Errorf("%w (needed by %s)", err, name)
		}
		to := "lib/" + names[i]
		if names[i] == path.Base(linker) {
			to = linker
		}
		if err := addFile(a, to, file); err != nil {
			return err
		}
		_, more, err := linked(file)
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		for _, m := range more {
			if !slices.Contains(names, m) {
				names = append(names, m)
			}
		}
	}
	return nil
}

// linked gives where a program's dynamic linker is, "" for a static one and for a library, and the libraries that it names.
func linked(program string) (linker string, libraries []string, err error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return "", nil, err
		}
		linker = strings.Trim(string(b), "/\x00")
	}
	libraries, err = f.ImportedLibraries() // none: static
	return linker, libraries, err
}

func addFile(a *archive, name, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.file(name, 0o755, b)
	return nil
}

// one gives the only file below tree that matches one of the patterns.
func one(tree string, patterns ...string) (string, error) {
	var found []string
	for _, p := range patterns {
		m, err := filepath.Glob(filepath.Join(tree, p))
		if err != nil {
			return "", err
		}
		found = append(found, m...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("find %s in the packages: %d files match", strings.Join(patterns, " or "), len(found))
	}
	return found[0], nil
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}
