package shim

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// bundle is what a manager says of one container: its config.json.
type bundle struct {
	dir  string
	spec specs.Spec
}

// The annotations by which containerd and CRI-O say what a container is. Those of CRI-O come second.
var (
	sandboxID        = []string{"io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"}
	containerType    = []string{"io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"}
	sandboxName      = []string{"io.kubernetes.cri.sandbox-name", "io.kubernetes.cri-o.KubeName"}
	sandboxNamespace = []string{"io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri-o.Namespace"}
)

func readBundle(dir string) (*bundle, error) {
	b := &bundle{dir: dir}
	f, err := os.Open(filepath.Join(dir, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the bundle: %w", err)
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxInput)).Decode(&b.spec); err != nil {
		return nil, fmt.Errorf("read the bundle: %s: %w", f.Name(), err)
	}
	if b.spec.Linux == nil {
		b.spec.Linux = &specs.Linux{}
	}
	return b, nil
}

func (b *bundle) annotation(keys []string) string {
	for _, k := range keys {
		if v := b.spec.Annotations[k]; v != "" {
			return v
		}
	}
	return ""
}

// sandbox gives the id of the pod, and whether the bundle is that of the pod itself.
func (b *bundle) sandbox() (id string, itself bool, err error) {
	id = b.annotation(sandboxID)
	switch kind := b.annotation(containerType); {
	case id == "" || kind == "":
		return "", false, errors.New("the container is of no pod: this runtime serves Kubernetes' pods alone (for a VM without Kubernetes: virtlet run)")
	case kind == "sandbox":
		return id, true, nil
	case kind == "container":
		return id, false, nil
	default:
		return "", false, fmt.Errorf("container type %q: want sandbox or container", kind)
	}
}

// pod gives the pod's namespace and name.
func (b *bundle) pod() string {
	return b.annotation(sandboxNamespace) + "/" + b.annotation(sandboxName)
}

// netns gives the path of the pod's network namespace.
func (b *bundle) netns() (string, error) {
	for _, n := range b.spec.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace && n.Path != "" {
			return n.Path, nil
		}
	}
	return "", errors.New("the pod has no network namespace of its own: a VM cannot have the node's (hostNetwork: true)")
}

// mounted gives where a file of the container comes from, "" if nothing is mounted there.
func (b *bundle) mounted(destination string) string {
	for _, m := range b.spec.Mounts {
		if m.Destination == destination {
			return m.Source
		}
	}
	return ""
}

// ours are the annotations of this project, in config.json.
func (b *bundle) ours() map[string]string {
	mine := map[string]string{}
	for k, v := range b.spec.Annotations {
		if strings.HasPrefix(k, prefix) {
			mine[k] = v
		}
	}
	return mine
}

var hexID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// vmName gives the name of a pod's VM: as much of the pod's id as tells it apart and people can still read. Both managers
// make ids of 32 random bytes; any other is hashed.
func vmName(namespace, sandbox string) string {
	if !hexID.MatchString(sandbox) {
		sum := sha256.Sum256([]byte(namespace + "/" + sandbox))
		sandbox = hex.EncodeToString(sum[:])
	}
	const enough = 20
	return "pod-" + sandbox[:enough]
}
