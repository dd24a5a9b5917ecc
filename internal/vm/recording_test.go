package vm

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/nic"
)

// What was recorded gives the same plan again; nothing of the configuration and of the arguments is in it, nor a name.
func TestRecording(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "webserver")
	conf := strings.Replace(string(cfg.Networks[0].Network), `"type":"bridge"`,
		`"type":"bridge","kubernetes":{"kubeconfig":"/secret/kubeconfig"},"etcd_endpoints":"https://user:secret@etcd.secret.example","k8s_auth_token":"secret-token"`, 1)
	if !strings.Contains(conf, "secret-token") {
		t.Fatalf("no bridge in %s", conf)
	}
	cfg.Networks[0].Network = json.RawMessage(conf)
	cfg.Networks[0].Args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "secret-pod"}}
	cfg.Networks[0].CapabilityArgs["io.kubernetes.cri.pod-annotations"] = map[string]any{"note": "secret-note"}
	cfg.Hostname, cfg.UserData = "secret-host", []byte("#cloud-config\npassword: secret")
	cfg.DNS, cfg.Search = []string{"192.0.2.53"}, []string{"secret.example"}
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	check := func(runs bool) nic.Recording {
		t.Helper()
		r, err := s.Recording("webserver")
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		for _, hidden := range []string{"secret", "webserver", "kubernetes", "etcd", "192.0.2.53", v.id} {
			if strings.Contains(string(b), hidden) {
				t.Errorf("%q is in the recording:\n%s", hidden, b)
			}
		}
		if want := []string{"bridge", "portmap", "bandwidth", "firewall"}; len(r.Attachments) != 1 || !slices.Equal(r.Attachments[0].Plugins, want) {
			t.Fatalf("attachments %+v, want one by %v", r.Attachments, want)
		}
		printed, err := create.CreateFromBytes(r.Attachments[0].Result)
		if err != nil {
			t.Fatal(err)
		}
		result, err := types100.NewResultFromResult(printed)
		if err != nil {
			t.Fatal(err)
		}
		nics, notes, err := nic.Plan([]nic.Attachment{{Network: r.Attachments[0].Network, IfName: r.Attachments[0].IfName, Result: result}}, r.Snapshot)
		if d := cmp.Diff(r.Want, nic.Want{NICs: nics, Notes: notes}, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b nic.NIC) bool {
			x, _ := json.Marshal(a)
			y, _ := json.Marshal(b)
			return string(x) == string(y)
		})); err != nil || d != "" {
			t.Errorf("the plan of the recording: %v\n%s", err, d)
		}
		if runs != (r.Host != nil) {
			t.Errorf("host: %+v", r.Host)
		}
		return r
	}
	host := check(true).Host
	if len(host.Links) != 2 || host.Links[0].PodLink != "eth0" && host.Links[1].PodLink != "eth0" {
		t.Errorf("links of the node: %+v", host.Links)
	}
	end(t, v)
	check(false)
	if err := s.Remove(context.Background(), "webserver", false); err != nil {
		t.Error(err)
	}
	if _, err := s.Recording("webserver"); err == nil {
		t.Error("a recording of no VM")
	}
}

// What a plugin has attached by itself stands between the VM's own networks, and has no plugins that we know of.
func TestRecordingOfDelegates(t *testing.T) {
	s := testStore(t)
	own := func(name, ifName string) cni.Attachment {
		return cni.Attachment{Name: name, IfName: ifName, ContainerID: "x", Network: json.RawMessage(`{"plugins":[{"type":"` + name + `-plugin"}]}`)}
	}
	v := &VM{store: s, cfg: Config{Name: "multus", Networks: []cni.Attachment{own("a", "eth0"), own("b", "eth1")}, Results: []nic.Attachment{
		{Network: "a", IfName: "eth0", Result: &types100.Result{CNIVersion: "1.0.0"}}, {Network: "lan", IfName: "net1"}, {Network: "b", IfName: "eth1"},
	}}}
	if err := os.MkdirAll(s.data("multus"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := v.keepRecording(nic.Snapshot{}, nil, nil); err != nil {
		t.Fatal(err)
	}
	var r nic.Recording
	if err := readJSON(s.data("multus", recordingFile), &r); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, a := range r.Attachments {
		got = append(got, a.Network+" "+strings.Join(a.Plugins, ","))
	}
	if want := []string{"a a-plugin", "lan ", "b b-plugin"}; !slices.Equal(got, want) || r.Attachments[0].Result == nil || r.Attachments[1].Result != nil {
		t.Errorf("attachments %q, want %q: %+v", got, want, r.Attachments)
	}
}
