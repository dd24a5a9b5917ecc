package testnet

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Replay gives a directory with the replay plugin (test/lab/replay), which makes again what other plugins were recorded to
// make. It is built once for each test program.
func Replay(t testing.TB) string {
	t.Helper()
	NeedRoot(t)
	dir, err := replay()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// ReplayAs gives a directory where the replay plugin has the name of another, whose configuration it is run by. What it is to
// replay, and where its pods are numbered, is what conf says.
func ReplayAs(t testing.TB, name string, conf map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(conf)
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, name+".json"), b, 0o644))
	check(t, os.Symlink(filepath.Join(Replay(t), "replay"), filepath.Join(dir, name)))
	return dir
}

// scratch is what Isolate removes at the end.
var scratch string

var replay = sync.OnceValues(func() (string, error) {
	var err error
	if scratch, err = os.MkdirTemp("", "virtlet-replay-*"); err != nil {
		return "", err
	}
	const pkg = "github.com/virtlet/virtlet/test/lab/replay"
	if out, err := online("go", "build", "-o", filepath.Join(scratch, "replay"), pkg).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return scratch, nil
})
