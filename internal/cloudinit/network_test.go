package cloudinit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gopkg.in/yaml.v3"

	"github.com/virtlet/virtlet/internal/nic"
)

func TestNewNetworkRefuses(t *testing.T) {
	for name, c := range netCases {
		_, _, err := NewNetwork(V1, c.interfaces)
		if c.refusesV1 != errors.Is(err, ErrOnLink) || c.refusesV1 != (err != nil) {
			t.Errorf("%s: %v", name, err)
		}
		for _, v := range []Version{V2, InUserData} {
			if _, _, err := NewNetwork(v, c.interfaces); err != nil {
				t.Errorf("%s: %s: %v", name, v, err)
			}
		}
	}
	_, _, err := NewNetwork(V1, netCases["calico-dual"].interfaces)
	if want := "eth0: the route to 169.254.1.1/32 needs 169.254.1.1/32 on the link: " + ErrOnLink.Error(); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if _, _, err := NewNetwork("v3", nil); err == nil || !strings.Contains(err.Error(), "use v1, v2 or user-data") {
		t.Error(err)
	}
	n, _, err := NewNetwork(V2, netCases["plain-dual"].interfaces)
	if err != nil {
		t.Fatal(err)
	}
	s := seed()
	s.Kind, s.Network = ConfigDrive, n
	if _, err := s.Files(); err == nil || !strings.Contains(err.Error(), "network_data.json") {
		t.Errorf("version 2 in a ConfigDrive: %v", err)
	}
	s = seed()
	s.Kind = "floppy"
	if _, err := s.Files(); err == nil || !strings.Contains(err.Error(), "use nocloud or configdrive") {
		t.Error(err)
	}
}

func TestNotes(t *testing.T) {
	n := nic.NIC{
		Addrs:  prefixes("10.1.0.5/24"),
		Routes: routes("10.2.0.0/16 via 10.1.0.1 mtu 1400 src 10.1.0.5", "2001:db8::/32 via fe80::1"),
		DNS:    nic.DNS{Search: []string{"good.example.", "$(reboot)", "a b", "good.example"}, Options: []string{"ndots:5"}},
	}
	_, v1, err := NewNetwork(V1, static(n))
	if err != nil {
		t.Fatal(err)
	}
	_, v2, err := NewNetwork(V2, static(n))
	if err != nil {
		t.Fatal(err)
	}
	both := []string{
		"eth0: the route to 2001:db8::/32 is left out: the guest has no address of its family",
		`eth0: search domain "$(reboot)" is no valid name, it is left out`,
		`eth0: search domain "a b" is no valid name, it is left out`,
		`eth0: cloud-init carries no resolver options, ["ndots:5"] are left out`,
	}
	if d := cmp.Diff(both, v2); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(append(both, "eth0: the MTU and the source address of the route to 10.2.0.0/16 are left out: version 1 has no words for them"), v1); d != "" {
		t.Error(d)
	}
}

func TestGuestNames(t *testing.T) {
	tests := []struct{ in, want []string }{
		{[]string{"eth0", "net1", "net2"}, []string{"eth0", "net1", "net2"}},
		{[]string{"eth1", "eth0; reboot", "eth0", "eth0"}, []string{"eth1", "eth2", "eth0", "eth3"}},
		{[]string{"", "lo", "a:1", "1a", "sixteen-letters-", "all", "ä", "..", "a\nb"}, []string{"eth0", "eth1", "eth2", "eth3", "eth4", "eth5", "eth6", "eth7", "eth8"}},
		{[]string{"ens1f0v3", "a.b_c-d"}, []string{"ens1f0v3", "a.b_c-d"}},
	}
	for _, tt := range tests {
		var in []Interface
		for _, n := range tt.in {
			in = append(in, Interface{NIC: nic.NIC{Name: n}})
		}
		if d := cmp.Diff(tt.want, guestNames(in)); d != "" {
			t.Errorf("%q: %s", tt.in, d)
		}
	}
}

// bootHookLine is all that a boot hook may say beside its fixed parts.
var bootHookLine = regexp.MustCompile(`^(nic [0-9a-f:]{17} [A-Za-z][A-Za-z0-9_.-]* -?[0-9]+|addr [0-9a-f.:/]+|route [0-9a-f.:/]+( (via|metric|mtu|src) [0-9a-f.:]+| onlink)*|` +
	`servers="\$servers [0-9a-f.: ]*" search="\$search [A-Za-z0-9_. -]*")?\n$`)

