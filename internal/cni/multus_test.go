package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// kept writes what Multus keeps of container c1 below a directory: its networks, and the results by file name.
func kept(t *testing.T, networks string, results map[string]string) (dir string, a Attachment) {
	t.Helper()
	dir = t.TempDir()
	files := map[string]string{"c1": networks}
	for name, entry := range results {
		files["results/"+name] = entry
	}
	write(t, dir, files)
	n, err := Parse("x", fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"first"},{"type":"multus","cniDir":%q}]}`, dir))
	if err != nil {
		t.Fatal(err)
	}
	return dir, n.Attachment("c1", here, "eth0")
}

func entry(network, ifName, result string) string {
	return fmt.Sprintf(`{"kind":"cniCacheV1","containerId":"c1","ifName":%q,"networkName":%q,"result":%s}`, ifName, network, result)
}

const (
	three = `[{"Conf":{"name":"default"},"ConfList":{"name":"default"}},{"Conf":{"name":"lan","type":"macvlan"},"ConfList":{}},
		{"Conf":{},"ConfList":{"name":"data"},"Name":"ns/other","ifnameRequest":"data0"}]`
	lanResult  = `{"cniVersion":"0.4.0","interfaces":[{"name":"net1","sandbox":"/x"}],"ips":[{"version":"4","address":"10.77.0.2/24"}],"dns":{"nameservers":["10.77.0.1"]}}`
	dataResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"data0","sandbox":"/x"}]}`
)

func TestDelegates(t *testing.T) {
	_, a := kept(t, three, map[string]string{
		"lan-c1-net1": entry("lan", "net1", lanResult), "data-c1-data0": entry("data", "data0", dataResult),
		"default-c1-eth0": entry("default", "eth0", lanResult),
	})
	all, err := a.Delegates(t.TempDir())
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if d := all[0]; d.Network != "lan" || d.IfName != "net1" || d.Result.IPs[0].Address.String() != "10.77.0.2/24" || d.Result.DNS.Nameservers[0] != "10.77.0.1" {
		t.Errorf("%+v", d)
	}
	if d := all[1]; d.Network != "data" || d.IfName != "data0" || d.Result.Interfaces[0].Name != "data0" {
		t.Errorf("%+v", d)
	}
	// A network that is not Multus's has none, whatever is there.
	if all, err := chain(t, "1.0.0", "x").Attachment("c1", here, "eth0").Delegates(t.TempDir()); all != nil || err != nil {
		t.Errorf("%+v, %v", all, err)
	}
}

// What cannot be used is said, and hides nothing else.
func TestUnusableDelegates(t *testing.T) {
	lan := entry("lan", "net1", lanResult)
	many := strings.Repeat(`{"Conf":{"name":"lan"}},`, maxDelegates)
	for name, c := range map[string]struct {
		networks, lan string
		says          string
		others        int // networks that are given all the same
	}{
		"no networks":        {"", lan, "unexpected end", 0},
		"networks no list":   {`{"a":1}`, lan, "cannot unmarshal", 0},
		"too many":           {"[" + many + `{}]`, lan, "at most 64", 0},
		"too much":           {`["` + strings.Repeat("x", maxConfig) + `"]`, lan, "more than", 0},
		"a path for a name":  {strings.Replace(three, `"lan"`, `"../lan"`, 1), lan, "name", 1},
		"no name":            {strings.Replace(three, `"lan"`, `""`, 1), lan, "name", 1},
		"a path for a link":  {strings.Replace(three, `"data0"`, `"../../x"`, 1), lan, "interface name", 1},
		"no result":          {three, entry("lan", "net1", `null`), "printed", 1},
		"result no object":   {three, entry("lan", "net1", `[]`), "cannot be used", 1},
		"result of a future": {three, entry("lan", "net1", `{"cniVersion":"9.9.9"}`), `"9.9.9"`, 1},
		"result with null":   {three, entry("lan", "net1", `{"cniVersion":"1.0.0","ips":[null]}`), "null entry", 1},
		"of another pod":     {three, strings.Replace(lan, `"c1"`, `"c2"`, 1), "another attachment", 1},
		"of another network": {three, entry("lan-c1", "net1", lanResult), "another attachment", 1},
		"of another link":    {three, entry("lan", "net2", lanResult), "another attachment", 1},
		"no cache of libcni": {three, strings.Replace(lan, "cniCacheV1", "other", 1), "another attachment", 1},
		"cache no JSON":      {three, `{"kind":`, "unexpected end", 1},
		"cache too much":     {three, `{"kind":"` + strings.Repeat("x", maxConfig) + `"}`, "more than", 1},
		"no interface made":  {three, entry("lan", "net1", `{"cniVersion":"1.0.0"}`), "", 1},
		"all well":           {three, lan, "", 2},
	} {
		t.Run(name, func(t *testing.T) {
			_, a := kept(t, c.networks, map[string]string{"lan-c1-net1": c.lan, "data-c1-data0": entry("data", "data0", dataResult)})
			all, err := a.Delegates(t.TempDir())
			if len(all) != c.others {
				t.Errorf("%d networks, want %d: %+v", len(all), c.others, all)
			}
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
}

// Files that are no files neither hang nor crash.
func TestDelegatesWithoutFiles(t *testing.T) {
	dir, a := kept(t, three, map[string]string{"other": ""})
	if err := unix.Mkfifo(filepath.Join(dir, "results", "lan-c1-net1"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := a.Delegates(t.TempDir())
	if len(all) != 0 || err == nil || !strings.Contains(err.Error(), "regular file") || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%+v, %v", all, err)
	}
	if err := os.Remove(filepath.Join(dir, "c1")); err != nil {
		t.Fatal(err)
	}
	if all, err := a.Delegates(t.TempDir()); len(all) != 0 || err == nil {
		t.Errorf("%+v, %v", all, err)
	}
	a.ContainerID = "../c1"
	if _, err := a.Delegates(t.TempDir()); err == nil || !strings.Contains(err.Error(), "container ID") {
		t.Error(err)
	}
}
