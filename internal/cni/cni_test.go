package cni

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

// startCaller starts a process that does nothing but Add, in the namespace of the calling thread. The test ends it.
func startCaller(t testing.TB, r *Runtime, a Attachment) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(call{Runtime{BinDirs: r.BinDirs, CacheDir: r.CacheDir, Timeout: r.Timeout}, a})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), callerEnv+"="+string(b))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

func TestAddConvertsResults(t *testing.T) {
	cases := map[string]struct{ conf, out, want string }{
		"0.3.0": {
			"0.3.0", `{"cniVersion":"0.3.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/x"}],"ips":[{"version":"4","interface":0,"address":"198.51.100.2/24","gateway":"198.51.100.1"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}`,
			`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/x"}],"ips":[{"interface":0,"address":"198.51.100.2/24","gateway":"198.51.100.1"}],"routes":[{"dst":"0.0.0.0/0"}]}`,
		},
		"0.3.1 for 1.0.0":     {"1.0.0", `{"cniVersion":"0.3.1","ips":[{"version":"6","address":"2001:db8::2/64"}]}`, `{"cniVersion":"1.1.0","ips":[{"address":"2001:db8::2/64"}]}`},
		"no version: 0.4.0":   {"0.4.0", `{"ips":[{"version":"4","address":"198.51.100.2/24"}]}`, `{"cniVersion":"1.1.0","ips":[{"address":"198.51.100.2/24"}]}`},
		"1.1.0 fields":        {"1.1.0", `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":1400,"pciID":"0000:01:10.0"}],"routes":[{"dst":"0.0.0.0/0","mtu":1300,"priority":5}]}`, `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":1400,"pciID":"0000:01:10.0"}],"routes":[{"dst":"0.0.0.0/0","mtu":1300,"priority":5}]}`},
		"empty":               {"1.0.0", `{}`, `{"cniVersion":"1.1.0"}`},
		"null":                {"1.0.0", `null`, `{"cniVersion":"1.1.0"}`},
		"only a version":      {"1.1.0", `{"cniVersion":"1.0.0"}`, `{"cniVersion":"1.1.0"}`},
		"indices out of here": {"1.0.0", `{"ips":[{"address":"198.51.100.2/24","interface":7},{"address":"198.51.100.3/24","interface":-1}]}`, `{"cniVersion":"1.1.0","ips":[{"interface":7,"address":"198.51.100.2/24"},{"interface":-1,"address":"198.51.100.3/24"}]}`},
		"null lists":          {"0.3.1", `{"interfaces":null,"ips":null,"routes":null}`, `{"cniVersion":"1.1.0"}`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r := scripted(t, map[string]string{"x": onAdd("cat <<'E'\n" + c.out + "\nE")})
			res, err := r.Add(t.Context(), chain(t, c.conf, "x").Attachment("c1", here, "eth0"))
			if err != nil {
				t.Fatal(err)
			}
			var want *types100.Result
			if err := json.Unmarshal([]byte(c.want), &want); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(asJSON(t, want), asJSON(t, res)); d != "" {
				t.Error(d)
			}
		})
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// recorder keeps what it was called with, one line of environment and one of configuration for each call.
func recorder(log string) string {
	return `printf '%s|%s|%s|%s|%s|' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS" >>` + log + `
cat >>` + log + `; echo >>` + log + `
[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"198.51.100.2/24"}]}'`
}

// recorded gives the calls: the environment, and the configuration without what varies.
func recorded(t *testing.T, log string) []string {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

func TestDelUsesWhatAddUsed(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	r := scripted(t, map[string]string{"x": recorder(log)})
	n, err := Parse("x", []byte(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"x","capabilities":{"portMappings":true},"old":1}]}`))
	if err != nil {
		t.Fatal(err)
	}
	a := n.Attachment("c1", here, "eth0")
	a.Args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "a=b"}}
	a.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 80}}, "bandwidth": "not asked for"}
	if _, err := r.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	// The configuration has changed since, and the arguments are forgotten.
	changed := n.Attachment("c1", here, "eth0")
	changed.Network = json.RawMessage(strings.Replace(string(a.Network), `"old":1`, `"old":2`, 1))
	if err := r.Del(t.Context(), changed); err != nil {
		t.Fatal(err)
	}
	const conf = `{"capabilities":{"portMappings":true},"cniVersion":"1.0.0","name":"net","old":1,` +
		`%s"runtimeConfig":{"portMappings":[{"hostPort":80}]},"type":"x"}`
	const env = `|c1|/proc/self/ns/net|eth0|IgnoreUnknown=1;K8S_POD_NAME=a=b|`
	want := []string{
		"ADD" + env + strings.Replace(conf, "%s", "", 1),
		"DEL" + env + strings.Replace(conf, "%s", `"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"198.51.100.2/24"}]},`, 1),
	}
	if d := cmp.Diff(want, recorded(t, log)); d != "" {
		t.Error(d)
	}
	// Nothing is cached any more: the second DEL works from what it is given.
	if err := r.Del(t.Context(), changed); err != nil {
		t.Fatal(err)
	}
	last := recorded(t, log)[2]
	if !strings.Contains(last, `"old":2`) || strings.Contains(last, "prevResult") {
		t.Errorf("second DEL: %s", last)
	}
}

