package node

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// The plugin of containerd that has the runtimes of pods: of its configuration of version 2 (containerd 1.3 to 1.7; 2.x
// migrates it), and of version 3 and later.
const (
	criV2 = "io.containerd.grpc.v1.cri"
	criV3 = "io.containerd.cri.v1.runtime"
)

// RuntimeType is this runtime for containerd, and the pattern of annotations that reach it.
const (
	runtimeType = "io.containerd.virtlet.v2"
	annotations = "virtlet.cloud/*"
)

// freshConfig is where a node without a configuration begins.
const freshConfig = "version = 2\n"

// The lines around a block in a file of somebody else.
const (
	blockBegin = "# BEGIN virtlet: by `virtlet node install`; `virtlet node uninstall` removes it"
	blockEnd   = "# END virtlet"
)

// containerdConfig is a configuration of containerd as far as it matters.
type containerdConfig struct {
	Version  int      `toml:"version"`
	Imports  []string `toml:"imports"`
	Disabled []string `toml:"disabled_plugins"`
	all      map[string]any
}

func parseContainerd(text []byte) (c containerdConfig, err error) {
	if err = toml.Unmarshal(text, &c); err == nil {
		err = toml.Unmarshal(text, &c.all)
	}
	if err != nil {
		return c, fmt.Errorf("it is no TOML that is understood: %w", err)
	}
	if c.all == nil {
		c.all = map[string]any{}
	}
	return c, nil
}

// plugin is the section for pods.
func (c containerdConfig) plugin() string {
	if c.Version == 2 {
		return criV2
	}
	return criV3
}

// table walks down tables; nil where there is none.
func table(m map[string]any, path ...string) map[string]any {
	for _, key := range path {
		m, _ = m[key].(map[string]any)
	}
	return m
}

func (c containerdConfig) runtimes() map[string]any {
	return table(c.all, "plugins", c.plugin(), "containerd", "runtimes")
}

// usable says why a handler cannot be added to a configuration, or nothing.
func (c containerdConfig) usable() error {
	if c.Version < 2 {
		return errors.New("it is of version 1 (no version = 2 or later): let `containerd config migrate` rewrite it, or `containerd config default` make a new one")
	}
	for _, d := range c.Disabled {
		if d == "cri" || d == criV2 || d == criV3 {
			return fmt.Errorf("disabled_plugins has %q: Kubernetes cannot use this containerd; remove it there (Docker's package puts it there)", d)
		}
	}
	return nil
}

// handlerText is the handler as TOML for a plugin.
func handlerText(plugin, shim string) string {
	return fmt.Sprintf(`[plugins.%q.containerd.runtimes.%s]
  runtime_type = %q
  runtime_path = %q
  pod_annotations = [%q]
  container_annotations = [%q]
`, plugin, Handler, runtimeType, shim, annotations, annotations)
}

// handlerTable is the same as a parser has it.
func handlerTable(shim string) map[string]any {
	return map[string]any{
		"runtime_type": runtimeType, "runtime_path": shim,
		"pod_annotations": []any{annotations}, "container_annotations": []any{annotations},
	}
}

// dropIn is a file of its own for containerd 2.x, of which every version takes version 3.
func dropIn(shim string) string {
	return "# By `virtlet node install`; `virtlet node uninstall` removes it.\nversion = 3\n\n" + handlerText(criV3, shim)
}

// crioDropIn is the file for CRI-O. It calls this kind of runtime "vm", and allows annotations by prefix.
func crioDropIn(shim string) string {
	return fmt.Sprintf(`# By %s; %s removes it.
[crio.runtime.runtimes.%s]
  runtime_path = %q
  runtime_type = "vm"
  allowed_annotations = ["virtlet.cloud/"]
`, "`virtlet node install`", "`virtlet node uninstall`", Handler, shim)
}

// block is what is appended to a configuration.
//
// containerd 1.x takes the runtimes of a file instead of its own default, which is runc. So a file that names none gets
// that default beside ours, word for word: without it every other pod of the node would fail.
func block(c containerdConfig, before []byte, shim string) string {
	var b strings.Builder
	if len(before) > 0 && !bytes.HasSuffix(before, []byte("\n")) {
		b.WriteString("\n")
	}
	b.WriteString("\n" + blockBegin + "\n")
	b.WriteString(handlerText(c.plugin(), shim))
	if c.addsRunc() {
		b.WriteString("\n# containerd's default, which goes when another runtime is named.\n")
		fmt.Fprintf(&b, "[plugins.%q.containerd.runtimes.runc]\n  runtime_type = %q\n", c.plugin(), runcType)
	}
	b.WriteString(blockEnd + "\n")
	return b.String()
}

const runcType = "io.containerd.runc.v2"

func (c containerdConfig) addsRunc() bool { return c.Version == 2 && len(c.runtimes()) == 0 }

// appendBlock gives the block for a configuration that does not have one, and verifies that the file with it says the
// same as before and the handler, and nothing else.
func appendBlock(before []byte, shim string) (string, error) {
	c, err := parseContainerd(before)
	if err != nil {
		return "", err
	}
	if err := c.usable(); err != nil {
		return "", err
	}
	text := block(c, before, shim)
	after, err := parseContainerd(slices.Concat(before, []byte(text)))
	if err != nil {
		return "", fmt.Errorf("a handler cannot be added at its end (are tables of plugins written in one line?): %w", err)
	}
	runtimes, err := makeTable(c.all, "plugins", c.plugin(), "containerd", "runtimes")
	if err != nil {
		return "", err
	}
	if c.addsRunc() {
		runtimes["runc"] = map[string]any{"runtime_type": runcType}
	}
	runtimes[Handler] = handlerTable(shim)
	if !reflect.DeepEqual(c.all, after.all) {
		return "", errors.New("with a handler at its end it would mean something else")
	}
	return text, nil
}

// makeTable walks down tables and makes those that are missing.
func makeTable(m map[string]any, path ...string) (map[string]any, error) {
	for _, key := range path {
		if m[key] == nil {
			m[key] = map[string]any{}
		}
		next, ok := m[key].(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%q is no table", key)
		}
		m = next
	}
	return m, nil
}

// dropInDir gives the directory whose files a configuration of version 3 or later imports, "" if there is none.
//
// One of version 2 has none that serves: containerd 1.x takes a plugin's section from the file that it reads last, and
// forgets what the others say of it.
func (c containerdConfig) dropInDir() string {
	if c.Version < 3 {
		return ""
	}
	for _, i := range c.Imports {
		if dir, file := filepath.Split(i); filepath.IsAbs(i) && file == "*.toml" && !strings.ContainsAny(dir, "*?[") {
			return filepath.Clean(dir)
		}
	}
	return ""
}

// isCurrentHandler says whether the file has our handler by somebody else's hand: the same shim, or the one of that name.
func isCurrentHandler(h map[string]any) bool {
	return h["runtime_type"] == runtimeType
}
