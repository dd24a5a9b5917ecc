package shim

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroup is a control group: of cgroup v2, or of the same name in every hierarchy of v1.
type cgroup struct {
	root string // where the file systems are mounted
	path string // below them; "": none, the process stays where it is
}

// cgroup gives the group that config.json names by a path, or by SLICE:PREFIX:NAME where systemd makes the groups. That
// one is made in the place where systemd would have it; systemd leaves groups alone that it has not made.
func (s Shim) cgroup(named string) cgroup {
	if parts := strings.Split(named, ":"); len(parts) == 3 {
		named = path.Join(slicePath(parts[0]), parts[1]+"-"+parts[2]+".scope")
	}
	if named = path.Clean("/" + named); named == "/" {
		named = ""
	}
	return cgroup{s.Cgroups, named}
}

// slicePath gives the directories of a slice: a-b.slice is in a.slice (systemd.slice(5)).
func slicePath(slice string) string {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "-" {
		return ""
	}
	var dir, so string
	for part := range strings.SplitSeq(name, "-") {
		so += part
		dir = path.Join(dir, so+".slice")
		so += "-"
	}
	return dir
}

func (c cgroup) unified() bool {
	var fs unix.Statfs_t
	return unix.Statfs(c.root, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// hierarchies gives the mounts that have groups: one of v2, or those of v1.
func (c cgroup) hierarchies() ([]string, error) {
	if c.unified() {
		return []string{c.root}, nil
	}
	entries, err := os.ReadDir(c.root)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		dir, err := filepath.EvalSymlinks(filepath.Join(c.root, e.Name())) // cpu is cpu,cpuacct at times
		if err != nil {
			continue
		}
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) == nil && fs.Type == unix.CGROUP_SUPER_MAGIC && !slices.Contains(all, dir) {
			all = append(all, dir)
		}
	}
	return all, nil
}

// join moves a process with all its threads to the group, which is made if need be.
func (c cgroup) join(pid int) error {
	if c.path == "" {
		return nil
	}
	all, err := c.hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := makeGroup(h, c.path); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
		if err := enterGroup(filepath.Join(h, c.path), pid); err != nil {
			return err
		}
	}
	return nil
}

func enterGroup(dir string, pid int) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// makeGroup makes a group and those above it. One of cpuset takes no process before it has CPUs and memory (cpuset(7)).
func makeGroup(hierarchy, group string) error {
	if group == "/" {
		return nil
	}
	if err := makeGroup(hierarchy, path.Dir(group)); err != nil {
		return err
	}
	dir := filepath.Join(hierarchy, group)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		above, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		mine, merr := os.ReadFile(filepath.Join(dir, file))
		if err != nil || merr != nil || len(strings.TrimSpace(string(mine))) > 0 || len(strings.TrimSpace(string(above))) == 0 {
			continue // not a cpuset, or v2, or set
		}
		if err := os.WriteFile(filepath.Join(dir, file), above, 0); err != nil {
			return err
		}
	}
	return nil
}

// leave moves this process out of its groups, so that they can go: to the top, where processes may always be.
func (c cgroup) leave() error {
	if c.path == "" {
		return nil
	}
	all, err := c.hierarchies()
	for _, h := range all {
		err = errors.Join(err, enterGroup(h, os.Getpid()))
	}
	return err
}

// remove takes the group away. One that is not there is done; one that has processes stays, and is an error.
func (c cgroup) remove() error {
	if c.path == "" {
		return nil
	}
	all, err := c.hierarchies()
	for _, h := range all {
		e := patiently(func() error { return unix.Rmdir(filepath.Join(h, c.path)) })
		if e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("remove cgroup %s in %s: %w", c.path, h, e))
		}
	}
	return err
}
