// Package guest is for tests only: a small Linux guest that configures its NICs by DHCP, DHCPv6 and router
// advertisements, as any distribution does, and says on its serial console what came of it.
//
// DHCPv6 is asked for an address when a router's advertisement has the M flag. The report does not wait for it, nor for
// IPv6 at all, unless virtlet.wait6 is on the kernel command line.
//
// The guest is a Debian kernel with an initramfs; [Artifacts] gives its files and builds them when they are missing.
// The command in build/ makes it, and the head of build/root/init lists what it understands on the kernel command line.
// It prints a report when its NICs are ready; [ParseReport] reads it. After that the console is a shell with the prompt
// "guest# ", port 80 serves files, and the power button ends it.
package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Report is the state of a guest as it sees itself.
type Report struct {
	Hostname   string            `json:"hostname"`
	Kernel     string            `json:"kernel"`     // its release
	Uptime     float64           `json:"uptime"`     // seconds from the kernel's start to the report
	Cmdline    string            `json:"cmdline"`    // the kernel's
	ResolvConf string            `json:"resolvConf"` // /etc/resolv.conf
	NICs       []NIC             `json:"nics"`       // in the order of PCI addresses: eth0, eth1, ...
	Disks      []Disk            `json:"disks"`
	Seed       map[string]string `json:"seed"` // files of the cloud-init volume, if there is one, by path
}

// NIC is one network interface: the kernel's configuration, and the lease that it comes from.
type NIC struct {
	Name    string         `json:"name"`
	MAC     string         `json:"mac"`
	MTU     int            `json:"mtu"`
	PCI     string         `json:"pci"` // address, such as 0000:00:10.0
	Driver  string         `json:"driver"`
	Carrier bool           `json:"carrier"`
	Addrs   []netip.Prefix `json:"addrs"`  // all, link-local ones included
	Routes  []Route        `json:"routes"` // of the main table, through this NIC
	DNS     []string       `json:"dns"`    // of DHCPv4, DHCPv6 and routers, in this order
	Search  []string       `json:"search"` // the same
	Domain  string         `json:"domain"`
	Lease   int            `json:"lease"` // seconds, as granted by DHCPv4
	// Events are what the DHCP clients saw: deconfig, bound, renew, nak, leasefail, and of DHCPv6 BOUND6, RENEW6, REBIND6,
	// INFORM6 (no address was asked for), EXPIRE6, STOP6. BOUND6 comes twice, before and after the address is proven unique.
	Events []string `json:"events"`
	// DHCP has the DHCPv4 client's variables, such as ip, router, and opt58 (hexadecimal). It is nil without a lease.
	DHCP map[string]string `json:"dhcp"`
	// DHCP6 has the DHCPv6 client's variables (dhcpcd's new_dhcp6_*): ia_na1_ia_addr1 with its lifetimes
	// ia_na1_ia_addr1_pltime and _vltime, ia_na1_t1, ia_na1_t2, name_servers, domain_search, server_id, client_id
	// (hexadecimal), and so on. It is nil without an answer; an answer to INFORM6 has no address.
	DHCP6 map[string]string `json:"dhcp6"`
	// RA has what the router advertised (dhcpcd's nd1_*; other routers' variables keep the prefixes nd2_, nd3_, ...): from,
	// flags ("M", "O", "MO", or empty), lifetime, mtu, prefix_information1_prefix with _length, _flags, _pltime and _vltime,
	// rdnss1_servers, dnssl1_search. It is nil without a router.
	RA map[string]string `json:"ra"`
}

// Route is one route. Without a gateway it is on-link.
type Route struct {
	Dst    netip.Prefix `json:"dst"`
	Gw     netip.Addr   `json:"gw"`
	Src    netip.Addr   `json:"src"`
	Scope  string       `json:"scope"` // "link", or empty
	Metric int          `json:"metric"`
	MTU    int          `json:"mtu"` // 0: the NIC's
}

