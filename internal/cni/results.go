package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// Added is what another runtime's libcni keeps of one ADD.
type Added struct {
	Network        string
	IfName         string
	Device         Device // as of Attachment.Device
	Result         *types100.Result
	CapabilityArgs map[string]any

	given Attachment // as far as the cache has it
}

// Bounds of another runtime's cache. A pod has a file for each network.
const (
	maxResult  = 1 << 20 // bytes of one file
	maxResults = 4096    // files: pods times networks of one node
)

// AddedBy gives what the cache in dir (libcni's own is /var/lib/cni) holds for a container and the namespace at netns: the
// loopback left out, eth0 first, the others by name, as a pod's first network is made as eth0. A file is known by its
// content, not its name. Files of others do not matter, however broken; one that is not there any more neither. No
// directory means no results. infos is where device info is, DeviceInfoDir.
func AddedBy(dir, containerID, netns, infos string) ([]Added, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "results"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the results of CNI: %w", err)
	}
	if len(entries) > maxResults {
		return nil, fmt.Errorf("read the results of CNI: %d files in %s are more than %d: something does not call DEL", len(entries), dir, maxResults)
	}
	var all []Added
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, "results", e.Name())
		a, mine, err := readAdded(path, containerID, netns)
		if err != nil {
			return nil, fmt.Errorf("read the result of CNI in %s: %w", path, err)
		}
		if mine && a.IfName != "lo" {
			a.Device = a.given.Device(infos)
			all = append(all, a)
		}
	}
	const first = "eth0"
	slices.SortFunc(all, func(a, b Added) int {
		if (a.IfName == first) != (b.IfName == first) {
			if a.IfName == first {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(len(a.IfName), len(b.IfName)), cmp.Compare(a.IfName, b.IfName)) // net2 before net10
	})
	return all, nil
}

// samePlace says whether two paths lead to one file: /var/run is /run at times.
func samePlace(a, b string) bool {
	if a == b {
		return true
	}
	fa, errA := os.Stat(a)
	fb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(fa, fb)
}

// cached gives the network's configuration of a file of libcni's cache; nil where it is none.
func cached(field json.RawMessage) (config []byte) {
	_ = json.Unmarshal(field, &config)
	return config
}

// readAdded reads one file of the cache. What is not of the container is no error.
func readAdded(path, containerID, netns string) (a Added, mine bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return a, false, nil
	}
	if err != nil {
		return a, false, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxResult+1))
	if err != nil || len(b) > maxResult {
		return a, false, err
	}
	var c struct {
		Kind           string          `json:"kind"`
		ContainerID    string          `json:"containerId"`
		IfName         string          `json:"ifName"`
		NetworkName    string          `json:"networkName"`
		NetNS          string          `json:"netns"`
		Config         json.RawMessage `json:"config"`
		CapabilityArgs map[string]any  `json:"capabilityArgs"`
		Result         json.RawMessage `json:"result"`
	}
	if json.Unmarshal(b, &c) != nil || c.ContainerID != containerID || c.Kind != "cniCacheV1" {
		return a, false, nil
	}
	if c.NetNS != "" && !samePlace(c.NetNS, netns) { // libcni before 1.3 does not write it
		return a, false, nil
	}
	var version struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(c.Result, &version); err != nil {
		return a, true, fmt.Errorf("no CNI result: %w", err)
	}
	var result types.Result
	if result, err = create.Create(cmp.Or(version.CNIVersion, "0.1.0"), c.Result); err != nil {
		return a, true, err
	}
	a = Added{Network: c.NetworkName, IfName: c.IfName, CapabilityArgs: c.CapabilityArgs}
	a.given = Attachment{Network: cached(c.Config), ContainerID: containerID, IfName: c.IfName, CapabilityArgs: c.CapabilityArgs}
	a.Result, err = types100.NewResultFromResult(result)
	return a, true, err
}
