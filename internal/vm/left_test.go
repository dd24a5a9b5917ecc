package vm

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

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
