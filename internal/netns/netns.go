// Package netns is the only door into a network namespace: it makes, pins, opens and removes namespaces, and runs
// code inside one.
//
// An [NS] owns one operating-system thread that entered the namespace when the NS was opened and never leaves it, so
// entering costs once per VM and no other goroutine can ever find itself in the wrong namespace. Sockets and netlink
// handles opened inside by [NS.Do] stay usable outside: the kernel binds a socket to the namespace it was made in.
// Whoever opens an NS closes it; closing ends the thread, not the namespace.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Dir is where named namespaces are pinned. It is iproute2's directory, so that `ip netns exec NAME` works on them.
const Dir = "/run/netns"

// ErrExist says that a live namespace of that name is there already.
var ErrExist = errors.New("namespace exists")

// ErrNotNamespace says that a path is there but is no network namespace.
var ErrNotNamespace = errors.New("not a network namespace")

// ErrClosed is what Do answers after Close.
var ErrClosed = errors.New("namespace is closed")

func init() {
	// Netlink errors then carry the kernel's own words (NETLINK_EXT_ACK) instead of a bare EINVAL.
	nl.EnableErrorMessageReporting = true
}

// NS is an open network namespace with a thread inside. Its methods may be called by several goroutines; calls of Do
// run one after another.
type NS struct {
	path  string
	calls chan func()
	done  chan struct{} // closed when the thread has ended

	rtnl *netlink.Handle
	nft  *nftables.Conn

	mu     sync.Mutex
	closed bool
}

// Path gives the file that the namespace is pinned at.
func (n *NS) Path() string { return n.path }

// Open enters the network namespace pinned at path, such as /run/netns/NAME or /proc/PID/ns/net.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer f.Close()
	if ok, err := isNetNS(f); err != nil {
		return nil, fmt.Errorf("open network namespace %q: %w", path, err)
	} else if !ok {
		return nil, fmt.Errorf("open network namespace %q: %w", path, ErrNotNamespace)
	}
	return start(path, func() error {
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %q: %w (needs CAP_SYS_ADMIN)", path, err)
		}
		return nil
	})
}

// Create makes a new network namespace, pins it at Dir/name and opens it. The loopback is up, as in any pod. A stale
// file of that name (a crash between two steps leaves one) is replaced; a live namespace gives [ErrExist].
func Create(name string) (*NS, error) {
	if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("create network namespace: bad name %q", name)
	}
	path := filepath.Join(Dir, name)
	if err := prepareDir(); err != nil {
		return nil, fmt.Errorf("create network namespace %q: %w", name, err)
	}
	if err := claim(path); err != nil {
		return nil, fmt.Errorf("create network namespace %q: %w", name, err)
	}
	ns, err := start(path, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w (needs CAP_SYS_ADMIN)", err)
		}
		src := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(src, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin at %s: %w", path, err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create network namespace %q: %w", name, err), Remove(path))
	}
	if err := ns.loopbackUp(); err != nil {
		ns.Close()
		return nil, errors.Join(fmt.Errorf("create network namespace %q: %w", name, err), Remove(path))
	}
	return ns, nil
}

// Remove unpins the namespace at path; the kernel frees it when its last process and descriptor are gone. A path that
// is not there is no error.
func Remove(path string) error {
	// EINVAL: nothing is mounted there, a crash left the plain file. Detaching, as others may hold a copy of the mount.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin network namespace %q: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %q: %w", path, err)
	}
	return nil
}

// Exists says whether a live network namespace is pinned at path.
func Exists(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	ok, err := isNetNS(f)
	return ok && err == nil
}

// Do runs fn on the thread inside the namespace and gives its error. fn must not start goroutines that expect to be
// inside, nor call Do.
func (n *NS) Do(fn func() error) error {
	res := make(chan error, 1)
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return fmt.Errorf("network namespace %q: %w", n.path, ErrClosed)
	}
	n.calls <- func() { res <- fn() }
	n.mu.Unlock()
	return <-res
}

// Netlink gives the rtnetlink handle of the namespace. NS owns it: Close closes it.
func (n *NS) Netlink() *netlink.Handle { return n.rtnl }

// Nftables gives the nftables connection of the namespace. NS owns it: Close closes it. It collects changes until they
// are flushed, so only one at a time may use it.
func (n *NS) Nftables() *nftables.Conn { return n.nft }

// connect opens both handles. It runs inside.
func (n *NS) connect() (err error) {
	if n.rtnl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open rtnetlink in %q: %w", n.path, err)
	}
	// A lasting connection keeps its socket, and so the namespace.
	if n.nft, err = nftables.New(nftables.AsLasting()); err != nil {
		n.rtnl.Close()
		return fmt.Errorf("open nftables in %q: %w (needs CONFIG_NF_TABLES)", n.path, err)
	}
	return nil
}

// Close ends the thread and closes the handles. It is safe to call again.
func (n *NS) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	close(n.calls)
	n.mu.Unlock()
	<-n.done
	n.rtnl.Close()
	if err := n.nft.CloseLasting(); err != nil {
		return fmt.Errorf("close nftables in %q: %w", n.path, err)
	}
	return nil
}

// start runs enter on a fresh thread and keeps the thread for Do.
func start(path string, enter func() error) (*NS, error) {
	n := &NS{path: path, calls: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go n.thread(enter, entered)
	if err := <-entered; err != nil {
		return nil, err
	}
	return n, nil
}

func (n *NS) thread(enter func() error, entered chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The process's first thread cannot end: it would stay in the namespace, pin it, and be what /proc/PID/ns/net
		// shows. Hold it until another thread has taken the work.
		handed := make(chan error)
		go n.thread(enter, handed)
		err := <-handed
		runtime.UnlockOSThread()
		entered <- err
		return
	}
	defer close(n.done)
	err := enter()
	if err == nil {
		err = n.connect()
	}
	if err != nil {
		entered <- err
		return // still locked: the runtime ends this thread, whatever namespace it is in
	}
	entered <- nil
	for fn := range n.calls {
		fn()
	}
}

// Dump calls list until it gives one consistent answer: the kernel marks a dump that a concurrent change cut in two.
func Dump[T any](list func() ([]T, error)) ([]T, error) {
	const tries = 10
	var err error
	for range tries {
		var all []T
		if all, err = list(); err == nil {
			return all, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("the namespace keeps changing under the dump (%d tries): %w", tries, err)
}

func (n *NS) loopbackUp() error {
	const loopback = 1 // LOOPBACK_IFINDEX: the kernel makes lo first in every namespace
	if err := n.rtnl.LinkSetUp(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: loopback}}); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

// prepareDir makes Dir a shared mount as iproute2 does, so that a namespace pinned in one mount namespace is seen,
// and can be unpinned, in all.
func prepareDir() error {
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", Dir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) { // EINVAL: not a mount point yet
		return err
	}
	if err := unix.Mount(Dir, Dir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make %s a mount point: %w (needs CAP_SYS_ADMIN)", Dir, err)
	}
	return unix.Mount("", Dir, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// claim makes the empty file that the namespace is mounted on.
func claim(path string) error {
	for range 2 {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
		if err == nil {
			return f.Close()
		}
		if !errors.Is(err, os.ErrExist) {
			return err
		}
		if Exists(path) {
			return fmt.Errorf("%w at %s", ErrExist, path)
		}
		if err := Remove(path); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w at %s", ErrExist, path)
}

func isNetNS(f *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, err
	}
	if st.Type != unix.NSFS_MAGIC {
		return false, nil
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	return kind == unix.CLONE_NEWNET, err
}
