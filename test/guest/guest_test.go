package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kdomanski/iso9660"
)

func TestParseReport(t *testing.T) {
	report := func(body string) string { return begin + "\r\n" + body + "\r\n" + end + "\r\n" }
	tests := map[string]struct {
		console string
		want    string // hostname; empty: no report
	}{
		"nothing":                  {console: ""},
		"boot messages only":       {console: "[    0.0] Linux version\r\n"},
		"not yet complete":         {console: begin + "\r\n{\"hostname\":\"a\""},
		"end without begin":        {console: "{\"hostname\":\"a\"}\r\n" + end},
		"one":                      {console: "x\r\n" + report(`{"hostname":"a"}`), want: "a"},
		"the last of two":          {console: report(`{"hostname":"a"}`) + "guest# " + report(`{"hostname":"b"}`), want: "b"},
		"the last complete one":    {console: report(`{"hostname":"a"}`) + begin + "\r\n{\"host", want: "a"},
		"the last undisturbed one": {console: report(`{"hostname":"a"}`) + report("{\"host[   5.1] oops\r\n"), want: "a"},
		"begins twice":             {console: begin + "\r\n{\"hos\r\n" + report(`{"hostname":"b"}`), want: "b"},
		"a command in the way":     {console: "guest# report\r\n" + report(`{"hostname":"a"}`) + "guest# ", want: "a"},
		"no address in addrs":      {console: report(`{"hostname":"a","nics":[{"addrs":["10.0.0.300/8"]}]}`)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r, ok := ParseReport([]byte(tt.console))
			if r.Hostname != tt.want || ok != (tt.want != "") {
				t.Errorf("got %q, %t; want %q", r.Hostname, ok, tt.want)
			}
		})
	}
}

// patience bounds each wait for a guest, which boots in 3 s under emulation when the machine is idle.
const patience = 120 * time.Second

// vm is a guest under QEMU. Its network is QEMU's own, inside QEMU, with no way out.
type vm struct {
	t       *testing.T
	console net.Conn
	monitor net.Conn
	exited  chan struct{}
	err     error // of QEMU, once exited is closed

	commands int // typed on the console
	ended    int // bytes that were printed when the last of them had ended

	mu  sync.Mutex
	out bytes.Buffer
	new chan struct{} // has one element when out has grown
}

// start boots a guest with more arguments for the kernel and for QEMU.
func start(t *testing.T, cmdline string, args ...string) *vm {
	t.Helper()
	return startWith(t, nil, cmdline, args...)
}

// startWith is start with files that QEMU inherits, as descriptors from 3 on.
func startWith(t *testing.T, files []*os.File, cmdline string, args ...string) *vm {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("boots under qemu-system-x86_64 only")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64: run `make setup`")
	}
	kernel, initrd, base := Artifacts(t)
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	v := &vm{t: t, exited: make(chan struct{}), new: make(chan struct{}, 1)}
	listeners := map[string]*net.UnixListener{}
	for _, name := range []string{"console", "monitor"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		listeners[name] = l
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256",
		"-kernel", kernel, "-initrd", initrd, "-append", base + " " + cmdline,
		"-chardev", "socket,id=console,path=" + filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-chardev", "socket,id=monitor,path=" + filepath.Join(dir, "monitor"), "-mon", "chardev=monitor,mode=control",
	}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr, cmd.ExtraFiles = &stderr, files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.exited)
		if err := cmd.Wait(); err != nil {
			v.err = fmt.Errorf("%w: %s", err, stderr.String())
		}
		for _, l := range listeners {
			l.Close() // nobody will come any more
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-v.exited
		if t.Failed() {
			t.Logf("console:\n%s", v.printed())
		}
	})
	for name, conn := range map[string]*net.Conn{"console": &v.console, "monitor": &v.monitor} {
		c, err := listeners[name].Accept()
		if err != nil {
			t.Fatalf("wait for QEMU's %s: %v\n%s", name, err, stderr.String())
		}
		t.Cleanup(func() { c.Close() })
		*conn = c
	}
	go v.read()
	v.qmp("qmp_capabilities")
	return v
}

