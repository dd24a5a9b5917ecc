package node

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Variables of a process that kills itself in the middle of its work: see [kill].
const (
	killAtEnv = "VIRTLET_TEST_KILL_AT"
	rootEnv   = "VIRTLET_TEST_ROOT"
	fromEnv   = "VIRTLET_TEST_FROM"
	actionEnv = "VIRTLET_TEST_ACTION"
)

func TestMain(m *testing.M) {
	if at, err := strconv.Atoi(os.Getenv(killAtEnv)); err == nil {
		dieAt(at)
	}
	os.Exit(m.Run())
}

// dieAt installs or uninstalls, and is gone at the nth effect. With less effects it ends by itself.
func dieAt(nth int) {
	n := Node{Root: os.Getenv(rootEnv), BinDir: DefaultBinDir, From: os.Getenv(fromEnv), Version: "test", Owner: "test"}
	n.step = func(string) {
		if nth--; nth == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	do := n.Install
	if os.Getenv(actionEnv) == "uninstall" {
		do = n.Uninstall
	}
	if _, err := do(context.Background()); err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
	os.Exit(0)
}

// needRoot skips where files cannot be given to root.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: an installation does")
	}
}

// machine makes the tree of a node with some files, and the programs to install.
func machine(t *testing.T, files map[string]string) Node {
	t.Helper()
	n := Node{Root: t.TempDir(), BinDir: DefaultBinDir, From: t.TempDir(), Version: "1", Owner: "me"}
	for _, dir := range []string{"usr/local/bin", "usr/bin", "run", "var/lib", "etc"} {
		if err := os.MkdirAll(filepath.Join(n.Root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range files {
		write(t, filepath.Join(n.Root, path), text, 0o640)
	}
	programs(t, n, "one")
	return n
}

func programs(t *testing.T, n Node, say string) {
	t.Helper()
	for _, name := range []string{Shim, Command} {
		write(t, filepath.Join(n.From, name), "#!/bin/sh\necho "+name+" "+say+"\n", 0o755)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func recorded(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// contents lists all of a node: modes, owners and contents. The lock is no trace: /run goes with a reboot.
func contents(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if name == rel(lockPath) {
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		what := fi.Mode().String() + " " + strconv.Itoa(int(st.Uid)) + " "
		switch {
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += string(b)
		case fi.Mode()&os.ModeSymlink != 0:
			to, _ := os.Readlink(path)
			what += to
		}
		all[name] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// handlers reads what handlers a node's configuration has, with its drop-in.
func handlers(t *testing.T, root string, files ...string) []string {
	t.Helper()
	all := map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(root, f))
		if err != nil {
			t.Fatal(err)
		}
		c, err := parseContainerd(b)
		if err != nil {
			t.Fatal(err)
		}
		for name := range c.runtimes() {
			all[name] = true
		}
		for name := range table(c.all, "crio", "runtime", "runtimes") {
			all[name] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// nodes are the machines that are known, and where the handler goes on each.
var nodes = []struct {
	name  string
	files map[string]string // path -> recorded file; "": nothing in it
	into  string
	also  []string // further files with handlers
}{
	{"debian 12", map[string]string{"etc/containerd/config.toml": "debian-12.toml"}, "etc/containerd/config.toml", nil},
	{"containerd 1.6", map[string]string{"etc/containerd/config.toml": "containerd-1.6-default.toml"}, "etc/containerd/config.toml", nil},
	{"containerd 1.7", map[string]string{"etc/containerd/config.toml": "containerd-1.7-default.toml"}, "etc/containerd/config.toml", nil},
	{"containerd 2.0", map[string]string{"etc/containerd/config.toml": "containerd-2.0-like.toml"}, "etc/containerd/config.toml", nil},
	{"containerd 2.4", map[string]string{"etc/containerd/config.toml": "containerd-2.4-default.toml"}, "etc/containerd/conf.d/50-virtlet.toml", []string{"etc/containerd/config.toml"}},
	{"containerd without configuration", map[string]string{"usr/bin/containerd": ""}, "etc/containerd/config.toml", nil},
	{
		"k3s",
		map[string]string{"var/lib/rancher/k3s/agent/etc/containerd/config.toml": "k3s-config-v3.toml"},
		"var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/50-virtlet.toml",
		[]string{"var/lib/rancher/k3s/agent/etc/containerd/config.toml"},
	},
	{"cri-o", map[string]string{"etc/crio/crio.conf.d/10-crio.conf": ""}, "etc/crio/crio.conf.d/50-virtlet.conf", nil},
}

// known makes one of those machines.
func known(t *testing.T, i int) Node {
	t.Helper()
	files := map[string]string{}
	for path, name := range nodes[i].files {
		files[path] = ""
		if name != "" {
			files[path] = recorded(t, name)
		}
	}
	n := machine(t, files)
	if program := filepath.Join(n.Root, "usr/bin/containerd"); nodes[i].files["usr/bin/containerd"] == "" {
		_ = os.Chmod(program, 0o755) // where there is one
	}
	return n
}

// On every machine: an installation adds the handler to those that are there, a second one changes nothing, one of other
// programs replaces them, and in the end everything is byte for byte as it was.
func TestInstallUninstall(t *testing.T) {
	needRoot(t)
	for i, m := range nodes {
		t.Run(m.name, func(t *testing.T) {
			n := known(t, i)
			before := contents(t, n.Root)
			dry := n
			dry.DryRun = true
			planned, err := dry.Install(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
				t.Errorf("--dry-run changed (-before +after):\n%s", diff)
			}
			rep, err := n.Install(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(planned.Changes, rep.Changes); diff != "" {
				t.Errorf("--dry-run said otherwise (-dry +done):\n%s", diff)
			}
			if rep.Config != "/"+m.into || rep.Restart == "" {
				t.Errorf("report %+v", rep)
			}
			want := []string{"runc", Handler}
			if m.name == "cri-o" {
				want = []string{Handler}
			}
			if got := handlers(t, n.Root, append(m.also, m.into)...); !slices.Equal(got, want) {
				t.Errorf("handlers %q, want %q", got, want)
			}
			installed := contents(t, n.Root)
			if again, err := n.Install(t.Context()); err != nil || len(again.Changes) != 0 {
				t.Errorf("again: %+v, %v", again.Changes, err)
			}
			if diff := cmp.Diff(installed, contents(t, n.Root)); diff != "" {
				t.Errorf("a second time it changed (-before +after):\n%s", diff)
			}

			programs(t, n, "two")
			n.Version = "2"
			rep, err = n.Install(t.Context())
			if err != nil || len(rep.Changes) != 2 || rep.Changes[0].Path != DefaultBinDir+"/"+Shim {
				t.Errorf("upgrade: %+v, %v", rep, err)
			}
			if _, err := n.Uninstall(t.Context()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
				t.Errorf("left behind (-before +after):\n%s", diff)
			}
			if rep, err := n.Uninstall(t.Context()); err != nil || len(rep.Changes) != 0 {
				t.Errorf("uninstall again: %+v, %v", rep, err)
			}
		})
	}
}

// What is not understood is refused with advice, and nothing is touched.
func TestRefuse(t *testing.T) {
	needRoot(t)
	const config = "etc/containerd/config.toml"
	tests := []struct {
		name  string
		files map[string]string
		set   func(n *Node)
		want  []string
	}{
		{"no manager", nil, nil, []string{"neither containerd nor CRI-O", "--config PATH"}},
		{"two managers", map[string]string{config: "version = 2\n", "etc/crio/crio.conf": ""}, nil, []string{"--manager containerd or --manager crio"}},
		{"version 1", map[string]string{config: "[plugins.cri]\n"}, nil, []string{"version 1", "containerd config migrate"}},
		{"no TOML", map[string]string{config: "version = \n"}, nil, []string{"no TOML"}},
		{"CRI disabled", map[string]string{config: "version = 2\ndisabled_plugins = [\"cri\"]\n"}, nil, []string{"disabled_plugins", "Docker"}},
		{
			"handler of somebody else",
			map[string]string{config: "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.virtlet]\nruntime_type = \"io.containerd.kata.v2\"\n"},
			nil,
			[]string{"another kind"},
		},
		{
			"tables in one line",
			map[string]string{config: "version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {containerd = {}}}\n"},
			nil,
			[]string{"in one line", "Nothing was changed", "runtime_type = \"io.containerd.virtlet.v2\""},
		},
		{
			"k3s before its drop-ins",
			map[string]string{"var/lib/rancher/k3s/agent/etc/containerd/config.toml": "version = 2\n"},
			nil,
			[]string{"config.toml.tmpl", `template "base"`, "k3s.service"},
		},
		{
			"rke2 with version 3",
			map[string]string{"var/lib/rancher/rke2/agent/etc/containerd/config.toml": "version = 3\n"},
			nil,
			[]string{"/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.tmpl", "io.containerd.cri.v1.runtime"},
		},
		{
			"an import that overrules", map[string]string{
				config:                            "version = 2\nimports = [\"conf.d/*.toml\"]\n",
				"etc/containerd/conf.d/site.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"pause\"\n",
			}, nil, []string{"--config /etc/containerd/conf.d/site.toml"},
		},
		{
			"a program of somebody else",
			map[string]string{config: "version = 2\n", "usr/local/bin/virtlet": "another"},
			nil,
			[]string{"/usr/local/bin/virtlet", "make uninstall", "--bin-dir"},
		},
		{"no programs", map[string]string{config: "version = 2\n"}, func(n *Node) { n.From = "/nonexistent" }, []string{"--from DIR"}},
		{"CRI-O that is not there", map[string]string{config: "version = 2\n"}, func(n *Node) { n.Manager = CRIO }, []string{"install CRI-O first"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := machine(t, tt.files)
			if tt.set != nil {
				tt.set(&n)
			}
			before := contents(t, n.Root)
			_, err := n.Install(t.Context())
			if err == nil {
				t.Fatal("it was not refused")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
				t.Errorf("touched (-before +after):\n%s", diff)
			}
		})
	}
}

// A link out of the node's root is not followed, and one inside is left to who made it.
func TestLinks(t *testing.T) {
	needRoot(t)
	n := machine(t, map[string]string{"etc/containerd/real.toml": "version = 2\n"})
	outside := filepath.Join(t.TempDir(), "config.toml")
	write(t, outside, "version = 2\n", 0o644)
	for _, to := range []string{"real.toml", outside} {
		link := filepath.Join(n.Root, "etc/containerd/config.toml")
		_ = os.Remove(link)
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Install(t.Context()); err == nil {
			t.Errorf("a link to %s was followed", to)
		}
	}
	if b, _ := os.ReadFile(outside); string(b) != "version = 2\n" {
		t.Errorf("outside of the root there is now %q", b)
	}
}

// What the operator does between install and uninstall stays.
func TestOperator(t *testing.T) {
	needRoot(t)
	const config = "etc/containerd/config.toml"
	edit := func(t *testing.T, n Node, with func(string) string) {
		b, err := os.ReadFile(filepath.Join(n.Root, config))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(n.Root, config), with(string(b)), 0o640)
	}
	install := func(t *testing.T, files map[string]string) Node {
		n := machine(t, files)
		if _, err := n.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		return n
	}
	now := func(n Node) string {
		b, err := os.ReadFile(filepath.Join(n.Root, config))
		if errors.Is(err, fs.ErrNotExist) {
			return "none"
		}
		return string(b)
	}
	const mine = "\n[metrics]\naddress = \"127.0.0.1:1\"\n"
	t.Run("adds lines", func(t *testing.T) {
		n := install(t, map[string]string{config: "version = 2"}) // no newline at the end
		edit(t, n, func(s string) string { return s + mine })
		if _, err := n.Install(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := n.Uninstall(t.Context()); err != nil || now(n) != "version = 2"+mine {
			t.Errorf("left %q, %v", now(n), err)
		}
	})
	t.Run("adds lines to a file that was made", func(t *testing.T) {
		n := machine(t, nil)
		write(t, filepath.Join(n.Root, "usr/bin/containerd"), "", 0o755)
		if _, err := n.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		edit(t, n, func(s string) string { return s + mine })
		if _, err := n.Install(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := n.Uninstall(t.Context()); err != nil || now(n) != freshConfig+mine {
			t.Errorf("left %q, %v", now(n), err)
		}
	})
	t.Run("removes the block", func(t *testing.T) {
		n := install(t, map[string]string{config: "version = 2\n"})
		edit(t, n, func(string) string { return "version = 2\n" })
		if _, err := n.Uninstall(t.Context()); err != nil || now(n) != "version = 2\n" {
			t.Errorf("left %q, %v", now(n), err)
		}
	})
	t.Run("changes the block", func(t *testing.T) {
		n := install(t, map[string]string{config: "version = 2\n"})
		edit(t, n, func(s string) string { return strings.Replace(s, "virtlet.cloud/*", "*", 1) })
		was := now(n)
		if _, err := n.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "by hand") || now(n) != was {
			t.Errorf("left %q, %v", now(n), err)
		}
	})
	t.Run("replaces a program", func(t *testing.T) {
		n := install(t, map[string]string{config: "version = 2\n"})
		write(t, filepath.Join(n.Root, DefaultBinDir, Command), "theirs", 0o755)
		rep, err := n.Uninstall(t.Context())
		if b, _ := os.ReadFile(filepath.Join(n.Root, DefaultBinDir, Command)); err != nil || string(b) != "theirs" || len(rep.Notes) != 1 {
			t.Errorf("left %q, %+v, %v", b, rep, err)
		}
	})
	t.Run("has installed the same programs before", func(t *testing.T) {
		n := machine(t, map[string]string{config: "version = 2\n"})
		n.From = filepath.Join(n.Root, DefaultBinDir)
		programs(t, n, "made")
		before := contents(t, n.Root)
		if rep, err := n.Install(t.Context()); err != nil || len(rep.Changes) != 1 {
			t.Errorf("%+v, %v", rep, err)
		}
		if _, err := n.Uninstall(t.Context()); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
			t.Errorf("left behind (-before +after):\n%s", diff)
		}
	})
}

// One installer takes over from another, as at an upgrade of the DaemonSet: the old one no longer uninstalls.
func TestOwners(t *testing.T) {
	needRoot(t)
	n := known(t, 0)
	before := contents(t, n.Root)
	next := n
	next.Owner = "next"
	for _, x := range []Node{n, next} {
		if _, err := x.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	installed := contents(t, n.Root)
	if rep, err := n.Uninstall(t.Context()); err != nil || len(rep.Changes) > 0 || len(rep.Notes) != 1 {
		t.Errorf("the old owner: %+v, %v", rep, err)
	}
	if diff := cmp.Diff(installed, contents(t, n.Root)); diff != "" {
		t.Errorf("the old owner changed (-before +after):\n%s", diff)
	}
	if _, err := next.Uninstall(t.Context()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

// kill runs an action in a process that is killed at its nth effect, and says whether it was.
func kill(t *testing.T, n Node, action string, nth int) bool {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), killAtEnv+"="+strconv.Itoa(nth), rootEnv+"="+n.Root, fromEnv+"="+n.From, actionEnv+"="+action)
	var out bytes.Buffer
	cmd.Stderr = &out
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", action, err, out.String())
	}
	return false
}

// Killed at any effect, an installation is finished by the next, and taken back without a trace by an uninstallation; an
// upgrade likewise, and an uninstallation is finished by the next.
func TestKilled(t *testing.T) {
	needRoot(t)
	for _, i := range []int{0, 4, 5} { // a block, a drop-in with its directory, a file that is made
		t.Run(nodes[i].name, func(t *testing.T) {
			t.Parallel()
			for nth := 1; ; nth++ {
				n := known(t, i)
				n.Owner, n.Version = "test", "test"
				before := contents(t, n.Root)
				killed := kill(t, n, "install", nth)
				if _, err := n.Uninstall(t.Context()); err != nil {
					t.Fatalf("killed at %d: %v", nth, err)
				}
				if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
					t.Fatalf("installation killed at %d, and uninstalled: left behind (-before +after):\n%s", nth, diff)
				}
				kill(t, n, "install", nth)
				if _, err := n.Install(t.Context()); err != nil {
					t.Fatalf("killed at %d: %v", nth, err)
				}
				if got := handlers(t, n.Root, append(nodes[i].also, nodes[i].into)...); !slices.Contains(got, Handler) {
					t.Fatalf("killed at %d, and installed: handlers %q", nth, got)
				}
				programs(t, n, "two")
				kill(t, n, "install", nth) // an upgrade
				kill(t, n, "uninstall", nth)
				if _, err := n.Uninstall(t.Context()); err != nil {
					t.Fatalf("killed at %d: %v", nth, err)
				}
				if diff := cmp.Diff(before, contents(t, n.Root)); diff != "" {
					t.Fatalf("upgrade and uninstallation killed at %d: left behind (-before +after):\n%s", nth, diff)
				}
				if !killed {
					if nth < 10 {
						t.Errorf("an installation has only %d effects", nth-1)
					}
					break
				}
			}
		})
	}
}
