package vm

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestCheckNetworks(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "checked")
	v, err := Start(t.Context(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	said := func() (words []string, err error) {
		checks, err := s.CheckNetworks(t.Context(), "checked")
		for _, c := range checks {
			for _, p := range c.Plugins {
				words = append(words, fmt.Sprintf("%s %t %t", p.Plugin, p.Error == "", p.Moved))
			}
		}
		return words, err
	}
	// The guest has the MAC and the addresses; all else is as the plugins made it.
	words, err := said()
	if err != nil || !slices.Contains(words, "bridge false true") || !slices.Contains(words, "portmap true false") {
		t.Errorf("a VM in order: %q, %v", words, err)
	}
	// What is wrong beside that is told.
	for _, c := range []struct{ by, want string }{
		{"ip netns exec virtlet-checked ip link set eth0 nomaster", `not of "vltbr0"`},
		{"ip link del virtlet0", `plugin "bridge"`},
	} {
		if out, err := exec.Command("sh", "-c", c.by).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c.by, err, out)
		}
		if words, err := said(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("after %s: %q, %v; want %s", c.by, words, err, c.want)
		}
	}
	end(t, v)
	if _, err := s.CheckNetworks(t.Context(), "checked"); !errors.Is(err, ErrStopped) {
		t.Errorf("a VM that has ended: %v", err)
	}
	if _, err := s.CheckNetworks(t.Context(), "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("no VM: %v", err)
	}
}
