package vm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/testnet"
)

// leaving makes the last plugin of the network make a link on the node, and say so in its result; it never removes it.
func leaving(t *testing.T, cfg *Config, link string) {
	t.Helper()
	real := testnet.Plugins(t) + "/firewall"
	scripted(t, cfg, "firewall", `[ $CNI_COMMAND = ADD ] || exec `+real+`
ip link add `+link+` type ifb || exit 1
`+real+` | tr -d '\n' | sed 's/\],[[:space:]]*"ips"/,{"name":"`+link+`"}],"ips"/'`)
	t.Cleanup(func() { exec.Command("ip", "link", "del", link).Run() })
}

// A link that DEL leaves on the node is no failure, but is not kept quiet.
func TestLinkLeftOnTheNode(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "leaves")
	leaving(t, &cfg, "left0")
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	end(t, v)
	st, err := s.Get("leaves")
	if err != nil || st.Left != "" || !strings.Contains(strings.Join(st.Notes, "\n"), "link left0 (ifb) is left on the node") {
		t.Errorf("left %q, notes %q, %v", st.Left, st.Notes, err)
	}
	if err := s.Remove(context.Background(), "leaves", false); err != nil {
		t.Error(err)
	}
	exec.Command("ip", "link", "del", "left0").Run()

	killed(t, s, cfg)
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err == nil || !strings.Contains(err.Error(), "ip link del left0") {
		t.Errorf("gc: %v, want one that says what is left", err)
	}
	exec.Command("ip", "link", "del", "left0").Run()
	if found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) > 0 {
		t.Errorf("second gc: %v, %v", found, err)
	}
	nothingLeft(t, s, before)
}

// A plugin whose DEL always fails keeps neither the namespace, nor for ever the name, nor gc busy for ever.
func TestDelAlwaysFails(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "stuck")
	scripted(t, &cfg, "firewall", `[ $CNI_COMMAND = ADD ] && exec `+testnet.Plugins(t)+`/firewall
`+testnet.Plugins(t)+`/firewall
echo '{"code":100,"msg":"chain is referenced"}'; exit 1`)
	before := machineState(t, s)
	gc := func(force bool) error {
		_, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins, Force: force})
		return err
	}
	failed := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "chain is referenced") {
			t.Errorf("%s: %v, want one that says what the plugin says", what, err)
		}
	}
	for _, way := range []struct {
		name string
		end  func() error
	}{
		{"gc --force", func() error { return gc(true) }},
		{"rm -f", func() error {
			// It may be tried again, as the plugin may have failed for the moment only.
			failed("rm -f", s.Remove(context.Background(), "stuck", true))
			failed("gc of what is cached", gc(false))
			return gc(true)
		}},
	} {
		v, err := Start(context.Background(), s, cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		v.Kill()
		_, err = v.Wait()
		failed("the end", err)
		if netns.Exists(ownNetNS("stuck")) {
			t.Error("the namespace is still there")
		}
		failed("rm", s.Remove(context.Background(), "stuck", false))
		failed("gc", gc(false))
		failed(way.name, way.end())
		if err := gc(false); err != nil {
			t.Errorf("gc after %s: %v", way.name, err)
		}
		if st, err := s.Get("stuck"); err == nil {
			if st.Status != Stopped || st.Left != "" {
				t.Errorf("after %s it is %s, left %q", way.name, st.Status, st.Left)
			}
			if err := s.Remove(context.Background(), "stuck", false); err != nil {
				t.Error(err)
			}
		}
	}
	os.RemoveAll(s.cniCache()) // directories alone
	nothingLeft(t, s, before)
}

// genie puts the VM on what was recorded of CNI-Genie, whose DEL always fails and leaves a link in the namespace.
func genie(t *testing.T, cfg *Config, recording string) {
	t.Helper()
	path, err := filepath.Abs("../../test/lab/testdata/" + recording + ".json")
	if err != nil {
		t.Fatal(err)
	}
	dir := testnet.ReplayAs(t, "genie", map[string]any{"recording": path, "dataDir": t.TempDir()})
	net, err := cni.Parse("00-genie.conf", []byte(`{"cniVersion":"0.3.1","name":"genie","type":"genie","default_plugin":"calico,flannel"}`))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Networks = []cni.Attachment{net.Attachment("", "", "eth0")}
	cfg.Plugins.Dirs = append([]string{dir}, cfg.Plugins.Dirs...)
	t.Cleanup(func() { exec.Command("ip", "link", "del", "cni0").Run() }) // shared by Flannel's pods: it stays
}

// What Genie leaves in the namespace goes with it, and so does its end on the node.
func TestGenie(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "genie")
	genie(t, &cfg, "genie-calico-flannel")
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := s.Get("genie"); err != nil || len(st.NICs) != 2 || len(st.Leases) != 2 {
		t.Errorf("NICs %+v, leases %+v, %v", st.NICs, st.Leases, err)
	}
	r, err := s.Recording("genie")
	if err != nil || len(r.Host.Links) != 3 { // the ends of both veths, and Flannel's bridge
		t.Errorf("the node's side %+v, %v", r.Host, err)
	}
	v.Kill()
	if _, err := v.Wait(); err == nil || !strings.Contains(err.Error(), "CHAIN_DEL failed") {
		t.Errorf("the end: %v", err)
	}
	st, err := s.Get("genie")
	if err != nil || !strings.Contains(st.Left, "CHAIN_DEL failed") || strings.Contains(strings.Join(st.Notes, "\n"), "left on the node") {
		t.Errorf("left %q, notes %q, %v", st.Left, st.Notes, err)
	}
	for i := range 3 { // twice as it was, then by force
		_, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins, Force: i == 2})
		if err == nil || !strings.Contains(err.Error(), "CHAIN_DEL failed") {
			t.Errorf("gc: %v", err)
		}
	}
	if err := s.Remove(context.Background(), "genie", false); err != nil {
		t.Error(err)
	}
	exec.Command("ip", "link", "del", "cni0").Run()
	nothingLeft(t, s, before)
}

// An ADD that fails and cannot be undone keeps the name for gc, and gc can be told to give up.
func TestGenieFailsToAdd(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "genie")
	genie(t, &cfg, "genie-flannel-calico-fails")
	before := machineState(t, s)
	_, err := Start(context.Background(), s, cfg, nil)
	if err == nil || !strings.Contains(err.Error(), "file exists") || !strings.Contains(err.Error(), "CHAIN_DEL failed") {
		t.Errorf("start: %v, want both errors of the plugin", err)
	}
	if netns.Exists(ownNetNS("genie")) {
		t.Error("the namespace is still there")
	}
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins, Force: true}); err == nil || !strings.Contains(err.Error(), "CHAIN_DEL failed") {
		t.Errorf("gc --force: %v", err)
	}
	if _, err := s.Get("genie"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after gc --force: %v", err)
	}
	exec.Command("ip", "link", "del", "cni0").Run()
	nothingLeft(t, s, before)
}
