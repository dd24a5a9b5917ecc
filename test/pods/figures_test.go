package pods

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const programImage = "localhost/program:1"

// BenchmarkPods makes and removes pods of this runtime and of runc by turns, on the same node, and prints a table of what
// each takes: docs/kubernetes.md has one. QEMU's start is part of it, and its firmware's work on the same CPUs, but no boot
// of a guest: the kernel stops at its first instruction.
func BenchmarkPods(b *testing.B) {
	if os.Getenv("VIRTLET_RUNC") == "" {
		b.Skip("needs runc to compare with: make bench-pods")
	}
	n := newNode(b)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		b.Skip("needs a program for containers: ", err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		b.Fatal(err)
	}
	forever := []string{"/busybox", "sleep", "1000000"}
	n.load(writeImage(b, guestImage, file{"boot/vmlinuz", haltKernel()}))
	n.load(writeProgram(b, programImage, forever, file{"busybox", program}))
	n.load(writeProgram(b, pauseImage, forever, file{"busybox", program}))
	before := n.state()
	runtimes := []*measured{
		{n: n, handler: "virtlet", image: guestImage, shim: "containerd-shim-virtlet-v2"},
		{n: n, handler: "runc", image: programImage, shim: "containerd-shim-runc-v2"},
	}
	const ones, tens = 10, 5
	for range b.N {
		for i := range 2 + ones { // the first two fill caches
			for _, r := range runtimes {
				r.keep = i >= 2
				r.one()
			}
		}
		for range tens {
			for _, r := range runtimes {
				r.ten()
			}
		}
	}
	n.left(before)
	out := "| | virtlet | runc | ratio |\n|---|---|---|---|\n"
	for _, what := range runtimes[0].order {
		v, r := runtimes[0].seen[what], runtimes[1].seen[what]
		var ratios []float64 // of neighbours: what else the machine does slows both down
		for i := range min(len(v), len(r)) {
			ratios = append(ratios, v[i]/r[i])
		}
		out += fmt.Sprintf("| %s | %s | %s | %s |\n", what, spread(v, 1), spread(r, 1), spread(ratios, 2))
	}
	fmt.Print(out)
}

// haltKernel is a Linux kernel to a boot loader, and a stop to the CPU: a header of the boot protocol, version 2.0
// (Documentation/arch/x86/boot.rst), whose real-mode entry jumps over itself to cli, hlt.
func haltKernel() []byte {
	const sector = 512
	k := make([]byte, 3*sector)
	k[0x1f1] = 1 // sectors of real-mode code beside the first
	copy(k[0x1fe:], []byte{0x55, 0xaa, 0xeb, 0x66})
	copy(k[0x202:], "HdrS")
	k[0x207] = 2    // version 2.0
	k[0x211] = 0x01 // loaded high
	copy(k[0x268:], []byte{0xfa, 0xf4, 0xeb, 0xfd})
	return k
}

// measured is one runtime and what was seen of it.
type measured struct {
	n                    *node
	handler, image, shim string
	keep                 bool
	order                []string // of what is in seen
	seen                 map[string][]float64
}

func (m *measured) saw(what string, value float64) {
	if !m.keep {
		return
	}
	if m.seen == nil {
		m.seen = map[string][]float64{}
	}
	if _, ok := m.seen[what]; !ok {
		m.order = append(m.order, what)
	}
	m.seen[what] = append(m.seen[what], value)
}

// made is a pod with its container, which runs.
type made struct {
	*pod
	sandbox, all time.Duration // since the beginning
}

// make makes a pod, until it is ready as the kubelet sees it: its container runs.
func (m *measured) make() (*made, error) {
	m.n.t.Helper()
	begin := time.Now()
	p, err := m.n.runPodWith(m.handler, fmt.Sprintf("pod%d", pods.Add(1)), func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"virtlet.cloud/memory": "64M"}
	})
	if err != nil {
		return nil, err
	}
	sandbox := time.Since(begin)
	c, err := m.n.runtime.CreateContainer(m.n.limit(), &cri.CreateContainerRequest{
		PodSandboxId: p.id, SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: m.image}, LogPath: "c.log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
		},
	})
	if err != nil {
		return nil, err
	}
	if _, err := m.n.runtime.StartContainer(m.n.limit(), &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return nil, err
	}
	return &made{p, sandbox, time.Since(begin)}, nil
}

// atRest is when the memory of both shims no longer changes.
const atRest = 2 * time.Second

var pods atomic.Int32 // of all runtimes: their names and cgroups differ

// unmake removes a pod at once, without a grace.
func (m *made) unmake() error {
	_, err := m.runtime.StopPodSandbox(m.limit(), &cri.StopPodSandboxRequest{PodSandboxId: m.id})
	if err == nil {
		_, err = m.runtime.RemovePodSandbox(m.limit(), &cri.RemovePodSandboxRequest{PodSandboxId: m.id})
	}
	return err
}

// one measures a pod alone.
func (m *measured) one() {
	m.n.t.Helper()
	p, err := m.make()
	if err != nil {
		m.n.t.Fatal(err)
	}
	m.saw("sandbox, ms", ms(p.sandbox))
	m.saw("pod ready, ms", ms(p.all))
	m.memory(1)
	begin := time.Now()
	if err := p.unmake(); err != nil {
		m.n.t.Fatal(err)
	}
	m.saw("pod removed, ms", ms(time.Since(begin)))
}

// ten measures ten pods at once.
func (m *measured) ten() {
	m.n.t.Helper()
	var all errgroup.Group
	var made [10]*made
	begin := time.Now()
	for i := range made {
		all.Go(func() (err error) { made[i], err = m.make(); return err })
	}
	if err := all.Wait(); err != nil {
		m.n.t.Fatal(err)
	}
	m.saw("ten pods ready, ms", ms(time.Since(begin)))
	m.memory(len(made))
	begin = time.Now()
	for _, p := range made {
		all.Go(p.unmake)
	}
	if err := all.Wait(); err != nil {
		m.n.t.Fatal(err)
	}
	m.saw("ten pods removed, ms", ms(time.Since(begin)))
}

// memory reads what the shims of some pods have: resident, and of that what no other process shares.
func (m *measured) memory(count int) {
	m.n.t.Helper()
	time.Sleep(atRest)
	found := 0
	for pid, command := range m.n.processes() {
		if !strings.Contains(command, m.shim) {
			continue
		}
		found++
		of := "shim"
		if count > 1 { // which share the program
			of = fmt.Sprintf("shim of %d pods", count)
			m.saw(of+", not shared, MB", m.n.rollup(pid, "Private_Clean:")+m.n.rollup(pid, "Private_Dirty:"))
		}
		m.saw(of+", resident, MB", m.n.rollup(pid, "Rss:"))
	}
	if found != count {
		m.n.t.Errorf("%d shims of %d pods", found, count)
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// spread gives the median and, in brackets, the middle half of what was seen.
func spread(seen []float64, digits int) string {
	sorted := slices.Sorted(slices.Values(seen))
	at := func(q float64) float64 { return sorted[int(q*float64(len(sorted)-1)+0.5)] }
	return fmt.Sprintf("%.*f (%.*f-%.*f)", digits, at(0.5), digits, at(0.25), digits, at(0.75))
}
