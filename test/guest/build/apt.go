package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// apt fetches Debian packages without installing them.
type apt struct {
	lists   string // package lists of our own, for a machine whose lists are missing or out of date
	arch    string
	private bool // the lists of our own are in use
}

// pkg is a package in one version.
type pkg struct{ name, version string }

func (p pkg) String() string { return p.name + "=" + p.version }

// dependsKernel matches the one dependency of the package linux-image-cloud-ARCH, which names the current kernel.
var dependsKernel = regexp.MustCompile(`(?m)^Depends: (linux-image-[a-z0-9.+-]+) \(= ([A-Za-z0-9.+:~-]+)\)`)

// kernel gives the newest cloud kernel: Debian's kernel for virtual machines, with no drivers for hardware.
func (a *apt) kernel(ctx context.Context) (pkg, error) {
	meta := "linux-image-cloud-" + a.arch
	m, err := a.show(ctx, meta, dependsKernel)
	if err != nil {
		return pkg{}, err
	}
	return pkg{m[1], m[2]}, nil
}

var hasVersion = regexp.MustCompile(`(?m)^Version: ([A-Za-z0-9.+:~-]+)`)

// candidate gives the version of a package that apt would install.
func (a *apt) candidate(ctx context.Context, name string) (pkg, error) {
	m, err := a.show(ctx, name, hasVersion)
	if err != nil {
		return pkg{}, err
	}
	return pkg{name, m[1]}, nil
}

// show gives what a pattern matches in the description of a package, which is looked for in fresh lists, too.
func (a *apt) show(ctx context.Context, name string, pattern *regexp.Regexp) ([]string, error) {
	var last error
	for {
		out, err := a.run(ctx, "", "apt-cache", "show", "--no-all-versions", name)
		if m := pattern.FindStringSubmatch(string(out)); err == nil && m != nil {
			return m, nil
		}
		last = errors.Join(last, err)
		if a.private {
			return nil, fmt.Errorf("find package %s: none of that name is known to apt: %w; Debian has it", name, last)
		}
		if err := a.update(ctx); err != nil {
			return nil, errors.Join(last, err)
		}
	}
}

// packages gives the kernel and the packages of those names, as apt would install them.
func (a *apt) packages(ctx context.Context, names []string) ([]pkg, error) {
	kernel, err := a.kernel(ctx)
	if err != nil {
		return nil, err
	}
	all := []pkg{kernel}
	for _, name := range names {
		p, err := a.candidate(ctx, name)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// unpack downloads packages into dir and unpacks them into tree.
func (a *apt) unpack(ctx context.Context, dir, tree string, pkgs []pkg) error {
	download := []string{"download"}
	for _, p := range pkgs {
		download = append(download, p.String())
	}
	dir, err := os.MkdirTemp(dir, "debs-") // of this try alone
	if err != nil {
		return err
	}
	if _, err := a.run(ctx, dir, "apt-get", download...); err != nil {
		return fmt.Errorf("download %v: %w", pkgs, err)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != len(pkgs) {
		return fmt.Errorf("download %v: got %d files: %w", pkgs, len(debs), err)
	}
	for _, deb := range debs {
		if _, err := a.run(ctx, dir, "dpkg-deb", "-x", deb, tree); err != nil {
			return err
		}
	}
	return nil
}

// update fetches package lists of our own: it needs no privilege and does not touch the machine's.
func (a *apt) update(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(a.lists, "partial"), 0o755); err != nil {
		return err
	}
	a.private = true
	_, err := a.run(ctx, "", "apt-get", "-q", "update")
	return err
}

// run runs a program of apt or dpkg; an error has its last words.
func (a *apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	if strings.HasPrefix(name, "apt-") {
		opts := []string{"-q", "-o", "APT::Sandbox::User="} // root's cache is closed to apt's own user
		if a.private {
			opts = append(opts, "-o", "Dir::State::Lists="+a.lists,
				"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")
		}
		args = append(opts, args...)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "LC_ALL=C")
	var errText bytes.Buffer
	cmd.Stderr = &errText
	out, err := cmd.Output()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("%w: the guest is made of Debian packages; elsewhere make it on a Debian machine and "+
			"set VIRTLET_GUEST to a copy", err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(errText.Bytes()))
	}
	return out, nil
}
