package vm

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// podAnnotations is the capability by which containerd gives all annotations of a pod to its networks.
const podAnnotations = "io.kubernetes.cri.pod-annotations"

// FindResults completes c with what libcni's cache in dir knows of a pod's namespace, c.NetNS, and gives the pod's
// annotations as its networks were told. Without results, and where no runtime keeps any, the namespace alone has to do.
func (c *Config) FindResults(dir, podID string) (annotations map[string]string, err error) {
	all, err := cni.AddedBy(dir, podID, c.NetNS, c.deviceInfos())
	if err != nil {
		return nil, err
	}
	annotations = map[string]string{}
	for _, a := range all {
		c.Results = append(c.Results, withDevice(nic.Attachment{Network: a.Network, IfName: a.IfName, Result: a.Result}, a.Device))
		told, _ := a.CapabilityArgs[podAnnotations].(map[string]any)
		for k, v := range told {
			if s, ok := v.(string); ok {
				annotations[k] = s
			}
		}
	}
	return annotations, nil
}

// InNetNS runs do in the network namespace at path, which must not be this process's own. A process that do starts is
// born there.
func InNetNS(path string, do func() error) error {
	if _, err := foreign(path, false); err != nil {
		return err
	}
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(do)
}

// ParseResolvConf reads resolv.conf(5): its servers, without those of a loopback, and its search domains.
func ParseResolvConf(text string) (servers, search []string) {
	d := parseResolvConf(text)
	for _, a := range d.Servers {
		servers = append(servers, a.String())
	}
	return servers, d.Search
}

// ParseMemory reads an amount of memory as people write it (512M, 2Gi), in MiB. M and Mi, G and Gi are the same here, and
// a number alone is of MiB.
func ParseMemory(s string) (int64, error) {
	number, unit := s, int64(1)
	for suffix, n := range map[string]int64{"M": 1, "Mi": 1, "G": 1 << 10, "Gi": 1 << 10} {
		if cut, ok := strings.CutSuffix(s, suffix); ok {
			number, unit = cut, n
		}
	}
	var n int64
	if _, err := fmt.Sscanf(number, "%d", &n); err != nil || n <= 0 || n > 1<<32 || fmt.Sprint(n) != number {
		return 0, fmt.Errorf("%q: use 512Mi, 2Gi or a number of MiB", s)
	}
	return n * unit, nil
}

// RemovePod undoes and erases the VM of a pod whose supervisor has ended. The supervisor may be about to end: its socket
// is closed before its lock. [ErrRunning] when it lives on.
func (s Store) RemovePod(ctx context.Context, name string) error {
	const moment = 3 * time.Second // a manager waits 5 s for what calls this
	if _, err := s.await(ctx, name, moment); err != nil {
		return err
	}
	return s.clean(ctx, name, true, false)
}
