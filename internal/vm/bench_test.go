package vm

import (
	"context"
	"strings"
	"testing"
	"time"
)

// BenchmarkStart measures a start until QEMU is executed and until it answers, apart from the CNI plugins: those are
// other programs. Run it alone: it needs the node's network namespace of this test binary.
func BenchmarkStart(b *testing.B) {
	s := benchStore(b)
	cfg := testConfig(b, s, "bench")
	var own, plugins, greeting time.Duration
	for b.Loop() {
		begin := time.Now()
		var cni, exec time.Duration
		v, err := Start(context.Background(), s, cfg, func(step, _ string, took time.Duration, done bool) {
			switch {
			case done && strings.HasPrefix(step, "cni "):
				cni = took
			case done && step == "qemu":
				exec = time.Since(begin)
			}
		})
		if err != nil {
			b.Fatal(err)
		}
		own, plugins, greeting = own+exec-cni, plugins+cni, greeting+time.Since(begin)-exec
		b.StopTimer()
		v.Kill()
		if _, err := v.Wait(); err != nil {
			b.Fatal(err)
		}
		if err := s.Remove(context.Background(), cfg.Name, false); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(b.N) }
	b.ReportMetric(each(own), "own-ms/start")
	b.ReportMetric(each(plugins), "plugins-ms/start")
	b.ReportMetric(each(greeting), "qemu-ms/start")
}

func benchStore(b *testing.B) Store {
	dir := b.TempDir()
	return Store{Run: dir + "/run", Data: dir + "/data"}
}
