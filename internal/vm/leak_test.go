package vm

import (
	"context"
	"os"
	"runtime"
	"testing"
	"time"
)

// A process that supervises one VM after another, as the Kubernetes front end's will not but tests do, keeps nothing of
// those that have ended.
func TestEndedVMsCostNothing(t *testing.T) {
	s := testStore(t)
	cfg := testConfig(t, s, "again")
	once := func() {
		t.Helper()
		v, err := Start(context.Background(), s, cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Kill(); err != nil {
			t.Error(err)
		}
		if _, err := v.Wait(); err != nil {
			t.Error(err)
		}
		if err := s.Remove(context.Background(), cfg.Name, false); err != nil {
			t.Error(err)
		}
	}
	once() // what is opened once for all
	files, goroutines, threads := count(t, "/proc/self/fd"), runtime.NumGoroutine(), count(t, "/proc/self/task")
	const times = 8
	for range times {
		once()
	}
	settled := func() bool {
		return count(t, "/proc/self/fd") <= files && runtime.NumGoroutine() <= goroutines
	}
	for end := time.Now().Add(5 * time.Second); !settled() && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
	}
	if !settled() {
		t.Errorf("after %d VMs: %d descriptors and %d goroutines, before: %d and %d",
			times, count(t, "/proc/self/fd"), runtime.NumGoroutine(), files, goroutines)
	}
	if now := count(t, "/proc/self/task"); now > threads+times {
		t.Errorf("after %d VMs: %d threads, before: %d", times, now, threads)
	}
}

func count(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
