package cni

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// maxConfig bounds a network configuration, the plugins from its folder included. Real ones are some KiB.
const maxConfig = 1 << 20

// versions are the CNI versions that virtlet speaks, oldest first. Before 0.3.0 there are no lists and no interfaces
// in results; a configuration without a version means 0.1.0 to the specification.
var versions = version.VersionsStartingFrom("0.3.0").SupportedVersions()

// defaultList is the network of a machine that has none configured.
//
//   - 10.231.86.0/24 stays clear of what else is common on a machine: Docker (172.17/16 and up), Podman (10.88/16),
//     Flannel (10.244/16), k3s (10.42/16), Weave (10.32/12), Calico and home routers (192.168/16), libvirt
//     (192.168.122/24), QEMU's user network (10.0.2/24), carrier NAT and overlays (100.64/10).
//   - fd09:9101:b46e:56::/64 is a unique local prefix with a random global ID (RFC 4193, section 3.2). Guests prefer
//     IPv4 for the world when all they have beside it is such an address (RFC 6724, section 2.1), so a node without
//     IPv6 costs no delays.
//   - Leases belong below /run, as they mean nothing after the reboot that took every namespace.
//   - Masquerading and port mapping use nft. The firewall plugin accepts the guests' traffic where the policy for
//     forwarded packets is to drop; it knows iptables and firewalld only and comes last, so that nothing fails after it.
//   - hairpinMode lets a guest reach its own mapped port.
//   - As a gateway the bridge plugin sets ip_forward and, for the IPv6 range, ipv6/conf/all/forwarding on the node. A
//     node that has its own default route from router advertisements then needs accept_ra=2 on that link (kernel
//     documentation, ip-sysctl: accept_ra).
//
//go:embed default.conflist
var defaultList []byte

// Network is one CNI network configuration, read and checked. It does not change.
type Network struct {
	Name    string
	Version string // the CNI version to speak, 0.3.0 to 1.1.0
	File    string // where it came from, for messages

	list *libcni.NetworkConfigList
}

// ConfigError says why a network configuration cannot be used.
type ConfigError struct {
	File  string
	Name  string // of the network, if it could be read
	Field string // the JSON key at fault, or empty
	Err   error
}

func (e *ConfigError) Error() string {
	if e.Field == "" {
		return fmt.Sprintf("network configuration %s: %v", e.File, e.Err)
	}
	return fmt.Sprintf("network configuration %s: field %q: %v", e.File, e.Field, e.Err)
}

// Unwrap gives the cause.
func (e *ConfigError) Unwrap() error { return e.Err }

// Bad is a file that cannot be used, and why.
type Bad struct {
	File string
	Err  error
}

// Bytes gives the configuration as a list, in compact JSON: a single configuration is wrapped, cniVersions is settled
// to one cniVersion, and plugins from the list's folder are inside. Parse reads it back.
func (n *Network) Bytes() []byte { return slices.Clone(n.list.Bytes) }

