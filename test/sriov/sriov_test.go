// Package sriov is the lab of SR-IOV: a machine with an emulated card (igb) and IOMMU, in QEMU, on which virtlet gives
// the card's virtual functions to guests of its own. `make lab-sriov` runs it; it takes some minutes, and so is not part
// of `make test`.
//
//	this machine -- QEMU (TCG) -- level 1: igb, IOMMU, virtlet -- QEMU -- the guest: igbvf
//
// Level 1 has this machine's root, read-only, and runs this test's own binary: TestInside, and TestInsideAgain after it was
// killed with VMs in it and booted anew. On the wire of the card there are two more: one is the world, the other has no VFs.
package sriov

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	labEnv    = "VIRTLET_LAB_SRIOV"    // set: the lab is run, all of it (1) or the parts of TestInside that fit (Pool|Node)
	insideEnv = "VIRTLET_SRIOV_INSIDE" // the lab's directory, in level 1
	partEnv   = "VIRTLET_SRIOV_PART"   // which boot of level 1 it is:
	debianEnv = "VIRTLET_DEBIAN"       // the directory of a cloud image (hack/debian.sh)
	limit     = 20 * time.Minute       // of both boots; it takes six on a machine that does nothing else

	firstBoot, secondBoot = "TestInside", "TestInsideAgain" // the tests that run in them
	shareDir              = "/share"                        // in level 1, and stays
	waiting               = "level 1: waits to be killed"
)

func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(bePlugin())
	}
	os.Exit(m.Run())
}

func TestSRIOV(t *testing.T) {
	if os.Getenv(labEnv) == "" {
		t.Skip("make lab-sriov runs it")
	}
	m := &machine{lab: run(t, "../../hack/sriov.sh"), share: t.TempDir()}
	m.env = map[string]string{
		insideEnv: m.lab, "VIRTLET_BIN": abs(t, "../../bin/virtlet"), "VIRTLET_CNI_BIN": abs(t, "../../bin/cni"),
		debianEnv: run(t, "../../hack/debian.sh"),
	}
	self, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(filepath.Join(m.share, "sriov.test"), self, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	// Level 1's kernel has links that this machine's may not have.
	run(t, "env", "CGO_ENABLED=0", "go", "test", "-c", "-o", filepath.Join(m.share, "podnet.test"), "../../internal/podnet")
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	parts := os.Getenv(labEnv)
	if parts == "1" {
		parts = ""
	}
	if m.boot(ctx, t, firstBoot, parts) {
		m.boot(ctx, t, secondBoot, "")
	}
}

// machine is level 1. What is in share outlives it.
type machine struct {
	lab, share string
	env        map[string]string
}

// boot runs one test in level 1, or those of its parts that fit, until it has ended or waits for the machine to be killed:
// then it is.
func (m *machine) boot(ctx context.Context, t *testing.T, test, parts string) (killed bool) {
	t.Helper()
	m.env[partEnv] = test
	var env strings.Builder
	for k, v := range m.env {
		fmt.Fprintf(&env, "export %s=%s\n", k, v)
	}
	script := fmt.Sprintf(`#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
%s
ln -s %s/modules/* /lib/modules/ 2>/dev/null || { mkdir -p /lib/modules; ln -s %[2]s/modules/* /lib/modules/; }
ip link set lo up
chmod 666 /dev/kvm 2>/dev/null
cd /tmp && %s/sriov.test -test.run '^%s$/(%s)' -test.v -test.timeout 19m
echo "level 1: ended with $?"
sync
[ -e /run/wait ] && echo %q && while :; do sleep 1; done
echo o >/proc/sysrq-trigger
while :; do :; done
`, env.String(), m.lab, shareDir, test, parts, waiting)
	if err := os.WriteFile(filepath.Join(m.share, "run"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := m.command(ctx)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	passed := false
	var said bytes.Buffer
	for lines := bufio.NewScanner(io.TeeReader(out, &said)); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		t.Log(line)
		passed = passed || line == "level 1: ended with 0"
		if line == waiting {
			killed = true
			break
		}
	}
	if !passed || !strings.Contains(said.String(), "--- PASS: "+test+" ") {
		t.Errorf("%s did not pass in level 1", test)
	}
	return killed
}

func (m *machine) command(ctx context.Context) *exec.Cmd {
	const igb, world = "02:00:00:aa:00:01", worldMAC
	return exec.CommandContext(ctx, filepath.Join(m.lab, "qemu"),
		"-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-device", "intel-iommu,intremap=on,caching-mode=on",
		"-device", "pcie-root-port,id=rp1,chassis=1", "-device", "pcie-root-port,id=rp2,chassis=2",
		"-netdev", "hubport,id=n0,hubid=1", "-netdev", "hubport,id=n1,hubid=1", "-netdev", "hubport,id=n2,hubid=1",
		"-device", "igb,netdev=n0,bus=rp1,mac="+igb, "-device", "virtio-net-pci,netdev=n1,romfile=,mac="+world,
		"-device", "e1000e,netdev=n2,bus=rp2,romfile=,mac="+wholeMAC,
		"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
		"-fsdev", "local,id=share,path="+m.share+",security_model=none", "-device", "virtio-9p-pci,fsdev=share,mount_tag=share",
		"-kernel", filepath.Join(m.lab, "vmlinuz"), "-initrd", filepath.Join(m.lab, "initrd"),
		// The check of the timer by loops of the CPU is too short for an emulated one on a busy machine.
		"-append", "console=ttyS0 intel_iommu=on iommu=nopt no_timer_check quiet panic=-1")
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func abs(t *testing.T, path string) string {
	t.Helper()
	p, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(p)
	}
	if err != nil {
		t.Fatal(err, ": make build plugins")
	}
	return p
}
