package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
)

// DefaultConfDir is where CNI configurations are looked for, as by every container runtime.
const DefaultConfDir = "/etc/cni/net.d"

// NetworkRequest is what a user wants of CNI networks.
type NetworkRequest struct {
	ConfDir string   // of CNI configurations
	Names   []string // in the order of the guest's NICs; none: the first of ConfDir, or the embedded network where there is none

	Ports     []PortMapping // by the first network that can
	Bandwidth *Bandwidth    // on every network that can
	IPs       []string      // the i-th belongs to the i-th network; "" leaves the choice to the plugin
	MACs      []string      // likewise
}

// Plugins says where CNI plugins are looked for.
type Plugins struct {
	Dirs []string `json:"dirs,omitempty"` // the node's
	Own  []string `json:"own,omitempty"`  // virtlet's, of the version that the embedded network is written for
}

// For gives the directories for a network, in order of search. The node's plugins are for the node's networks and
// virtlet's for its own: a distribution's may be too old for that.
func (p Plugins) For(network string) []string {
	if network == embeddedName {
		return slices.Concat(p.Own, p.Dirs)
	}
	return slices.Concat(p.Dirs, p.Own)
}

// What the network of [cni.Default] calls itself and its bridge.
const (
	embeddedName   = "virtlet"
	embeddedBridge = "virtlet0"
)

// PortMapping publishes a port of the guest on the host. The JSON form is the portMappings capability of the CNI
// conventions.
type PortMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp or sctp
	HostIP        string `json:"hostIP,omitempty"`
}

// Bandwidth limits a NIC, in bits per second and bits; 0 is no limit. Ingress is what the guest receives. The JSON form is the
// bandwidth capability of the CNI conventions.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

// Attachments turns a request into what [Config].Networks wants: eth0 on the first network, eth1 on the next. A wish
// that no plugin of its network can fulfil is an error, not a surprise.
func (s Store) Attachments(r NetworkRequest) ([]cni.Attachment, error) {
	nets, err := s.networks(r)
	if err != nil {
		return nil, err
	}
	if len(r.IPs) > len(nets) || len(r.MACs) > len(nets) {
		return nil, wrong("%d networks, but --ip %d times and --mac %d times: give each at most once for every network, in their order",
			len(nets), len(r.IPs), len(r.MACs))
	}
	var all []cni.Attachment
	ports, shaped := len(r.Ports) == 0, r.Bandwidth == nil
	for i, n := range nets {
		a := n.Attachment("", "", fmt.Sprintf("eth%d", i))
		a.CapabilityArgs = map[string]any{}
		can := n.Capabilities()
		if !ports && slices.Contains(can, "portMappings") {
			ports, a.CapabilityArgs["portMappings"] = true, r.Ports
		}
		if r.Bandwidth != nil && slices.Contains(can, "bandwidth") {
			shaped, a.CapabilityArgs["bandwidth"] = true, r.Bandwidth
		}
		if err := r.address(i, n, can, a.CapabilityArgs); err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	if !ports {
		return nil, fmt.Errorf("publish ports: no network has a plugin with the portMappings capability: add portmap to the configuration of one of %s", names(nets))
	}
	if !shaped {
		return nil, fmt.Errorf("limit bandwidth: no network has a plugin with the bandwidth capability: add it to the configuration of one of %s", names(nets))
	}
	return all, nil
}

// address asks the i-th network for a certain address or MAC.
func (r NetworkRequest) address(i int, n *cni.Network, can []string, args map[string]any) error {
	if i < len(r.IPs) && r.IPs[i] != "" {
		if _, err := netip.ParsePrefix(r.IPs[i]); err != nil {
			if _, err := netip.ParseAddr(r.IPs[i]); err != nil {
				return wrong("--ip %q: use an address such as 10.1.0.5, or 10.1.0.5/24 where the network wants its mask", r.IPs[i])
			}
		}
		if !slices.Contains(can, "ips") {
			return fmt.Errorf("--ip: network %q has no plugin with the ips capability", n.Name)
		}
		args["ips"] = []string{r.IPs[i]}
	}
	if i < len(r.MACs) && r.MACs[i] != "" {
		mac, err := nic.ParseMAC(r.MACs[i])
		if err != nil || mac[0]&1 != 0 {
			return wrong("--mac %q: use a unicast Ethernet address such as 02:00:5e:10:00:01", r.MACs[i])
		}
		if !slices.Contains(can, "mac") {
			return fmt.Errorf("--mac: network %q has no plugin with the mac capability", n.Name)
		}
		args["mac"] = mac.String()
	}
	return nil
}

// networks finds the configurations of the request.
func (s Store) networks(r NetworkRequest) ([]*cni.Network, error) {
	nets, bad, err := cni.Load(r.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(r.Names) == 0 {
		switch {
		case len(nets) > 0:
			return nets[:1], nil
		case len(bad) > 0:
			return nil, fmt.Errorf("no usable CNI configuration in %s: %s: %w", r.ConfDir, bad[0].File, bad[0].Err)
		}
		return []*cni.Network{s.embedded()}, nil
	}
	var all []*cni.Network
	for _, name := range r.Names {
		n, err := cni.Find(append(nets, s.embedded()), bad, name)
		if err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	return all, nil
}

// NetworkNames gives the networks that can be asked for by name; those that cannot be read are left out.
func (s Store) NetworkNames(confDir string) []string {
	nets, _, _ := cni.Load(confDir)
	var all []string
	for _, n := range append(nets, s.embedded()) {
		if !slices.Contains(all, n.Name) {
			all = append(all, n.Name)
		}
	}
	return all
}

// embedded is the network of a machine without configurations. Its leases mean nothing after a reboot.
func (s Store) embedded() *cni.Network { return cni.Default(s.ipam()) }

func wrong(format string, a ...any) error { return &ConfigError{fmt.Errorf(format, a...)} }

func names(nets []*cni.Network) string {
	var all []string
	for _, n := range nets {
		all = append(all, fmt.Sprintf("%q (%s)", n.Name, n.File))
	}
	return strings.Join(all, ", ")
}
