package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDetectAccel(t *testing.T) {
	const (
		intel = "processor\t: 0\nflags\t\t: fpu vmx sse\nvmx flags\t: vnmi\n"
		amd   = "flags : fpu svm\n"
		plain = "flags : fpu vmx_not svml\nvmx flags : vmx svm\nmodel name : vmx\n"
		arm   = "Features : fp asimd\n"
	)
	for _, tt := range []struct {
		name, arch, cpuinfo string
		kvm                 bool
		want                Accel
		why                 string
	}{
		{"Intel", "amd64", intel, true, KVM, "vmx"},
		{"AMD", "amd64", amd, true, KVM, "svm"},
		{"a device without the CPU's flag", "amd64", plain, true, TCG, "neither vmx nor svm"},
		{"the flag without a device", "amd64", intel, false, TCG, "/dev/kvm does not open"},
		{"neither", "amd64", plain, false, TCG, "neither vmx nor svm"},
		{"no cpuinfo", "amd64", "", true, TCG, "cannot be read"},
		{"arm64", "arm64", arm, true, KVM, "opens"},
		{"arm64 without a device", "arm64", arm, false, TCG, "does not open"},
		{"another", "riscv64", "", true, TCG, "riscv64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			write := func(name, s string) {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if tt.cpuinfo != "" {
				write("proc/cpuinfo", tt.cpuinfo)
			}
			if tt.kvm {
				write("dev/kvm", "")
			}
			got, why := detectAccel(root, tt.arch)
			if got != tt.want || !strings.Contains(why, tt.why) || strings.ContainsAny(why, "\n") {
				t.Errorf("%s: %q, want %s with %q", got, why, tt.want, tt.why)
			}
		})
	}
	if a, why := DetectAccel("/"); a == "" || why == "" {
		t.Errorf("this machine: %q, %q", a, why)
	}
}
