package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/vm"
)

// Check looks whether pods can be VMs on this node, and leaves it as it is. Where the node is this machine itself, its
// kernel is tried too, which takes root.
func (n Node) Check(ctx context.Context) ([]vm.Finding, error) {
	n.DryRun = true
	t, err := n.open()
	if err != nil {
		return nil, fmt.Errorf("check the node: %w", err)
	}
	defer t.close()
	all := t.checkPrograms(ctx)
	all = append(all, t.checkKernel(ctx)...)
	return append(all, t.checkManager(ctx)...), nil
}

func finding(level vm.Level, what, is, do string) vm.Finding {
	if level == vm.OK {
		do = ""
	}
	return vm.Finding{Level: level, What: what, Is: is, Do: do}
}

// checkPrograms looks for QEMU where a service of the node finds it.
func (t *tree) checkPrograms(ctx context.Context) []vm.Finding {
	system, pkg := "qemu-system-x86_64", "qemu-system-x86"
	if runtime.GOARCH == "arm64" {
		system, pkg = "qemu-system-aarch64", "qemu-system-arm"
	}
	var all []vm.Finding
	for _, p := range []struct{ what, name, pkg, others string }{
		{"QEMU", system, pkg, "qemu-kvm"}, {"qemu-img", "qemu-img", "qemu-utils", "qemu-img"},
	} {
		do := fmt.Sprintf("install it on the node: apt-get install --no-install-recommends %s (Debian, Ubuntu; Fedora and its kin: %s)", p.pkg, p.others)
		at := t.lookPath(p.name)
		if at == "" {
			all = append(all, finding(vm.Fail, p.what, fmt.Sprintf("no %s in %s", p.name, strings.Join(servicePath, ":")), do))
			continue
		}
		v, err := t.version(ctx, at)
		if err != nil {
			all = append(all, finding(vm.Fail, p.what, err.Error(), do))
			continue
		}
		all = append(all, finding(vm.OK, p.what, fmt.Sprintf("%s, version %s", at, v), ""))
	}
	return all
}

func (t *tree) checkKernel(ctx context.Context) []vm.Finding {
	all := vm.CheckDevices(t.Root)
	mode := "v1"
	if t.exists("/sys/fs/cgroup/cgroup.controllers") {
		mode = "v2"
	}
	all = append(all, finding(vm.OK, "cgroups", mode, ""))
	groups, _ := os.ReadDir(t.host("/sys/kernel/iommu_groups"))
	is := fmt.Sprintf("%d groups", len(groups))
	if len(groups) == 0 {
		is = "none: SR-IOV functions cannot go to guests here (intel_iommu=on or amd_iommu=on on the kernel's command line)"
	}
	all = append(all, finding(vm.OK, "IOMMU", is, ""))
	if t.Root == "/" && os.Geteuid() == 0 {
		return append(all, vm.CheckNetwork())
	}
	return append(all, finding(vm.Warn, "namespace, bridge, TAP, filters", "not tried from here", "run virtlet node check as root on the node itself"))
}

// checkManager looks at the container manager: is the handler in its configuration, and does the one that runs have it?
func (t *tree) checkManager(ctx context.Context) []vm.Finding {
	f, err := t.find()
	if err != nil {
		return []vm.Finding{finding(vm.Fail, "container manager", err.Error(), "")}
	}
	is := fmt.Sprintf("%s, configured by %s", f.manager, f.config)
	var v string
	if f.program != "" {
		if v, err = t.version(ctx, f.program); err == nil {
			is = fmt.Sprintf("%s %s, configured by %s", f.manager, v, f.config)
		}
	}
	all := []vm.Finding{finding(vm.OK, "container manager", is, "")}
	shim, err := t.configured(f)
	install := "virtlet node install"
	if err != nil {
		return append(all, finding(vm.Fail, "handler", err.Error(), install))
	}
	if fi, err := os.Stat(t.host(shim)); err != nil || fi.Mode()&0o111 == 0 {
		all = append(all, finding(vm.Fail, "shim", errors.Join(fmt.Errorf("%s does not run", shim), err).Error(), install))
	} else if strings.HasPrefix(v, "1.6.") && !slices.Contains(servicePath, path.Dir(shim)) {
		all = append(all, finding(vm.Warn, "shim", shim+": containerd 1.6 does not look there", "virtlet node install --bin-dir "+DefaultBinDir))
	} else {
		all = append(all, finding(vm.OK, "shim", shim, ""))
	}
	if r, err := t.record(); err == nil && len(r.Files) > 0 {
		all = append(all, finding(vm.OK, "installed", fmt.Sprintf("version %s, %d files", r.Version, len(r.Files)), ""))
	}
	s, err := t.ask(ctx, f.socket)
	restart := "restart it: systemctl restart " + strings.TrimSuffix(f.unit, ".service")
	switch {
	case err != nil:
		all = append(all, finding(vm.Warn, "handler in use", fmt.Sprintf("%s does not answer on %s: %v", f.manager, f.socket, err), "start it, and check again as root"))
	case s.handlers == nil:
		all = append(all, finding(vm.Warn, "handler in use", fmt.Sprintf("%s %s does not tell its handlers", s.name, s.version), "restart it if it has not been since the installation"))
	case !slices.Contains(s.handlers, Handler):
		all = append(all, finding(vm.Fail, "handler in use", fmt.Sprintf("%s %s runs with the handlers %q", s.name, s.version, s.handlers), restart))
	case !s.has(shim):
		all = append(all, finding(vm.Fail, "handler in use", fmt.Sprintf("%s %s runs with another shim, %s", s.name, s.version, s.shim), restart))
	default:
		all = append(all, finding(vm.OK, "handler in use", fmt.Sprintf("%s %s has it", s.name, s.version), ""))
	}
	return all
}

// configured gives the shim that the manager's configuration names for our handler.
func (t *tree) configured(f found) (string, error) {
	files := []string{f.config}
	var text []byte
	var err error
	if f.manager == Containerd {
		if text, err = t.read(f.config); err == nil {
			c, err := parseContainerd(text)
			if err != nil {
				return "", fmt.Errorf("read %s: %w", f.config, err)
			}
			if dir := c.dropInDir(); dir != "" {
				files = append(files, path.Join(dir, "50-virtlet.toml"))
			}
		}
	}
	for _, file := range files {
		text, err := t.read(file)
		if err != nil {
			continue
		}
		c, err := parseContainerd(text)
		if err != nil {
			return "", fmt.Errorf("read %s: %w", file, err)
		}
		h, _ := c.runtimes()[Handler].(map[string]any)
		if f.manager == CRIO {
			h = table(c.all, "crio", "runtime", "runtimes", Handler)
		}
		if h == nil {
			continue
		}
		if shim, _ := h["runtime_path"].(string); shim != "" {
			return shim, nil
		}
		if shim := t.lookPath(Shim); shim != "" {
			return shim, nil
		}
		return "", fmt.Errorf("%s has it, and there is no %s in %s", file, Shim, strings.Join(servicePath, ":"))
	}
	return "", fmt.Errorf("it is not in %s", strings.Join(files, ", nor in "))
}
