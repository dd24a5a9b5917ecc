package testnet

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Plugins gives a directory with the reference plugins of the version in go.mod: the one that VIRTLET_CNI_BIN names, or
// one in the user's cache that is built once.
func Plugins(t testing.TB) string {
	t.Helper()
	NeedRoot(t)
	dir, err := plugins()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var plugins = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("VIRTLET_CNI_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	const module = "github.com/containernetworking/plugins"
	version, err := online("go", "list", "-m", "-f", "{{.Version}}", module).Output()
	if err != nil {
		return "", fmt.Errorf("version of %s: %w", module, err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	list := []string{
		"ipam/host-local", "ipam/static", "main/bridge", "main/host-device", "main/loopback", "main/macvlan", "main/ptp", "main/tap",
		"meta/bandwidth", "meta/firewall", "meta/portmap", "meta/sbr", "meta/tuning",
	}
	key := sha256.Sum256([]byte(strings.Join(list, " ")))
	dir := filepath.Join(cache, "virtlet", fmt.Sprintf("cni-plugins-%s-%x", strings.TrimSpace(string(version)), key[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "build-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	args := []string{"build", "-o", tmp + "/"}
	for _, p := range list {
		args = append(args, module+"/plugins/"+p)
	}
	if out, err := online("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the reference plugins: %w\n%s", err, out)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	// Somebody else may have been faster: a directory that is not empty is not replaced.
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOTEMPTY) {
		return "", err
	}
	return dir, nil
})

// Virtlet puts the command virtlet into a directory: the one that VIRTLET_BIN names, or one that is built.
func Virtlet(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "virtlet")
	cmd := online("go", "build", "-o", path, "github.com/virtlet/virtlet/cmd/virtlet")
	if given := os.Getenv("VIRTLET_BIN"); given != "" {
		cmd = exec.Command("install", "-D", given, path)
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	return path
}
