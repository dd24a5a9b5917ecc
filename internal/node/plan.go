package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/diff"
)

// record is what is ours on a node. While something is being changed it has what was and what will be.
type record struct {
	Version string  `json:"version"`
	Owner   string  `json:"owner,omitempty"`
	Manager Manager `json:"manager"`
	Config  string  `json:"config"` // the file with the handler
	Unit    string  `json:"unit"`   // who has to be restarted
	Restart bool    `json:"restart,omitempty"`
	Files   []entry `json:"files"`
}

// entry is a file that is ours, or a block of ours in one.
type entry struct {
	Path   string   `json:"path"`
	Sums   []string `json:"sums,omitempty"`   // SHA-256 of what we have written, or are about to
	Blocks []string `json:"blocks,omitempty"` // likewise, of what was appended
	Dirs   []string `json:"dirs,omitempty"`   // made for it, the outermost first
	Config bool     `json:"config,omitempty"` // of the manager, not a program
}

// step is one effect on a file.
type step struct {
	path   string
	before []byte // nil: there is none
	after  []byte // nil: remove it
	mode   os.FileMode
	quiet  bool
	config bool     // of the manager: it has to be restarted to notice
	dirs   []string // to be made before, or removed after, the outermost first
}

// planned is what will be done.
type planned struct {
	union record // to be recorded before: everything that may be ours in the meantime
	next  record // after
	steps []step
	notes []string
}

// plan compares what is ours with what is wanted. It touches nothing: read reads a file of the node.
func plan(old record, want wanted, read func(string) ([]byte, error)) (planned, error) {
	p := planned{union: old}
	p.union.Files = slices.Clone(old.Files)
	for _, f := range want.files {
		i := slices.IndexFunc(old.Files, func(e entry) bool { return e.Path == f.path })
		var ours entry
		if i >= 0 {
			ours = old.Files[i]
		}
		s, e, err := planFile(ours, f, read)
		if err != nil {
			return p, err
		}
		if e.Path == "" { // it is there, by somebody else
			p.notes = append(p.notes, f.path+" is there already, just so: it stays at the end")
			continue
		}
		if p.next.Files = append(p.next.Files, e); s != nil {
			p.steps = append(p.steps, *s)
		}
		both := e
		for _, x := range ours.Sums {
			both.Sums = add(both.Sums, x)
		}
		for _, x := range ours.Blocks {
			both.Blocks = add(both.Blocks, x)
		}
		if i < 0 {
			p.union.Files = append(p.union.Files, both)
		} else {
			p.union.Files[i] = both
		}
	}
	// What is no longer wanted goes, in the reverse order: the handler before its program.
	for _, e := range slices.Backward(old.Files) {
		if slices.ContainsFunc(want.files, func(f file) bool { return f.path == e.Path }) {
			continue
		}
		s, note, err := planRemoval(e, read)
		if err != nil {
			return p, err
		}
		if note != "" {
			p.notes = append(p.notes, note)
		}
		if s != nil {
			p.steps = append(p.steps, *s)
		}
	}
	return p, nil
}

// planFile plans one file that is wanted. No step: it is as wanted. No entry: and not ours.
func planFile(ours entry, f file, read func(string) ([]byte, error)) (*step, entry, error) {
	now, err := read(f.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, entry{}, err
	}
	s := &step{path: f.path, before: now, mode: f.mode, quiet: f.quiet, config: !f.quiet, dirs: ours.Dirs}
	if err != nil {
		s.before = nil
		dirs, err := missing(path.Dir(f.path), read)
		if err != nil {
			return nil, entry{}, err
		}
		for _, d := range dirs {
			s.dirs = add(s.dirs, d)
		}
	} else if s.before == nil {
		s.before = []byte{}
	}
	e := entry{Path: f.path, Dirs: s.dirs, Config: s.config}
	if f.block != nil {
		base, _, err := cutBlock(ours, now)
		if err != nil {
			return nil, entry{}, err
		}
		block, err := f.block(base)
		if err != nil {
			return nil, entry{}, err
		}
		s.after, e.Blocks = append(bytes.Clone(base), block...), []string{block}
		if len(ours.Sums) > 0 && string(base) == freshConfig { // we have made the file, and nobody has added anything
			e.Sums = []string{sum(s.after)}
		}
	} else {
		s.after, e.Sums = f.data, []string{sum(f.data)}
		if s.config && bytes.Contains(f.data, []byte(blockBegin)) { // a configuration that the operator may complete
			e.Blocks = []string{string(f.data[bytes.Index(f.data, []byte("\n"+blockBegin)):])}
		}
		known := s.before == nil || slices.Contains(ours.Sums, sum(now))
		switch {
		case !known && bytes.Equal(now, f.data) && ours.Path == "":
			return nil, entry{}, nil
		case !known && !bytes.Equal(now, f.data):
			return nil, entry{}, fmt.Errorf("write %s: it is there already, and not by this: remove it first (`make uninstall`, if it was `make install`), or use another directory (--bin-dir)", f.path)
		}
	}
	if s.before != nil && bytes.Equal(s.before, s.after) {
		return nil, e, nil
	}
	return s, e, nil
}

