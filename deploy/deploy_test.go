// Package deploy holds manifests for Kubernetes and the image of the installer; here is what tests them.
package deploy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	yamldocs "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// decode reads every document of a file as the API server does with strict validation: what it does not know is an error.
func decode(t *testing.T, file string, text []byte) []runtime.Object {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, nodev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	strict := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	docs := yamldocs.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	var all []runtime.Object
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if bytes.Contains(doc, []byte("kind: NetworkAttachmentDefinition")) { // Multus's own
			multus(t, file, doc)
			continue
		}
		o, _, err := strict.Decode(doc, nil, nil)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		all = append(all, o)
	}
}

// multus reads a network for Multus: its configuration is one of CNI.
func multus(t *testing.T, file string, doc []byte) {
	t.Helper()
	var n struct {
		Spec struct {
			Config string `json:"config"`
		} `json:"spec"`
	}
	if err := yaml.Unmarshal(doc, &n); err != nil {
		t.Errorf("%s: %v", file, err)
	}
	var c struct{ CNIVersion, Type string }
	if err := json.Unmarshal([]byte(n.Spec.Config), &c); err != nil || c.Type == "" || c.CNIVersion == "" {
		t.Errorf("%s: the network's configuration is %+v, %v", file, c, err)
	}
}

// pods gives the pods of a manifest, also those of a template.
func pods(o runtime.Object) []corev1.PodSpec {
	switch o := o.(type) {
	case *corev1.Pod:
		return []corev1.PodSpec{o.Spec}
	case *appsv1.Deployment:
		return []corev1.PodSpec{o.Spec.Template.Spec}
	case *appsv1.DaemonSet:
		return []corev1.PodSpec{o.Spec.Template.Spec}
	}
	return nil
}

// Every file of the base is in its kustomization and is taken by the API server; the installer runs where VMs are scheduled to, and
// has no privileges but those that it needs.
func TestBase(t *testing.T) {
	var k struct {
		APIVersion string   `json:"apiVersion"`
		Kind       string   `json:"kind"`
		Resources  []string `json:"resources"`
		Images     []struct {
			Name    string `json:"name"`
			NewName string `json:"newName"`
			NewTag  string `json:"newTag"`
		} `json:"images"`
	}
	text, err := os.ReadFile("base/kustomization.yaml")
	if err == nil {
		err = yaml.UnmarshalStrict(text, &k)
	}
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("base/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var there []string
	var all []runtime.Object
	for _, file := range files {
		if name := filepath.Base(file); name != "kustomization.yaml" {
			there = append(there, name)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, decode(t, file, text)...)
		}
	}
	slices.Sort(k.Resources)
	if !slices.Equal(k.Resources, there) {
		t.Errorf("kustomization.yaml has %q, and there are %q", k.Resources, there)
	}
	var class *nodev1.RuntimeClass
	var set *appsv1.DaemonSet
	for _, o := range all {
		switch o := o.(type) {
		case *nodev1.RuntimeClass:
			class = o
		case *appsv1.DaemonSet:
			set = o
		}
	}
	if class == nil || set == nil {
		t.Fatalf("objects %v", all)
	}
	if class.Handler != "virtlet" || class.Overhead.PodFixed.Memory().IsZero() {
		t.Errorf("RuntimeClass %+v", class)
	}
	pod := set.Spec.Template.Spec
	for key, value := range class.Scheduling.NodeSelector {
		if pod.NodeSelector[key] != value {
			t.Errorf("VMs are scheduled to nodes with %s=%s, and the installer to %v", key, value, pod.NodeSelector)
		}
	}
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("the installer has a token, and needs none")
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		s := c.SecurityContext
		if s == nil || s.Privileged != nil || s.ReadOnlyRootFilesystem == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("container %s: %+v", c.Name, s)
		}
		if len(k.Images) != 1 || c.Image != k.Images[0].Name {
			t.Errorf("container %s: image %s is not the one of kustomization.yaml", c.Name, c.Image)
		}
		for _, m := range c.VolumeMounts {
			if m.MountPath != "/host" && !strings.HasPrefix(m.MountPath, "/host/") || m.MountPath == "/host" && !m.ReadOnly {
				t.Errorf("container %s: mount %+v", c.Name, m)
			}
		}
	}
}

// Every sample is taken by the API server, and its pods are VMs: one container each, with the class of the base.
func TestSamples(t *testing.T) {
	files, err := filepath.Glob("samples/*.yaml")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d samples, %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		vms := 0
		for _, o := range decode(t, file, text) {
			for _, spec := range pods(o) {
				vms++
				if spec.RuntimeClassName == nil || *spec.RuntimeClassName != "virtlet" || len(spec.Containers) != 1 || len(spec.InitContainers) != 0 {
					t.Errorf("%s: no pod that is a VM: %+v", file, spec)
				}
				if len(spec.Containers[0].Command) == 0 || spec.Containers[0].Resources.Limits.Memory().IsZero() {
					t.Errorf("%s: the container has no command, or no memory", file)
				}
			}
		}
		if vms == 0 {
			t.Errorf("%s has no VM", file)
		}
	}
}
