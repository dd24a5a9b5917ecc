package sriov

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// pluginConf is what the plugin takes, as the SR-IOV CNI plugin does, with one address in the place of an IPAM plugin.
type pluginConf struct {
	Version  string `json:"cniVersion"`
	Name     string `json:"name"`
	DeviceID string `json:"deviceID,omitempty"`
	// Pool is a VF as a device plugin's pool for VFIO has it. The plugin leaves it there, and tells of it by device info alone.
	Pool    string `json:"pool,omitempty"`
	VLAN    int    `json:"vlan"`
	MAC     string `json:"mac"`
	Address string `json:"address"`
	Gateway string `json:"gateway"` // of the route that it makes, which is on the link without
}

// seenAtDel is where the plugin writes what DEL has found.
const seenAtDel = "/run/seen-"

// infoDir is where CNI plugins tell of devices (the Device Information Specification of the Network Plumbing Working Group).
const infoDir = "/var/run/k8s.cni.cncf.io/devinfo/cni"

// bePlugin stands in for the SR-IOV CNI plugin: it sets MAC and VLAN at the PF, moves the VF's device into the namespace,
// and answers as that one does (its results were recorded). DEL finds the device there, or fails, as that one does.
func bePlugin() int {
	fail := func(err error) int {
		json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "1.0.0", "code": 100, "msg": err.Error()})
		return 1
	}
	if os.Getenv("CNI_COMMAND") == "VERSION" {
		fmt.Println(`{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}`)
		return 0
	}
	var c pluginConf
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return fail(err)
	}
	do := func(line string) (string, error) {
		out, err := exec.Command("sh", "-c", line).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%s: %w: %s", line, err, out)
		}
		return strings.TrimSpace(string(out)), nil
	}
	dir := "/sys/bus/pci/devices/" + c.DeviceID + c.Pool
	pf, err := do("ls " + dir + "/physfn/net")
	if err != nil {
		return fail(err)
	}
	number, err := do(fmt.Sprintf(`for v in %[1]s/physfn/virtfn*; do [ "$(readlink -f $v)" = "$(readlink -f %[1]s)" ] && echo "${v##*virtfn}"; done; true`, dir))
	if err != nil {
		return fail(err)
	}
	ns, name := filepath.Base(os.Getenv("CNI_NETNS")), os.Getenv("CNI_IFNAME")
	all := func(lines ...string) error {
		for _, l := range lines {
			if _, err := do(l); err != nil {
				return err
			}
		}
		return nil
	}
	result := func(mac string, mtu int) int {
		face := map[string]any{"name": name, "sandbox": os.Getenv("CNI_NETNS")}
		if mac != "" {
			face["mac"], face["mtu"] = mac, mtu
		}
		json.NewEncoder(os.Stdout).Encode(map[string]any{
			"cniVersion": "1.0.0", "interfaces": []any{face}, "ips": []any{map[string]any{"address": c.Address, "interface": 0}},
		})
		return 0
	}
	if c.Pool != "" {
		// By the name that Multus tells plugins.
		info := filepath.Join(infoDir, fmt.Sprintf("%s-%s_%s", c.Name, os.Getenv("CNI_CONTAINERID"), name))
		if os.Getenv("CNI_COMMAND") == "DEL" {
			err := all(fmt.Sprintf("rm -f %s; ip link set %s vf %s vlan 0 mac 00:00:00:00:00:00", info, pf, number))
			if err != nil {
				return fail(err)
			}
			return 0
		}
		told := fmt.Sprintf(`{"type":"pci","version":"1.1.0","pci":{"pci-address":"%s","pf-pci-address":"%s"}}`, c.Pool, pfAddr)
		err := all(
			fmt.Sprintf("ip link set %s vf %s mac %s vlan %d", pf, number, c.MAC, c.VLAN),
			fmt.Sprintf("mkdir -p %s; echo '%s' >%s", infoDir, told, info),
		)
		if err != nil {
			return fail(err)
		}
		return result("", 0)
	}
	switch os.Getenv("CNI_COMMAND") {
	case "ADD":
		way := "scope link"
		if c.Gateway != "" {
			way = "via " + c.Gateway
		}
		dev, err := do("ls " + dir + "/net")
		if err != nil {
			return fail(err)
		}
		err = all(
			// In this order: igb lets no VF touch its MAC any more once it is set at the PF.
			fmt.Sprintf("ip link set %s down; ip link set %s address %s", dev, dev, c.MAC),
			fmt.Sprintf("ip link set %s vf %s mac %s vlan %d", pf, number, c.MAC, c.VLAN),
			fmt.Sprintf("ip link set %s netns %s name %s", dev, ns, name),
			fmt.Sprintf("ip -n %s addr add %s dev %s", ns, c.Address, name),
			fmt.Sprintf("ip -n %s link set %s mtu 1400 up", ns, name),
			fmt.Sprintf("ip -n %s route add 198.18.0.0/24 dev %s %s metric 10%s", ns, name, way, number),
		)
		if err != nil {
			return fail(err)
		}
		return result(c.MAC, 1400)
	case "DEL":
		if _, err := do("ls -d " + dir + "/net/*"); err == nil {
			return 0 // on the node: ADD has failed
		}
		seen, err := do(fmt.Sprintf("ip -n %[1]s -br addr show dev %[2]s; ip -n %[1]s route show dev %[2]s; ip -n %[1]s -o link show dev %[2]s; ip link show %[3]s | grep 'vf %[4]s '", ns, name, pf, number))
		if err != nil {
			return fail(err)
		}
		if err := os.WriteFile(seenAtDel+c.DeviceID, []byte(seen), 0o600); err != nil {
			return fail(err)
		}
		err = all(
			fmt.Sprintf("ip -n %s link set %s down", ns, name),
			fmt.Sprintf("ip -n %s link set %s name back%s netns 1", ns, name, number),
			fmt.Sprintf("ip link set %s vf %s vlan 0 mac 00:00:00:00:00:00", pf, number),
		)
		if err != nil {
			return fail(err)
		}
	}
	return 0
}
