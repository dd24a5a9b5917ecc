package vm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/podnet"
)

// A plugin's DEL does not run before its function is back, and runs when there is nothing to bring back.
func TestDelWaitsForTheFunction(t *testing.T) {
	s := testStore(t)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	dir, called := t.TempDir(), filepath.Join(t.TempDir(), "called")
	script := "#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = VERSION ] && echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}' || : >" + called + "\n"
	if err := os.WriteFile(filepath.Join(dir, "sriov"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	j := Journal{
		NetNS: "/run/netns/virtlet-not-there", Plugins: Plugins{Dirs: []string{dir}},
		Attachments: []cni.Attachment{{
			Network: []byte(`{"cniVersion":"1.0.0","name":"blue","plugins":[{"type":"sriov"}]}`),
			Name:    "blue", ContainerID: "pod", NetNS: "/run/netns/virtlet-not-there", IfName: "eth0",
		}},
		// No function has such an address: it cannot be told whether it is there.
		Network: &podnet.Record{VFs: []podnet.Handover{{NIC: "eth0", BDF: "broken", Boot: strings.TrimSpace(string(boot))}}},
	}
	own, plugins := s.undoJournal(context.Background(), j)
	if _, err := os.Stat(called); own == nil || plugins != nil || err == nil {
		t.Errorf("with a function that is not back: %v, %v, the plugin was called: %t", own, plugins, err == nil)
	}
	j.Network.VFs[0].Boot = "an earlier one"
	own, plugins = s.undoJournal(context.Background(), j)
	if _, err := os.Stat(called); own != nil || plugins != nil || err != nil {
		t.Errorf("after a reboot: %v, %v, the plugin was called: %t", own, plugins, err == nil)
	}
}
