package cni

import (
	"encoding/json"
	"os/exec"
	"slices"
)

// MissingTools gives the programs that the reference plugins of n would run and PATH does not have, sorted: iptables or
// nft, by the back end that is configured for masquerading, port mapping or the firewall.
func (n *Network) MissingTools() []string {
	var out []string
	for _, p := range n.list.Plugins {
		var conf struct {
			Type          string `json:"type"`
			IPMasq        bool   `json:"ipMasq"`
			IPMasqBackend string `json:"ipMasqBackend"`
			Backend       string `json:"backend"`
		}
		if json.Unmarshal(p.Bytes, &conf) != nil {
			continue // fields of another plugin's own
		}
		backend := conf.Backend
		switch conf.Type {
		case "bridge", "ptp":
			if !conf.IPMasq {
				continue
			}
			backend = conf.IPMasqBackend
		case "portmap", "firewall":
		default:
			continue
		}
		tool := "iptables" // what the plugins take first when nothing is said
		switch {
		case backend == "nftables":
			tool = "nft"
		case backend == "firewalld", backend == "" && conf.Type != "firewall" && inPath("nft"):
			continue
		}
		if !inPath(tool) {
			out = append(out, tool)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func inPath(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}
