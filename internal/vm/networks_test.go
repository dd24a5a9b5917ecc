package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/testnet"
)

// oldPlugin is what a distribution's plugin says to a configuration that is newer than it.
const oldPlugin = "#!/bin/sh\n" + `[ "$CNI_COMMAND" = VERSION ] && { echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}'; exit; }
echo '{"cniVersion":"1.0.0","code":1,"msg":"incompatible CNI versions"}'; exit 1`

func oldPlugins(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"bridge", "host-local", "portmap", "bandwidth", "firewall"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(oldPlugin), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestOldPluginsOfTheNodeDoNotServeTheEmbeddedNetwork(t *testing.T) {
	s := testStore(t)
	if name := s.embedded().Name; name != embeddedName {
		t.Fatalf("the embedded network is called %q", name)
	}
	cfg := testConfig(t, s, "own")
	cfg.Plugins = Plugins{Dirs: []string{oldPlugins(t)}, Own: []string{testnet.Plugins(t)}}
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	v.Kill()
	if _, err := v.Wait(); err != nil { // DEL found the same plugins
		t.Error(err)
	}
	if err := s.Remove(context.Background(), "own", false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
	if got := cfg.Plugins.For("blue"); !slices.Equal(got, []string{cfg.Plugins.Dirs[0], cfg.Plugins.Own[0]}) {
		t.Errorf("the node's network is served from %v", got)
	}
}

func TestCheckSaysThatPluginsAreTooOld(t *testing.T) {
	testnet.NeedRoot(t)
	s := testStore(t)
	r := CheckRequest{Store: s, ConfDir: t.TempDir(), Plugins: Plugins{Dirs: []string{oldPlugins(t)}}}
	for _, f := range r.networks(context.Background()) {
		if !strings.Contains(f.What, embeddedName) {
			continue
		}
		if f.Level != Warn || !strings.Contains(f.Is, "1.1.0") || !strings.Contains(f.Do, "newer") {
			t.Errorf("%+v", f)
		}
		return
	}
	t.Error("check says nothing of the embedded network")
}

func TestTools(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if got := cni.Default(t.TempDir()).MissingTools(); !slices.Equal(got, []string{"iptables", "nft"}) {
		t.Errorf("missing: %v", got)
	}
}

// What Multus keeps to itself is worth a note when it cannot be read, and no failure. TestMultusGuest of test/lab has the rest.
func TestMultusWithoutItsFiles(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "multus")
	scripted(t, &cfg, "multus", "exec "+filepath.Join(testnet.Plugins(t), "ptp"))
	n, err := cni.Parse("x", fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"pods","type":"multus","cniDir":%q,
		"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"198.51.100.0/24"}]]}}`, t.TempDir(), t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Networks = []cni.Attachment{n.Attachment("", "", "eth0")}
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if notes := v.Notes(); !slices.ContainsFunc(notes, func(n string) bool { return strings.Contains(n, "what Multus attached beside") }) {
		t.Errorf("notes: %q", notes)
	}
	v.Kill()
	if _, err := v.Wait(); err != nil {
		t.Error(err)
	}
	if err := s.Remove(context.Background(), "multus", false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}
