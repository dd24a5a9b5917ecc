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
	DeviceID string `json:"deviceID"`
	VLAN     int    `json:"vlan"`
	MAC      string `json:"mac"`
	Address  string `json:"address"`
}

// seenAtDel is where the plugin writes what DEL has found.
const seenAtDel = "/run/seen-"

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
	dir := "/sys/bus/pci/devices/" + c.DeviceID
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
	switch os.Getenv("CNI_COMMAND") {
	case "ADD":
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
			fmt.Sprintf("ip -n %s route add 198.18.0.0/24 dev %s scope link metric 10%s", ns, name, number),
		)
		if err != nil {
			return fail(err)
		}
		json.NewEncoder(os.Stdout).Encode(map[string]any{
			"cniVersion": "1.0.0",
			"interfaces": []any{map[string]any{"name": name, "mac": c.MAC, "mtu": 1400, "sandbox": os.Getenv("CNI_NETNS")}},
			"ips":        []any{map[string]any{"address": c.Address, "interface": 0}},
		})
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
