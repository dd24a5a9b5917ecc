package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
	"github.com/virtlet/virtlet/internal/vfio"
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
		Network: &podnet.Record{VFs: []vfio.Handover{{NIC: "eth0", BDF: "broken", Boot: strings.TrimSpace(string(boot))}}},
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

// What a pod's networks have left in libcni's cache tells which functions are the pod's, and QEMU is asked how it takes
// them before there is a guest.
func TestFunctionsOfAPod(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "results"), 0o755); err != nil {
		t.Fatal(err)
	}
	const entry = `{"kind":"cniCacheV1","containerId":"pod","ifName":"%s","networkName":"%s","netns":"/run/netns/x",
"config":"eyJjbmlWZXJzaW9uIjoiMS4xLjAiLCJuYW1lIjoiYmx1ZSIsInBsdWdpbnMiOlt7InR5cGUiOiJzcmlvdiJ9XX0=",
"capabilityArgs":{"deviceID":"%s"},"result":{"cniVersion":"1.1.0","interfaces":[{"name":"%[1]s","sandbox":"/run/netns/x","pciID":"0000:01:10.2"}]}}`
	for i, text := range []string{fmt.Sprintf(entry, "net1", "blue", "0000:01:10.0"), fmt.Sprintf(entry, "eth0", "zero", "")} {
		if err := os.WriteFile(filepath.Join(dir, "results", fmt.Sprint(i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := Config{NetNS: "/run/netns/x"}
	if _, err := cfg.FindResults(dir, "pod"); err != nil || len(cfg.Results) != 2 {
		t.Fatalf("results %+v, %v", cfg.Results, err)
	}
	if r := cfg.Results; r[0].IfName != "eth0" || r[1].IfName != "net1" || r[1].Device != "0000:01:10.0" || r[1].Result.Interfaces[0].PciID != "0000:01:10.2" {
		t.Errorf("results %+v", r)
	}
	if got := nic.Functions(cfg.Results, nil); !slices.Contains(got, "0000:01:10.2") {
		t.Errorf("functions %q", got)
	}
	if _, err := exec.LookPath(qemu.DefaultBinary(arch)); err != nil {
		t.Skip("needs QEMU: ", err)
	}
	v := &VM{cfg: Config{CPUs: 1, AllowPhysical: true}}
	if o, err := v.options(t.Context(), []nic.NIC{{VF: &nic.VF{BDF: "0000:01:10.2"}}}); err != nil || !o.PCI.AllowPhysical {
		t.Errorf("options %+v, %v", o, err)
	}
}
