package vm

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// podConfig is a VM with two queues in a namespace that somebody else keeps.
func podConfig(t *testing.T, s Store) Config {
	t.Helper()
	cfg := testConfig(t, s, "halves")
	node := testnet.NewNode(t, netip.MustParsePrefix("192.0.2.1/24"))
	pod, _ := node.AddPod(t, testnet.PodSpec{Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}})
	cfg.Networks, cfg.NetNS, cfg.CPUs, cfg.Pod = nil, pod.Path(), 2, "default/halves"
	return cfg
}

// podNetwork opens the pod's namespace until the test's end, and gives what is in it.
func podNetwork(t *testing.T, cfg Config) (*netns.NS, nic.Snapshot) {
	t.Helper()
	ns, err := netns.Open(cfg.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	snap, err := podnet.Observe(ns)
	if err != nil {
		t.Fatal(err)
	}
	return ns, snap
}

// A pod's network outlives its guests, each of which gets it as it was, and Close puts it back.
func TestGuestsOfOneNetwork(t *testing.T) {
	s := testStore(t)
	cfg := podConfig(t, s)
	before := machineState(t, s)
	ns, was := podNetwork(t, cfg)
	image := cfg.Image
	cfg.Image = nil
	v, err := Prepare(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	status := func(want Status) State {
		t.Helper()
		st, err := s.Get("halves")
		if err != nil || st.Status != want {
			t.Errorf("state %+v, %v, want %s", st, err, want)
		}
		return st
	}
	leases := status(Idle).Leases
	if len(leases) != 1 || leases[0].Addr.String() != "192.0.2.7/24" {
		t.Errorf("leases %+v", leases)
	}
	if _, err := s.Stop(context.Background(), "halves", 0); err == nil || !strings.Contains(err.Error(), "default/halves") {
		t.Errorf("stop of a pod's VM: %v", err)
	}
	guest := v.Config()
	guest.Image = &Disk{Path: filepath.Join(t.TempDir(), "none.raw")}
	if _, err := v.Boot(context.Background(), guest); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("boot without an image: %v", err)
	}
	guest.Image, guest.DiskDir = image, t.TempDir()
	for range 2 {
		pid := 0
		guest.Started = func(p int) error { pid = p; return nil }
		g, err := v.Boot(context.Background(), guest)
		if err != nil {
			t.Fatal(err)
		}
		if g.PID() != pid || status(Running).QEMU.PID != pid {
			t.Errorf("QEMU is %d, and Started was called with %d", g.PID(), pid)
		}
		if _, err := os.Stat(filepath.Join(guest.DiskDir, "disk.qcow2")); err != nil {
			t.Error(err)
		}
		if all, err := s.Counters("halves"); err != nil || len(all) != 1 || all[0].DHCP == nil {
			t.Errorf("counters %+v, %v", all, err)
		}
		if _, err := v.Boot(context.Background(), guest); !errors.Is(err, ErrBusy) {
			t.Errorf("a second guest: %v", err)
		}
		if err := errors.Join(g.Pause(t.Context()), g.Resume(t.Context()), g.Kill()); err != nil {
			t.Error(err)
		}
		if exit, err := g.Wait(); err != nil || exit.Reason != Killed {
			t.Errorf("exit %+v, %v", exit, err)
		}
		if err := g.Console(io.Discard); err != nil {
			t.Errorf("console of a guest that has ended: %v", err)
		}
		if files, _ := os.ReadDir(guest.DiskDir); len(files) > 0 {
			t.Errorf("left in the disk's directory: %v", files)
		}
	}
	if d := cmp.Diff(leases, status(Idle).Leases, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("the network has changed: %s", d)
	}
	// An end that nobody has waited for, and a hook that refuses.
	if _, err := v.Boot(context.Background(), guest); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Get("halves"); !errors.Is(err, ErrNotFound) {
		t.Errorf("state after Close: %v", err)
	}
	is, err := podnet.Observe(ns)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(was, is, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("the namespace has changed (-before +after): %s", d)
	}
	nothingLeft(t, s, before)
}

func TestStartedRefuses(t *testing.T) {
	s := testStore(t)
	cfg := podConfig(t, s)
	v, err := Prepare(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("no such cgroup")
	guest := v.Config()
	guest.Started = func(int) error { return refused }
	if _, err := v.Boot(context.Background(), guest); !errors.Is(err, refused) {
		t.Errorf("boot: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if left := qemus(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// In a namespace that ends with its VM Close gives back what DEL looks at, and leaves the rest, without waiting for the kernel, to the
// end of the namespace.
func TestNetworkEndsWithItsNamespace(t *testing.T) {
	for _, datapath := range []string{"bridge", "redirect"} {
		t.Run(datapath, func(t *testing.T) {
			s := testStore(t)
			cfg := podConfig(t, s)
			cfg.Image, cfg.NetNSEnds, cfg.Datapath = nil, true, datapath
			before := machineState(t, s)
			ns, was := podNetwork(t, cfg)
			v, err := Prepare(context.Background(), s, cfg, nil)
			if err != nil {
				t.Fatal(err)
			}
			join := v.ports[0].Join
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, s, before)
			is, err := podnet.Observe(ns)
			if err != nil {
				t.Fatal(err)
			}
			same := []cmp.Option{
				cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			}
			for _, l := range was.Links {
				if d := cmp.Diff(&l, is.Link(l.Name), same...); d != "" {
					t.Errorf("%s has changed (-before +after): %s", l.Name, d)
				}
			}
			if d := cmp.Diff(was.Sysctls, is.Sysctls); d != "" {
				t.Errorf("settings have changed (-before +after): %s", d)
			}
			if rules, err := podnet.Rules(ns, []podnet.Join{join}); err != nil || len(rules[join.Link]) > 0 {
				t.Errorf("rules are left: %v, %v", rules, err)
			}
			if err := v.Closed(); err != nil {
				t.Error(err)
			}
			if is, err = podnet.Observe(ns); err != nil {
				t.Fatal(err)
			}
			var left []string
			for _, l := range is.Links {
				if was.Link(l.Name) == nil {
					left = append(left, l.Name)
				}
			}
			// The bridge, which the kernel would have been waited for, and no TAP.
			if want := strings.Fields(join.Bridge); !slices.Equal(left, want) {
				t.Errorf("links %v are left, want %v", left, want)
			}
		})
	}
}
