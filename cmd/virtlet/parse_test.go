package main

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtlet/virtlet/internal/vm"
)

func TestParseMemory(t *testing.T) {
	for text, want := range map[string]int64{"512": 512, "512M": 512, "2G": 2048, "1g": 1024, "64m": 64} {
		if got, err := parseMemory(text); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0", "-1", "1T", "G", "1.5G", "99999999999999G", "1 G", "512MB"} {
		if got, err := parseMemory(text); err == nil {
			t.Errorf("%q was accepted as %d", text, got)
		}
	}
}

func TestParseDisk(t *testing.T) {
	for text, want := range map[string]vm.Disk{
		"a.img":                {Path: "a.img"},
		"a.img,ro":             {Path: "a.img", ReadOnly: true},
		"a.img,format=raw,ro":  {Path: "a.img", ReadOnly: true, Format: "raw"},
		"a,b.img":              {Path: "a,b.img"},
		"a,b.img,format=qcow2": {Path: "a,b.img", Format: "qcow2"},
	} {
		if got, err := parseDisk(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", ",ro"} {
		if got, err := parseDisk(text); err == nil {
			t.Errorf("%q was accepted as %+v", text, got)
		}
	}
}

func TestParsePort(t *testing.T) {
	for text, want := range map[string]vm.PortMapping{
		"8080:80":             {HostPort: 8080, ContainerPort: 80, Protocol: "tcp"},
		"53:53/udp":           {HostPort: 53, ContainerPort: 53, Protocol: "udp"},
		"192.0.2.1:1:2/sctp":  {HostPort: 1, ContainerPort: 2, Protocol: "sctp", HostIP: "192.0.2.1"},
		"[2001:db8::1]:80:81": {HostPort: 80, ContainerPort: 81, Protocol: "tcp", HostIP: "2001:db8::1"},
	} {
		if got, err := parsePort(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "80", ":80", "80:", "0:80", "80:0", "65536:80", "80:80/icmp", "host:80:80", "80:80/", "a:b", "-1:80"} {
		if got, err := parsePort(text); err == nil {
			t.Errorf("%q was accepted as %+v", text, got)
		}
	}
}

func TestParseBandwidth(t *testing.T) {
	const segment = 64 << 10 * 8
	for text, want := range map[string]vm.Bandwidth{
		"100M":            {IngressRate: 1e8, IngressBurst: 1e7, EgressRate: 1e8, EgressBurst: 1e7},
		"in=1G,out=8k":    {IngressRate: 1e9, IngressBurst: 1e8, EgressRate: 8000, EgressBurst: segment},
		"out=10000000000": {}, // too long a number; a G says it
		"out=10G":         {EgressRate: 1e10, EgressBurst: 1e9},
	} {
		got, err := parseBandwidth(text)
		if (want == vm.Bandwidth{}) {
			if err == nil {
				t.Errorf("%q was accepted as %+v", text, got)
			}
			continue
		}
		if d := cmp.Diff(&want, got); err != nil || d != "" {
			t.Errorf("%q: %v %s", text, err, d)
		}
	}
	for _, text := range []string{"", "0", "in=", "up=1M", "1T", "in=1M,", "-1M"} {
		if got, err := parseBandwidth(text); err == nil {
			t.Errorf("%q was accepted as %+v", text, got)
		}
	}
}

func TestExitCode(t *testing.T) {
	for want, err := range map[int]error{
		0: nil,
		1: errors.New("disk full"),
		2: fmt.Errorf("x: %w", usageError{errors.New("unknown flag")}),
		3: errors.Join(&vm.Exit{Reason: vm.Panicked}, nil),
		4: errors.Join(errors.New("undo"), &vm.Exit{Reason: vm.Failed}),
		5: &vm.Exit{Reason: vm.Killed},
	} {
		if got := exitCode(err); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
	}
}

// Every subcommand that a user sees explains itself by example.
func TestHelp(t *testing.T) {
	a := &app{out: io.Discard, err: io.Discard}
	for _, c := range a.root().Commands() {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" {
			continue
		}
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s has no example or no short help", c.Name())
		}
	}
}
