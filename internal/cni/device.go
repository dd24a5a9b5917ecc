package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/utils"
)

// DeviceInfoDir is where device plugins (dp) and CNI plugins (cni) tell of devices, by the Device Information
// Specification of the Kubernetes Network Plumbing Working Group.
const DeviceInfoDir = "/var/run/k8s.cni.cncf.io/devinfo"

const (
	typePCI = "pci" // the specification's types: pci, vdpa, vhost-user, memif

	deviceInfoArg = "CNIDeviceInfoFile" // capability argument: where the network's plugin is to tell of its device
	sriovType     = "sriov"             // the plugins' type, of whatever maker
	sriovDir      = "/var/lib/cni/sriov"

	// maxDeviceInfos bounds a directory of device info: a node has some hundred devices.
	maxDeviceInfos = 4096
)

// pciForm is how the kernel prints a PCI address.
var pciForm = regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// Device is what is known of the device that a network has its interface of, from whoever wrote it down. Whether there is
// such a device, and of what kind, nobody has looked at.
type Device struct {
	Address string // PCI address; "": unknown
	// PF is, where Address is unknown, the network device of a physical function, and VF a number of its virtual functions.
	PF   string
	VF   int
	Type string // as device info has it: pci, vdpa, vhost-user, memif or what else it says; "": it says nothing
	Err  error  // what could not be used of all that was written down
}

// Device looks for what is known of the device of a's interface, in this order: the capability argument deviceID; the
// configuration (deviceID; deviceinfo and dpdk of the SR-IOV plugins before today's; pciBusID of host-device); the device info
// below the directory infos; what an SR-IOV plugin keeps for its DEL; the PF and number in the configuration. What kind
// of device it is, device info alone says.
func (a Attachment) Device(infos string) Device {
	var d Device
	if id, ok := a.CapabilityArgs["deviceID"].(string); ok {
		d.Address = id
	}
	told, _ := a.CapabilityArgs[deviceInfoArg].(string)
	plugins := a.pluginConfigs()
	for _, p := range plugins {
		d.Address = cmp.Or(d.Address, p.text("runtimeConfig", "deviceID"), p.text("deviceID"), p.text("deviceinfo", "pci_addr"), p.text("dpdk", "pci_addr"), p.text("pciBusID"))
		told = cmp.Or(told, p.text("runtimeConfig", deviceInfoArg))
	}
	info, err := a.deviceInfo(infos, told, d.Address)
	d.Type, d.Err = info.Type, err
	switch {
	case d.Address == "":
		d.Address = info.address()
	case info.address() != "" && info.address() != d.Address:
		d.Err = errors.Join(d.Err, fmt.Errorf("%s names the device %s, the configuration %s: that is taken", info.file, info.address(), printable(d.Address, 64)))
	}
	if d.Address != "" {
		return d
	}
	for _, p := range plugins {
		if p.text("type") != sriovType {
			continue
		}
		address, err := a.keptBySRIOV(p)
		d.Address, d.Err = cmp.Or(d.Address, address), errors.Join(d.Err, err)
		if d.PF == "" {
			d.PF, d.VF = p.function()
		}
	}
	if d.Address != "" {
		d.PF, d.VF = "", 0
	}
	return d
}

// pluginConfig is one plugin's configuration. What has another form than is asked for counts as absent: a field may mean
// something else to another plugin.
type pluginConfig map[string]json.RawMessage

// pluginConfigs gives the plugins of a configuration, or of a list.
func (a Attachment) pluginConfigs() []pluginConfig {
	var one pluginConfig
	if json.Unmarshal(a.Network, &one) != nil {
		return nil // of that, ADD has complained
	}
	var list []pluginConfig
	if json.Unmarshal(one["plugins"], &list) != nil {
		list = nil
	}
	return append([]pluginConfig{one}, list...)
}

func (p pluginConfig) text(path ...string) (s string) {
	_ = p.read(&s, path...)
	return s
}

// read reads the field that a path leads to.
func (p pluginConfig) read(v any, path ...string) error {
	field := p[path[0]]
	if field == nil {
		return fs.ErrNotExist
	}
	if len(path) == 1 {
		return json.Unmarshal(field, v)
	}
	var in pluginConfig
	if err := json.Unmarshal(field, &in); err != nil {
		return err
	}
	return in.read(v, path[1:]...)
}

// function gives the VF that a configuration names by its PF: deviceinfo of Intel's plugin, master or if0 with vf of the
// others. "" is none.
func (p pluginConfig) function() (pf string, vf int) {
	for _, at := range [][2][]string{{{"deviceinfo", "pfname"}, {"deviceinfo", "vfid"}}, {{"master"}, {"vf"}}, {{"if0"}, {"vf"}}} {
		if pf = p.text(at[0]...); pf != "" && p.read(&vf, at[1]...) == nil && vf >= 0 {
			return pf, vf
		}
	}
	return "", 0
}

