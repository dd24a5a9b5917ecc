package nic

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var equal = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}

// TestPlanOfRecordedStates runs every file of testdata. A user's state becomes a test when it is put there. Of those
// there, the results are what plugins printed (but cilium, ovs, sriov and unconfigured-link, which are made up after
// their documentation); the links of ptp and bridge are snapshots, those of others composed from what `ip` showed.
func TestPlanOfRecordedStates(t *testing.T) {
	for _, file := range glob(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			r, as := load(t, file)
			nics, notes, err := Plan(as, r.Snapshot)
			if r.WantErr != "" || err != nil {
				wantError(t, err, r.WantErr)
				return
			}
			got := Want{NICs: nics, Notes: notes}
			if diff := cmp.Diff(r.Want, got, equal); diff != "" {
				b, _ := json.Marshal(got)
				t.Errorf("%s\n-want +got:\n%s\ngot, to copy where it is right:\n%s", r.About, diff, b)
			}
		})
	}
}

func glob(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	return files
}

func load(t testing.TB, file string) (Recording, []Attachment) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r Recording
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if r.About == "" || (r.Want.NICs == nil) == (r.WantErr == "") {
		t.Errorf("%s: needs about, and either want.nics or wantErr", file)
	}
	var as []Attachment
	for _, a := range r.Attachments {
		as = append(as, Attachment{Network: a.Network, IfName: a.IfName, Device: a.Device, DeviceType: a.Type, Result: result(t, string(a.Result))})
	}
	return r, as
}

// result reads what a plugin printed, as the caller of the plugin does; empty text is no result.
func result(t testing.TB, text string) *types100.Result {
	t.Helper()
	if text == "" {
		return nil
	}
	r, err := parse(text)
	if err != nil {
		t.Fatalf("result %s: %v", text, err)
	}
	return r
}

func parse(text string) (r *types100.Result, err error) {
	defer func() {
		if p := recover(); p != nil { // the library converts a null entry of an old result by a nil pointer
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

func wantError(t *testing.T, err error, part string) {
	t.Helper()
	switch {
	case part == "":
		t.Errorf("unexpected error: %v", err)
	case err == nil || !strings.Contains(err.Error(), part):
		t.Errorf("error %v, want %q", err, part)
	}
}
