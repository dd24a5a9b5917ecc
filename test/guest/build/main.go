// Command build makes the test guest: a kernel, an initramfs with busybox, a DHCPv6 client and the scripts below root/,
// and a kernel command line. Everything else is Debian's: packages are fetched by apt-get, which verifies them, and unpacked by
// dpkg-deb; nothing is installed and no privilege is needed.
//
// The result is a directory with the files vmlinuz, initrd, cmdline, and extra, which a test may put behind the initrd for
// more drivers and a guest agent. It is in the folder guest of VIRTLET_CACHE (default: virtlet in the user's cache). Its
// name holds the architecture, the kernel's version, a hash of the other packages' versions and one of this program and its scripts, so a change of any makes another one; it appears complete or not at
// all, and two builds at once are one. A build that is there is used without asking the network whether there are newer
// packages: -refresh asks.
//
// The directory's path is printed on standard output and nothing else is; progress and errors go to standard error.
package main

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// inputs are hashed for the name of the build, and root/ goes into the initramfs.
//
//go:embed *.go root
var inputs embed.FS

// programs are the packages that the guest's programs are in, beside the kernel's. busybox has a client for DHCPv4 only;
// of Debian's DHCPv6 clients dhcpcd is the one that looks at router advertisements. It needs the C library, which makes
// up most of what it adds to the initramfs (2.5 MB).
var programs = []string{
	"busybox-static", "dhcpcd-base", "libc6",
	"qemu-guest-agent", "libglib2.0-0", "libpcre2-8-0", "libudev1", "liburing2", "libnuma1", // of extra
}

// limit is how long a build may take; most of it is the download of the kernel package (27 MB).
const limit = 10 * time.Minute

func main() {
	refresh := flag.Bool("refresh", false, "look for newer packages even if there is a guest already")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dir, err := run(ctx, runtime.GOARCH, *refresh)
	if err != nil {
		fmt.Fprintln(os.Stderr, "build test guest:", err)
		os.Exit(1)
	}
	fmt.Println(dir)
}

// run gives the directory of a guest, an existing one if that will do.
func run(ctx context.Context, arch string, refresh bool) (string, error) {
	if _, ok := consoles[arch]; !ok {
		return "", fmt.Errorf("no guest for architecture %q: only amd64 and arm64", arch)
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	hash, err := hashInputs()
	if err != nil {
		return "", err
	}
	if dir := newest(cache, arch, hash); dir != "" && !refresh {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if dir := newest(cache, arch, hash); dir != "" && !refresh { // made while this one waited for the lock
		return dir, nil
	}
	return build(ctx, cache, arch, hash)
}

// build fetches, assembles and puts the finished guest in its place. The lock is held.
func build(ctx context.Context, cache, arch, hash string) (dir string, err error) {
	apt := apt{lists: filepath.Join(cache, "apt"), arch: arch}
	temp, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	tree, done := filepath.Join(temp, "tree"), filepath.Join(temp, "guest")
	for {
		pkgs, err := apt.packages(ctx, programs)
		if err != nil {
			return "", err
		}
		dir = filepath.Join(cache, fmt.Sprintf("%s-%s-%s-%s", arch, pkgs[0].version, hashVersions(pkgs[1:]), hash))
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
		fmt.Fprintf(os.Stderr, "guest: making one of %v\n", pkgs)
		if err = apt.unpack(ctx, temp, tree, pkgs); err == nil {
			break
		}
		// Lists that are out of date name files that are no longer there: once more with fresh ones, which name others.
		if apt.private {
			return "", err
		}
		if failed := apt.update(ctx); failed != nil {
			return "", errors.Join(err, failed)
		}
	}
	if err := os.Mkdir(done, 0o755); err != nil {
		return "", err
	}
	if err := assemble(ctx, tree, done, arch); err != nil {
		return "", err
	}
	return dir, os.Rename(done, dir)
}

// cacheDir gives the directory of all builds.
func cacheDir() (string, error) {
	dir := os.Getenv("VIRTLET_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("find cache directory: %w; set VIRTLET_CACHE", err)
		}
		dir = filepath.Join(user, "virtlet")
	}
	return filepath.Abs(filepath.Join(dir, "guest"))
}

// hashInputs gives the first 12 hexadecimal digits of a hash of all that is embedded, names and contents.
func hashInputs() (string, error) {
	h := sha256.New()
	err := fs.WalkDir(inputs, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := inputs.ReadFile(path)
		fmt.Fprintf(h, "%s %d\n%s", path, len(b), b)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:12], err
}

// hashVersions gives the first 6 hexadecimal digits of a hash of packages and their versions.
func hashVersions(pkgs []pkg) string {
	sum := sha256.Sum256(fmt.Append(nil, pkgs))
	return hex.EncodeToString(sum[:])[:6]
}

// newest gives the build of this architecture and these inputs that was made last, "" if there is none.
func newest(cache, arch, hash string) string {
	dirs, _ := filepath.Glob(filepath.Join(cache, arch+"-*-"+hash)) // fails on a bad pattern only
	if len(dirs) == 0 {
		return ""
	}
	made := func(dir string) time.Time {
		info, err := os.Stat(dir)
		if err != nil {
			return time.Time{}
		}
		return info.ModTime()
	}
	return slices.MaxFunc(dirs, func(a, b string) int { return made(a).Compare(made(b)) })
}

// lock waits until no other build runs. The kernel gives the lock back when the process ends, however it ends.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
