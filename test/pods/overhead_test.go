package pods

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// memory is what a process has, in KiB.
type memory struct {
	rss, pss, anon int64
	guest          int64 // of that (RSS), the guest's own memory
	jit            int64 // and code that TCG has translated: there is none under KVM
}

func (m memory) beside() int64 { return m.rss - m.guest - m.jit }

// memoryOf reads smaps of a process, proc_pid_smaps(5). The guest's memory is the mapping of its size.
func memoryOf(t *testing.T, pid int, guestMiB int64) memory {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var m memory
	var ram, code bool
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) >= 5 && strings.Contains(words[0], "-") { // address, permissions, offset, device, inode
			code, ram = words[1] == "rwxp", false
			continue
		}
		if len(words) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			continue
		}
		switch words[0] {
		case "Size:":
			ram = guestMiB > 0 && kib == guestMiB<<10
		case "Rss:":
			m.rss += kib
			if ram {
				m.guest += kib
			}
			if code {
				m.jit += kib
			}
		case "Pss:":
			m.pss += kib
		case "Anonymous:":
			m.anon += kib
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return m
}

// What a pod needs beside its guest's memory: the figure behind overhead.podFixed of the RuntimeClass, which it must not
// exceed.
func TestOverhead(t *testing.T) {
	n := newNode(t)
	n.images()
	p, err := n.runPod("web", nil)
	if err != nil {
		t.Fatal(err)
	}
	p.start("vm")
	p.report()
	guest := n.vm(t).Config.Memory
	shim := memoryOf(t, n.process("containerd-shim-virtlet-v2"), 0)
	qemu := memoryOf(t, n.process("qemu-system"), guest)
	show := func(name string, m memory) {
		t.Logf("%s: RSS %.1f MiB, PSS %.1f, anonymous %.1f; of the RSS: guest's memory %.1f, translated code %.1f, the rest %.1f", name,
			float64(m.rss)/1024, float64(m.pss)/1024, float64(m.anon)/1024, float64(m.guest)/1024, float64(m.jit)/1024, float64(m.beside())/1024)
	}
	show("shim", shim)
	show("QEMU", qemu)
	if qemu.guest == 0 {
		t.Fatalf("no mapping of QEMU is of %d MiB", guest)
	}
	sum := (shim.rss + qemu.beside()) / 1024
	fixed := podFixed(t)
	t.Logf("a pod needs %d MiB beside its guest's %d MiB; its RuntimeClass says %d MiB", sum, guest, fixed)
	if sum > fixed {
		t.Errorf("%d MiB beside the guest's memory are more than the RuntimeClass's overhead.podFixed of %d MiB", sum, fixed)
	}
}

// podFixed reads the overhead of the RuntimeClass in deploy, in MiB.
func podFixed(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("../../deploy/base/runtimeclass.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^    memory: (\d+)Mi$`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("no memory in %s", text)
	}
	mib, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return mib
}
