package dhcp

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/virtlet/virtlet/internal/nic"
)

// FuzzResult goes the whole way: what a plugin printed and what the namespace looks like, to NICs, to leases.
func FuzzResult(f *testing.F) {
	files, err := filepath.Glob("../nic/testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatalf("no recorded results: %v", err)
	}
	for _, file := range files {
		var r struct {
			Attachments []struct {
				Result json.RawMessage `json:"result"`
			} `json:"attachments"`
			Snapshot json.RawMessage `json:"snapshot"`
		}
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			f.Fatalf("%s: %v", file, err)
		}
		for _, a := range r.Attachments {
			f.Add(string(a.Result), string(r.Snapshot), "vm-1")
		}
	}
	f.Fuzz(func(t *testing.T, text, namespace, hostname string) {
		r, err := parseResult(text)
		if err != nil {
			return
		}
		var s nic.Snapshot
		if json.Unmarshal([]byte(namespace), &s) != nil {
			return
		}
		nics, _, err := nic.Plan([]nic.Attachment{{Network: "a", IfName: "eth0", Result: r}, {Network: "b", IfName: "net1", Result: r}}, s)
		if err != nil {
			return
		}
		for _, n := range nics {
			checkLease(t, n, hostname)
		}
	})
}

// parseResult reads a plugin's output of any version. The library panics on a null entry of an old one.
func parseResult(text string) (r *types100.Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("convert result: %v", p)
		}
	}()
	version, err := create.DecodeVersion([]byte(text))
	if err != nil {
		return nil, err
	}
	old, err := create.Create(version, []byte(text))
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(old)
}
