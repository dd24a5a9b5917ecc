package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

func create(t *testing.T) *NS {
	t.Helper()
	needRoot(t)
	ns, err := Create(fmt.Sprintf("vlt-ns-%d-%s", os.Getpid(), strings.ToLower(filepath.Base(t.Name()))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		if err := Remove(ns.Path()); err != nil {
			t.Error(err)
		}
	})
	return ns
}

func netID(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestCreateRunsInsideAndLeavesOthersOutside(t *testing.T) {
	ns := create(t)
	outside := netID(t, "/proc/self/ns/net")
	want := netID(t, ns.Path())
	if want == outside {
		t.Fatal("the new namespace is the old one")
	}
	err := ns.Do(func() error {
		if got := netID(t, fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); got != want {
			t.Errorf("Do ran in namespace %d, want %d", got, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if got := netID(t, fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())); got != outside {
					t.Errorf("a goroutine outside Do is in namespace %d", got)
				}
			})
		}
		wg.Wait()
	}
	if got := netID(t, fmt.Sprintf("/proc/%d/ns/net", os.Getpid())); got != outside {
		t.Errorf("the process's first thread is in namespace %d", got)
	}
}

func TestLoopbackIsUpAndNetlinkWorksOutside(t *testing.T) {
	ns := create(t)
	links, err := Dump(ns.Netlink().LinkList)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if a := l.Attrs(); a.Name == "lo" && a.RawFlags&unix.IFF_UP == 0 {
			t.Error("lo is down")
		}
		if l.Attrs().Name == "eth0" {
			t.Error("the handle shows another namespace's links")
		}
	}
}

func TestCreateTwice(t *testing.T) {
	ns := create(t)
	if _, err := Create(filepath.Base(ns.Path())); !errors.Is(err, ErrExist) {
		t.Fatalf("second Create: %v, want ErrExist", err)
	}
	if !Exists(ns.Path()) {
		t.Fatal("the refused Create removed the namespace")
	}
}

func TestStaleFileIsReplaced(t *testing.T) {
	needRoot(t)
	if err := prepareDir(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("vlt-stale-%d", os.Getpid())
	path := filepath.Join(Dir, name)
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	defer Remove(path)
	if Exists(path) {
		t.Error("a plain file counts as a namespace")
	}
	if _, err := Open(path); !errors.Is(err, ErrNotNamespace) {
		t.Errorf("Open of a plain file: %v", err)
	}
	ns, err := Create(name)
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
}

func TestOpenRemoveClose(t *testing.T) {
	ns := create(t)
	again, err := Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
	if err := again.Do(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
	for range 2 {
		if err := Remove(ns.Path()); err != nil {
			t.Fatalf("Remove: %v", err)
		}
	}
	if _, err := Open(ns.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of a removed namespace: %v", err)
	}
	if _, err := Open("/proc/self/ns/mnt"); !errors.Is(err, ErrNotNamespace) {
		t.Errorf("Open of a mount namespace: %v", err)
	}
}

func TestBadNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "../x"} {
		if ns, err := Create(name); err == nil {
			ns.Close()
			t.Errorf("Create(%q) worked", name)
		}
	}
}

func TestDumpRetries(t *testing.T) {
	n := 0
	got, err := Dump(func() ([]int, error) {
		if n++; n < 3 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(got) != 2 || n != 3 {
		t.Errorf("got %v, %v after %d calls", got, err, n)
	}
	if _, err := Dump(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("endless interruption: %v", err)
	}
	if _, err := Dump(func() ([]int, error) { return nil, unix.EPERM }); !errors.Is(err, unix.EPERM) {
		t.Errorf("other error: %v", err)
	}
}

func TestThreadsEnd(t *testing.T) {
	needRoot(t)
	ns := create(t)
	count := func() int {
		e, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	fds := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	threads, files := count(), fds()
	for range 200 {
		n, err := Open(ns.Path())
		if err != nil {
			t.Fatal(err)
		}
		n.Close()
	}
	if now := count(); now > threads+20 {
		t.Errorf("%d threads before, %d after 200 opens", threads, now)
	}
	if now := fds(); now > files+2 {
		t.Errorf("%d descriptors before, %d after 200 opens", files, now)
	}
}

func BenchmarkOpenClose(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	ns, err := Create(fmt.Sprintf("vlt-bench-%d", os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { ns.Close(); Remove(ns.Path()) }()
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			n, err := Open(ns.Path())
			if err != nil {
				b.Fatal(err)
			}
			n.Close()
		}
	})
	b.Run("do", func(b *testing.B) {
		for b.Loop() {
			if err := ns.Do(func() error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}