// FuzzNetwork puts texts from outside into every place that has one, and reads the files as YAML, which is what
// cloud-init does. What is written has the texts that are fit and no others, and no key that was not meant.
func FuzzNetwork(f *testing.F) {
	f.Add("eth0", "example.org", "a.example", "web", uint32(0), int64(1500))
	f.Add("eth0\"}: reboot", "{{x}}", "a: b", "web\n", uint32(1024), int64(-1))
	f.Add("$(reboot)", "`reboot`", "a\nruncmd: [reboot]", "x", uint32(4294967295), int64(65521))
	f.Fuzz(func(t *testing.T, name, domain, search, host string, metric uint32, mtu int64) {
		n := plain
		n.Name, n.MTU, n.DNS.Domain, n.DNS.Search = name, int(mtu), domain, []string{search, domain}
		n.Routes = append(routes(fmt.Sprintf("10.9.0.0/16 via 10.244.1.9 metric %d", metric)), n.Routes...)
		for _, form := range []form{forms["v1"], forms["v2"], forms["network-data"], {version: InUserData, kind: NoCloud}} {
			network, _, err := NewNetwork(form.version, static(n))
			if err != nil {
				t.Fatal(err)
			}
			s := Seed{Kind: form.kind, InstanceID: "i", Hostname: host, Network: network, EveryBoot: true}
			files, err := s.Files()
			if err != nil {
				if CheckHostname(host) == nil {
					t.Fatal(err)
				}
				continue
			}
			if form.version == InUserData {
				ours := strings.TrimSuffix(strings.TrimPrefix(string(network.bootHook()), bootHookStart), bootHookEnd)
				for line := range strings.Lines(ours) {
					if !bootHookLine.MatchString(line) {
						t.Errorf("in the boot hook: %q", line)
					}
				}
				continue
			}
			for file, b := range files {
				var fromYAML, fromJSON any
				if err := yaml.Unmarshal(b, &fromYAML); err != nil {
					t.Fatalf("%s: %v\n%s", file, err, b)
				}
				if strings.HasPrefix(string(b), "#cloud-config") {
					continue
				}
				if err := json.Unmarshal(b, &fromJSON); err != nil {
					t.Fatalf("%s: %v\n%s", file, err, b)
				}
				if d := cmp.Diff(texts(fromJSON), texts(fromYAML)); d != "" {
					t.Errorf("%s reads otherwise as YAML:\n%s", file, d)
				}
			}
			for _, s := range texts(network.v2()) {
				if !tame(s) {
					t.Errorf("%s: the text %q reaches the guest's files", form.version, s)
				}
			}
		}
	})
}

// texts gives all keys and values of a document, sorted.
func texts(v any) (all []string) {
	b, err := json.Marshal(v)
	if err != nil {
		return []string{err.Error()}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	for {
		tok, err := d.Token()
		if err != nil {
			slices.Sort(all)
			return all
		}
		all = append(all, fmt.Sprint(tok))
	}
}

// tame says whether a text is an address, a name, a number or a key.
func tame(s string) bool {
	_, err1 := netip.ParsePrefix(s)
	_, err2 := netip.ParseAddr(s)
	_, err3 := nic.ParseMAC(s)
	return err1 == nil || err2 == nil || err3 == nil || nameForm.MatchString(s) || domainForm.MatchString(s) || strings.ContainsAny(s, "{}[]") && len(s) == 1 ||
		strings.TrimLeft(s, "-0123456789") == ""
}

func TestConfigDrive(t *testing.T) {
	s := seed()
	s.Kind, s.EveryBoot = ConfigDrive, true
	var err error
	if s.Network, _, err = NewNetwork(V1, netCases["vf-beside-dhcp"].interfaces); err != nil {
		t.Fatal(err)
	}
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	const dir = "openstack/latest/"
	if len(files) != 4 || !bytes.Equal(files[dir+"user_data"], s.UserData) {
		t.Errorf("files %q", files)
	}
	var meta, vendor map[string]any
	if err := errors.Join(json.Unmarshal(files[dir+"meta_data.json"], &meta), json.Unmarshal(files[dir+"vendor_data.json"], &vendor)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]any{"uuid": s.InstanceID, "hostname": s.Hostname, "name": s.Hostname, "public_keys": map[string]any{"key0": s.SSHKeys[0]}}, meta); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string]any{"cloud-init": everyBoot}, vendor); d != "" {
		t.Error(d)
	}
}

