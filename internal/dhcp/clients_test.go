package dhcp

import (
	"cmp"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// client is a DHCP client as a distribution ships it, with the scripts that apply what it is told.
type client struct {
	name    string
	program string
	pkg     string            // of Debian
	files   map[string]string // by path in the machine
	args    []string

	release []string // the command, or else
	signal  string   // the signal, by which it gives the lease back

	reboots bool     // asks for its old address without discovery (INIT-REBOOT)
	again   []string // further arguments for a client that does not remember its address
	replug  bool     // remembers its address as long as it runs
	offlink bool     // sets the MTU of its routes, not of the link
	small   bool     // accepts no message over 576 bytes
	pieces  bool     // does not join the pieces of an option over 255 bytes

	told func(*machine) told
}

// told is what a client was told beside what the kernel shows.
type told struct {
	DNS, Search []string
	Hostname    string
}

// resolved is what a client's script made of /etc/resolv.conf, and the machine's name.
func resolved(m *machine) told {
	r := told{Hostname: m.run("hostname")}
	for line := range strings.Lines(m.readAll("etc/resolv.conf")) {
		switch f := strings.Fields(line); {
		case len(f) < 2:
		case f[0] == "nameserver":
			r.DNS = append(r.DNS, f[1])
		case f[0] == "search":
			r.Search = f[1:]
			for i := range r.Search {
				r.Search[i] = strings.TrimSuffix(r.Search[i], ".")
			}
		}
	}
	return r
}

// assigned gives the value of the last line NAME=VALUE of a text.
func assigned(text, name string) (value string) {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			value = strings.Trim(v, `"'`)
		}
	}
	return value
}

var clients = []client{
	{
		name: "udhcpc", program: "busybox", pkg: "busybox-static",
		files: map[string]string{"etc/udhcpc.script": `#!/bin/sh
case $1 in
deconfig) ip -4 addr flush dev "$interface" ;;
bound)
	ip addr add "$ip/$mask" dev "$interface"
	[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
	if [ -n "$staticroutes" ]; then
		set -- $staticroutes
		while [ $# -gt 1 ]; do
			if [ "$2" = 0.0.0.0 ]; then ip route add "$1" dev "$interface" scope link
			else ip route add "$1" via "$2" dev "$interface"; fi
			shift 2
		done
	elif [ -n "$router" ]; then ip route add default via "$router"
	fi
	[ -z "$hostname" ] || hostname "$hostname"
	{
		echo "search ${search:-$domain}"
		for s in $dns; do echo "nameserver $s"; done
	} >/etc/resolv.conf
	;;
esac
`},
		args: []string{
			"busybox", "udhcpc", "-f", "-i", "eth0", "-s", "/etc/udhcpc.script",
			"-O", "staticroutes", "-O", "mtu", "-O", "search", "-O", "hostname", "-O", "domain",
		},
		signal: "USR2",
		again:  []string{"-r", "198.51.100.2"},
		small:  true,
		told:   resolved,
	},
	{
		name: "dhclient", program: "dhclient", pkg: "isc-dhcp-client",
		files: map[string]string{"etc/dhclient.conf": `
option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
initial-interval 1;
backoff-cutoff 1;
send dhcp-max-message-size 1500;
request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, domain-search, host-name,
	interface-mtu, rfc3442-classless-static-routes;
`},
		args:    []string{"dhclient", "-4", "-d", "-cf", "/etc/dhclient.conf", "eth0"},
		release: []string{"dhclient", "-4", "-r", "-cf", "/etc/dhclient.conf", "eth0"},
		reboots: true,
		told:    resolved,
	},
	{
		name: "dhcpcd", program: "dhcpcd", pkg: "dhcpcd-base",
		files: map[string]string{"etc/dhcpcd.conf": `
option domain_name_servers, domain_name, domain_search, classless_static_routes, interface_mtu, host_name
require dhcp_server_identifier
nodelay
noarp
noipv4ll
ipv4only
env hostname_fqdn=no
`},
		args:    []string{"dhcpcd", "-B", "eth0"},
		signal:  "ALRM", // as dhcpcd -k sends
		reboots: true, offlink: true,
		told: resolved,
	},
	{
		name: "networkd", program: "/lib/systemd/systemd-networkd", pkg: "systemd",
		files: map[string]string{"etc/systemd/network/eth0.network": `[Match]
Name=eth0
[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
[DHCPv4]
ClientIdentifier=mac
UseDomains=yes
UseMTU=yes
RoutesToDNS=no
`},
		args: []string{"sh", "-c", `
			install -d -o systemd-network -g systemd-network /run/systemd/netif
			exec /lib/systemd/systemd-networkd
		`},
		signal:  "TERM",
		reboots: true, replug: true, pieces: true,
		told: func(m *machine) told {
			// Setting the name is systemd-hostnamed's, and resolv.conf is systemd-resolved's business.
			var r told
			link := m.readAll("run/systemd/netif/links/*")
			r.DNS, r.Search = strings.Fields(assigned(link, "DNS")), slices.Compact(strings.Fields(assigned(link, "DOMAINS")))
			r.Hostname = assigned(m.readAll("run/systemd/netif/leases/*"), "HOSTNAME")
			return r
		},
	},
}

// start starts the client.
func (c *client) start(m *machine) {
	m.t.Helper()
	m.start(c.args...)
}

// restart makes the client ask for the address that it had: after a power cut, or a cable that was out.
func (c *client) restart(f *life) {
	if c.replug {
		f.guest.MustRun("ip", "link", "set", "eth0", "down")
		for end := time.Now().Add(20 * time.Second); len(f.got().Addrs) > 0 && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		}
		f.guest.MustRun("ip", "link", "set", "eth0", "up")
		return
	}
	f.machine.cut()
	f.guest.MustRun("ip", "-4", "addr", "flush", "dev", "eth0")
	f.machine.start(append(slices.Clone(c.args), c.again...)...)
}

// giveBack has the client release its lease.
func (c *client) giveBack(m *machine) {
	if len(c.release) > 0 {
		m.run(c.release...)
		return
	}
	m.signal(c.signal)
}

// need skips a test without the client.
func (c *client) need(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath(c.program); err != nil {
		t.Skipf("needs %s (Debian: %s)", cmp.Or(c.program, c.name), c.pkg)
	}
}
