// Package virtlet_test holds the shape of the code: which package may import which, and what is said about each. A new
// package or a new edge is a change of the tables below, made on purpose (docs/ARCHITECTURE.md says why they are so).
package virtlet_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/virtlet/virtlet"

// edges is every package and what it may import of this module. Tests may import whatever Go lets them.
var edges = map[string][]string{
	"":                               nil, // this file
	"cmd/virtlet":                    {"internal/node", "internal/vm"},
	"cmd/containerd-shim-virtlet-v2": {"internal/shim"},
	"deploy":                         nil,
	"deploy/image":                   nil,
	"internal/shim":                  {"internal/vm"},
	"internal/node":                  {"internal/vm"},
	"internal/vm": {
		"internal/agent", "internal/cloudinit", "internal/cni", "internal/dhcp", "internal/image", "internal/netns", "internal/nic",
		"internal/pci", "internal/podnet", "internal/qemu", "internal/ssh", "internal/vfio",
	},
	"internal/agent":     nil,
	"internal/podnet":    {"internal/netns", "internal/nic", "internal/vfio"},
	"internal/vfio":      {"internal/netns", "internal/nic", "internal/pci"},
	"internal/dhcp":      {"internal/nic"},
	"internal/cloudinit": {"internal/nic"},
	"internal/cni":       {"internal/netns"},
	"internal/netns":     nil,
	"internal/nic":       nil,
	"internal/pci":       nil,
	"internal/qemu":      nil,
	"internal/image":     nil,
	"internal/ssh":       nil,
	"internal/testnet":   {"internal/netns", "internal/nic"},
	"internal/testpci":   {"internal/pci"},
	"test":               nil,
	"test/bench":         {"internal/dhcp", "internal/netns", "internal/nic", "internal/podnet", "internal/qemu"},
	"test/guest":         nil,
	"test/guest/build":   nil,
	"test/lab":           nil,
	"test/sriov":         nil,
	"test/lab/replay":    {"internal/netns", "internal/nic", "internal/podnet", "internal/testnet"},
	"test/pods":          nil,

	"test/kubernetes":         nil,
	"test/kubernetes/cluster": nil, // a module of its own
}

// testOnly are packages that nothing but tests, and they themselves, may import or be part of.
var testOnly = []string{
	"internal/testnet", "internal/testpci", "test", "test/bench", "test/guest", "test/guest/build", "test/lab", "test/lab/replay", "test/pods",
	"test/sriov", "test/kubernetes", "test/kubernetes/cluster",
}

// guarded are imports that have one place: the first row whose prefix fits says who may have them outside of tests.
var guarded = []struct {
	prefix string
	by     []string
}{
	{"github.com/vishvananda/netlink", []string{"internal/netns", "internal/podnet", "internal/testnet", "internal/vfio", "test/bench", "test/lab/replay"}},
	{"github.com/cilium/ebpf", []string{"internal/podnet", "test/bench"}},
	{"github.com/vishvananda/netns", nil}, // a door of its own into namespaces
	{"github.com/containernetworking/cni/pkg/types", []string{"internal/cni", "internal/nic", "internal/vm"}},
	{"github.com/containernetworking/cni", []string{"internal/cni"}},
	{"github.com/containernetworking/plugins", nil},               // they are programs, run by internal/cni
	{"github.com/containerd/containerd/api/runtime/task/v3", nil}, // brings all of gRPC; version 2 has the same messages
	{"github.com/containerd", []string{"internal/shim"}},
	{"google.golang.org/grpc/codes", []string{"internal/shim"}},
	{"google.golang.org/grpc/status", []string{"internal/shim"}},
	{"google.golang.org/grpc", append([]string{"internal/node"}, testOnly...)},
	{"github.com/moby", testOnly},
	{"github.com/opencontainers", []string{"internal/shim"}},
	{"github.com/google/go-containerregistry", []string{"deploy/image"}},
	{"k8s.io/cri-api", append([]string{"internal/node"}, testOnly...)},
	{"k8s.io", testOnly},
	{"os/exec", append([]string{"internal/cni", "internal/image", "internal/node", "internal/qemu", "internal/ssh"}, testOnly...)},
	{"testing", testOnly},
}

// badNames say nothing of what a package is for.
var badNames = []string{"common", "helper", "helpers", "manager", "types", "util", "utils"}

// The most lines that a file may have.
const (
	maxLines     = 450
	maxTestLines = 700
)

// source is one parsed file.
type source struct {
	path string // from the root, with slashes
	ast  *ast.File
	size int // in lines
}

func (s source) pkg() string  { return strings.TrimPrefix(path.Dir(s.path), ".") }
func (s source) test() bool   { return strings.HasSuffix(s.path, "_test.go") }
func (s source) name() string { return s.ast.Name.Name }

func (s source) imports(t *testing.T) []string {
	t.Helper()
	var paths []string
	for _, i := range s.ast.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths
}

