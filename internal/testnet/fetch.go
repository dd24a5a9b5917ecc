package testnet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

var fetched = struct {
	sync.Mutex
	dirs map[string]string
}{dirs: map[string]string{}}

// online is a command with the network of the machine, which [Isolate] has taken from the tests: it may have to download.
func online(name string, args ...string) *exec.Cmd {
	if os.Getenv(isolated) == "" {
		return exec.Command(name, args...)
	}
	// The process that was before Isolate is still there, and waits.
	net := fmt.Sprintf("--net=/proc/%d/ns/net", os.Getppid())
	return exec.Command("nsenter", append([]string{net, name}, args...)...)
}

// Fetch runs a script of hack/ that fetches or builds something, if it is not in the cache, and prints the directory that it
// is in.
func Fetch(t testing.TB, script string, args ...string) string {
	t.Helper()
	NeedRoot(t)
	fetched.Lock()
	defer fetched.Unlock()
	key := strings.Join(append([]string{script}, args...), " ")
	if dir, ok := fetched.dirs[key]; ok {
		return dir
	}
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	check(t, err)
	dir := strings.TrimSpace(string(root))
	cmd := online(filepath.Join(dir, "hack", script), args...)
	var stderr strings.Builder
	cmd.Dir, cmd.Stderr = dir, &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("hack/%s: %v\n%s", key, err, stderr.String())
	}
	fetched.dirs[key] = strings.TrimSpace(string(out))
	return fetched.dirs[key]
}

// Tools gives the directory of the programs that the go.mod in a directory of the project pins by its tool lines.
func Tools(t testing.TB, dir string) string {
	t.Helper()
	return Fetch(t, "tools.sh", dir)
}
