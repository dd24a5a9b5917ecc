package cni

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestAddedBy(t *testing.T) {
	const id, ns = "5f0c", "/run/netns/cni-1"
	entry := func(id, ns, ifName, result string) string {
		return `{"kind":"cniCacheV1","containerId":"` + id + `","ifName":"` + ifName + `","networkName":"blue","netns":"` + ns +
			`","capabilityArgs":{"io.kubernetes.cri.pod-annotations":{"virtlet.cloud/cpus":"2"}},"result":` + result + `}`
	}
	const result = `{"cniVersion":"0.4.0","ips":[{"version":"4","address":"192.0.2.7/24","gateway":"192.0.2.1"}]}`
	tests := []struct {
		name  string
		files map[string]string
		want  []string
		err   string
	}{
		{"none", nil, nil, ""},
		{"by content, in order", map[string]string{
			"blue-x-1": entry(id, ns, "net10", result), "blue-x-2": entry(id, ns, "net2", result), "zzz": entry(id, ns, "eth0", result),
			"cni-loopback-5f0c-lo": entry(id, ns, "lo", result),
		}, []string{"eth0", "net2", "net10"}, ""},
		{"an old libcni's without a namespace", map[string]string{"a": entry(id, "", "eth0", result)}, []string{"eth0"}, ""},
		{"others'", map[string]string{
			"blue-5f0c-eth0": entry("5f0d", ns, "eth0", result), "b": entry(id, "/run/netns/cni-2", "eth0", result),
			"c": "{", "d": `"text"`, "e": strings.Repeat(" ", maxResult+1), "f": `{"kind":"x","containerId":"5f0c"}`,
		}, nil, ""},
		{"no result", map[string]string{"a": entry(id, ns, "eth0", `7`)}, nil, "no CNI result"},
		{"a version of tomorrow", map[string]string{"a": entry(id, ns, "eth0", `{"cniVersion":"9.0.0"}`)}, nil, "9.0.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.files != nil {
				if err := os.Mkdir(filepath.Join(dir, "results"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for name, content := range tt.files {
				if err := os.WriteFile(filepath.Join(dir, "results", name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			all, err := AddedBy(dir, id, ns, t.TempDir())
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			var names []string
			for _, a := range all {
				names = append(names, a.IfName)
				if len(a.Result.IPs) != 1 || a.Result.IPs[0].Address.String() != "192.0.2.7/24" || a.CapabilityArgs == nil {
					t.Errorf("%+v", a)
				}
			}
			if !slices.Equal(names, tt.want) {
				t.Errorf("got %v, want %v", names, tt.want)
			}
		})
	}
}
