package cloudinit

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"gopkg.in/yaml.v3"
)

// rendered is what a guest's files say of one interface.
type rendered struct {
	MAC         string
	MTU         string
	DHCP4       bool
	DHCP6       bool
	Addrs       []string
	Routes      []string // "DST via GW metric N"; the unspecified gateway is none
	DNS, Search []string
}

func routeText(dst, gw, metric string) string {
	p := netip.MustParsePrefix(dst)
	if a, err := netip.ParseAddr(gw); err != nil || a.IsUnspecified() {
		gw = ""
	}
	if metric == "" {
		metric = "0"
	}
	return fmt.Sprintf("%s via %s metric %s", p, gw, metric)
}

func (r *rendered) sort() *rendered {
	slices.Sort(r.Addrs)
	slices.Sort(r.Routes)
	return r
}

// expected gives what a NIC asks of its guest.
func expected(in Interface) *rendered {
	r := &rendered{MAC: in.NIC.MAC.String(), MTU: fmt.Sprint(in.NIC.MTU), DHCP4: in.DHCP4, DHCP6: in.DHCP6}
	served := func(is4 bool) bool { return is4 && in.DHCP4 || !is4 && in.DHCP6 }
	given := false
	for _, a := range in.NIC.Addrs {
		if is4 := a.Addr().Is4(); served(is4) && (!is4 || !given) {
			given = true
			continue
		}
		r.Addrs = append(r.Addrs, a.String())
	}
	for _, route := range in.NIC.Routes {
		covered := route.OnLink() && slices.ContainsFunc(in.NIC.Addrs, func(a netip.Prefix) bool { return a.Contains(route.Dst.Addr()) })
		if served(route.Dst.Addr().Is4()) || covered {
			continue
		}
		metric := route.Metric
		if route.Dst.Addr().Is6() && metric == 1024 {
			metric = 0
		}
		gw := ""
		if route.Gw.IsValid() {
			gw = route.Gw.String()
		}
		r.Routes = append(r.Routes, routeText(route.Dst.String(), gw, fmt.Sprint(metric)))
	}
	if !in.DHCP4 && !in.DHCP6 && len(r.Addrs) > 0 {
		for _, s := range in.NIC.DNS.Servers {
			r.DNS = append(r.DNS, s.String())
		}
		if r.Search = in.NIC.DNS.Search; len(r.Search) == 0 && in.NIC.DNS.Domain != "" {
			r.Search = []string{in.NIC.DNS.Domain}
		}
	}
	return r.sort()
}

// checkRendered compares what a renderer wrote with what the case asks for.
func checkRendered(t testing.TB, renderer string, c netCase, files map[string]string) {
	t.Helper()
	read := map[string]func(testing.TB, map[string]string, string) *rendered{
		"netplan": readNetplan, "networkd": readNetworkd, "eni": readENI, "sysconfig": readSysconfig,
	}[renderer]
	for _, in := range c.interfaces {
		want, got := expected(in), read(t, files, in.NIC.Name).sort()
		if renderer == "sysconfig" { // it has one metric for the default routes of both families, and room for three servers
			want.DNS = want.DNS[:min(3, len(want.DNS))]
			for _, all := range [][]string{want.Routes, got.Routes} {
				for i := range all {
					all[i] = strings.Replace(all[i], "metric 2048", "metric 200", 1)
				}
			}
		}
		if d := gocmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s, interface %s (-want +got):\n%s", renderer, in.NIC.Name, d)
		}
	}
}

func readNetplan(t testing.TB, files map[string]string, name string) *rendered {
	t.Helper()
	var doc struct {
		Network struct {
			Ethernets map[string]struct {
				Match     map[string]string
				SetName   string `yaml:"set-name"`
				MTU       string
				DHCP4     bool
				DHCP6     bool
				Addresses []string
				Gateway4  string
				Gateway6  string
				Routes    []struct{ To, Via, Metric string }
				NS        struct{ Addresses, Search []string } `yaml:"nameservers"`
			}
		}
	}
	if err := yaml.Unmarshal([]byte(files["etc/netplan/50-cloud-init.yaml"]), &doc); err != nil {
		t.Fatal(err)
	}
	e := doc.Network.Ethernets[name]
	if e.SetName != name {
		t.Errorf("netplan: set-name %q, want %q", e.SetName, name)
	}
	r := &rendered{MAC: e.Match["macaddress"], MTU: e.MTU, DHCP4: e.DHCP4, DHCP6: e.DHCP6, Addrs: e.Addresses, DNS: e.NS.Addresses, Search: e.NS.Search}
	for _, route := range e.Routes {
		r.Routes = append(r.Routes, routeText(route.To, route.Via, route.Metric))
	}
	if e.Gateway4 != "" {
		r.Routes = append(r.Routes, routeText("0.0.0.0/0", e.Gateway4, ""))
	}
	if e.Gateway6 != "" {
		r.Routes = append(r.Routes, routeText("::/0", e.Gateway6, ""))
	}
	return r
}