// Disk is one block device.
type Disk struct {
	Name     string `json:"name"`
	Size     int64  `json:"size"` // bytes
	ReadOnly bool   `json:"readOnly"`
	Label    string `json:"label"` // of an ISO 9660 volume
}

// The lines around a report on the console.
const (
	begin = "=== virtlet report begin ==="
	end   = "=== virtlet report end ==="
)

// ParseReport gives the last complete report in what a console printed. Without one, ok is false.
func ParseReport(console []byte) (r Report, ok bool) {
	for {
		stop := bytes.LastIndex(console, []byte(end))
		if stop < 0 {
			return Report{}, false
		}
		console = console[:stop]
		start := bytes.LastIndex(console, []byte(begin))
		if start < 0 {
			return Report{}, false
		}
		r = Report{}
		if err := json.Unmarshal(console[start+len(begin):], &r); err == nil {
			return r, true
		}
		console = console[:start]
	}
}

// built is the guest in the cache, made at most once in a process.
var built = sync.OnceValues(func() (string, error) {
	// By its import path, which works in any directory of the module.
	cmd := exec.Command("go", "run", "github.com/virtlet/virtlet/test/guest/build")
	out, err := cmd.Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return strings.TrimSpace(string(out)), err
})

// Artifacts gives the paths of the guest's kernel and initramfs and the kernel command line to start it with, to which
// a test may add. They are in the directory that the environment variable VIRTLET_GUEST names, or else in the cache;
// there they are made when they are missing, which takes the network and some seconds. The test ends when that fails.
func Artifacts(t testing.TB) (kernel, initrd, cmdline string) {
	t.Helper()
	dir := os.Getenv("VIRTLET_GUEST")
	if dir == "" {
		var err error
		if dir, err = built(); err != nil {
			t.Fatalf("%v\nrun `make guest` on a machine with apt-get and set VIRTLET_GUEST to a copy of what it makes", err)
		}
	}
	kernel, initrd = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	for _, f := range []string{kernel, initrd} {
		if _, err := os.Stat(f); err != nil {
			t.Fatalf("find test guest: %v; run `make guest` and set VIRTLET_GUEST to what it prints, or not at all", err)
		}
	}
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		t.Fatalf("find test guest: %v; run `make guest`", err)
	}
	return kernel, initrd, strings.TrimSpace(string(line))
}

// Extra gives the path of an archive which a test may put behind the initrd, in the same file: it has a QEMU guest agent
// (qemu-ga), and drivers of a balloon, of SCSI disks and of ext4.
func Extra(t testing.TB) string {
	t.Helper()
	kernel, _, _ := Artifacts(t)
	path := filepath.Join(filepath.Dir(kernel), "extra")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("find what test guests may have beside: %v; run `make guest`", err)
	}
	return path
}

// Agent is a command line for the console that starts the agent of [Extra].
const Agent = "qemu-ga -d -m virtio-serial -p /dev/vport*p1 -t /run -f /run/qemu-ga.pid -l /run/qemu-ga.log"

// Type types a line at the console of a guest that has reported, and gives what the console says until that is done. console
// is a command that joins it to its standard input and output.
func Type(t testing.TB, console *exec.Cmd, line string) string {
	t.Helper()
	in, err := console.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := console.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := console.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); console.Process.Kill(); console.Wait() }()
	limit := time.AfterFunc(time.Minute, func() { console.Process.Kill() })
	defer limit.Stop()
	fmt.Fprintf(in, "%s; echo do''ne $?\n", line) // the echo of the line itself does not say "done"
	var said []byte
	buf := make([]byte, 4096)
	for {
		if _, status, ok := bytes.Cut(said, []byte("\ndone ")); ok && bytes.ContainsRune(status, '\n') {
			return string(said)
		}
		n, err := out.Read(buf)
		said = append(said, buf[:n]...)
		if err != nil {
			t.Fatalf("console after %q: %v: %q", line, err, said)
		}
	}
}
