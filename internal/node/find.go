package node

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// found is the container manager of a node.
type found struct {
	manager Manager
	config  string // its configuration; for CRI-O the drop-in
	unit    string // of systemd; for distributions that start containerd themselves, words
	self    string // a distribution that writes the configuration itself: k3s, rke2; "": nobody does
	program string // of the manager, on the node; "" if it is not where it is looked for
	socket  string // where it serves CRI
}

// Where containerd is configured. k3s and rke2 write that file at each start; they are first, as a machine with one of them
// may have another containerd, for Docker, that no pod sees.
var containerds = []found{
	{config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", unit: "k3s.service or k3s-agent.service", self: "k3s", socket: "/run/k3s/containerd/containerd.sock"},
	{config: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml", unit: "rke2-server.service or rke2-agent.service", self: "rke2", socket: "/run/k3s/containerd/containerd.sock"},
	{config: "/etc/containerd/config.toml", unit: "containerd.service", socket: "/run/containerd/containerd.sock"},
}

var crio = found{manager: CRIO, config: "/etc/crio/crio.conf.d/50-virtlet.conf", unit: "crio.service", socket: "/run/crio/crio.sock"}

// servicePath is where systemd's services look for programs, systemd.exec(5).
var servicePath = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// lookPath finds a program on the node, "" if there is none.
func (t *tree) lookPath(name string) string {
	for _, dir := range servicePath {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(t.host(p)); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p
		}
	}
	return ""
}

func (t *tree) exists(path string) bool {
	_, err := t.root.Lstat(rel(path))
	return err == nil
}

// find looks for the container manager.
func (t *tree) find() (found, error) {
	var c, o *found
	for _, f := range containerds {
		if f.self == "" && !t.exists(f.config) && t.lookPath("containerd") == "" || f.self != "" && !t.exists(f.config) {
			continue
		}
		f.manager = Containerd
		if f.self == "" {
			f.program = t.lookPath("containerd")
		}
		c = &f
		break
	}
	if program := t.lookPath("crio"); program != "" || t.exists("/etc/crio") {
		f := crio
		f.program = program
		o = &f
	}
	switch {
	case t.Manager == Containerd || t.Manager != CRIO && t.Config != "":
		if c == nil {
			f := containerds[len(containerds)-1]
			f.manager, f.program = Containerd, t.lookPath("containerd")
			c = &f
		}
	case t.Manager == CRIO:
		if o == nil {
			return found{}, errors.New("find CRI-O: there is neither /etc/crio nor a program crio: install CRI-O first, or name another manager")
		}
	case c != nil && o != nil:
		return found{}, fmt.Errorf("find the container manager: there are two, containerd (%s) and CRI-O: name the kubelet's one: --manager containerd or --manager crio", c.config)
	case c == nil && o == nil:
		return found{}, errors.New("find the container manager: there is neither containerd nor CRI-O: install one first, or name its configuration: --config PATH")
	}
	f := c
	if t.Manager == CRIO || c == nil {
		f = o
	}
	if t.Config != "" && t.Config != f.config {
		f.config, f.self = t.Config, ""
	}
	return *f, nil
}

// wanted is what has to be on the node.
type wanted struct {
	files  []file // programs first: the handler never names one that is not there
	config string // which of the files, or of those that are there already, has the handler
	notes  []string
}

// file is a file to be written, or a block to be appended to one.
type file struct {
	path  string
	data  []byte // all of it; nil: block
	block func(before []byte) (string, error)
	mode  os.FileMode
	quiet bool // a program: no text to show
}

// wanted reads the programs and decides how the handler gets into the configuration.
func (t *tree) wanted(f found) (wanted, error) {
	var w wanted
	for _, name := range []string{Shim, Command} {
		data, err := os.ReadFile(filepath.Join(t.From, name))
		if err != nil {
			return w, fmt.Errorf("read the programs to install: %w (both have to be in one directory: --from DIR)", err)
		}
		w.files = append(w.files, file{path: path.Join(t.BinDir, name), data: data, mode: 0o755, quiet: true})
	}
	shim := path.Join(t.BinDir, Shim)
	w.config = f.config
	if f.manager == Containerd && !slices.Contains(servicePath, t.BinDir) {
		w.notes = append(w.notes, fmt.Sprintf("containerd 1.6 does not look for the shim in %s: it knows its PATH alone, which usually has %s", t.BinDir, DefaultBinDir))
	}
	if f.manager == CRIO {
		w.files = append(w.files, file{path: f.config, data: []byte(crioDropIn(shim)), mode: 0o644})
		return w, nil
	}
	text, err := t.read(f.config)
	if errors.Is(err, fs.ErrNotExist) {
		// Every containerd since 1.3 takes version 2; what is not said is as without a file.
		block, err := appendBlock([]byte(freshConfig), shim)
		w.files = append(w.files, file{path: f.config, data: []byte(freshConfig + block), mode: 0o644})
		return w, err
	}
	if err != nil {
		return w, err
	}
	fail := func(err error) (wanted, error) { return w, t.refuse(f, text, shim, err) }
	c, err := parseContainerd(withoutBlock(text))
	if err != nil {
		return fail(err)
	}
	if err := c.usable(); err != nil {
		return fail(err)
	}
	if theirs, ok := c.runtimes()[Handler].(map[string]any); ok {
		if !isCurrentHandler(theirs) {
			return fail(fmt.Errorf("it has a handler %q of another kind: remove it there, with the file that belongs to it", Handler))
		}
		w.notes = append(w.notes, fmt.Sprintf("%s has the handler by somebody else's hand: it is left as it is", f.config))
		return w, nil
	}
	if dir := c.dropInDir(); dir != "" {
		w.config = path.Join(dir, "50-virtlet.toml")
		w.files = append(w.files, file{path: w.config, data: []byte(dropIn(shim)), mode: 0o644})
		return w, nil
	}
	if fi, err := t.root.Lstat(rel(f.config)); err != nil {
		return w, err
	} else if fi.Mode()&os.ModeSymlink != 0 {
		return fail(errors.New("it is a symbolic link, so somebody else looks after it: name the file itself (--config PATH)"))
	}
	if f.self != "" {
		return fail(fmt.Errorf("%s writes that file anew at each start", f.self))
	}
	if other, err := t.overruled(c, f.config); err != nil {
		return fail(err)
	} else if other != "" {
		return fail(fmt.Errorf("it imports %s, whose section of the plugin overrules its own in containerd 1.x: put the handler there: --config %s", other, other))
	}
	w.files = append(w.files, file{path: f.config, mode: 0o644, block: func(before []byte) (string, error) {
		block, err := appendBlock(before, shim)
		if err != nil {
			err = t.refuse(f, before, shim, err)
		}
		return block, err
	}})
	return w, nil
}

// overruled gives the imported file of a configuration of version 2 that has the plugin's section, "" for none.
func (t *tree) overruled(c containerdConfig, config string) (string, error) {
	if c.Version != 2 {
		return "", nil
	}
	for _, pattern := range c.Imports {
		if !path.IsAbs(pattern) {
			pattern = path.Join(path.Dir(config), pattern)
		}
		files, err := fs.Glob(t.root.FS(), rel(pattern))
		if err != nil {
			return "", fmt.Errorf("read its imports %q: %w", pattern, err)
		}
		for _, name := range files {
			text, err := t.read(name)
			if err != nil {
				return "", err
			}
			imported, err := parseContainerd(text)
			if err != nil {
				return "", fmt.Errorf("read its import %s: %w", name, err)
			}
			if table(imported.all, "plugins")[criV2] != nil {
				return "/" + name, nil
			}
		}
	}
	return "", nil
}

// refuse says what is to be done by hand where a configuration is not touched.
func (t *tree) refuse(f found, text []byte, shim string, why error) error {
	plugin := criV2
	if c, err := parseContainerd(text); err == nil {
		plugin = c.plugin()
	}
	where := "add this to it yourself"
	if f.self != "" {
		dir := path.Dir(f.config)
		template := "config.toml.tmpl"
		if plugin == criV3 {
			template = "config-v3.toml.tmpl"
		}
		where = fmt.Sprintf("write %s/%s (its first line {{ template \"base\" . }}, which keeps what %s has) with this", dir, template, f.self)
	}
	return fmt.Errorf("configure %s: %w\nNothing was changed. Or %s, restart %s, and run this again:\n%s", f.config, why, where, f.unit, strings.TrimSuffix(handlerText(plugin, shim), "\n"))
}

// withoutBlock gives a configuration as it is without our block, if that can be told.
func withoutBlock(text []byte) []byte {
	before, rest, ok := strings.Cut(string(text), blockBegin)
	_, after, ok2 := strings.Cut(rest, blockEnd)
	if !ok || !ok2 {
		return text
	}
	return []byte(before + after)
}

// maxFile bounds a file that is read of the node, in bytes.
const maxFile = 256 << 20

// read reads a file of the node. A link is not followed out of the node's root.
func (t *tree) read(path string) ([]byte, error) {
	f, err := t.root.Open(rel(path))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no regular file", path), err)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

func add(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}
