package lab

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// cluster is an API server on a node's loopback: as much of one as meta-plugins ask for. It knows pods by their
// annotations, and NetworkAttachmentDefinitions; all is in the namespace "default".
type cluster struct {
	kubeconfig string // a file

	mu       sync.Mutex
	pods     map[string]map[string]string // annotations by name
	networks map[string]string            // spec.config by name
	status   map[string][]byte            // what was last put, by pod: JSON or protobuf
	events   int
}

// newCluster makes a cluster that ends with the test. A request that it does not know fails the test.
func newCluster(t *testing.T, n *node) *cluster {
	t.Helper()
	c := &cluster{
		kubeconfig: filepath.Join(n.dir, "kubeconfig"),
		pods:       map[string]map[string]string{}, networks: map[string]string{}, status: map[string][]byte{},
	}
	const pod = "/api/v1/namespaces/default/pods/{name}"
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pod, func(w http.ResponseWriter, r *http.Request) {
		c.answer(w, "v1", "Pod", r.PathValue("name"), c.pod(r.PathValue("name")))
	})
	mux.HandleFunc("PUT "+pod+"/status", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		c.mu.Lock()
		c.status[r.PathValue("name")] = b
		c.mu.Unlock()
		c.answer(w, "v1", "Pod", r.PathValue("name"), c.pod(r.PathValue("name")))
	})
	mux.HandleFunc("POST /api/v1/namespaces/default/events", func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.events++
		c.mu.Unlock()
		c.answer(w, "v1", "Event", "one", map[string]any{})
	})
	mux.HandleFunc("GET /apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions/{name}", func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		config, ok := c.networks[r.PathValue("name")]
		c.mu.Unlock()
		var fields map[string]any
		if ok {
			fields = map[string]any{"spec": map[string]any{"config": config}}
		}
		c.answer(w, "k8s.cni.cncf.io/v1", "NetworkAttachmentDefinition", r.PathValue("name"), fields)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("the API server was asked %s %s, which it does not know", r.Method, r.URL)
		c.answer(w, "", "", r.URL.Path, nil)
	})
	var l net.Listener
	n.Must(func() (err error) { l, err = net.Listen("tcp", "127.0.0.1:0"); return err })
	server := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	config := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"lab",
		"clusters":[{"name":"lab","cluster":{"server":"http://%s"}}],"contexts":[{"name":"lab","context":{"cluster":"lab"}}]}`, l.Addr())
	if err := os.WriteFile(c.kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// pod gives the fields of a pod, or nil.
func (c *cluster) pod(name string) map[string]any {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pods[name] == nil {
		return nil
	}
	return map[string]any{"metadata": map[string]any{"name": name, "namespace": "default", "uid": "uid-" + name, "annotations": c.pods[name]}}
}

// answer writes an object, or that there is none.
func (c *cluster) answer(w http.ResponseWriter, version, kind, name string, fields map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	object := map[string]any{"apiVersion": version, "kind": kind, "metadata": map[string]any{"name": name, "namespace": "default"}}
	for k, v := range fields {
		object[k] = v
	}
	if fields == nil {
		w.WriteHeader(http.StatusNotFound)
		object = map[string]any{
			"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound", "code": http.StatusNotFound, "message": name + " not found",
		}
	}
	json.NewEncoder(w).Encode(object)
}

// args registers a pod with annotations, and gives the CNI_ARGS by which a runtime names it.
func (c *cluster) args(name string, annotations map[string]string) [][2]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods[name] = annotations
	return [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", "uid-" + name}}
}

// reported gives the interfaces that the pod's status names, in its order.
func (c *cluster) reported(name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []string
	for _, m := range regexp.MustCompile(`"interface": *"([^"]+)"`).FindAllSubmatch(c.status[name], -1) {
		all = append(all, string(m[1]))
	}
	return strings.Join(all, " ")
}
