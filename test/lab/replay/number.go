package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func threadID() int { return unix.Gettid() }

// pod is the one that the plugin is called for.
type pod struct {
	id, ifName, netNS string
	dir               string // a file for each pod of this node, with its number
	number            int
}

func (c config) pod() (*pod, error) {
	p := &pod{id: os.Getenv("CNI_CONTAINERID"), ifName: os.Getenv("CNI_IFNAME"), netNS: os.Getenv("CNI_NETNS"), dir: c.DataDir}
	if p.id == "" || p.ifName == "" || p.dir == "" || p.id != filepath.Base(p.id) {
		return nil, errors.New("needs CNI_CONTAINERID, CNI_IFNAME and a dataDir")
	}
	return p, os.MkdirAll(p.dir, 0o755)
}

func (p *pod) file() string { return filepath.Join(p.dir, p.id+"-"+p.ifName) }

// take gives the pod the lowest free number from first on.
func (p *pod) take(first int) (int, error) {
	lock, err := os.Open(p.dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return 0, err
	}
	files, err := os.ReadDir(p.dir)
	if err != nil {
		return 0, err
	}
	var taken []int
	for _, f := range files {
		n, err := number(filepath.Join(p.dir, f.Name()))
		if err != nil {
			return 0, err
		}
		taken = append(taken, n)
	}
	n := first
	for slices.Contains(taken, n) {
		n++
	}
	f, err := os.OpenFile(p.file(), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, fmt.Errorf("a second ADD: %w", err)
	}
	_, err = fmt.Fprintln(f, n)
	return n, errors.Join(err, f.Close())
}

func (p *pod) has() (int, error) { return number(p.file()) }
func (p *pod) free() error       { return os.Remove(p.file()) }

func number(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}
