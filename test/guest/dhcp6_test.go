package guest

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

// router is a namespace with one TAP for each NIC of a guest, tap0, tap1, ..., where dnsmasq serves DHCPv4 and DHCPv6
// and advertises itself as a router.
type router struct {
	*testnet.Namespace
	taps []*os.File
	addr []netip.Addr // of IPv6 on the taps, link-local
}

// newRouter makes a router that treats its n-th NIC as the n-th of the modes says, in dnsmasq's words.
func newRouter(t *testing.T, modes ...string) *router {
	t.Helper()
	testnet.NeedRoot(t)
	if _, err := exec.LookPath("dnsmasq"); err != nil {
		t.Skip("needs dnsmasq, as a router: run `make setup`")
	}
	r := &router{Namespace: testnet.New(t, "router")}
	// Its neighbor advertisements say so, too: one that says "host" takes the default route back (RFC 4861, section 7.3.3).
	r.Sysctl("ipv6/conf/all/forwarding", "1")
	args := []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root", "--leasefile-ro", "--port=0",
		"--bind-dynamic", "--enable-ra", "--no-ping", "--log-dhcp", "--log-facility=-",
		"--dhcp-option=option:dns-server,203.0.113.53",
		"--dhcp-option=option6:dns-server,[2001:db8::53],[2001:db8::54]",
		"--dhcp-option=option6:domain-search,a.example,b.example",
	}
	for i, mode := range modes {
		tap := fmt.Sprintf("tap%d", i)
		f := r.openTAP(t, tap)
		r.taps = append(r.taps, f)
		link, err := r.Link().LinkByName(tap)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Link().LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{fmt.Sprintf("192.0.2.%d/28", 16*i+1), fmt.Sprintf("2001:db8:%d::1/64", i)} {
			if err := r.Link().AddrAdd(link, testnet.Address(netip.MustParsePrefix(p))); err != nil {
				t.Fatal(err)
			}
		}
		r.addr = append(r.addr, r.linkLocal(t, link))
		args = append(args, fmt.Sprintf("--dhcp-range=192.0.2.%d,192.0.2.%d,1h", 16*i+2, 16*i+14),
			"--dhcp-range="+strings.ReplaceAll(mode, "TAP", tap))
	}
	r.serve(t, args)
	return r
}

// openTAP makes a TAP in the namespace.
func (r *router) openTAP(t *testing.T, name string) *os.File {
	t.Helper()
	var f *os.File
	r.Must(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	})
	t.Cleanup(func() { f.Close() })
	return f
}

// linkLocal waits until a link's own address is proven unique: dnsmasq advertises from a wrong one before that.
func (r *router) linkLocal(t *testing.T, link netlink.Link) netip.Addr {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		addrs, err := r.Link().AddrList(link, netlink.FAMILY_V6)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
				return ip
			}
		}
	}
	t.Fatalf("%s has no link-local address", link.Attrs().Name)
	return netip.Addr{}
}

// serve runs dnsmasq until the test's end.
func (r *router) serve(t *testing.T, args []string) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command("dnsmasq", args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	r.Must(cmd.Start) // forks from the thread inside
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // killed
		if t.Failed() {
			t.Logf("dnsmasq:\n%s", log.String())
		}
	})
}