// keptBySRIOV gives the address that an SR-IOV plugin keeps for its DEL, in a file for each interface. Where it has chosen
// the VF by itself and bound it for DPDK, nothing else tells of it. "": it keeps none.
func (a Attachment) keptBySRIOV(p pluginConfig) (string, error) {
	name := cmp.Or(p.text("if0name"), a.IfName)
	if utils.ValidateContainerID(a.ContainerID) != nil || utils.ValidateInterfaceName(name) != nil {
		return "", nil
	}
	file := filepath.Join(cmp.Or(p.text("cniDir"), sriovDir), a.ContainerID+"-"+name)
	var kept pluginConfig
	if err := readJSON(file, &kept); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("read what plugin %s keeps: %w", sriovType, err)
	}
	// The original writes its dpdk alone, the later ones all that they know.
	address := cmp.Or(kept.text("pci_addr"), kept.text("deviceID"), kept.text("deviceinfo", "pci_addr"), kept.text("dpdk", "pci_addr"))
	if address != "" && !pciForm.MatchString(address) {
		return "", fmt.Errorf("read what plugin %s keeps: %s: %q is no PCI address", sriovType, file, printable(address, 64))
	}
	return address, nil
}

// deviceInfo is one file by the specification, as far as it matters here.
type deviceInfo struct {
	file string
	Type string `json:"type"`
	PCI  struct {
		Address string `json:"pci-address"`
	} `json:"pci"`
}

// address gives the PCI address of a device that is one to be given away as such.
func (i deviceInfo) address() string {
	if i.Type != typePCI {
		return ""
	}
	return i.PCI.Address
}

// deviceInfo finds the device info of a's interface: in the file that its plugin was told to write; in one that is called
// after container and interface, as Multus calls them; in the device plugin's for a device. The zero value is none.
func (a Attachment) deviceInfo(infos, told, id string) (deviceInfo, error) {
	const cniDir, dpDir, end = "cni", "dp", "-device.json"
	var errs []error
	if told != "" {
		if !samePlace(filepath.Dir(told), filepath.Join(infos, cniDir)) {
			errs = append(errs, fmt.Errorf("device info %q is not in %s", printable(told, 256), filepath.Join(infos, cniDir)))
		} else if i, err := readDeviceInfo(told); err == nil {
			return i, nil
		} else if !errors.Is(err, fs.ErrNotExist) { // many plugins write none
			return i, err
		}
	}
	look := map[string]string{} // directory -> end of the name, with or without -device.json
	if utils.ValidateContainerID(a.ContainerID) == nil && utils.ValidateInterfaceName(a.IfName) == nil {
		look[cniDir] = "-" + a.ContainerID + "_" + a.IfName
	}
	if pciForm.MatchString(id) {
		look[dpDir] = "-" + id
	}
	for _, dir := range []string{cniDir, dpDir} {
		names, err := infoFiles(filepath.Join(infos, dir))
		errs = append(errs, err)
		for _, name := range names {
			if look[dir] == "" || !strings.HasSuffix(strings.TrimSuffix(name, end), look[dir]) {
				continue
			}
			i, err := readDeviceInfo(filepath.Join(infos, dir, name))
			if err == nil {
				return i, errors.Join(errs...)
			}
			errs = append(errs, err)
		}
	}
	return deviceInfo{}, errors.Join(errs...)
}

// infoFiles lists a directory of device info; it need not be there.
func infoFiles(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for device info: %w", err)
	}
	defer f.Close()
	names, err := f.Readdirnames(maxDeviceInfos + 1) // an empty directory is io.EOF
	if len(names) > maxDeviceInfos {
		return nil, fmt.Errorf("look for device info: %s has more than %d files", dir, maxDeviceInfos)
	}
	if err != nil && len(names) > 0 {
		return nil, fmt.Errorf("look for device info: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

// readDeviceInfo reads one file and checks what is taken from it.
func readDeviceInfo(file string) (i deviceInfo, err error) {
	if err := readJSON(file, &i); err != nil {
		return deviceInfo{}, fmt.Errorf("read device info: %w", err)
	}
	i.file = file
	switch {
	case i.Type == "":
		err = errors.New("it has no type")
	case i.Type == typePCI && !pciForm.MatchString(i.PCI.Address):
		err = fmt.Errorf("%q is no PCI address", printable(i.PCI.Address, 64))
	}
	if err != nil {
		return deviceInfo{}, fmt.Errorf("read device info %s: %w", file, err)
	}
	return i, nil
}
