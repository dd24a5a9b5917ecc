package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

func TestMain(m *testing.M) {
	if order := os.Getenv(supervisorEnv); order != "" {
		os.Exit(superviseForTest(order))
	}
	testnet.Isolate(m)
}

// emptyDisk is a guest that does nothing: the firmware finds nothing to boot and idles.
func emptyDisk(t testing.TB) *Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "empty.raw")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return &Disk{Path: path}
}

// needs skips a test that this machine cannot run.
func needs(t testing.TB) {
	t.Helper()
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU: ", err)
	}
}

// testConfig is a small VM on the embedded network.
func testConfig(t testing.TB, s Store, name string) Config {
	t.Helper()
	needs(t)
	nets, err := s.Attachments(NetworkRequest{ConfDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Name: name, CPUs: 1, Memory: 64, Image: emptyDisk(t), Accel: "tcg",
		Networks: nets, Plugins: Plugins{Dirs: []string{testnet.Plugins(t)}}, CNITimeout: 30 * time.Second,
	}
}

// scripted puts a shell script in place of a plugin in front of the real ones.
func scripted(t testing.TB, cfg *Config, plugin, body string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, plugin), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Plugins.Dirs = append([]string{dir}, cfg.Plugins.Dirs...)
}

// machineState is what a VM could leave behind, in words.
func machineState(t testing.TB, s Store) []string {
	t.Helper()
	var all []string
	entries, err := os.ReadDir(netns.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, "namespace "+e.Name())
	}
	for _, root := range []string{s.Run, s.Data} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			// host-local keeps its lock and the last address it gave; libcni keeps its directory.
			if err == nil && !e.IsDir() && !strings.HasPrefix(e.Name(), "last_reserved_ip") && !(e.Name() == "lock" && strings.Contains(path, "/ipam/")) {
				all = append(all, "file "+path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	links, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(links)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			all = append(all, "link "+strings.TrimSpace(name))
		}
	}
	rules, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, rules)
	}
	for line := range strings.Lines(string(rules)) {
		if strings.Contains(line, "dnat") || strings.Contains(line, "10.231.86.") && strings.Contains(line, "saddr") {
			all = append(all, "rule "+strings.TrimSpace(line))
		}
	}
	return append(all, qemus()...)
}