// TestRealCloudInitReadsTheDrive has cloud-init's own reader read a ConfigDrive.
func TestRealCloudInitReadsTheDrive(t *testing.T) {
	debian(t)
	s := seed()
	s.Kind, s.EveryBoot = ConfigDrive, true
	var err error
	if s.Network, _, err = NewNetwork(V1, netCases["plain-dual"].interfaces); err != nil {
		t.Fatal(err)
	}
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	out := python(t, nil, "-c", `import json, sys
from cloudinit import sources
from cloudinit.sources.DataSourceConfigDrive import read_config_drive
r = read_config_drive(sys.argv[1])
print(json.dumps([r["metadata"]["instance-id"], r["metadata"]["local-hostname"], list(r["metadata"]["public_keys"].values()),
	r["userdata"].decode(), sources.convert_vendordata(r["vendordata"]), len(r["networkdata"]["networks"])]))`, dir)
	var got []any
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err, out)
	}
	want := []any{s.InstanceID, s.Hostname, []any{s.SSHKeys[0]}, string(s.UserData), everyBoot, 2.0}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestRealCloudInitAcceptsConfigs asks cloud-init's schema about the cloud-configs of ours.
func TestRealCloudInitAcceptsConfigs(t *testing.T) {
	d := debian(t)
	for name, text := range map[string]string{"empty user-data": emptyUserData, "vendor-data": everyBoot, "control": "#cloud-config\nupdates: {network: {when: [never]}}\n"} {
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("python3", filepath.Join(d, "usr/bin/cloud-init"), "schema", "--config-file", path)
		cmd.Env = append(os.Environ(), "PYTHONPATH="+filepath.Join(d, "usr/lib/python3/dist-packages"), "PYTHONDONTWRITEBYTECODE=1")
		if out, err := cmd.CombinedOutput(); (err == nil) != (name != "control") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// TestWithBootHook reads the message back as a mail program does, and as cloud-init does.
func TestWithBootHook(t *testing.T) {
	n, _, err := NewNetwork(InUserData, netCases["ptp"].interfaces)
	if err != nil {
		t.Fatal(err)
	}
	hook := string(n.bootHook())
	message := "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n--x\nContent-Type: text/cloud-config\n\n#cloud-config\n{}\n--x--\n"
	for name, tt := range map[string]struct {
		user  string
		kinds string // of the parts, to cloud-init
	}{
		"cloud-config": {"#cloud-config\npackages: [nginx]\n# ä\n", "text/cloud-boothook text/cloud-config"},
		"script":       {"#!/bin/sh\ntrue\n", "text/cloud-boothook text/x-shellscript"},
		"jinja":        {"## template: jinja\n#cloud-config\n{}\n", "text/cloud-boothook text/jinja2"},
		"packed":       {pack(t, "#!/bin/sh\ntrue\n"), "text/cloud-boothook text/x-shellscript"},
		"message":      {message, "text/cloud-boothook text/cloud-config"},
	} {
		t.Run(name, func(t *testing.T) {
			s := seed()
			s.Network, s.UserData = n, []byte(tt.user)
			files, err := s.Files()
			if err != nil {
				t.Fatal(err)
			}
			b := files["user-data"]
			if err := CheckUserData(b); err != nil || files["network-config"] != nil {
				t.Errorf("%v, files %q", err, files)
			}
			m, err := mail.ReadMessage(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			_, params, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
			if err != nil {
				t.Fatal(err)
			}
			parts := 0
			for r := multipart.NewReader(m.Body, params["boundary"]); ; parts++ {
				if _, err := r.NextPart(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if parts != 2 {
				t.Errorf("%d parts", parts)
			}
			out := python(t, b, "-c", `import json, sys
from cloudinit import helpers, user_data
msg = user_data.UserDataProcessor(helpers.Paths({})).process(sys.stdin.buffer.read())
print(json.dumps([[p.get_content_type(), p.get_payload(decode=True).decode()] for p in msg.walk() if not p.is_multipart()]))`)
			var read [][2]string
			if err := json.Unmarshal([]byte(out), &read); err != nil {
				t.Fatal(err, out)
			}
			var kinds []string
			for _, p := range read {
				kinds = append(kinds, p[0])
			}
			if got := strings.Join(kinds, " "); got != tt.kinds || read[0][1] != hook {
				t.Errorf("cloud-init reads %s, want %s\n%s", got, tt.kinds, read[0][1])
			}
		})
	}
	s := seed()
	s.Network, s.UserData = n, []byte("#!/bin/sh\necho --"+boundary+"\n")
	if _, err := s.Files(); err != nil {
		t.Errorf("what is encoded cannot end its part: %v", err)
	}
	s.UserData = []byte(message + "--" + boundary + "--\n")
	if _, err := s.Files(); err == nil || !strings.Contains(err.Error(), boundary) {
		t.Errorf("a message that ends its part: %v", err)
	}
}
