package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// move makes of the recorded pod the one with a number: what has to be a pod's own is replaced, wherever it occurs.
type move struct {
	from   *nic.Recording
	ifName string
	netNS  string
	addrs  map[netip.Addr]netip.Addr
	macs   map[nic.MAC]nic.MAC
	names  map[string]string // of the node's links
}

func newMove(r *nic.Recording, number int, ifName, netNS string) *move {
	m := &move{from: r, ifName: ifName, netNS: netNS, addrs: map[netip.Addr]netip.Addr{}, macs: map[nic.MAC]nic.MAC{}, names: map[string]string{}}
	add := func(l nic.Link) {
		m.macs[l.MAC] = nextMAC(l.MAC, number)
		m.addrs[linkLocal(l.MAC)] = linkLocal(m.macs[l.MAC])
	}
	for _, l := range r.Snapshot.Links {
		add(l)
	}
	for _, ip := range podAddrs(r) {
		m.addrs[ip] = next(ip, offset(r, number))
	}
	for _, l := range r.Host.Links {
		if l.PodLink == "" {
			continue
		}
		m.names[l.Name] = l.Name
		if number > 0 {
			const most = 15 // IFNAMSIZ less the final 0
			digits := fmt.Sprintf("-%x", number)
			m.names[l.Name] = l.Name[:min(len(l.Name), most-len(digits))] + digits
		}
		// One bridge has no two ports of one MAC. What is no port may have it in common with all others.
		if l.Master != "" {
			add(l.Link)
		}
	}
	return m
}

// podAddrs gives the addresses of the pod, without those that the kernel makes.
func podAddrs(r *nic.Recording) []netip.Addr {
	var all []netip.Addr
	for _, l := range r.Snapshot.Links {
		for _, a := range l.Addrs {
			if ip := a.Prefix.Addr(); !ip.IsLinkLocalUnicast() {
				all = append(all, ip)
			}
		}
	}
	return all
}

// offset says how far the addresses of the pod with a number are from those recorded: as far as its number, but for steps
// that lead to an address of the node.
func offset(r *nic.Recording, number int) int {
	node := map[netip.Addr]bool{}
	for _, l := range r.Host.Links {
		for _, a := range l.Addrs {
			node[a.Prefix.Addr()] = true
		}
	}
	for n := 0; ; n++ {
		if slices.ContainsFunc(podAddrs(r), func(ip netip.Addr) bool { return node[next(ip, n)] }) {
			continue
		}
		if number == 0 {
			return n
		}
		number--
	}
}

// next gives the address that is n further.
func next(ip netip.Addr, n int) netip.Addr {
	b := ip.AsSlice()
	carry(b, n)
	moved, _ := netip.AddrFromSlice(b)
	return moved
}

func nextMAC(mac nic.MAC, n int) nic.MAC {
	carry(mac[3:], n) // the rest names who made it
	return mac
}

func carry(b []byte, n int) {
	for i := len(b) - 1; i >= 0 && n > 0; i-- {
		n += int(b[i])
		b[i] = byte(n)
		n >>= 8
	}
}

// linkLocal is the address that the kernel makes of a MAC (RFC 4291, appendix A).
func linkLocal(mac nic.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
}

func (m *move) addr(ip netip.Addr) netip.Addr {
	if to, ok := m.addrs[ip]; ok {
		return to
	}
	return ip
}

func (m *move) prefix(p netip.Prefix) netip.Prefix {
	if !p.IsValid() {
		return p
	}
	return netip.PrefixFrom(m.addr(p.Addr()), p.Bits())
}

func (m *move) mac(mac nic.MAC) nic.MAC {
	if to, ok := m.macs[mac]; ok {
		return to
	}
	return mac
}

// podName gives the name in the pod of a link that was recorded as another.
func (m *move) podName(name string) string {
	if name == m.from.Attachments[0].IfName {
		return m.ifName
	}
	return name
}

// recording gives the network of the pod.
func (m *move) recording() *nic.Recording {
	r := *m.from
	r.Snapshot.Links = nil
	for _, l := range m.from.Snapshot.Links {
		r.Snapshot.Links = append(r.Snapshot.Links, m.link(l, m.podName(l.Name)))
	}
	r.NoTxChecksum = nil
	for _, name := range m.from.NoTxChecksum {
		r.NoTxChecksum = append(r.NoTxChecksum, m.podName(name))
	}
	host := *m.from.Host
	host.Links = nil
	for _, l := range m.from.Host.Links {
		name := l.Name
		if to := m.names[name]; to != "" {
			name = to
		}
		l.Link = m.link(l.Link, name)
		l.PodLink = m.podName(l.PodLink)
		var entries []nic.Neighbour
		for _, e := range l.Neighbours {
			entries = append(entries, nic.Neighbour{IP: m.addr(e.IP), MAC: m.mac(e.MAC), Proxy: e.Proxy})
		}
		l.Neighbours = entries
		host.Links = append(host.Links, l)
	}
	r.Host = &host
	return &r
}

func (m *move) link(l nic.Link, name string) nic.Link {
	from := l.Name
	l.Name, l.MAC = name, m.mac(l.MAC)
	var addrs []nic.Addr
	for _, a := range l.Addrs {
		a.Prefix, a.Peer = m.prefix(a.Prefix), m.prefix(a.Peer)
		if a.Label == from {
			a.Label = name
		}
		addrs = append(addrs, a)
	}
	var routes []nic.KernelRoute
	for _, r := range l.Routes {
		r.Dst, r.Src, r.Gw = m.prefix(r.Dst), m.addr(r.Src), m.addr(r.Gw)
		routes = append(routes, r)
	}
	sysctls := map[string]string{}
	for path, value := range l.Sysctls {
		sysctls[strings.Replace(path, "/"+from+"/", "/"+name+"/", 1)] = value
	}
	l.Addrs, l.Routes, l.Sysctls = addrs, routes, sysctls
	return l
}

// result gives what was answered, for the pod.
func (m *move) result(recorded json.RawMessage) ([]byte, error) {
	var r any
	if err := json.Unmarshal(recorded, &r); err != nil {
		return nil, fmt.Errorf("the recorded result: %w", err)
	}
	return json.Marshal(m.value("", r))
}

// value replaces in JSON of any CNI version.
func (m *move) value(key string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = m.value(k, v[k])
		}
	case []any:
		for i := range v {
			v[i] = m.value(key, v[i])
		}
	case string:
		return m.text(key, v)
	}
	return v
}

func (m *move) text(key, s string) string {
	if key == "sandbox" && s != "" {
		return m.netNS
	}
	if key == "name" {
		if to := m.names[s]; to != "" {
			return to
		}
		return m.podName(s)
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return m.prefix(p).String()
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		return m.addr(ip).String()
	}
	if mac, err := nic.ParseMAC(s); err == nil {
		return m.mac(mac).String()
	}
	return s
}
