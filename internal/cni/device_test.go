package cni

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const aVF, another = "0000:01:10.0", "10000:81:02.1"

// The configurations are those of the documentation of the plugins, and what they keep is what their sources write: today's
// SR-IOV plugin (k8snetworkplumbingwg), Intel's before it, both with DPDK, and the original, which has no DPDK.
func TestDevice(t *testing.T) {
	pci := func(address string) string {
		return fmt.Sprintf(`{"type":"pci","version":"1.1.0","pci":{"pci-address":%q,"pf-pci-address":"0000:01:00.0","vhost-net":"/dev/vhost-net"}}`, address)
	}
	const (
		ofCNI = "devinfo/cni/ns1-blue-c1_net1"
		ofDP  = "devinfo/dp/intel.com-pool-0000:01:10.0-device.json"
		kept  = "kept/c1-net1"
		plain = `{"type":"sriov"}`
		dpdk  = `{"kernel_driver":"ixgbevf","dpdk_driver":"vfio-pci","dpdk_tool":"/path/to/dpdk/tools/dpdk-devbind.py"}`
	)
	with := func(keys string) string { return `{"type":"sriov","cniDir":"DIR/kept",` + keys + `}` }
	tests := []struct {
		name   string
		config string
		args   map[string]any
		files  map[string]string
		want   string // address, or PF/VF
		typ    string
		says   string
	}{
		{"none", `{"type":"bridge"}`, nil, nil, "", "", ""},
		{"no configuration", `[]`, nil, nil, "", "", ""},
		{"deviceID in a list", `{"plugins":[{"type":"tuning"},{"type":"sriov","deviceID":"0000:01:10.0"}]}`, nil, nil, aVF, "", ""},
		{"deviceID of a plugin alone", with(`"deviceID":"0000:01:10.0"`), nil, nil, aVF, "", ""},
		{"deviceID by capability argument comes first", with(`"deviceID":"0000:01:10.0"`), map[string]any{"deviceID": another}, nil, another, "", ""},
		{"deviceID as the plugin was told", with(`"runtimeConfig":{"deviceID":"0000:01:10.0"}`), nil, nil, aVF, "", ""},
		{"host-device", `{"type":"host-device","pciBusID":"0000:01:10.0"}`, nil, nil, aVF, "", ""},
		{"Intel's deviceinfo", with(`"deviceinfo":{"pci_addr":"0000:01:10.0","pfname":"ens1f0","vfid":3},"l2enable":true`), nil, nil, aVF, "", ""},
		{"Intel's deviceinfo without an address", with(`"deviceinfo":{"pfname":"ens1f0","vfid":3}`), nil, nil, "ens1f0/3", "", ""},
		{"Intel's dpdk", with(`"master":"ens1f0","dpdk":{"pci_addr":"0000:01:10.0","kernel_driver":"ixgbevf","dpdk_driver":"vfio-pci","dpdk_tool":"/x"}`), nil, nil, aVF, "", ""},
		{
			"Intel's first, for DPDK: the plugin chooses, and keeps what it chose", with(`"if0":"ens786f1","if0name":"net0","dpdk":` + dpdk), nil,
			map[string]string{"kept/c1-net0": `{"pci_addr":"0000:01:10.0","ifname":"net0","kernel_driver":"ixgbevf","dpdk_driver":"vfio-pci","dpdk_tool":"/x"}`},
			aVF, "", "",
		},
		{
			"Intel's second, for DPDK: it keeps its configuration", with(`"master":"ens1f0"`), nil,
			map[string]string{kept: `{"DPDKMode":true,"master":"ens1f0","deviceID":"0000:01:10.0","vlan":100}`},
			aVF, "", "",
		},
		{"kept of another interface", with(`"if0":"ens1f0"`), nil, map[string]string{"kept/c1-net2": `{"pci_addr":"0000:01:10.0"}`}, "", "", ""},
		{"kept by no plugin of SR-IOV", `{"type":"multus","cniDir":"DIR/kept"}`, nil, map[string]string{kept: `{"pci_addr":"0000:01:10.0"}`}, "", "", ""},
		{"kept no JSON", with(`"if0":"ens1f0"`), nil, map[string]string{kept: `{`}, "", "", "what plugin sriov keeps"},
		{"kept no address", with(`"if0":"ens1f0"`), nil, map[string]string{kept: `{"pci_addr":"../x"}`}, "", "", "no PCI address"},
		{"kept too much", with(`"if0":"ens1f0"`), nil, map[string]string{kept: `{"a":"` + strings.Repeat("x", maxConfig) + `"}`}, "", "", "more than"},
		{"the original: PF and number", with(`"master":"eth1","vf":2`), nil, nil, "eth1/2", "", ""},
		{"Intel's first: PF and number", with(`"if0":"eth1","vf":0`), nil, nil, "eth1/0", "", ""},
		{"what is kept comes before the number", with(`"master":"eth1","vf":2`), nil, map[string]string{kept: `{"deviceID":"0000:01:10.0"}`}, aVF, "", ""},
		{"a PF without a number", with(`"master":"eth1"`), nil, nil, "", "", ""},
		{"another plugin's master", `{"type":"macvlan","master":"eth1","vf":1}`, nil, nil, "", "", ""},
		{"fields of other kinds", with(`"deviceID":7,"deviceinfo":[1],"dpdk":true,"master":{},"vf":"x"`), nil, nil, "", "", ""},

		{"device info, where the plugin was told to write it", plain, map[string]any{deviceInfoArg: "DIR/devinfo/cni/any-name"}, map[string]string{"devinfo/cni/any-name": pci(aVF)}, aVF, "pci", ""},
		{"device info, told by the configuration", with(`"runtimeConfig":{"CNIDeviceInfoFile":"DIR/devinfo/cni/any"}`), nil, map[string]string{"devinfo/cni/any": pci(aVF)}, aVF, "pci", ""},
		{"device info by Multus' name", plain, nil, map[string]string{ofCNI: pci(aVF)}, aVF, "pci", ""},
		{"device info by a name with the end", plain, nil, map[string]string{ofCNI + "-device.json": pci(another)}, another, "pci", ""},
		{"device info of other pods and interfaces", plain, nil, map[string]string{"devinfo/cni/ns1-blue-c2_net1": pci(aVF), "devinfo/cni/ns1-blue-c1_net10": pci(aVF), "devinfo/cni/ns1-blue-xc1_net1": pci(aVF)}, "", "", ""},
		{"the device plugin's, by deviceID", with(`"deviceID":"0000:01:10.0"`), nil, map[string]string{ofDP: pci(aVF), "devinfo/dp/a-0000:01:10.2-device.json": `{`}, aVF, "pci", ""},
		{"the device plugin's of an unknown device", plain, nil, map[string]string{ofDP: pci(aVF)}, "", "", ""},
		{"vdpa", with(`"deviceID":"0000:01:10.0"`), nil, map[string]string{ofDP: `{"type":"vdpa","vdpa":{"parent-device":"vdpa1","driver":"vhost","path":"/dev/vhost-vdpa1","pci-address":"0000:01:10.0"}}`}, aVF, "vdpa", ""},
		{"vhost-user", plain, nil, map[string]string{ofCNI: `{"type":"vhost-user","vhost-user":{"mode":"client","path":"/run/s"},"pci":{"pci-address":"0000:01:10.0"}}`}, "", "vhost-user", ""},
		{"a CNI plugin's comes before the device plugin's", with(`"deviceID":"0000:01:10.0"`), nil, map[string]string{ofDP: pci(aVF), ofCNI: `{"type":"vdpa"}`}, aVF, "vdpa", ""},
		{"it names another device", with(`"deviceID":"0000:01:10.0"`), nil, map[string]string{ofCNI: pci(another)}, aVF, "pci", "names the device 10000:81:02.1"},
		{"told to be elsewhere", plain, map[string]any{deviceInfoArg: "DIR/devinfo/cni/../../secret"}, map[string]string{"secret": pci(aVF), ofDP: pci(aVF), "devinfo/cni/x": ""}, "", "", "is not in"},
		{"told and not written", plain, map[string]any{deviceInfoArg: "DIR/devinfo/cni/none"}, map[string]string{"devinfo/cni/x": "", ofCNI: pci(aVF)}, aVF, "pci", ""},
		{"no JSON", plain, nil, map[string]string{ofCNI: `{"type":`}, "", "", "unexpected end"},
		{"no type", plain, nil, map[string]string{ofCNI: `{"pci":{"pci-address":"0000:01:10.0"}}`}, "", "", "no type"},
		{"no address", plain, nil, map[string]string{ofCNI: `{"type":"pci","pci":{"pci-address":"../0000:01:10.0"}}`}, "", "", "no PCI address"},
		{"too much", plain, nil, map[string]string{ofCNI: `{"type":"` + strings.Repeat("x", maxConfig) + `"}`}, "", "", "more than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, tt.files)
			at := func(s string) string { return strings.ReplaceAll(s, "DIR", dir) }
			for k, v := range tt.args {
				tt.args[k] = at(v.(string))
			}
			a := Attachment{Network: []byte(at(tt.config)), ContainerID: "c1", IfName: "net1", CapabilityArgs: tt.args}
			d := a.Device(filepath.Join(dir, "devinfo"))
			got := d.Address
			if d.PF != "" {
				got += fmt.Sprintf("%s/%d", d.PF, d.VF)
			}
			if got != tt.want || d.Type != tt.typ {
				t.Errorf("device %+v, want %q of type %q", d, tt.want, tt.typ)
			}
			if (d.Err == nil) != (tt.says == "") || d.Err != nil && !strings.Contains(d.Err.Error(), tt.says) {
				t.Errorf("%v, want %q", d.Err, tt.says)
			}
		})
	}
}