// sources parses every Go file of the module, build constraints or not.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n := d.Name()
		if d.IsDir() && file != "." && (n == "testdata" || strings.HasPrefix(n, ".") || strings.HasPrefix(n, "_")) {
			return fs.SkipDir
		}
		if d.IsDir() || filepath.Ext(file) != ".go" {
			return nil
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, b, parser.ParseComments|parser.SkipObjectResolution)
		all = append(all, source{filepath.ToSlash(file), f, bytes.Count(b, []byte("\n"))})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range sources(t) {
		allowed, known := edges[s.pkg()]
		if !known && !seen[s.pkg()] {
			t.Errorf("package %s is not in the table of edges: add it on purpose", s.pkg())
		}
		seen[s.pkg()] = true
		if s.test() {
			continue
		}
		for _, imp := range s.imports(t) {
			if why := refuse(s.pkg(), imp, allowed); why != "" {
				t.Errorf("%s imports %s: %s", s.path, imp, why)
			}
		}
	}
	for _, pkg := range slices.Sorted(maps.Keys(edges)) {
		if !seen[pkg] {
			t.Errorf("package %s is in the table of edges and nowhere else", pkg)
		}
	}
}

// refuse gives the reason why a package may not have an import, "" if it may.
func refuse(pkg, imp string, allowed []string) string {
	if rel, ours := strings.CutPrefix(imp, module+"/"); ours {
		switch {
		case slices.Contains(testOnly, rel) && !slices.Contains(testOnly, pkg):
			return "it is for tests only"
		case !slices.Contains(allowed, rel):
			return "the table of edges has no such edge"
		}
		return ""
	}
	for _, g := range guarded {
		if imp == g.prefix || strings.HasPrefix(imp, g.prefix+"/") {
			if !slices.Contains(g.by, pkg) {
				return "only for " + strings.Join(g.by, ", ") + " and tests"
			}
			return ""
		}
	}
	return ""
}

func TestRefuse(t *testing.T) {
	tests := []struct {
		pkg, imp string
		ok       bool
	}{
		{"internal/vm", module + "/internal/nic", true},
		{"internal/vm", module + "/internal/testnet", false},
		{"internal/nic", module + "/internal/netns", false},
		{"cmd/virtlet", module + "/internal/podnet", false},
		{"internal/testnet", module + "/internal/nic", true},
		{"internal/podnet", "github.com/vishvananda/netlink", true},
		{"internal/podnet", "github.com/vishvananda/netlink/nl", true},
		{"internal/vm", "github.com/vishvananda/netlink", false},
		{"internal/nic", "github.com/containernetworking/cni/pkg/types/100", true},
		{"internal/nic", "github.com/containernetworking/cni/libcni", false},
		{"internal/cni", "github.com/containernetworking/cni/libcni", true},
		{"internal/vm", "github.com/containerd/containerd/v2/core/runtime", false},
		{"internal/podnet", "os/exec", false},
		{"internal/podnet", "os/executable", true},
		{"internal/qemu", "testing", false},
	}
	for _, tt := range tests {
		if why := refuse(tt.pkg, tt.imp, edges[tt.pkg]); (why == "") != tt.ok {
			t.Errorf("%s imports %s: got %q, want it allowed: %t", tt.pkg, tt.imp, why, tt.ok)
		}
	}
}

// TestPackageComments wants one package comment for each package, in one file.
func TestPackageComments(t *testing.T) {
	comments := map[string][]string{} // package -> files
	for _, s := range sources(t) {
		if _, ok := comments[s.pkg()]; !ok {
			comments[s.pkg()] = nil
		}
		if s.ast.Doc == nil {
			continue
		}
		comments[s.pkg()] = append(comments[s.pkg()], s.path)
		want := "Package " + s.name() + " "
		if s.name() == "main" {
			want = "Command " + path.Base(s.pkg()) + " "
		}
		if !strings.HasPrefix(s.ast.Doc.Text(), want) {
			t.Errorf("%s: the package comment does not begin with %q", s.path, want)
		}
	}
	for pkg, files := range comments {
		if len(files) != 1 {
			t.Errorf("package %q has %d package comments, want 1: %v", pkg, len(files), files)
		}
	}
}

func TestNamesAndSizes(t *testing.T) {
	for _, s := range sources(t) {
		names := append(strings.Split(s.pkg(), "/"), s.name(), strings.TrimSuffix(path.Base(s.path), ".go"))
		for _, n := range names {
			if slices.Contains(badNames, strings.TrimSuffix(n, "_test")) {
				t.Errorf("%s: %q says nothing of what is inside", s.path, n)
			}
		}
		limit := maxLines
		if s.test() {
			limit = maxTestLines
		}
		if s.size > limit {
			t.Errorf("%s has %d lines, more than %d: split it by subject", s.path, s.size, limit)
		}
	}
}
