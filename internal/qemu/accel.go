package qemu

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// kvmDevice is where the kernel offers virtualisation.
const kvmDevice = "/dev/kvm"

// DetectAccel picks KVM only where the CPU has it and /dev/kvm opens, otherwise TCG. why is one sentence for people.
// root is the root of the file system, "/". A machine that is itself virtual can have a /dev/kvm without the CPU's
// flag: guests hang under such a one, so on amd64 the flag decides.
func DetectAccel(root string) (a Accel, why string) { return detectAccel(root, runtime.GOARCH) }

func detectAccel(root, arch string) (Accel, string) {
	switch arch {
	case "amd64":
		flag, err := cpuFlag(filepath.Join(root, "proc/cpuinfo"))
		if err != nil {
			return TCG, fmt.Sprintf("the CPU's features cannot be read: %v", err)
		}
		if flag == "" {
			return TCG, "the CPU offers no virtualisation (neither vmx nor svm in /proc/cpuinfo)"
		}
		why := kvmOpens(root)
		if why == "" {
			return KVM, fmt.Sprintf("the CPU has %s and %s opens", flag, kvmDevice)
		}
		return TCG, fmt.Sprintf("the CPU has %s, but %s", flag, why)
	case "arm64": // cpuinfo says nothing of EL2; the kernel offers the device only when it was started there
		if why := kvmOpens(root); why != "" {
			return TCG, why
		}
		return KVM, kvmDevice + " opens"
	}
	return TCG, fmt.Sprintf("KVM is not served on %s", arch)
}

// kvmOpens gives "" or why /dev/kvm cannot be used.
func kvmOpens(root string) string {
	f, err := os.OpenFile(filepath.Join(root, kvmDevice), os.O_RDWR, 0)
	if err != nil {
		return fmt.Sprintf("%s does not open: %v", kvmDevice, err)
	}
	f.Close()
	return ""
}

// cpuFlag gives vmx (Intel) or svm (AMD) when the CPU has it.
func cpuFlag(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		key, value, _ := strings.Cut(s.Text(), ":")
		if strings.TrimSpace(key) != "flags" { // "vmx flags" is a list of its own
			continue
		}
		flags := strings.Fields(value)
		for _, want := range []string{"vmx", "svm"} {
			if slices.Contains(flags, want) {
				return want, nil
			}
		}
		return "", nil // the CPUs of one machine are alike
	}
	return "", nil
}
