package vm

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
)

// Published gives what c publishes on the node.
func (c *Config) Published() ([]PortMapping, error) {
	var all []PortMapping
	for _, a := range c.Networks {
		asked, ok := a.CapabilityArgs["portMappings"]
		if !ok {
			continue
		}
		// As written for the plugin, or as read back from a file.
		b, err := json.Marshal(asked)
		if err != nil {
			return nil, err
		}
		var some []PortMapping
		if err := json.Unmarshal(b, &some); err != nil {
			return nil, fmt.Errorf("port mappings of network %s: %w", a.Name, err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// portsFree refuses to publish a port twice: the plugins take it, and then one of the two guests gets nothing. Others
// on the node may publish it all the same; that is theirs to know.
func (s Store) portsFree(c Config) error {
	mine, err := c.Published()
	if err != nil || len(mine) == 0 {
		return err
	}
	for i, p := range mine {
		for _, q := range mine[:i] {
			if p.collides(q) {
				return wrong("port %d/%s is published twice", p.HostPort, p.Protocol)
			}
		}
	}
	all, _ := s.List() // a VM that cannot be read is no reason not to start another
	for _, st := range all {
		if st.Config.Name == c.Name || s.inOrder(st.Config.Name, st) {
			continue // its ports are free; those of a dead one are still mapped
		}
		theirs, _ := st.Config.Published()
		for _, p := range mine {
			for _, q := range theirs {
				if p.collides(q) {
					return fmt.Errorf("port %d/%s is published by VM %q: choose another, or end that VM (virtlet ps shows its state, virtlet gc cleans up after a dead one)", p.HostPort, p.Protocol, st.Config.Name)
				}
			}
		}
	}
	return nil
}

// String gives the form "HOST:PORT->PORT/PROTOCOL".
func (p PortMapping) String() string {
	host := fmt.Sprint(p.HostPort)
	if p.HostIP != "" {
		host = net.JoinHostPort(p.HostIP, host)
	}
	return fmt.Sprintf("%s->%d/%s", host, p.ContainerPort, p.Protocol)
}

// collides says whether two mappings claim the same port of the same address.
func (p PortMapping) collides(q PortMapping) bool {
	return p.HostPort == q.HostPort && p.Protocol == q.Protocol && (every(p.HostIP) || every(q.HostIP) || p.HostIP == q.HostIP)
}

// every says whether a host address stands for all of the node's.
func every(ip string) bool {
	a, err := netip.ParseAddr(ip)
	return err != nil || a.IsUnspecified()
}
