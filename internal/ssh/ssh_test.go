package ssh

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestArgs(t *testing.T) {
	l := Login{
		Host: netip.MustParseAddr("2001:db8::2"), Port: 2222, User: "debian", Identities: []string{"a b", "-c"},
		KnownHosts: `/var/l i"b/50%/web/known_hosts`, Alias: "web", Options: []string{"StrictHostKeyChecking=no"},
		Command: []string{"ls", "-l", "/a b"},
	}
	want := []string{
		"ssh", "-l", "debian", "-p", "2222", "-o", "StrictHostKeyChecking=no", "-i", "a b", "-i", "-c",
		"-o", `UserKnownHostsFile="/var/l i\"b/50%%/web/known_hosts"`, "-o", "GlobalKnownHostsFile=none", "-o", "HostKeyAlias=web",
		"-o", "StrictHostKeyChecking=accept-new", "--", "2001:db8::2", "ls", "-l", "/a b",
	}
	if diff := cmp.Diff(want, l.Args()); diff != "" {
		t.Error(diff)
	}
}

// The client understands the command line as it is meant.
func TestClientReadsArgs(t *testing.T) {
	program, err := exec.LookPath("ssh")
	if err != nil {
		t.Skip("needs openssh-client: ", err)
	}
	known := filepath.Join(t.TempDir(), `known 100% "hosts"`)
	key := filepath.Join(t.TempDir(), "the key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := Login{
		Host: netip.MustParseAddr("2001:db8::2"), Port: 2222, User: "ubuntu", Identities: []string{key}, KnownHosts: known, Alias: "web",
		Options: []string{"ConnectTimeout=7"}, Command: []string{"-x"},
	}
	cmd := exec.Command(program, append([]string{"-G", "-F", "none"}, l.Args()[1:]...)...) // -G prints the configuration
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{
		"host 2001:db8::2", "user ubuntu", "port 2222", "identityfile " + key, "userknownhostsfile " + known, "globalknownhostsfile none",
		"hostkeyalias web", "stricthostkeychecking accept-new", "connecttimeout 7",
	} {
		if !strings.Contains("\n"+string(out), "\n"+want+"\n") {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestCheckUser(t *testing.T) {
	for _, name := range []string{"debian", "core", "a.b-c_d", "user@realm", `übung`} {
		if err := CheckUser(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "-oProxyCommand=x", "a b", "a\n", "$(id)", "a;b", strings.Repeat("a", 256)} {
		if CheckUser(name) == nil {
			t.Errorf("%q is taken", name)
		}
	}
}