// read collects what the console prints until QEMU closes it.
func (v *vm) read() {
	buf := make([]byte, 4096)
	for {
		n, err := v.console.Read(buf)
		v.mu.Lock()
		v.out.Write(buf[:n])
		v.mu.Unlock()
		select {
		case v.new <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (v *vm) printed() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.out.String()
}

// await waits until the console has printed, after its first skip bytes, what accept wants.
func (v *vm) await(what string, skip int, accept func(string) bool) {
	v.t.Helper()
	timeout := time.After(patience)
	for !accept(v.printed()[skip:]) {
		select {
		case <-v.new:
		case <-v.exited:
			v.t.Fatalf("wait for %s: QEMU ended: %v", what, v.err)
		case <-timeout:
			v.t.Fatalf("wait for %s: not there after %v", what, patience)
		}
	}
}

// report waits for a report that is printed after the first skip bytes.
func (v *vm) report(skip int) Report {
	v.t.Helper()
	var r Report
	v.await("a report", skip, func(s string) (ok bool) { r, ok = ParseReport([]byte(s)); return ok })
	return r
}

const prompt = "guest# "

// shell types a command at the next prompt, for what is typed before it is echoed before it, and gives what it prints.
// The end is marked, for a prompt is no mark: a report that a signal asked for may come after it.
func (v *vm) shell(command string) string {
	v.t.Helper()
	v.await("a prompt", v.ended, func(s string) bool { return strings.Contains(s, prompt) })
	v.commands++
	skip, mark := len(v.printed()), fmt.Sprintf("end%d\r\n", v.commands)
	// The terminal echoes what is typed; the sum keeps the mark out of the echo.
	if _, err := fmt.Fprintf(v.console, "%s; echo end$((%d))\n", command, v.commands); err != nil {
		v.t.Fatal(err)
	}
	v.await("the end of "+command, skip, func(s string) bool { return strings.Contains(s, mark) })
	out, _, _ := strings.Cut(v.printed()[skip:], mark)
	v.ended = skip + len(out) + len(mark)
	_, out, _ = strings.Cut(out, "\n")
	return strings.TrimSpace(strings.ReplaceAll(out, "\r", ""))
}

// qmp sends a command to QEMU and waits for its answer, past the greeting and events.
func (v *vm) qmp(command string) {
	v.t.Helper()
	if err := v.monitor.SetDeadline(time.Now().Add(patience)); err != nil {
		v.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(v.monitor, "{\"execute\":%q}\n", command); err != nil {
		v.t.Fatal(err)
	}
	// What the decoder has read beyond the answer is lost with it: events, for commands are sent one by one.
	for dec := json.NewDecoder(v.monitor); ; {
		var answer struct{ Return, Error json.RawMessage }
		if err := dec.Decode(&answer); err != nil {
			v.t.Fatalf("%s: %v", command, err)
		}
		if answer.Error != nil {
			v.t.Fatalf("%s: %s", command, answer.Error)
		}
		if answer.Return != nil {
			return
		}
	}
}

// awaitExit waits until QEMU has ended by itself.
func (v *vm) awaitExit(d time.Duration) bool {
	select {
	case <-v.exited:
		if v.err != nil {
			v.t.Error(v.err)
		}
		return true
	case <-time.After(d):
		return false
	}
}

// seedDisk makes a cloud-init volume.
func seedDisk(t *testing.T, files map[string]string) string {
	t.Helper()
	w, err := iso9660.NewWriter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Cleanup()
	for name, content := range files {
		if err := w.AddFile(strings.NewReader(content), name); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "seed.iso")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.WriteTo(f, "cidata"), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestGuest boots the guest with two NICs, the second first on QEMU's command line, and a third that nobody answers.
func TestGuest(t *testing.T) {
	const secret = "instance-id: i-1\nquote: \"a\\b\"\n\tbell: \a, ü\n"
	seed := seedDisk(t, map[string]string{"meta-data": secret})
	v := start(
		t, "virtlet.dhcp_timeout=5",
		"-netdev", "user,id=b,restrict=on,net=10.9.0.0/24,ipv6=off,hostname=second,dnssearch=b.example,dnssearch=c.example",
		"-device", "virtio-net-pci,netdev=b,mac=02:00:00:00:00:0b,bus=pcie.0,addr=0x11,romfile=,host_mtu=1400",
		"-netdev", "user,id=a,restrict=on,net=10.8.0.0/24,ipv6=off",
		"-device", "virtio-net-pci,netdev=a,mac=02:00:00:00:00:0a,bus=pcie.0,addr=0x10,romfile=",
		"-netdev", "hubport,id=c,hubid=0",
		"-device", "virtio-net-pci,netdev=c,mac=02:00:00:00:00:0c,bus=pcie.0,addr=0x12,romfile=",
		"-drive", "if=none,id=seed,format=raw,readonly=on,file="+seed, "-device", "virtio-blk-pci,drive=seed",
	)
	r := v.report(0)
	checkReport(t, r)
	if got := r.Seed["meta-data"]; got != secret {
		t.Errorf("seed: meta-data is %q, want %q", got, secret)
	}
	if len(r.Disks) != 1 || r.Disks[0].Label != "cidata" || !r.Disks[0].ReadOnly || r.Disks[0].Size == 0 {
		t.Errorf("disks: got %+v", r.Disks)
	}

	if got := v.shell("hostname; echo $((6 * 7))"); got != "second\n42" {
		t.Errorf("shell: got %q", got)
	}
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		if got := v.shell("wget -q -O - http://" + host + "/"); got != "second" {
			t.Errorf("http://%s/: got %q", host, got)
		}
		var again Report
		body := v.shell("wget -q -O - http://" + host + "/cgi-bin/report")
		if err := json.Unmarshal([]byte(body), &again); err != nil || len(again.NICs) != 3 || again.Uptime <= r.Uptime {
			t.Errorf("http://%s/cgi-bin/report: got %q, %v", host, body, err)
		}
	}
	const size = "10485760"
	v.shell("until [ -e /run/www/big ]; do sleep 1; done")
	if got := v.shell("wget -q -O - http://10.8.0.15/big | wc -c"); got != size {
		t.Errorf("/big: got %s bytes, want %s", got, size)
	}
	for _, command := range []string{"report", "kill -USR1 1"} {
		skip := len(v.printed())
		v.shell(command)
		if again := v.report(skip); again.Uptime <= r.Uptime {
			t.Errorf("%s: the report is not a new one: %v s, before %v s", command, again.Uptime, r.Uptime)
		}
	}

	checkLease(t, v)

	v.qmp("system_powerdown")
	if !v.awaitExit(patience) {
		t.Error("the guest does not end when its power button is pressed")
	}
}

// checkLease has the client's script take a lease as Calico's pods get one: an address without a prefix, and a gateway
// that a route of its own leads to. No server inside QEMU gives such a lease.
func checkLease(t *testing.T, v *vm) {
	t.Helper()
	skip := len(v.printed())
	v.shell(`env interface=eth2 ip=10.1.0.5 mask=32 mtu=1450 lease=600 router=10.1.0.1 domain='a "b' ` +
		`dns='10.96.0.10 10.96.0.11' staticroutes='169.254.1.1/32 0.0.0.0 0.0.0.0/0 169.254.1.1' ` +
		`/lib/dhcp-event bound && report`)
	r := v.report(skip)
	if len(r.NICs) != 3 {
		t.Fatalf("got %d NICs, want 3", len(r.NICs))
	}
	n, gateway := r.NICs[2], netip.MustParseAddr("169.254.1.1")
	if !slices.Contains(n.Addrs, netip.MustParsePrefix("10.1.0.5/32")) || n.MTU != 1450 || n.Lease != 600 {
		t.Errorf("got addresses %v, MTU %d, lease %d s", n.Addrs, n.MTU, n.Lease)
	}
	for _, want := range []Route{
		{Dst: netip.PrefixFrom(gateway, 32), Scope: "link"},
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gw: gateway}, // not through the router, which option 121 overrules
	} {
		if !slices.Contains(n.Routes, want) {
			t.Errorf("got routes %+v, want %+v among them", n.Routes, want)
		}
	}
	if n.Domain != `a "b` || n.DHCP["domain"] != `a "b` || !slices.Equal(n.DNS, []string{"10.96.0.10", "10.96.0.11"}) {
		t.Errorf("got domain %q, DNS %q, variables %v", n.Domain, n.DNS, n.DHCP)
	}
	if !strings.Contains(r.ResolvConf, "nameserver 10.96.0.10\nnameserver 10.96.0.11\n") {
		t.Errorf("got resolv.conf %q", r.ResolvConf)
	}
}

// checkReport compares the report with what the servers inside QEMU are known to say.
func checkReport(t *testing.T, r Report) {
	t.Helper()
	if len(r.NICs) != 3 {
		t.Fatalf("got %d NICs, want 3: %+v", len(r.NICs), r)
	}
	wantMTU := []int{1500, 1400, 1500}
	for i, n := range r.NICs {
		pci, mac := fmt.Sprintf("0000:00:1%d.0", i), fmt.Sprintf("02:00:00:00:00:0%c", 'a'+i)
		name := fmt.Sprintf("eth%d", i)
		if n.Name != name || n.PCI != pci || n.MAC != mac || n.Driver != "virtio_net" || n.MTU != wantMTU[i] {
			t.Errorf("NIC %d: got %s at %s, MAC %s, MTU %d, driver %s", i, n.Name, n.PCI, n.MAC, n.MTU, n.Driver)
		}
		if want := (i < 2); slices.Contains(n.Events, "bound") != want || (n.DHCP != nil) != want {
			t.Errorf("NIC %d: bound should be %t: events %v, variables %v", i, want, n.Events, n.DHCP)
		}
	}
	if !slices.Contains(r.NICs[2].Events, "leasefail") {
		t.Errorf("NIC 2: got events %v, want a leasefail", r.NICs[2].Events)
	}
	second := r.NICs[1]
	if want := netip.MustParsePrefix("10.9.0.15/24"); !slices.Contains(second.Addrs, want) {
		t.Errorf("NIC 1: got addresses %v and lease %v, want %v", second.Addrs, second.DHCP, want)
	}
	onLink := Route{Dst: netip.MustParsePrefix("10.9.0.0/24"), Scope: "link", Src: netip.MustParseAddr("10.9.0.15")}
	if !slices.Contains(second.Routes, onLink) {
		t.Errorf("NIC 1: got routes %+v, want %+v among them", second.Routes, onLink)
	}
	if !slices.Equal(second.Search, []string{"b.example", "c.example"}) || second.Lease != 86400 {
		t.Errorf("NIC 1: got search list %q, lease %d s", second.Search, second.Lease)
	}
	if r.Hostname != "second" || !strings.Contains(r.ResolvConf, "search b.example c.example\n") {
		t.Errorf("got hostname %q, resolv.conf %q", r.Hostname, r.ResolvConf)
	}
	if !strings.Contains(r.Cmdline, "virtlet.dhcp_timeout=5") || r.Kernel == "" || r.Uptime == 0 {
		t.Errorf("got kernel %q, %v s, command line %q", r.Kernel, r.Uptime, r.Cmdline)
	}
}

func TestSwitches(t *testing.T) {
	for _, name := range []string{"poweroff", "reboot", "panic"} {
		t.Run(name, func(t *testing.T) {
			v := start(t, "virtlet.no_dhcp virtlet."+name)
			if !v.awaitExit(patience) {
				t.Fatal("the guest goes on")
			}
			if _, ok := ParseReport([]byte(v.printed())); !ok {
				t.Error("no report")
			}
		})
	}
	t.Run("ignore_powerdown", func(t *testing.T) {
		v := start(t, "virtlet.no_dhcp virtlet.ignore_powerdown")
		v.shell("true")
		v.qmp("system_powerdown")
		if v.awaitExit(3 * time.Second) {
			t.Error("the guest ended")
		}
	})
}
