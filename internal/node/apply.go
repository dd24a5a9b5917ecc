package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// record reads what is ours on the node; an empty one if there is nothing.
func (t *tree) record() (record, error) {
	var r record
	text, err := t.read(recordPath)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read what was installed, %s: %w (without it nothing is undone; remove it to install anew)", recordPath, err)
	}
	return r, nil
}

// save replaces the record.
func (t *tree) save(r record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	t.effect("record")
	if err := t.mkdirAll(stateDir); err != nil {
		return err
	}
	return t.replace(recordPath, append(text, '\n'), 0o600, nil)
}

// forget removes the record, when nothing is ours any more.
func (t *tree) forget() error {
	t.effect("forget")
	for _, p := range []string{temporary(recordPath), recordPath} {
		if err := t.root.Remove(rel(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// In a container that has the node's root mounted it is a mount of its own, and stays, empty.
	err := t.root.Remove(rel(stateDir))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// apply does what is planned. Killed at any moment, the record covers what is there, and a further call converges.
func (t *tree) apply(old record, p planned) error {
	if len(p.steps) == 0 && len(p.next.Files) == len(old.Files) && p.next.Version == old.Version && p.next.Owner == old.Owner && p.next.Restart == old.Restart {
		return nil
	}
	union := p.union
	union.Version, union.Owner, union.Manager, union.Config = p.next.Version, p.next.Owner, p.next.Manager, p.next.Config
	union.Unit, union.Restart = p.next.Unit, p.next.Restart
	if len(p.next.Files) == 0 {
		union = old
		union.Restart, union.Unit = p.next.Restart, p.next.Unit
	}
	if err := t.save(union); err != nil {
		return err
	}
	for _, e := range union.Files { // of a run that was killed
		if err := t.root.Remove(rel(temporary(e.Path))); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
	}
	for _, s := range p.steps {
		if err := t.do(s); err != nil {
			return err
		}
	}
	return t.save(p.next)
}

// do does one step. The file is as the plan has seen it, or nothing happens.
func (t *tree) do(s step) error {
	now, err := t.read(s.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if (err == nil) != (s.before != nil) || !bytes.Equal(now, s.before) {
		return fmt.Errorf("write %s: somebody has changed it meanwhile: run this again", s.path)
	}
	if s.after == nil {
		t.effect("remove " + s.path)
		if err := t.root.Remove(rel(s.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, dir := range slices.Backward(s.dirs) {
			t.effect("remove " + dir)
			err := t.root.Remove(rel(dir))
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
				return err
			}
		}
		return nil
	}
	if err := t.mkdirAll(path.Dir(s.path)); err != nil {
		return err
	}
	return t.replace(s.path, s.after, s.mode, s.before)
}

func (t *tree) mkdirAll(dir string) error {
	if t.exists(dir) {
		return nil // perhaps a link to one
	}
	t.effect("make " + dir)
	return t.root.MkdirAll(rel(dir), 0o755)
}

// temporary is where a file is written before it is at its place, in the same file system. Managers read whatever is in
// a directory of drop-ins (CRI-O by any name), so there it is above.
func temporary(file string) string {
	dir := path.Dir(file)
	if strings.HasSuffix(dir, ".d") {
		dir = path.Dir(dir)
	}
	return path.Join(dir, "."+path.Base(file)+".virtlet-new")
}

// replace gives a file new content in one step, also for who looks after a power cut. One that is there, with content
// before, keeps its mode, owner and label; mode is for a new one.
func (t *tree) replace(file string, data []byte, mode os.FileMode, before []byte) error {
	tmp := temporary(file)
	if err := t.root.Remove(rel(tmp)); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a run that was killed
		return err
	}
	t.effect("write " + tmp)
	f, err := t.root.OpenFile(rel(tmp), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = func() error {
		if _, err := f.Write(data); err != nil {
			return err
		}
		if err := f.Chmod(mode); err != nil {
			return err
		}
		if before != nil {
			if err := t.likeness(f, file); err != nil {
				return err
			}
		}
		return f.Sync()
	}()
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", file, err), t.root.Remove(rel(tmp)))
	}
	t.effect("replace " + file)
	if err := t.root.Rename(rel(tmp), rel(file)); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", file, err), t.root.Remove(rel(tmp)))
	}
	dir, err := t.root.Open(rel(path.Dir(file)))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// likeness gives a file the mode, the owner and the SELinux label of another.
func (t *tree) likeness(f *os.File, path string) error {
	var st unix.Stat_t
	old, err := t.root.Open(rel(path))
	if err != nil {
		return err
	}
	defer old.Close()
	if err := unix.Fstat(int(old.Fd()), &st); err != nil {
		return err
	}
	const selinux = "security.selinux"
	label := make([]byte, 4096)
	if n, err := unix.Fgetxattr(int(old.Fd()), selinux, label); err == nil {
		if err := unix.Fsetxattr(int(f.Fd()), selinux, label[:n], 0); err != nil {
			return fmt.Errorf("set the label of SELinux: %w", err)
		}
	}
	if err := f.Chmod(os.FileMode(st.Mode).Perm()); err != nil {
		return err
	}
	return f.Chown(int(st.Uid), int(st.Gid)) // the last, as it may end what this process may do
}