// Capabilities gives what the plugins accept at run time, such as portMappings, bandwidth, ips, mac, dns: each once,
// sorted.
func (n *Network) Capabilities() []string {
	var out []string
	for _, p := range n.list.Plugins {
		for c, on := range p.Network.Capabilities {
			if on {
				out = append(out, c)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Default gives the embedded network: bridge "virtlet0" with an IPv4 and an IPv6 prefix, masqueraded, with port mapping
// and bandwidth limits. leases is the directory where it keeps which addresses are taken.
func Default(leases string) *Network {
	n, err := withLeases(leases)
	if err != nil {
		panic(err) // it is part of the program; a test reads it
	}
	return n
}

func withLeases(dir string) (*Network, error) {
	var list struct {
		Version string           `json:"cniVersion"`
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal(defaultList, &list); err != nil {
		return nil, err
	}
	ipam, ok := list.Plugins[0]["ipam"].(map[string]any)
	if !ok {
		return nil, errors.New("the embedded network has no ipam")
	}
	ipam["dataDir"] = dir
	b, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	return Parse("the embedded one", b)
}

// Load reads every network configuration in dir, in lexical order: files that end in .conflist, .conf or .json. As with
// libcni, a list also takes the plugins in the folder of its name, dir/NAME/*.conf, unless it sets
// loadOnlyInlinedPlugins. A file that cannot be used is in bad and does not hide the others; of several networks with
// the same name the first counts. The error is for dir itself; it is os.ErrNotExist when there is no dir.
func Load(dir string) (nets []*Network, bad []Bad, err error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, nil, fmt.Errorf("read network configurations: %w", err)
	}
	files := map[string]string{}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); e.IsDir() || (ext != ".conflist" && ext != ".conf" && ext != ".json") {
			continue
		}
		file := filepath.Join(dir, e.Name())
		n, err := loadFile(file)
		switch {
		case err != nil:
			bad = append(bad, Bad{file, err})
		case files[n.Name] != "":
			err := &ConfigError{file, n.Name, "name", fmt.Errorf("%q is taken by %s, which comes first", n.Name, files[n.Name])}
			bad = append(bad, Bad{file, err})
		default:
			files[n.Name] = file
			nets = append(nets, n)
		}
	}
	return nets, bad, nil
}

// Find gives the network of that name. Its error lists the networks there are, and says why the one of that name, or in
// a file called after it, cannot be used.
func Find(nets []*Network, bad []Bad, name string) (*Network, error) {
	names := []string{}
	for _, n := range nets {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	have := "there is none"
	if len(names) > 0 {
		have = "there is " + strings.Join(names, ", ")
	}
	errs := []error{fmt.Errorf("find network %q: no such network; %s", name, have)}
	for _, b := range bad {
		var ce *ConfigError
		if errors.As(b.Err, &ce) && ce.Name == name || calledAfter(b.File, name) {
			errs = append(errs, b.Err)
		}
	}
	return nil, errors.Join(errs...)
}

// calledAfter says whether file is called NAME.ext or, as with an order in front, 10-NAME.ext.
func calledAfter(file, name string) bool {
	base := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	_, after, found := strings.Cut(base, "-")
	return base == name || found && after == name
}

// Parse reads a network list or, as from old .conf files, a single plugin's configuration. file is for messages only.
// Every error is a [*ConfigError].
func Parse(file string, b []byte) (*Network, error) { return parse(file, b, "") }

func loadFile(file string) (*Network, error) {
	b, err := readBounded(file)
	if err != nil {
		return nil, &ConfigError{File: file, Err: err}
	}
	return parse(file, b, filepath.Dir(file))
}

// parse is Parse that adds the plugins of the list's folder in dir, if dir is given.
func parse(file string, b []byte, dir string) (*Network, error) {
	bad := &ConfigError{File: file}
	fail := func(field string, err error) (*Network, error) {
		bad.Field, bad.Err = field, err
		return nil, bad
	}
	if len(b) > maxConfig {
		return fail("", fmt.Errorf("%d bytes, more than %d", len(b), maxConfig))
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return fail("", err)
	}
	_ = json.Unmarshal(raw["name"], &bad.Name) // a wrong kind of name is an empty one
	if err := utils.ValidateNetworkName(bad.Name); err != nil {
		return fail("name", fmt.Errorf("%q: %s; it starts with a letter or digit and goes on with letters, digits, . _ -",
			printable(bad.Name, 64), strings.TrimSuffix(err.Msg, ":")))
	}
	if _, list := raw["plugins"]; !list && raw["type"] != nil {
		raw = map[string]json.RawMessage{"name": raw["name"], "cniVersion": raw["cniVersion"], "cniVersions": raw["cniVersions"], "plugins": wrap(b)}
		raw = dropEmpty(raw)
		dir = ""
	}
	// libcni settles cniVersions and reads the flags.
	list, err := reread(raw)
	if err != nil {
		return fail("", err)
	}
	if list.CNIVersion == "" {
		return fail("cniVersion", fmt.Errorf("missing; give one of %s", strings.Join(versions, ", ")))
	}
	if !slices.Contains(versions, list.CNIVersion) {
		return fail("cniVersion", fmt.Errorf("%q is not served; give one of %s", printable(list.CNIVersion, 64), strings.Join(versions, ", ")))
	}
	if dir != "" && !list.LoadOnlyInlinedPlugins {
		if err := addFolder(raw, filepath.Join(dir, bad.Name)); err != nil {
			return fail("plugins", err)
		}
	}
	raw["cniVersion"], _ = json.Marshal(list.CNIVersion)
	delete(raw, "cniVersions")
	if list, err = reread(raw); err != nil {
		return fail("", err)
	}
	if len(list.Plugins) == 0 {
		return fail("plugins", errors.New("there are none"))
	}
	if len(list.Bytes) > maxConfig {
		return fail("plugins", fmt.Errorf("%d bytes with those of the folder, more than %d", len(list.Bytes), maxConfig))
	}
	for _, p := range list.Plugins {
		if !isFileName(p.Network.Type) {
			return fail("type", fmt.Errorf("%q is not the name of a program", printable(p.Network.Type, 64)))
		}
		if t := p.Network.IPAM.Type; t != "" && !isFileName(t) {
			return fail("ipam.type", fmt.Errorf("%q is not the name of a program", printable(t, 64)))
		}
	}
	return &Network{Name: list.Name, Version: list.CNIVersion, File: file, list: list}, nil
}

func reread(raw map[string]json.RawMessage) (*libcni.NetworkConfigList, error) {
	b, err := json.Marshal(raw)
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(b)
}

// addFolder appends the plugins in folder/*.conf to the list, and marks the list as whole.
func addFolder(raw map[string]json.RawMessage, folder string) error {
	files, err := libcni.ConfFiles(folder, []string{".conf"})
	if err != nil || len(files) == 0 {
		return err
	}
	var plugins []json.RawMessage
	if raw["plugins"] != nil {
		if err := json.Unmarshal(raw["plugins"], &plugins); err != nil {
			return err
		}
	}
	size := 0
	for _, f := range files {
		b, err := readBounded(f)
		if err != nil {
			return err
		}
		if !json.Valid(b) {
			return fmt.Errorf("%s is not JSON", f)
		}
		if size += len(b); size > maxConfig {
			return fmt.Errorf("%s holds more than %d bytes", folder, maxConfig)
		}
		plugins = append(plugins, b)
	}
	raw["plugins"], err = json.Marshal(plugins)
	raw["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	return err
}

// readBounded reads a regular file of at most maxConfig bytes. Not blocking: a FIFO in the folder must not hang us.
func readBounded(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", file)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("%s holds more than %d bytes", file, maxConfig)
	}
	return b, err
}

func wrap(b []byte) json.RawMessage { return slices.Concat([]byte("["), b, []byte("]")) }

func dropEmpty(raw map[string]json.RawMessage) map[string]json.RawMessage {
	for k, v := range raw {
		if v == nil {
			delete(raw, k)
		}
	}
	return raw
}

// isFileName says whether s names a file in a folder, so that no configuration can name a program elsewhere.
func isFileName(s string) bool {
	const nameMax = 255 // NAME_MAX of <linux/limits.h>
	return s != "" && len(s) <= nameMax && s != "." && s != ".." && !strings.ContainsAny(s, "/\\\x00")
}

// atLeast says whether CNI version v, one of versions, is min or newer.
func atLeast(v, min string) bool { return slices.Index(versions, v) >= slices.Index(versions, min) }
