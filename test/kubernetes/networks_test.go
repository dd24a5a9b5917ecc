package kubernetes

import (
	"encoding/json"

	"github.com/virtlet/virtlet/test/guest"
)

// Multus' kind of object, and a network of it.
const networkObjects = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: network-attachment-definitions.k8s.cni.cncf.io}
spec:
  group: k8s.cni.cncf.io
  scope: Namespaced
  names: {plural: network-attachment-definitions, singular: network-attachment-definition, kind: NetworkAttachmentDefinition}
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: virtlet-multus}
handler: virtlet-multus
overhead: {podFixed: {memory: 160Mi, cpu: 100m}}
`

const secondNetwork = `
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata: {name: data}
spec:
  config: '{"cniVersion": "1.0.0", "name": "data", "type": "bridge", "bridge": "data0", "mtu": 1400,
    "ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "192.0.2.128/25"}]]}}'
---
apiVersion: v1
kind: Pod
metadata: {name: two, labels: {app: two}, annotations: {k8s.v1.cni.cncf.io/networks: data}}
spec:
  runtimeClassName: virtlet-multus
  terminationGracePeriodSeconds: 1
  containers:
  - name: vm
    image: ` + guestImage + `
    resources: {limits: {memory: 192Mi}, requests: {cpu: 100m}}
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1, failureThreshold: 300}
`

// networks: a guest has a NIC for each network that Multus attached.
func (c *cluster) networks() {
	c.apply(networkObjects)
	c.kubectl("wait", "--for=condition=Established", "crd/network-attachment-definitions.k8s.cni.cncf.io", "--timeout="+patience.String())
	c.apply(secondNetwork)
	c.kubectl("wait", "--for=condition=Ready", "pod/two", "--timeout="+patience.String())
	// What Multus told the cluster.
	var told []struct {
		Interface string
		IPs       []string
	}
	status := c.kubectl("get", "pod", "two", "-o", `jsonpath={.metadata.annotations.k8s\.v1\.cni\.cncf\.io/network-status}`)
	if err := json.Unmarshal([]byte(status), &told); err != nil || len(told) != 2 {
		c.t.Fatalf("Multus told the cluster of %q, %v", status, err)
	}
	r, ok := guest.ParseReport([]byte(c.kubectl("logs", "two")))
	if !ok || len(r.NICs) != 2 {
		c.t.Fatalf("the guest has %+v", r.NICs)
	}
	for i, mtu := range []int{1430, 1400} {
		if nic := r.NICs[i]; nic.MTU != mtu || len(told[i].IPs) != 1 || nic.DHCP["ip"] != told[i].IPs[0] {
			c.t.Errorf("Multus says %+v, the guest %+v", told[i], nic)
		}
	}
	c.kubectl("delete", "pod", "two", "--timeout="+patience.String())
}