// TestIPv6 boots the guest with three NICs whose routers say different things: ask for an address, ask for the rest, and
// ask for nothing.
func TestIPv6(t *testing.T) {
	r := newRouter(t, "::100,::1ff,constructor:TAP,64,1h", "::,constructor:TAP,ra-stateless", "::,constructor:TAP,ra-only")
	var args []string
	for i := range r.taps {
		args = append(
			args, "-netdev", fmt.Sprintf("tap,id=n%d,fd=%d", i, 3+i),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=n%d,mac=02:00:00:00:00:0%x,bus=pcie.0,addr=0x1%[1]d,romfile=", i, 10+i),
		)
	}
	v := startWith(t, r.taps, "virtlet.wait6 virtlet.dhcp_timeout=60", args...)
	report := v.report(0)
	t.Logf("the report came after %v s", report.Uptime)
	if len(report.NICs) != 3 {
		t.Fatalf("got %d NICs, want 3", len(report.NICs))
	}
	for i, n := range report.NICs {
		if want := (Route{Dst: netip.MustParsePrefix("::/0"), Gw: r.addr[i], Metric: 1024}); !slices.Contains(n.Routes, want) {
			t.Errorf("%s: got routes %+v, want %+v among them", n.Name, n.Routes, want)
		}
		onLink := netip.MustParsePrefix(fmt.Sprintf("2001:db8:%d::/64", i))
		if !slices.ContainsFunc(n.Routes, func(r Route) bool { return r.Dst == onLink && !r.Gw.IsValid() }) {
			t.Errorf("%s: got routes %+v, want %s on the link", n.Name, n.Routes, onLink)
		}
		if want := []string{"MO", "O", ""}[i]; n.RA["flags"] != want || n.RA["from"] != r.addr[i].String() {
			t.Errorf("%s: got advertisement %v, want flags %q from %s", n.Name, n.RA, want, r.addr[i])
		}
		if want := []string{"203.0.113.53", "2001:db8::53", "2001:db8::54"}; !slices.Equal(n.DNS, want) {
			t.Errorf("%s: got DNS %v, want %v", n.Name, n.DNS, want)
		}
		if got := v.shell("ping6 -c 1 -W 10 " + onLink.Addr().Next().String()); !strings.Contains(got, " 0% packet loss") {
			t.Errorf("%s: no answer from the router: %s", n.Name, got)
		}
	}
	want := "search a.example b.example\nnameserver 203.0.113.53\nnameserver 2001:db8::53\nnameserver 2001:db8::54\n"
	if report.ResolvConf != want {
		t.Errorf("got resolv.conf %q, want %q", report.ResolvConf, want)
	}
	if got := v.shell("ip -6 addr"); strings.Contains(got, "tentative") {
		t.Errorf("addresses that are not yet proven unique: %s", got)
	}
	checkStateful(t, report.NICs[0])
	checkAutoconfigured(t, report.NICs[1:])
	checkRenewal(t, v)
}

// checkStateful checks a NIC whose one address is the server's.
func checkStateful(t *testing.T, n NIC) {
	t.Helper()
	addr, err := netip.ParseAddr(n.DHCP6["ia_na1_ia_addr1"])
	if err != nil || !netip.MustParsePrefix("2001:db8::100/120").Contains(addr) {
		t.Errorf("got address %s, %v of %v", addr, err, n.DHCP6)
	}
	if got, want := global(n), []netip.Prefix{netip.PrefixFrom(addr, 128)}; !slices.Equal(got, want) {
		t.Errorf("got addresses %v, want %v and a link-local one", got, want)
	}
	for name, want := range map[string]string{
		"ia_na1_ia_addr1_vltime": "3600", "name_servers": "2001:db8::53 2001:db8::54", "domain_search": "a.example b.example",
		"client_id": "0003000102000000000a",
	} {
		if got := n.DHCP6[name]; got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if !slices.Contains(n.Events, "BOUND6") || n.DHCP6["server_id"] == "" {
		t.Errorf("got events %v, variables %v", n.Events, n.DHCP6)
	}
}

// checkAutoconfigured checks NICs that make their addresses themselves. Only the first asks a server.
func checkAutoconfigured(t *testing.T, nics []NIC) {
	t.Helper()
	for i, n := range nics {
		// Of the MAC 02:00:00:00:00:0b and so on, by RFC 4291, appendix A.
		want := []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("2001:db8:%d:0:0:ff:fe00:%x/64", i+1, 11+i))}
		if got := global(n); !slices.Equal(got, want) {
			t.Errorf("%s: got addresses %v, want %v and a link-local one", n.Name, got, want)
		}
		asked := i == 0
		if (n.DHCP6 != nil) != asked || slices.Contains(n.Events, "INFORM6") != asked || n.DHCP6["ia_na1_ia_addr1"] != "" {
			t.Errorf("%s: got events %v, variables %v; asked should be %t", n.Name, n.Events, n.DHCP6, asked)
		}
	}
}

// checkRenewal makes the client renew its lease at once, and then lose it.
func checkRenewal(t *testing.T, v *vm) {
	t.Helper()
	for _, tt := range []struct{ signal, event string }{
		{"USR1", "RENEW6"}, // dhcpcd(8): renews
		{"TERM", "STOP6"},
	} {
		v.shell("kill -" + tt.signal + " $(cat /run/dhcpcd/eth0-6.pid)")
		v.shell("until grep -q " + tt.event + " /run/nic/eth0.events; do sleep 0.2; done")
		skip := len(v.printed())
		v.shell("report")
		n := v.report(skip).NICs[0]
		leased := tt.event != "STOP6"
		if (len(global(n)) == 1) != leased || (n.DHCP6 != nil) != leased {
			t.Errorf("after %s: got addresses %v, variables %v", tt.event, n.Addrs, n.DHCP6)
		}
	}
}

// global gives a NIC's IPv6 addresses that are not link-local.
func global(n NIC) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range n.Addrs {
		if p.Addr().Is6() && !p.Addr().IsLinkLocalUnicast() {
			out = append(out, p)
		}
	}
	return out
}