// qemus finds the QEMU processes of this test's node.
func qemus() []string {
	var all []string
	here, _ := os.Readlink("/proc/self/ns/net")
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		ns, _ := os.Readlink(p + "/ns/net")
		b, err := os.ReadFile(p + "/cmdline")
		program, _, _ := strings.Cut(string(b), "\x00")
		if err == nil && ns == here && strings.Contains(filepath.Base(program), "qemu") {
			all = append(all, "process "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return all
}

// nothingLeft compares with what there was; the CNI plugin's own bridge stays. Links go with their namespace, which the
// kernel removes in the background.
func nothingLeft(t testing.TB, s Store, before []string) {
	t.Helper()
	before = slices.DeleteFunc(slices.Clone(before), func(l string) bool { return l == "link virtlet0" })
	var diff string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		after := slices.DeleteFunc(machineState(t, s), func(l string) bool { return l == "link virtlet0" })
		if diff = cmp.Diff(before, after); diff == "" {
			return
		}
	}
	t.Errorf("left behind (-before +after):\n%s", diff)
}

func TestLifeOfAVM(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "life")
	cfg.Networks[0].CapabilityArgs["portMappings"] = []PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	before := machineState(t, s)
	var steps []string
	v, err := Start(context.Background(), s, cfg, func(step, _ string, _ time.Duration, done bool) {
		if done {
			steps = append(steps, step)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(steps)
	if d := cmp.Diff([]string{"attach", "cni virtlet", "dhcp", "disk", "guest", "image", "namespace", "qemu", "seed", "state"}, steps); d != "" {
		t.Errorf("steps: %s", d)
	}
	st, err := s.Get("life")
	if err != nil || st.Status != Running {
		t.Fatalf("state %+v, %v", st, err)
	}
	if len(st.NICs) != 1 || len(st.Leases) != 1 || st.NICs[0].Addrs[0] != st.Leases[0].Addr {
		t.Errorf("NICs %+v, leases %+v", st.NICs, st.Leases)
	}
	if len(st.Leases6) != 1 || st.Leases6[0].Addrs[0] != testnet.Addr(t, st.NICs[0], 6) {
		t.Errorf("IPv6 leases %+v", st.Leases6)
	}
	counters, err := s.Counters("life")
	if err != nil || len(counters) != 1 || counters[0].DHCP == nil || counters[0].IPv6 == nil || len(counters[0].Rules) == 0 {
		t.Errorf("counters %+v, %v", counters, err)
	}
	if _, there := counters[0].Dropped[podnet.SpoofedMAC]; !there {
		t.Errorf("the guest may send from any MAC: %+v", counters[0].Dropped)
	}
	for _, want := range []string{"qemu-system-x86_64", "-sandbox on", st.NICs[0].MAC.String()} {
		if !strings.Contains(st.Command, want) {
			t.Errorf("no %q in the command line %s", want, st.Command)
		}
	}
	proc, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", st.QEMU.PID))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(proc), fmt.Sprintf("Uid:\t%d\t", unprivileged(v.id))) || !strings.Contains(string(proc), "CapEff:\t0000000000000000") {
		t.Errorf("QEMU has privileges:\n%s", proc)
	}
	if _, err := Start(context.Background(), s, cfg, nil); !errors.Is(err, ErrExists) {
		t.Errorf("second start of the same name: %v", err)
	}
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil {
		t.Errorf("gc beside a living VM: %v", err)
	}
	if st, _ := s.Get("life"); st.Status != Running {
		t.Errorf("gc made a living VM %s", st.Status)
	}
	if err := s.Remove(context.Background(), "life", false); !errors.Is(err, ErrRunning) {
		t.Errorf("rm of a running VM: %v", err)
	}
	v.quiet() // as at the beginning of the end
	for end := time.Now().Add(10 * time.Second); !errors.Is(err, ErrStopped) && time.Now().Before(end); time.Sleep(time.Millisecond) {
		_, err = s.Counters("life")
	}
	if !errors.Is(err, ErrStopped) {
		t.Errorf("counters while it ends: %v", err)
	}
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
	end, err := v.Wait()
	if err != nil || end.Reason != Killed {
		t.Errorf("end %+v, %v", end, err)
	}
	if st, _ := s.Get("life"); st.Status != Stopped || st.Exit.Reason != Killed {
		t.Errorf("state after the end: %+v", st)
	}
	if _, err := s.Counters("life"); !errors.Is(err, ErrStopped) {
		t.Errorf("counters after the end: %v", err)
	}
	if err := s.Remove(context.Background(), "life", false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}

func TestQEMUDies(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "dies")
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(v.proc.PID(), unix.SIGSEGV)
	end, err := v.Wait()
	if err != nil || end.Reason != Failed || !strings.Contains(end.Detail, "segmentation") {
		t.Errorf("end %+v, %v", end, err)
	}
	if err := s.Remove(context.Background(), cfg.Name, false); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}

func TestFailuresLeaveNothing(t *testing.T) {
	qcow2 := func(t *testing.T, args ...string) *Disk {
		path := filepath.Join(t.TempDir(), "bad.qcow2")
		base := emptyDisk(t).Path
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "BASE", base)
		}
		out, err := exec.Command("qemu-img", append(append([]string{"create", "-f", "qcow2"}, args...), path)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return &Disk{Path: path}
	}
	cases := map[string]struct {
		spoil func(*testing.T, *Config)
		want  []string
	}{
		"plugin fails": {
			func(t *testing.T, c *Config) {
				scripted(t, c, "bridge", `[ $CNI_COMMAND = DEL ] && exit; echo '{"cniVersion":"1.1.0","code":11,"msg":"no more addresses"}'; exit 1`)
			}, []string{"bridge", "virtlet", "no more addresses"},
		},
		"last plugin of the chain fails": {
			func(t *testing.T, c *Config) { scripted(t, c, "firewall", "[ $CNI_COMMAND = DEL ] || exit 1") },
			[]string{"firewall"},
		},
		"plugin hangs": {
			func(t *testing.T, c *Config) {
				scripted(t, c, "bridge", "[ $CNI_COMMAND = DEL ] || sleep 1000")
				c.CNITimeout = 300 * time.Millisecond
			}, []string{"bridge", "300ms"},
		},
		"plugin prints garbage": {
			func(t *testing.T, c *Config) { scripted(t, c, "bridge", `[ $CNI_COMMAND = DEL ] || echo hello`) },
			[]string{"bridge", "hello"},
		},
		"plugin is missing": {
			func(t *testing.T, c *Config) { c.Plugins.Dirs = []string{"/nonexistent"} },
			[]string{"bridge", "/nonexistent"},
		},
		"QEMU is missing": {
			func(_ *testing.T, c *Config) { c.QEMU = "/nonexistent/qemu" }, []string{"/nonexistent/qemu"},
		},
		"QEMU dies at the start": {
			func(t *testing.T, c *Config) {
				c.QEMU = filepath.Join(t.TempDir(), "qemu")
				if err := os.WriteFile(c.QEMU, []byte("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n"), 0o755); err != nil {
					t.Fatal(err)
				}
				os.Chmod(filepath.Dir(c.QEMU), 0o755)
				os.Chmod(filepath.Dir(filepath.Dir(c.QEMU)), 0o755)
			}, []string{"no such machine"},
		},
		"qemu-img is missing": {
			func(_ *testing.T, c *Config) { c.QEMUImg = "/nonexistent/qemu-img" }, []string{"/nonexistent/qemu-img"},
		},
		"image is missing": {
			func(_ *testing.T, c *Config) { c.Image.Path = "/nonexistent/image" }, []string{"/nonexistent/image"},
		},
		"image is truncated": {
			func(t *testing.T, c *Config) {
				c.Image = qcow2(t, "-o", "size=1M")
				if err := os.Truncate(c.Image.Path, 70); err != nil {
					t.Fatal(err)
				}
			}, []string{"bad.qcow2", "truncated"},
		},
		"image names a backing file": {
			func(t *testing.T, c *Config) { c.Image = qcow2(t, "-b", "BASE", "-F", "raw") },
			[]string{"bad.qcow2", "backing file", "qemu-img convert"},
		},
		"kernel is no kernel": {
			func(_ *testing.T, c *Config) { c.Kernel = "/etc/passwd" }, []string{"/etc/passwd"},
		},
		"KVM is not there": {
			func(t *testing.T, c *Config) {
				if _, err := os.Stat("/dev/kvm"); err == nil {
					t.Skip("this machine has /dev/kvm")
				}
				c.Accel = "kvm"
			}, []string{"--accel auto"},
		},
		"namespace is not there": {
			func(_ *testing.T, c *Config) { c.Networks, c.NetNS = nil, "/run/netns/nonexistent" }, []string{"/run/netns/nonexistent"},
		},
		"no network in the namespace": {
			func(t *testing.T, c *Config) { c.Networks, c.NetNS = nil, testnet.New(t, "bare").Path() }, []string{"no"},
		},
		"bad user-data": {
			func(_ *testing.T, c *Config) { c.UserData = []byte("hello") }, []string{"#cloud-config"},
		},
		"bad SSH key": {
			func(_ *testing.T, c *Config) { c.SSHKeys = []string{"-----BEGIN OPENSSH PRIVATE KEY-----"} }, []string{"SSH"},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s := testStore(t)
			cfg := testConfig(t, s, "fails")
			c.spoil(t, &cfg)
			before := machineState(t, s)
			v, err := Start(context.Background(), s, cfg, nil)
			if err == nil {
				v.Kill()
				v.Wait()
				t.Fatal("it started")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
			nothingLeft(t, s, before)
		})
	}
}

// A plugin that can neither attach nor undo it now can do so later: the attachment is not forgotten.
func TestFailedUndoIsTriedAgain(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "later")
	mark := filepath.Join(t.TempDir(), "undone")
	scripted(t, &cfg, "firewall", `[ $CNI_COMMAND = DEL ] || exit 1
[ -e `+mark+`.ready ] || { echo '{"code":100,"msg":"datastore down"}'; exit 1; }
touch `+mark)
	before := machineState(t, s)
	if v, err := Start(context.Background(), s, cfg, nil); err == nil {
		v.Kill()
		v.Wait()
		t.Fatal("it started")
	} else if !strings.Contains(err.Error(), "datastore down") || !strings.Contains(err.Error(), "virtlet gc") {
		t.Errorf("error %q does not say what failed and what to do", err)
	}
	if st, err := s.Get("later"); err != nil || st.Status != Dead {
		t.Errorf("state %s, %v: it was forgotten", st.Status, err)
	}
	if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err == nil {
		t.Error("gc hides that the plugin still fails")
	}
	if err := os.WriteFile(mark+".ready", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil || len(found) == 0 {
		t.Errorf("gc: %v, %v", found, err)
	}
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("DEL was not called again: %v", err)
	}
	nothingLeft(t, s, before)
}

