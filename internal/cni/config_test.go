package cni

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAttachmentNamesThePlugin(t *testing.T) {
	if a := chain(t, "1.0.0", "macvlan", "portmap").Attachment("vm", here, "eth0"); a.Plugin != "macvlan" || a.Name != "net" {
		t.Errorf("%q of %q", a.Plugin, a.Name)
	}
}

func TestParse(t *testing.T) {
	cases := map[string]struct {
		in, want string // want is the list; empty: refused
		field    string
		says     string
	}{
		"list": {
			in:   `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge","mtu":1400}]}`,
			want: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge","mtu":1400}]}`,
		},
		"single": {
			in:   `{"cniVersion":"0.3.1","name":"a","type":"weave-net","hairpinMode":true}`,
			want: `{"cniVersion":"0.3.1","name":"a","plugins":[{"cniVersion":"0.3.1","name":"a","type":"weave-net","hairpinMode":true}]}`,
		},
		"single with cniVersions": {
			in:   `{"cniVersions":["0.4.0","1.0.0"],"name":"a","type":"x"}`,
			want: `{"cniVersion":"1.0.0","name":"a","plugins":[{"cniVersions":["0.4.0","1.0.0"],"name":"a","type":"x"}]}`,
		},
		"newest of cniVersions that is known": {
			in:   `{"cniVersion":"0.3.1","cniVersions":["0.4.0","9.0.0","1.1.0","1.0.0"],"name":"a","plugins":[{"type":"x"}]}`,
			want: `{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"x"}]}`,
		},
		"flags and unknown keys stay": {
			in:   `{"cniVersion":"1.1.0","name":"a","disableCheck":true,"x":[1],"plugins":[{"type":"x"}]}`,
			want: `{"cniVersion":"1.1.0","disableCheck":true,"name":"a","plugins":[{"type":"x"}],"x":[1]}`,
		},
		"no version":          {in: `{"name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "missing"},
		"single, no version":  {in: `{"name":"a","type":"x"}`, field: "cniVersion", says: "missing"},
		"empty version":       {in: `{"cniVersion":"","name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "missing"},
		"0.2.0":               {in: `{"cniVersion":"0.2.0","name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "0.3.0"},
		"1.2.0":               {in: `{"cniVersion":"1.2.0","name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "1.1.0"},
		"no such version":     {in: `{"cniVersion":"0.9.0","name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "0.9.0"},
		"version with space":  {in: `{"cniVersion":" 1.0.0","name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion"},
		"version a number":    {in: `{"cniVersion":1,"name":"a","plugins":[{"type":"x"}]}`, says: "cniVersion"},
		"only new versions":   {in: `{"cniVersions":["2.0.0"],"name":"a","plugins":[{"type":"x"}]}`, field: "cniVersion", says: "missing"},
		"no name":             {in: `{"cniVersion":"1.0.0","plugins":[{"type":"x"}]}`, field: "name", says: "missing"},
		"name a number":       {in: `{"cniVersion":"1.0.0","name":5,"plugins":[{"type":"x"}]}`, field: "name"},
		"name with slash":     {in: `{"cniVersion":"1.0.0","name":"../a","plugins":[{"type":"x"}]}`, field: "name"},
		"name with escape":    {in: `{"cniVersion":"1.0.0","name":"a\u001b[2J","plugins":[{"type":"x"}]}`, field: "name", says: `\x1b`},
		"name with line end":  {in: `{"cniVersion":"1.0.0","name":"a\n","plugins":[{"type":"x"}]}`, field: "name"},
		"name starts with -":  {in: `{"cniVersion":"1.0.0","name":"-a","plugins":[{"type":"x"}]}`, field: "name"},
		"plugins missing":     {in: `{"cniVersion":"1.0.0","name":"a"}`, field: "plugins", says: "none"},
		"plugins empty":       {in: `{"cniVersion":"1.0.0","name":"a","plugins":[]}`, says: "no plugins"},
		"plugins null":        {in: `{"cniVersion":"1.0.0","name":"a","plugins":null}`, says: "plugins"},
		"plugin null":         {in: `{"cniVersion":"1.0.0","name":"a","plugins":[null]}`, says: "type"},
		"plugin without type": {in: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"},{}]}`, says: "plugin config 1"},
		"type is a path":      {in: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../../bin/sh"}]}`, field: "type"},
		"type is a folder":    {in: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":".."}]}`, field: "type"},
		"ipam is a path":      {in: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x","ipam":{"type":"/bin/sh"}}]}`, field: "ipam.type"},
		"too big":             {in: `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"}]}` + strings.Repeat(" ", maxConfig), says: "bytes"},
		"no JSON":             {in: `cniVersion: 1.0.0`, says: "invalid"},
		"nothing":             {in: ``, says: "unexpected end"},
		"null":                {in: `null`, field: "name"},
		"two documents":       {in: `[] {}`, says: "after top-level"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			n, err := Parse("/etc/cni/net.d/10-x.conflist", []byte(c.in))
			if c.want == "" {
				var ce *ConfigError
				if !errors.As(err, &ce) {
					t.Fatalf("gave %+v, %v; want it refused", n, err)
				}
				if ce.Field != c.field || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "10-x") {
					t.Errorf("refused for field %q, want %q: %v (want it to say %q)", ce.Field, c.field, err, c.says)
				}
				return
			}
			if err != nil || string(n.Bytes()) != c.want {
				t.Fatalf("got  %+v, %v\nwant %s", n, err, c.want)
			}
			again, err := Parse("again", n.Bytes())
			if err != nil || string(again.Bytes()) != c.want {
				t.Errorf("a second reading differs: %v, %v", again, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(defaultList)
	f.Add([]byte(`{"cniVersions":["0.4.0"],"name":"a","type":"x","capabilities":{"ips":true}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := Parse("f", b)
		if err != nil {
			return
		}
		n.Capabilities()
		again, err := Parse("f", n.Bytes())
		if err != nil || string(again.Bytes()) != string(n.Bytes()) || again.Name != n.Name || again.Version != n.Version {
			t.Errorf("%q is not read back: %v", n.Bytes(), err)
		}
	})
}

func TestBytesAreACopy(t *testing.T) {
	n := Default(t.TempDir())
	n.Bytes()[0] = 'x'
	if n.Bytes()[0] != '{' {
		t.Error("a caller can change the network")
	}
}

func TestCapabilities(t *testing.T) {
	n, err := Parse("x", []byte(`{"cniVersion":"1.0.0","name":"a","plugins":[
		{"type":"bridge","capabilities":{"mac":true,"ips":true,"dns":false}},{"type":"portmap","capabilities":{"portMappings":true,"ips":true}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"ips", "mac", "portMappings"}, n.Capabilities()); d != "" {
		t.Error(d)
	}
}

func TestDefault(t *testing.T) {
	n := Default(t.TempDir())
	if n.Name != "virtlet" || n.Version != "1.1.0" {
		t.Errorf("%+v", n)
	}
	if d := cmp.Diff([]string{"bandwidth", "ips", "mac", "portMappings"}, n.Capabilities()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"bridge", "host-local", "portmap", "bandwidth", "firewall"}, (&Runtime{}).Missing(n)); d != "" {
		t.Error(d)
	}
}

// write makes files below dir; a path that ends in / is a folder.
func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func list(name string) string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[{"type":"bridge"}]}`, name)
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"20-b.conflist": list("b"), "10-a.conf": `{"cniVersion":"0.3.1","name":"a","type":"ptp"}`, "30-c.json": list("c"),
		"05-old.conf": `{"name":"old","type":"bridge"}`, "06-bad.conflist": `{`, "40-b2.conflist": list("b"),
		"README.md": "no", "x.conflist.bak": "no", "folder.conflist/": "",
		"50-big.conf": strings.Repeat(" ", maxConfig+1),
	})
	if err := syscall.Mkfifo(filepath.Join(dir, "60-fifo.conf"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "70-link.conf")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../"+filepath.Base(dir)+"/30-c.json", filepath.Join(dir, "99-link.conf")); err != nil {
		t.Fatal(err)
	}
	nets, bad, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range nets {
		names = append(names, n.Name+" "+filepath.Base(n.File))
	}
	if d := cmp.Diff([]string{"a 10-a.conf", "b 20-b.conflist", "c 30-c.json"}, names); d != "" {
		t.Error(d)
	}
	why := map[string]string{
		"05-old.conf": "cniVersion", "06-bad.conflist": "unexpected end", "40-b2.conflist": "20-b.conflist",
		"50-big.conf": "more than", "60-fifo.conf": "regular", "70-link.conf": "no such file", "99-link.conf": "30-c.json",
	}
	for _, b := range bad {
		base := filepath.Base(b.File)
		if why[base] == "" || !strings.Contains(b.Err.Error(), why[base]) || !strings.Contains(b.Err.Error(), base) {
			t.Errorf("%s: %v; want %q", base, b.Err, why[base])
		}
		delete(why, base)
	}
	if len(why) > 0 {
		t.Errorf("not reported: %v", why)
	}
	if _, _, err := Load(filepath.Join(dir, "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}

	for name, says := range map[string][]string{
		"a":   nil,
		"old": {"a, b, c", "05-old.conf", "cniVersion"}, // by the name inside
		"bad": {"06-bad.conflist", "unexpected end"},    // by the file's name
		"big": {"50-big.conf"},
		"d":   {"a, b, c"},
	} {
		n, err := Find(nets, bad, name)
		if says == nil {
			if err != nil || n.Name != name {
				t.Errorf("Find(%q) = %v, %v", name, n, err)
			}
			continue
		}
		for _, s := range says {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("Find(%q): %v; want %q in it", name, err, s)
			}
		}
		if name == "d" && strings.Contains(err.Error(), "05-old") {
			t.Errorf("Find(%q) talks about others: %v", name, err)
		}
	}
	if _, err := Find(nil, nil, "x"); err == nil || !strings.Contains(err.Error(), "there is none") {
		t.Errorf("nothing at all: %v", err)
	}
}

func TestLoadPluginsFromFolder(t *testing.T) {
	types := func(n *Network) (out []string) {
		for _, p := range n.list.Plugins {
			out = append(out, p.Network.Type)
		}
		return out
	}
	head := `{"cniVersion":"1.1.0","name":"a"`
	folder := map[string]string{"a/20.conf": `{"type":"tuning"}`, "a/10.conf": `{"type":"bandwidth"}`, "a/x.json": `{"type":"no"}`}
	cases := map[string]struct {
		files map[string]string
		want  []string
	}{
		"appended":     {map[string]string{"a.conflist": head + `,"plugins":[{"type":"bridge"}]}`}, []string{"bridge", "bandwidth", "tuning"}},
		"alone":        {map[string]string{"a.conflist": head + `}`}, []string{"bandwidth", "tuning"}},
		"inlined only": {map[string]string{"a.conflist": head + `,"loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"}]}`}, []string{"bridge"}},
		"single":       {map[string]string{"a.conf": head + `,"type":"ptp"}`}, []string{"ptp"}},
		"no JSON":      {map[string]string{"a.conflist": head + `}`, "a/30.conf": "x"}, nil},
		"too much":     {map[string]string{"a.conflist": head + `}`, "a/30.conf": "{" + strings.Repeat(" ", maxConfig-10) + "}"}, nil},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, folder)
			write(t, dir, c.files)
			nets, bad, err := Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == nil {
				if len(nets) != 0 || len(bad) != 1 {
					t.Errorf("networks %v, bad %v", nets, bad)
				}
				return
			}
			if len(nets) != 1 || !slices.Equal(types(nets[0]), c.want) {
				t.Fatalf("networks %v, bad %v; want plugins %v", nets, bad, c.want)
			}
			again, err := Parse("again", nets[0].Bytes())
			if err != nil || !slices.Equal(types(again), c.want) {
				t.Errorf("Bytes do not hold the folder's plugins: %s, %v", nets[0].Bytes(), err)
			}
		})
	}
}
