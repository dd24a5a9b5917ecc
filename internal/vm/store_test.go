package vm

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func testStore(t *testing.T) Store {
	t.Helper()
	dir := t.TempDir()
	return Store{Run: filepath.Join(dir, "run"), Data: filepath.Join(dir, "data")}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "web", "web-1", "0", strings.Repeat("x", 63)} {
		if err := CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "-a", "a-", "Web", "a b", "a\nb", "é", "cni", "ipam", strings.Repeat("x", 64), "a_b", "a.b"} {
		if CheckName(name) == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

func TestOneNameOneSupervisor(t *testing.T) {
	s := testStore(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for range 20 {
		wg.Go(func() {
			l, err := s.create("web")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
				t.Cleanup(func() { l.release() })
				return
			}
			if !errors.Is(err, ErrExists) {
				t.Errorf("create: %v, want ErrExists", err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of 20 got the name", won)
	}
}

func TestLock(t *testing.T) {
	s := testStore(t)
	if _, err := s.lock("web"); !errors.Is(err, ErrNotFound) {
		t.Errorf("lock of nothing: %v", err)
	}
	l, err := s.create("web")
	if err != nil {
		t.Fatal(err)
	}
	if !s.alive("web") {
		t.Error("a locked VM is not alive")
	}
	if _, err := s.lock("web"); !errors.Is(err, ErrRunning) {
		t.Errorf("second lock: %v", err)
	}
	first := l
	if free, err := s.await(context.Background(), "web", 50*time.Millisecond); free || err != nil {
		t.Errorf("await of a locked VM: %v, %v", free, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.await(ctx, "web", time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled await: %v", err)
	}
	time.AfterFunc(50*time.Millisecond, func() { first.release() })
	if free, err := s.await(context.Background(), "web", 10*time.Second); !free || err != nil {
		t.Errorf("await of a lock that is given up: %v, %v", free, err)
	}
	l, err = s.lock("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.erase("web"); err != nil {
		t.Fatal(err)
	}
	l.release()
	if names, err := s.names(); err != nil || len(names) != 0 {
		t.Errorf("after erase: %v, %v", names, err)
	}
}

func TestStates(t *testing.T) {
	s := testStore(t)
	if _, err := s.Get("web"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of nothing: %v", err)
	}
	if all, err := s.List(); err != nil || len(all) != 0 {
		t.Errorf("List of nothing: %v, %v", all, err)
	}
	l, err := s.create("web")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := s.Get("web"); err != nil || st.Status != Starting || st.Config.Name != "web" {
		t.Errorf("before its first state: %+v, %v", st, err)
	}
	write := func(status Status) {
		t.Helper()
		if err := writeJSON(s.run("web", "state.json"), State{Config: Config{Name: "web"}, Status: status}, false); err != nil {
			t.Fatal(err)
		}
	}
	write(Running)
	if st, _ := s.Get("web"); st.Status != Running {
		t.Errorf("a running VM is %s", st.Status)
	}
	l.release()
	if st, _ := s.Get("web"); st.Status != Dead {
		t.Errorf("a VM whose supervisor has gone is %s", st.Status)
	}
	if _, err := s.create("web"); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "gc") {
		t.Errorf("a dead VM's name: %v, want advice", err)
	}
	write(Stopped)
	if st, _ := s.Get("web"); st.Status != Stopped {
		t.Errorf("a stopped VM is %s", st.Status)
	}
	if _, err := s.create("web"); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "virtlet rm web") {
		t.Errorf("a stopped VM's name: %v, want advice", err)
	}
	// After a reboot only the data directory is left.
	os.RemoveAll(s.Run)
	if st, err := s.Get("web"); err != nil || st.Status != Dead {
		t.Errorf("after a reboot: %+v, %v", st, err)
	}
	found, err := s.Clean(context.Background(), CleanOptions{})
	if err != nil || len(found) != 1 {
		t.Errorf("clean after a reboot: %v, %v", found, err)
	}
	if names, _ := s.names(); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestAbrokenStateHidesNoOther(t *testing.T) {
	s := testStore(t)
	held := map[string]lock{}
	for _, name := range []string{"a", "b"} {
		l, err := s.create(name)
		if err != nil {
			t.Fatal(err)
		}
		held[name] = l
		defer l.release()
	}
	if err := os.WriteFile(s.run("a", "state.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := s.List()
	if err == nil || !strings.Contains(err.Error(), "state.json") {
		t.Errorf("error %v, want one that names the file", err)
	}
	if len(all) != 1 || all[0].Config.Name != "b" {
		t.Errorf("List gave %+v", all)
	}
	if err := s.Remove(context.Background(), "a", true); !errors.Is(err, ErrRunning) {
		t.Errorf("rm -f of one that is alive: %v", err)
	}
	held["a"].release()
	if err := s.Remove(context.Background(), "a", true); err != nil {
		t.Errorf("rm -f: %v", err)
	}
	if names, _ := s.names(); len(names) != 1 {
		t.Errorf("left: %v", names)
	}
}

func TestWriteJSONIsWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.json")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 200 {
			if err := writeJSON(path, make([]int, i*100), false); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		if b, err := os.ReadFile(path); err == nil && !json.Valid(b) {
			t.Fatalf("half a file of %d bytes was seen", len(b))
		}
		select {
		case <-done:
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			return
		default:
		}
	}
}

// Whoever cleans up does not take a VM that is just being made for one that nobody cares for.
func TestCleanBesideCreate(t *testing.T) {
	s := testStore(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if found, err := s.Clean(context.Background(), CleanOptions{}); err != nil || len(found) > 0 {
					t.Errorf("found %v, %v", found, err)
					return
				}
			}
		})
	}
	for range 300 {
		l, err := s.create("web")
		if err != nil {
			t.Errorf("create: %v", err)
			break
		}
		if _, err := s.Get("web"); err != nil {
			t.Errorf("get: %v", err)
		}
		if err := s.erase("web"); err != nil {
			t.Errorf("erase: %v", err)
		}
		l.release()
	}
	close(stop)
	wg.Wait()
	if left, _ := filepath.Glob(filepath.Join(s.Run, ".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