// Files that are none, and too many of them, neither hang nor hide anything.
func TestDeviceInfoDirectories(t *testing.T) {
	dir := t.TempDir()
	cni := filepath.Join(dir, "cni")
	if err := os.Mkdir(cni, 0o700); err != nil {
		t.Fatal(err)
	}
	a := Attachment{Network: []byte(`{"type":"sriov"}`), ContainerID: "c1", IfName: "net1"}
	if d := a.Device(dir); d != (Device{}) {
		t.Errorf("an empty one: %+v", d)
	}
	if err := unix.Mkfifo(filepath.Join(cni, "blue-c1_net1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := a.Device(dir); d.Address != "" || d.Err == nil || !strings.Contains(d.Err.Error(), "regular file") {
		t.Errorf("a FIFO: %+v", d)
	}
	for i := range maxDeviceInfos {
		if err := os.WriteFile(filepath.Join(cni, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if d := a.Device(dir); d.Err == nil || !strings.Contains(d.Err.Error(), "more than 4096") {
		t.Errorf("too many: %+v", d)
	}
	a.ContainerID, a.IfName = "../c1", "../../x"
	if d := a.Device(filepath.Join(dir, "none")); d != (Device{}) {
		t.Errorf("names that are paths: %+v", d)
	}
}

// Where libcni's cache is all there is, the plugins of DPDK answer little, or nothing: null.
func TestDevicesOfCaches(t *testing.T) {
	config := base64.StdEncoding.EncodeToString([]byte(`{"type":"sriov","deviceID":"0000:01:10.0","dpdk":{"kernel_driver":"ixgbevf"}}`))
	of := func(config, args, result string) string {
		return fmt.Sprintf(`{"kind":"cniCacheV1","containerId":"c1","ifName":"net1","networkName":"lan","config":%q,"capabilityArgs":%s,"result":%s}`, config, args, result)
	}
	for name, tt := range map[string]struct{ entry, want, says string }{
		"today's":          {of(config, "{}", `{"cniVersion":"1.0.0","interfaces":[{"name":"net1","sandbox":"/x"}]}`), aVF, ""},
		"Intel's null":     {of(config, "{}", `null`), aVF, "cannot be used"},
		"of 0.2.0":         {of(config, "{}", `{"cniVersion":"0.2.0","dns":{}}`), aVF, `"0.2.0"`},
		"no configuration": {of("", `{"CNIDeviceInfoFile":"DIR/cni/x"}`, `{"cniVersion":"1.0.0","interfaces":[{"name":"net1","sandbox":"/x"}]}`), another, ""},
		"nothing":          {of("", "{}", `{"cniVersion":"1.0.0"}`), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			infos := t.TempDir()
			write(t, infos, map[string]string{"cni/x": fmt.Sprintf(`{"type":"pci","pci":{"pci-address":%q}}`, another)})
			dir, a := kept(t, `[{},{"Conf":{"name":"lan"}}]`, map[string]string{"lan-c1-net1": strings.ReplaceAll(tt.entry, "DIR", infos)})
			all, err := a.Delegates(infos)
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, want %q", err, tt.says)
			}
			if (len(all) == 1) != (tt.want != "") || len(all) == 1 && all[0].Device.Address != tt.want {
				t.Errorf("by Multus: %+v", all)
			}
			// The same file as a runtime's own.
			added, err := AddedBy(dir, "c1", "", infos)
			if len(added) != 1 || added[0].Device.Address != tt.want || err != nil {
				t.Errorf("by a runtime: %+v, %v", added, err)
			}
		})
	}
}