func TestDelTellsThatTheNamespaceIsGone(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "stale")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"no file": plain + "x", "a plain file": plain, "none": ""} {
		t.Run(name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			r := scripted(t, map[string]string{"x": recorder(log)})
			a := chain(t, "1.0.0", "x").Attachment("c1", path, "eth0")
			if _, err := r.Add(t.Context(), a); err == nil || !strings.Contains(err.Error(), "no network namespace") {
				t.Errorf("ADD: %v", err)
			}
			if err := r.Del(t.Context(), a); err != nil {
				t.Fatal(err)
			}
			if got := recorded(t, log); len(got) != 1 || !strings.HasPrefix(got[0], "DEL|c1||eth0||") {
				t.Errorf("called with %v", got)
			}
		})
	}
}

func TestDelGoesOnAndKeepsTheCache(t *testing.T) {
	dir := t.TempDir()
	log, flag := filepath.Join(dir, "log"), filepath.Join(dir, "broken")
	r := scripted(t, map[string]string{
		"first": "echo first $CNI_COMMAND >>" + log + "\n" + ok,
		"last":  "echo last $CNI_COMMAND >>" + log + "\n" + ok + "\n" + `[ $CNI_COMMAND != DEL ] || ! [ -e ` + flag + ` ] || { echo '{"code":5,"msg":"no iptables"}'; exit 1; }`,
	})
	a := chain(t, "1.0.0", "first", "last").Attachment("c1", here, "eth0")
	if _, err := r.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	write(t, dir, map[string]string{"broken": "x"})
	if err := r.Del(t.Context(), a); err == nil || !strings.Contains(err.Error(), `DEL network "net": plugin "last": no iptables`) {
		t.Errorf("DEL: %v", err)
	}
	if cached, err := r.Cached(); len(cached) != 1 || err != nil {
		t.Errorf("after a failed DEL the cache has %v, %v", cached, err)
	}
	os.Remove(flag)
	for range 2 {
		if err := r.Del(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	if cached, err := r.Cached(); len(cached) != 0 || err != nil {
		t.Errorf("after DEL the cache has %v, %v", cached, err)
	}
	if got := strings.Join(lines(t, log), " "); got != "first ADD last ADD"+strings.Repeat(" last DEL first DEL", 3) {
		t.Errorf("ran %s", got)
	}
	os.Remove(filepath.Join(r.BinDirs[0], "last"))
	os.Remove(log)
	if err := r.Del(t.Context(), a); !errors.Is(err, ErrMissing) {
		t.Errorf("DEL without the plugin: %v", err)
	}
	if got := strings.Join(lines(t, log), " "); got != "first DEL" {
		t.Errorf("ran %s", got)
	}
}

func TestFailedUndoIsReported(t *testing.T) {
	r := scripted(t, map[string]string{"x": `cat >/dev/null; echo "{\"code\":100,\"msg\":\"cannot $CNI_COMMAND\"}"; exit 1`})
	_, err := r.Add(t.Context(), chain(t, "1.0.0", "x").Attachment("c1", here, "eth0"))
	if err == nil || !strings.Contains(err.Error(), "cannot ADD") || !strings.Contains(err.Error(), "cannot DEL") {
		t.Error(err)
	}
}

func TestSecondAddIsRefusedWithoutHarm(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	r := scripted(t, map[string]string{"x": "echo $CNI_COMMAND >>" + log + "\n" + ok})
	a := chain(t, "1.0.0", "x").Attachment("c1", here, "eth0")
	if _, err := r.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Add(t.Context(), a); !errors.Is(err, ErrAttached) {
		t.Errorf("second ADD: %v", err)
	}
	if got := strings.Join(lines(t, log), " "); got != "ADD" {
		t.Errorf("ran %s", got)
	}
}

// libcni's file names are ambiguous: net "net", container "a-b" and net "net-a", container "b" share one.
func TestOtherAttachmentsCacheIsLeftAlone(t *testing.T) {
	r := scripted(t, map[string]string{"x": ok})
	other, err := Parse("x", []byte(`{"cniVersion":"1.0.0","name":"net-a","plugins":[{"type":"x"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Add(t.Context(), other.Attachment("b", here, "eth0")); err != nil {
		t.Fatal(err)
	}
	a := chain(t, "1.0.0", "x").Attachment("a-b", here, "eth0")
	if _, err := r.Add(t.Context(), a); !errors.Is(err, ErrAttached) {
		t.Errorf("ADD over another's cache: %v", err)
	}
	if err := r.Del(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if cached, err := r.Cached(); err != nil || len(cached) != 1 || cached[0].Name != "net-a" {
		t.Errorf("cached: %v, %v", cached, err)
	}
}

func TestTornCache(t *testing.T) {
	r := scripted(t, map[string]string{"x": ok})
	n := chain(t, "1.0.0", "x")
	a, whole := n.Attachment("c1", here, "eth0"), n.Attachment("c2", here, "eth0")
	if _, err := r.Add(t.Context(), whole); err != nil {
		t.Fatal(err)
	}
	write(t, r.CacheDir, map[string]string{"results/net-c1-eth0": `{"kind":"cniCacheV1","contai`})
	cached, err := r.Cached()
	if err == nil || !strings.Contains(err.Error(), "net-c1-eth0") || len(cached) != 1 {
		t.Errorf("cached: %v, %v", cached, err)
	}
	if err := r.Del(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if cached, err = r.Cached(); err != nil || len(cached) != 1 {
		t.Errorf("cached: %v, %v", cached, err)
	}
	// From the cache alone, as `gc` in another process.
	if err := r.Del(t.Context(), cached[0]); err != nil {
		t.Fatal(err)
	}
	if cached, err = r.Cached(); err != nil || len(cached) != 0 {
		t.Errorf("cached: %v, %v", cached, err)
	}
}

func TestUnusableAttachments(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	r := scripted(t, map[string]string{"x": "echo $CNI_COMMAND >>" + log + "\n" + ok})
	cases := map[string]struct {
		spoil func(*Attachment, *Runtime)
		says  string
	}{
		"container ID empty":   {func(a *Attachment, _ *Runtime) { a.ContainerID = "" }, "container ID"},
		"container ID a path":  {func(a *Attachment, _ *Runtime) { a.ContainerID = "../c" }, "container ID"},
		"interface too long":   {func(a *Attachment, _ *Runtime) { a.IfName = "eth0123456789012" }, "interface name"},
		"interface a path":     {func(a *Attachment, _ *Runtime) { a.IfName = "a/b" }, "interface name"},
		"names too long":       {func(a *Attachment, _ *Runtime) { a.ContainerID = strings.Repeat("c", 250) }, "too long"},
		"another network":      {func(a *Attachment, _ *Runtime) { a.Name = "other" }, `of network "net"`},
		"no configuration":     {func(a *Attachment, _ *Runtime) { a.Network = nil }, "unexpected end"},
		"argument in argument": {func(a *Attachment, _ *Runtime) { a.Args = [][2]string{{"A", "1;IgnoreUnknown=1"}} }, "argument"},
		"argument without key": {func(a *Attachment, _ *Runtime) { a.Args = [][2]string{{"", "1"}} }, "argument"},
		"no cache directory":   {func(_ *Attachment, r *Runtime) { r.CacheDir = "" }, "cache directory"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r := *r
			a := chain(t, "1.0.0", "x").Attachment("c1", here, "eth0")
			c.spoil(&a, &r)
			_, err := r.Add(t.Context(), a)
			for verb, err := range map[string]error{"ADD": err, "DEL": r.Del(t.Context(), a), "CHECK": r.Check(t.Context(), a)} {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s: %v, want %q", verb, err, c.says)
				}
			}
		})
	}
	if l := lines(t, log); len(l) != 0 {
		t.Errorf("ran %v", l)
	}
}

func TestAttachmentSurvivesTheDisk(t *testing.T) {
	a := Default(t.TempDir()).Attachment("c1", here, "eth0")
	a.Args = [][2]string{{"A", "1"}}
	a.CapabilityArgs = map[string]any{"mac": "02:00:00:00:00:01"}
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var back Attachment
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(a, back); d != "" {
		t.Error(d)
	}
}

func TestUnsupportedVerbs(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	for version, want := range map[string]string{"0.3.0": "", "0.3.1": "", "0.4.0": "CHECK", "1.0.0": "CHECK", "1.1.0": "CHECK STATUS GC"} {
		os.Remove(log)
		r := scripted(t, map[string]string{"x": "echo $CNI_COMMAND >>" + log + "\n" + ok})
		n := chain(t, version, "x")
		a := n.Attachment("c"+version, here, "eth0")
		if err := r.Check(t.Context(), a); !errors.Is(err, ErrNotAttached) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: CHECK before ADD: %v", version, err)
		}
		if _, err := r.Add(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		for verb, err := range map[string]error{
			"CHECK": r.Check(t.Context(), a), "STATUS": r.Status(t.Context(), n), "GC": r.GC(t.Context(), n, []Attachment{a}),
		} {
			switch has := strings.Contains(want, verb); {
			case has && err != nil:
				t.Errorf("%s: %s: %v", version, verb, err)
			case !has && (!errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), verb)):
				t.Errorf("%s: %s: %v, want it unsupported", version, verb, err)
			}
		}
		if got := strings.Join(lines(t, log), " "); got != strings.TrimSpace("ADD "+want) {
			t.Errorf("%s: ran %s, want ADD %s", version, got, want)
		}
	}
}

func TestFailingVerbs(t *testing.T) {
	r := scripted(t, map[string]string{"x": ok + `; [ $CNI_COMMAND = ADD ] || { echo "{\"code\":50,\"msg\":\"cannot $CNI_COMMAND\"}"; exit 1; }`})
	n := chain(t, "1.1.0", "x")
	a := n.Attachment("c1", here, "eth0")
	if _, err := r.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	for verb, err := range map[string]error{
		"CHECK": r.Check(t.Context(), a), "STATUS": r.Status(t.Context(), n), "GC": r.GC(t.Context(), n, []Attachment{a}), "DEL": r.Del(t.Context(), a),
	} {
		var pe *PluginError
		if !errors.As(err, &pe) || pe.Verb != verb || !strings.Contains(err.Error(), "cannot "+verb) {
			t.Errorf("%s: %v", verb, err)
		}
	}
}

func TestGC(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	r := scripted(t, map[string]string{"x": recorder(log)})
	n := chain(t, "1.1.0", "x")
	var all []Attachment
	for _, id := range []string{"c1", "c2", "c3"} {
		a := n.Attachment(id, here, "eth0")
		if _, err := r.Add(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	elsewhere := all[0]
	elsewhere.Name = "other"
	os.Remove(log)
	if err := r.GC(t.Context(), n, []Attachment{elsewhere, all[1]}); err != nil {
		t.Fatal(err)
	}
	got := recorded(t, log)
	if len(got) != 3 || !strings.HasPrefix(got[0], "DEL|c1|") || !strings.HasPrefix(got[1], "DEL|c3|") || !strings.HasPrefix(got[2], "GC|") {
		t.Fatalf("ran %v", got)
	}
	if want := `"cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]`; !strings.Contains(got[2], want) {
		t.Errorf("GC was told %s, want %s", got[2], want)
	}
	os.Remove(log)
	if err := r.GC(t.Context(), n, nil); err != nil {
		t.Fatal(err)
	}
	if got := recorded(t, log); len(got) != 2 || !strings.Contains(got[1], `"cni.dev/valid-attachments":[]`) {
		t.Errorf("ran %v", got)
	}
	quiet, err := Parse("x", []byte(`{"cniVersion":"1.1.0","name":"net","disableGC":true,"plugins":[{"type":"x"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(log)
	if err := r.GC(t.Context(), quiet, nil); err != nil || len(lines(t, log)) > 0 {
		t.Errorf("disableGC: %v, ran %v", err, lines(t, log))
	}
}
