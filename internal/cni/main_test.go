package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// callerEnv makes the test binary call one ADD and nothing else: the process that a test kills in the middle.
const callerEnv = "VIRTLET_TEST_CNI_CALLER"

// call is what the caller is to do.
type call struct {
	Runtime    Runtime
	Attachment Attachment
}

func TestMain(m *testing.M) {
	if s := os.Getenv(callerEnv); s != "" {
		var c call
		if err := json.Unmarshal([]byte(s), &c); err != nil {
			panic(err)
		}
		_, err := c.Runtime.Add(context.Background(), c.Attachment)
		fmt.Fprintln(os.Stderr, "ADD returned:", err)
		os.Exit(3)
	}
	os.Exit(m.Run())
}

// script writes a plugin in shell.
func script(t testing.TB, dir, name, body string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// scripted gives a Runtime whose plugins are scripts in its one directory.
func scripted(t testing.TB, scripts map[string]string) *Runtime {
	t.Helper()
	dir := t.TempDir()
	for name, body := range scripts {
		script(t, dir, name, body)
	}
	return &Runtime{BinDirs: []string{dir}, CacheDir: t.TempDir(), Timeout: 20 * time.Second}
}

// chain is a network of plugins without configuration.
func chain(t testing.TB, version string, plugins ...string) *Network {
	t.Helper()
	var list []map[string]any
	for _, p := range plugins {
		list = append(list, map[string]any{"type": p})
	}
	b, err := json.Marshal(map[string]any{"name": "net", "cniVersion": version, "plugins": list})
	if err != nil {
		t.Fatal(err)
	}
	n, err := Parse("test", b)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// here is a namespace that is there without privileges: scripts do not enter it.
const here = "/proc/self/ns/net"

func lines(t testing.TB, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Fields(string(b))
}

// gone waits until the process has ended; a zombie has.
func gone(t testing.TB, pid string) bool {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(b), ") Z ") {
			return true
		}
	}
	return false
}

// await waits until a file has something in it, and gives that.
func await(t testing.TB, file string) string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(file); err == nil && strings.HasSuffix(string(b), "\n") {
			return strings.TrimSpace(string(b))
		}
	}
	t.Fatalf("nothing came in %s", file)
	return ""
}
