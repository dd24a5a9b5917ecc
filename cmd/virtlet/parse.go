package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/virtlet/virtlet/internal/vm"
)

// parseMemory reads 512M, 2G or a number of MiB.
func parseMemory(s string) (int64, error) {
	number, unit := s, int64(1)
	switch {
	case s == "":
	case strings.ContainsRune("mM", rune(s[len(s)-1])):
		number = s[:len(s)-1]
	case strings.ContainsRune("gG", rune(s[len(s)-1])):
		number, unit = s[:len(s)-1], 1024
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("--memory %q: use 512M, 2G or a number of MiB", s)
	}
	return n * unit, nil
}

// parseDisk reads PATH[,ro][,format=F]. A path may have commas: only known endings count.
func parseDisk(s string) (vm.Disk, error) {
	d := vm.Disk{Path: s}
	for {
		i := strings.LastIndexByte(d.Path, ',')
		if i < 0 {
			break
		}
		option := d.Path[i+1:]
		if format, ok := strings.CutPrefix(option, "format="); ok {
			d.Format = format
		} else if option == "ro" {
			d.ReadOnly = true
		} else {
			break
		}
		d.Path = d.Path[:i]
	}
	if d.Path == "" {
		return d, fmt.Errorf("--disk %q: use PATH[,ro][,format=raw|qcow2]", s)
	}
	return d, nil
}

// parsePort reads [IP:]HOST:GUEST[/PROTOCOL]; an IPv6 address is in brackets.
func parsePort(s string) (vm.PortMapping, error) {
	bad := func(why string) (vm.PortMapping, error) {
		return vm.PortMapping{}, fmt.Errorf("--publish %q: %s: use [IP:]HOST:GUEST[/tcp|udp|sctp], such as 8080:80 or [::1]:53:53/udp", s, why)
	}
	rest, protocol, ok := strings.Cut(s, "/")
	if !ok {
		protocol = "tcp"
	}
	if protocol != "tcp" && protocol != "udp" && protocol != "sctp" {
		return bad("unknown protocol")
	}
	rest, guest, ok := cutLast(rest)
	if !ok {
		return bad("no guest port")
	}
	m := vm.PortMapping{Protocol: protocol}
	if ip, host, ok := cutLast(rest); ok {
		a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]"))
		if err != nil {
			return bad("bad IP address")
		}
		m.HostIP, rest = a.String(), host
	}
	var err1, err2 error
	m.HostPort, err1 = portNumber(rest)
	m.ContainerPort, err2 = portNumber(guest)
	if err1 != nil || err2 != nil {
		return bad("bad port")
	}
	return m, nil
}

func portNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && n == 0 {
		err = strconv.ErrRange
	}
	return int(n), err
}

func cutLast(s string) (before, after string, found bool) {
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// parseBandwidth reads RATE, or in=RATE, out=RATE or both.
func parseBandwidth(s string) (*vm.Bandwidth, error) {
	b := &vm.Bandwidth{}
	for part := range strings.SplitSeq(s, ",") {
		which, text, ok := strings.Cut(part, "=")
		if !ok {
			which, text = "both", part
		}
		rate, err := parseRate(text)
		if err != nil || which != "both" && which != "in" && which != "out" {
			return nil, fmt.Errorf("--bandwidth %q: use a rate in bits per second such as 100M, or in=100M,out=20M", s)
		}
		// What a tenth of a second brings may come at once, and one large segment always.
		const segment = 64 << 10 * 8
		burst := max(rate/10, segment)
		if which != "out" {
			b.IngressRate, b.IngressBurst = rate, burst
		}
		if which != "in" {
			b.EgressRate, b.EgressBurst = rate, burst
		}
	}
	return b, nil
}

func parseRate(s string) (uint64, error) {
	units := map[byte]uint64{'k': 1e3, 'K': 1e3, 'm': 1e6, 'M': 1e6, 'g': 1e9, 'G': 1e9}
	unit := uint64(1)
	if s != "" && units[s[len(s)-1]] != 0 {
		unit, s = units[s[len(s)-1]], s[:len(s)-1]
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 0 {
		err = strconv.ErrRange
	}
	return n * unit, err
}
