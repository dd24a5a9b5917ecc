// Package sriov is the lab of SR-IOV: a machine with an emulated card (igb) and IOMMU, in QEMU, on which virtlet gives
// the card's virtual functions to guests of its own. `make lab-sriov` runs it; it takes some minutes, and so is not part
// of `make test`.
//
//	this machine -- QEMU (TCG) -- level 1: igb, IOMMU, virtlet -- QEMU -- the guest: igbvf
//
// Level 1 has this machine's root, read-only, and runs this test's own binary: TestInside. On the wire of the card there
// is a second one, as the world.
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
	labEnv    = "VIRTLET_LAB_SRIOV"    // set: the lab is run
	insideEnv = "VIRTLET_SRIOV_INSIDE" // the lab's directory, in level 1
	limit     = 10 * time.Minute
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
	lab := run(t, "../../hack/sriov.sh")
	bin, cni := abs(t, "../../bin/virtlet"), abs(t, "../../bin/cni")
	share := t.TempDir()
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
export %s=%s VIRTLET_BIN=%s VIRTLET_CNI_BIN=%s
ip link set lo up
chmod 666 /dev/kvm 2>/dev/null
cd /tmp && /share/sriov.test -test.run '^TestInside$' -test.v -test.timeout 9m
echo "level 1: ended with $?"
sync
echo o >/proc/sysrq-trigger
while :; do :; done
`, insideEnv, lab, bin, cni)
	for name, data := range map[string][]byte{"sriov.test": self, "run": []byte(script)} {
		if err := os.WriteFile(filepath.Join(share, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	const igb, world = "02:00:00:aa:00:01", worldMAC
	cmd := exec.CommandContext(ctx, filepath.Join(lab, "qemu"),
		"-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-device", "intel-iommu,intremap=on,caching-mode=on", "-device", "pcie-root-port,id=rp1,chassis=1",
		"-netdev", "hubport,id=n0,hubid=1", "-netdev", "hubport,id=n1,hubid=1",
		"-device", "igb,netdev=n0,bus=rp1,mac="+igb, "-device", "virtio-net-pci,netdev=n1,romfile=,mac="+world,
		"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
		"-fsdev", "local,id=share,path="+share+",security_model=none", "-device", "virtio-9p-pci,fsdev=share,mount_tag=share",
		"-kernel", filepath.Join(lab, "vmlinuz"), "-initrd", filepath.Join(lab, "initrd"),
		// The check of the timer by loops of the CPU is too short for an emulated one on a busy machine.
		"-append", "console=ttyS0 intel_iommu=on iommu=nopt no_timer_check quiet panic=-1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); cmd.Wait() }()
	passed := false
	var said bytes.Buffer
	for lines := bufio.NewScanner(io.TeeReader(out, &said)); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		t.Log(line)
		passed = passed || line == "level 1: ended with 0"
	}
	if !passed || !strings.Contains(said.String(), "--- PASS: TestInside") {
		t.Error("level 1 did not pass")
	}
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