func TestNoRoomForTheOverlay(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "full")
	if err := os.MkdirAll(s.Data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", s.Data, "tmpfs", 0, "size=48k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(s.Data, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(s.Data, "filler"), make([]byte, 20<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	before := machineState(t, s)
	v, err := Start(context.Background(), s, cfg, nil)
	if err == nil {
		v.Kill()
		v.Wait()
		t.Fatal("it started")
	}
	if !strings.Contains(err.Error(), "space") {
		t.Errorf("error %q does not speak of space", err)
	}
	nothingLeft(t, s, before)
}

func TestCancelledStart(t *testing.T) {
	for _, at := range []string{"namespace", "cni virtlet", "attach", "dhcp", "qemu", "guest"} {
		t.Run(at, func(t *testing.T) {
			s := testStore(t)
			cfg := testConfig(t, s, "cancelled")
			before := machineState(t, s)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			v, err := Start(ctx, s, cfg, func(step, _ string, _ time.Duration, _ bool) {
				if step == at {
					cancel()
				}
			})
			if err == nil {
				t.Error("it runs all the same")
				v.Kill()
				v.Wait()
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v does not say that it was cancelled", err)
			}
			nothingLeft(t, s, before)
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "many")
	before := machineState(t, s)
	var wg sync.WaitGroup
	var mu sync.Mutex
	addrs := map[string]string{}
	for i := range 6 {
		wg.Go(func() {
			c := cfg
			c.Name = fmt.Sprintf("many-%d", i)
			c.Networks = slices.Clone(cfg.Networks)
			v, err := Start(context.Background(), s, c, nil)
			if err != nil {
				t.Error(err)
				return
			}
			st, err := s.Get(c.Name)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			for _, p := range st.NICs[0].Addrs {
				if other := addrs[p.String()]; other != "" {
					t.Errorf("%s and %s both have %s", c.Name, other, p)
				}
				addrs[p.String()] = c.Name
			}
			mu.Unlock()
			v.Kill()
			if end, err := v.Wait(); err != nil || end.Reason != Killed {
				t.Errorf("%s: %+v, %v", c.Name, end, err)
			}
			if err := s.Remove(context.Background(), c.Name, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	nothingLeft(t, s, before)
}

func TestJoinedNamespaceIsGivenBack(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "joined")
	node := testnet.NewNode(t, netip.MustParsePrefix("198.51.100.1/24"))
	pod, _ := node.AddPod(t, testnet.PodSpec{Addrs: []netip.Prefix{netip.MustParsePrefix("198.51.100.2/24")}})
	show := func() string { return pod.MustRun("ip", "-4", "-o", "addr") + pod.MustRun("ip", "route") }
	was, before := show(), machineState(t, s)
	cfg.Networks, cfg.NetNS = nil, pod.Path()
	v, err := Start(context.Background(), s, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	if st, _ := s.Get("joined"); len(st.NICs) != 1 || st.NICs[0].Addrs[0].String() != "198.51.100.2/24" {
		t.Errorf("NICs: %+v", st.NICs)
	}
	second := cfg
	second.Name = "joined-too"
	if v2, err := Start(context.Background(), s, second, nil); err == nil {
		v2.Kill()
		v2.Wait()
		t.Error("two VMs took the same namespace")
	} else if !strings.Contains(err.Error(), "another VM") {
		t.Errorf("second VM in a namespace: %v", err)
	}
	v.Kill()
	if _, err := v.Wait(); err != nil {
		t.Error(err)
	}
	if err := s.Remove(context.Background(), "joined", false); err != nil {
		t.Error(err)
	}
	if now := show(); now != was {
		t.Errorf("before:\n%s\nafter:\n%s", was, now)
	}
	nothingLeft(t, s, before)
}

// supervisorEnv makes the test binary start a VM and kill itself at some point.
const supervisorEnv = "VIRTLET_TEST_SUPERVISOR"

// order is what such a supervisor is to do.
type order struct {
	Store  Store
	Config Config
	At     int // kill yourself at the At-th point of the start; 0: run until you are killed
}

// superviseForTest counts the points of a start: the begin and end of every step, and every entry of the journal whose
// effect has not happened yet. It dies at the one that is asked for, and reports how many there were otherwise.
func superviseForTest(text string) int {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		panic(err)
	}
	var mu sync.Mutex
	points := 0
	point := func() {
		mu.Lock()
		defer mu.Unlock()
		if points++; points == o.At {
			unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	o.Store.recorded = point
	v, err := Start(context.Background(), o.Store, o.Config, func(string, string, time.Duration, bool) { point() })
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(points)
	if o.At > 0 {
		return 0 // not reached; a supervisor that exits is as dead as a killed one
	}
	v.Wait()
	return 0
}

func supervisor(t *testing.T, o order) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), supervisorEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	return cmd
}

func TestKillAtEveryStep(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "killed")
	cfg.Networks[0].CapabilityArgs["portMappings"] = []PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	before := machineState(t, s)
	for at := 1; ; at++ {
		out, err := supervisor(t, order{s, cfg, at}).Output()
		var exit *exec.ExitError
		reached := errors.As(err, &exit) && exit.Sys().(interface{ Signaled() bool }).Signaled()
		if err != nil && !reached {
			t.Fatalf("point %d: %v", at, err)
		}
		// A program that was about to be started has the lock until it is: it lives a moment longer.
		if free, err := s.await(context.Background(), cfg.Name, 30*time.Second); err != nil || !free {
			t.Fatalf("point %d: its lock is held: %v", at, err)
		}
		if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins, DryRun: true}); err != nil {
			t.Errorf("point %d: gc --dry-run: %v", at, err)
		}
		for range 2 {
			if _, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins}); err != nil {
				t.Fatalf("point %d: gc: %v", at, err)
			}
		}
		nothingLeft(t, s, before)
		if t.Failed() {
			t.Fatalf("after a kill at point %d", at)
		}
		if !reached {
			if n, _ := strconv.Atoi(strings.TrimSpace(string(out))); n != at-1 || n < 15 {
				t.Errorf("%s points of a start, %d were tried", out, at-1)
			}
			return
		}
	}
}

func TestSupervisorKilledWhileRunning(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "killed")
	before := machineState(t, s)
	killed(t, s, cfg)
	if st, _ := s.Get(cfg.Name); st.Status != Dead {
		t.Errorf("its state is %s", st.Status)
	}
	if _, err := s.Stop(context.Background(), cfg.Name, time.Second); !errors.Is(err, ErrStopped) || !strings.Contains(err.Error(), "gc") {
		t.Errorf("stop of a dead VM: %v", err)
	}
	found, err := s.Clean(context.Background(), CleanOptions{Plugins: cfg.Plugins, DryRun: true})
	if err != nil || len(found) < 3 {
		t.Errorf("gc --dry-run: %v, %v", found, err)
	}
	if st, _ := s.Get(cfg.Name); st.Status != Dead {
		t.Error("gc --dry-run did something")
	}
	if err := s.Remove(context.Background(), cfg.Name, true); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s, before)
}