// missing gives the directories above a file that are not there, the outermost first.
func missing(dir string, read func(string) ([]byte, error)) ([]string, error) {
	var all []string
	for ; dir != "/" && dir != "."; dir = path.Dir(dir) {
		if _, err := read(dir); !errors.Is(err, fs.ErrNotExist) {
			break // a directory is there: reading one fails otherwise
		}
		all = append(all, dir)
	}
	slices.Reverse(all)
	return all, nil
}

// planRemoval plans the end of what is ours. No step: there is nothing of it.
func planRemoval(e entry, read func(string) ([]byte, error)) (s *step, note string, err error) {
	now, err := read(e.Path)
	if errors.Is(err, fs.ErrNotExist) {
		if len(e.Dirs) == 0 {
			return nil, "", nil
		}
		return &step{path: e.Path, dirs: e.Dirs, quiet: true}, "", nil // killed between the directories and the file
	}
	if err != nil {
		return nil, "", err
	}
	s = &step{path: e.Path, before: now, dirs: e.Dirs, config: e.Config, quiet: !e.Config}
	if slices.Contains(e.Sums, sum(now)) {
		return s, "", nil
	}
	if len(e.Blocks) == 0 {
		return nil, fmt.Sprintf("%s has been changed by somebody else: it stays", e.Path), nil
	}
	base, cut, err := cutBlock(e, now)
	if err != nil || !cut {
		return nil, "", err // without: the operator has removed the block
	}
	s.after = base
	return s, "", nil
}

// cutBlock gives a file without our block, and whether it had one.
func cutBlock(e entry, now []byte) (base []byte, cut bool, err error) {
	for _, b := range e.Blocks {
		if i := bytes.Index(now, []byte(b)); i >= 0 {
			return slices.Concat(now[:i], now[i+len(b):]), true, nil
		}
	}
	if bytes.Contains(now, []byte(blockBegin)) {
		return nil, false, fmt.Errorf("read %s: the lines of virtlet in it are not those that were written there: remove them by hand, from %q to %q, and run this again", e.Path, blockBegin, blockEnd)
	}
	return now, false, nil
}

// restart says whether the manager has to read its configuration again.
func (p planned) restart() bool {
	return slices.ContainsFunc(p.steps, func(s step) bool { return s.config })
}

// changes shows the steps to people.
func (p planned) changes() []Change {
	all := []Change{}
	for _, s := range p.steps {
		if s.before == nil && s.after == nil {
			continue
		}
		c := Change{Do: "write", Path: s.path, Size: len(s.after)}
		if s.after == nil {
			c.Do, c.Size = "remove", 0
		}
		if !s.quiet {
			before, after := s.path, s.path
			if s.before == nil {
				before = os.DevNull
			}
			if s.after == nil {
				after = os.DevNull
			}
			c.Diff, c.Size = unified(before, s.before, after, s.after), 0
		}
		all = append(all, c)
	}
	return all
}

func unified(oldName string, before []byte, newName string, after []byte) string {
	_, text, _ := strings.Cut(string(diff.Diff(oldName, before, newName, after)), "\n") // its first line is a command's
	return text
}
