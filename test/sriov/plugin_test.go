package sriov

import (
	"encoding/json"
	"errors"
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

// call is one call of the plugin.
type call struct {
	pluginConf
	ns, name   string // the pod's namespace, and the interface's name there
	dir        string // sysfs has the VF there
	pf, number string
}

// bePlugin stands in for the SR-IOV CNI plugin: it sets MAC and VLAN at the PF, moves the VF's device into the namespace,
// and answers as that one does (its results were recorded). DEL finds the device there, or fails, as that one does.
func bePlugin() int {
	if os.Getenv("CNI_COMMAND") == "VERSION" {
		fmt.Println(`{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}`)
		return 0
	}
	if err := serve(); err != nil {
		json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "1.0.0", "code": 100, "msg": err.Error()})
		return 1
	}
	return 0
}

func serve() (err error) {
	c := call{ns: filepath.Base(os.Getenv("CNI_NETNS")), name: os.Getenv("CNI_IFNAME")}
	if err := json.NewDecoder(os.Stdin).Decode(&c.pluginConf); err != nil {
		return err
	}
	c.dir = "/sys/bus/pci/devices/" + c.DeviceID + c.Pool
	if c.pf, err = do("ls %s/physfn/net", c.dir); err != nil {
		return err
	}
	c.number, err = do(`for v in %[1]s/physfn/virtfn*; do [ "$(readlink -f $v)" = "$(readlink -f %[1]s)" ] && echo "${v##*virtfn}"; done; true`, c.dir)
	if err != nil {
		return err
	}
	switch verb := os.Getenv("CNI_COMMAND"); {
	case verb == "ADD" && c.Pool != "":
		return c.addPool()
	case verb == "ADD":
		return c.add()
	case verb == "DEL" && c.Pool != "":
		return errors.Join(os.RemoveAll(c.info()), c.reset())
	case verb == "DEL":
		return c.del()
	}
	return nil
}

// do runs a line of the shell.
func do(format string, a ...any) (string, error) {
	line := fmt.Sprintf(format, a...)
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", line, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func (c *call) add() error {
	dev, err := do("ls %s/net", c.dir)
	if err != nil {
		return err
	}
	way := "scope link"
	if c.Gateway != "" {
		way = "via " + c.Gateway
	}
	_, err = do(`set -e
# In this order: igb lets no VF touch its MAC any more once it is set at the PF.
ip link set %[1]s down; ip link set %[1]s address %[2]s
ip link set %[3]s vf %[4]s mac %[2]s vlan %[5]d
ip link set %[1]s netns %[6]s name %[7]s
ip -n %[6]s addr add %[8]s dev %[7]s
ip -n %[6]s link set %[7]s mtu 1400 up
ip -n %[6]s route add 198.18.0.0/24 dev %[7]s %[9]s metric 10%[4]s`, dev, c.MAC, c.pf, c.number, c.VLAN, c.ns, c.name, c.Address, way)
	if err != nil {
		return err
	}
	return c.answer(map[string]any{"mac": c.MAC, "mtu": 1400})
}

// addPool sets what the PF holds, and tells of the VF.
func (c *call) addPool() error {
	if _, err := do("ip link set %s vf %s mac %s vlan %d", c.pf, c.number, c.MAC, c.VLAN); err != nil {
		return err
	}
	info, err := json.Marshal(map[string]any{"type": "pci", "version": "1.1.0", "pci": map[string]string{"pci-address": c.Pool, "pf-pci-address": pfAddr}})
	if err == nil {
		err = os.MkdirAll(infoDir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(c.info(), info, 0o444)
	}
	if err != nil {
		return err
	}
	return c.answer(map[string]any{})
}

// info has the name that Multus gives such files.
func (c *call) info() string {
	return filepath.Join(infoDir, fmt.Sprintf("%s-%s_%s", c.Name, os.Getenv("CNI_CONTAINERID"), c.name))
}

// answer gives the result, with what it says of the interface beside its name.
func (c *call) answer(face map[string]any) error {
	face["name"], face["sandbox"] = c.name, os.Getenv("CNI_NETNS")
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"cniVersion": "1.0.0", "interfaces": []any{face}, "ips": []any{map[string]any{"address": c.Address, "interface": 0}},
	})
}

func (c *call) del() error {
	if _, err := do("ls -d %s/net/*", c.dir); err == nil {
		return nil // on the node: ADD has failed, or the node has crashed since
	}
	seen, err := do("ip -n %[1]s -br addr show dev %[2]s; ip -n %[1]s route show dev %[2]s; ip -n %[1]s -o link show dev %[2]s; ip link show %[3]s | grep 'vf %[4]s '", c.ns, c.name, c.pf, c.number)
	if err == nil {
		err = os.WriteFile(seenAtDel+c.DeviceID, []byte(seen), 0o600)
	}
	if err == nil {
		_, err = do("set -e; ip -n %[1]s link set %[2]s down; ip -n %[1]s link set %[2]s name back%[3]s netns 1", c.ns, c.name, c.number)
	}
	if err != nil {
		return err
	}
	return c.reset()
}

// reset takes back what the PF holds.
func (c *call) reset() error {
	_, err := do("ip link set %s vf %s vlan 0 mac 00:00:00:00:00:00", c.pf, c.number)
	return err
}
