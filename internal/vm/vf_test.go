package vm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
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

// What a runtime's cache and device info say of devices comes to the plan.
func TestDevicesOfPod(t *testing.T) {
	dir, infos := t.TempDir(), t.TempDir()
	files := map[string]string{
		filepath.Join(infos, "cni", "blue"): `{"type":"pci","pci":{"pci-address":"0000:01:10.0"}}`,
		filepath.Join(infos, "cni", "red"):  `{"type":"vhost-user","vhost-user":{"mode":"client","path":"/run/s"}}`,
	}
	const entry = `{"kind":"cniCacheV1","containerId":"pod","ifName":"NAME","networkName":"n","capabilityArgs":{"CNIDeviceInfoFile":"FILE"},"result":{"cniVersion":"1.0.0"}}`
	for name, file := range map[string]string{"net1": filepath.Join(infos, "cni", "blue"), "net2": filepath.Join(infos, "cni", "red"), "net3": "/etc/passwd", "net4": filepath.Join(infos, "cni", "none")} {
		files[filepath.Join(dir, "results", name)] = strings.NewReplacer("NAME", name, "FILE", file).Replace(entry)
	}
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := Config{DeviceInfos: infos}
	if _, err := c.FindResults(dir, "pod"); err != nil {
		t.Fatal(err)
	}
	var got []nic.Attachment
	for _, r := range c.Results {
		r.Network, r.Result = "", nil
		got = append(got, r)
	}
	want := []nic.Attachment{
		{IfName: "net1", Device: "0000:01:10.0", DeviceType: "pci"},
		{IfName: "net2", DeviceType: "vhost-user"},
		{IfName: "net3", DeviceNote: `device info "/etc/passwd" is not in ` + filepath.Join(infos, "cni")},
		{IfName: "net4"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