// readNetworkd reads systemd.network(5) files, cloud-init's and netplan's.
func readNetworkd(t testing.TB, files map[string]string, name string) *rendered {
	t.Helper()
	text := ""
	for file, s := range files {
		if strings.HasSuffix(file, "-"+name+".network") {
			text = s
		}
	}
	r := &rendered{}
	var section string
	var route map[string]string
	end := func() {
		if gw := route["Gateway"]; section == "Route" && route != nil {
			r.Routes = append(r.Routes, routeText(cmp.Or(route["Destination"], everything(gw)), gw, route["Metric"]))
		}
		route = map[string]string{}
	}
	for line := range strings.Lines(text + "[End]\n") {
		line = strings.TrimSpace(line)
		key, value, _ := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "["):
			end()
			section = strings.Trim(line, "[]")
		case section == "Route":
			route[key] = value
		case key == "MACAddress", key == "PermanentMACAddress":
			r.MAC = value
		case key == "MTUBytes":
			r.MTU = value
		case key == "Address":
			r.Addrs = append(r.Addrs, value)
		case key == "Gateway":
			r.Routes = append(r.Routes, routeText(everything(value), value, ""))
		case key == "DHCP":
			r.DHCP4, r.DHCP6 = value == "yes" || value == "ipv4", value == "yes" || value == "ipv6"
		case key == "DNS":
			r.DNS = append(r.DNS, strings.Fields(value)...)
		case key == "Domains":
			r.Search = append(r.Search, strings.Fields(value)...)
		}
	}
	return r
}

func everything(gw string) string {
	if strings.Contains(gw, ":") {
		return "::/0"
	}
	return "0.0.0.0/0"
}

// readENI reads interfaces(5) and the udev rules beside it.
func readENI(t testing.TB, files map[string]string, name string) *rendered {
	t.Helper()
	r := &rendered{}
	for line := range strings.Lines(files["etc/udev/rules.d/70-persistent-net.rules"]) {
		if strings.Contains(line, fmt.Sprintf("NAME=%q", name)) {
			_, rest, _ := strings.Cut(line, `ATTR{address}=="`)
			r.MAC, _, _ = strings.Cut(rest, `"`)
		}
	}
	ours := false
	for line := range strings.Lines(files["etc/network/interfaces.d/50-cloud-init"]) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case f[0] == "iface":
			ours = f[1] == name
			r.DHCP4 = r.DHCP4 || ours && f[2] == "inet" && f[3] == "dhcp"
			r.DHCP6 = r.DHCP6 || ours && f[2] == "inet6" && f[3] == "dhcp"
		case !ours:
		case f[0] == "address":
			r.Addrs = append(r.Addrs, f[1])
		case f[0] == "mtu":
			r.MTU = f[1]
		case f[0] == "gateway":
			r.Routes = append(r.Routes, routeText(everything(f[1]), f[1], ""))
		case f[0] == "dns-nameservers":
			r.DNS = f[1:]
		case f[0] == "dns-search":
			r.Search = f[1:]
		case f[0] == "post-up":
			words := f[3 : len(f)-2] // post-up route add ... || true
			var dst, gw, metric string
			for i, w := range words {
				switch w {
				case "default":
					dst = "default"
				case "gw":
					gw = words[i+1]
				case "metric":
					metric = words[i+1]
				default:
					if strings.Contains(w, "/") {
						dst = w
					}
				}
			}
			if dst == "default" {
				dst = everything(gw)
			}
			r.Routes = append(r.Routes, routeText(dst, gw, metric))
		}
	}
	return r
}

// readSysconfig reads Red Hat's files of one interface.
func readSysconfig(t testing.TB, files map[string]string, name string) *rendered {
	t.Helper()
	const dir = "etc/sysconfig/network-scripts"
	read := func(file string) map[string]string {
		m := map[string]string{}
		for line := range strings.Lines(files[path.Join(dir, file)]) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
			m[k] = strings.Trim(v, `"`)
		}
		return m
	}
	bits := func(mask string) string {
		ones, _ := net.IPMask(netip.MustParseAddr(mask).AsSlice()).Size()
		return fmt.Sprint("/", ones)
	}
	c := read("ifcfg-" + name)
	r := &rendered{MAC: c["HWADDR"], MTU: c["MTU"], DHCP4: c["BOOTPROTO"] == "dhcp", DHCP6: c["DHCPV6C"] == "yes", Search: strings.Fields(c["DOMAIN"])}
	for i := range 10 {
		n := strings.TrimPrefix(fmt.Sprint(i), "0")
		if a := c["IPADDR"+n]; a != "" {
			r.Addrs = append(r.Addrs, a+bits(c["NETMASK"+n]))
		}
		if s := c[fmt.Sprint("DNS", i)]; s != "" {
			r.DNS = append(r.DNS, s)
		}
	}
	r.Addrs = append(r.Addrs, strings.Fields(c["IPV6ADDR"]+" "+c["IPV6ADDR_SECONDARIES"])...)
	for _, gw := range []string{c["GATEWAY"], c["IPV6_DEFAULTGW"]} {
		if gw != "" {
			r.Routes = append(r.Routes, routeText(everything(gw), gw, c["METRIC"]))
		}
	}
	four := read("route-" + name)
	for i := 0; four[fmt.Sprint("ADDRESS", i)] != ""; i++ {
		n := fmt.Sprint(i)
		r.Routes = append(r.Routes, routeText(four["ADDRESS"+n]+bits(four["NETMASK"+n]), four["GATEWAY"+n], four["METRIC"+n]))
	}
	for line := range strings.Lines(files[path.Join(dir, "route6-"+name)]) {
		if f := strings.Fields(line); len(f) >= 3 && f[1] == "via" {
			metric := ""
			if f[3] == "metric" {
				metric = f[4]
			}
			r.Routes = append(r.Routes, routeText(f[0], f[2], metric))
		}
	}
	return r
}
