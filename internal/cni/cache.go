package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Answer gives the result of Add as the last plugin printed it, in the CNI version that it spoke, from the cache:
// [ErrNotAttached] after Del. What CNI knows no name for is not in it.
func (r *Runtime) Answer(a Attachment) (json.RawMessage, error) {
	var entry struct {
		Result json.RawMessage `json:"result"`
	}
	if _, mine := r.lookup(a); !mine {
		return nil, a.errorf("ADD", "%w: the cache has no result", ErrNotAttached)
	}
	b, err := os.ReadFile(r.cacheFile(a))
	if err == nil {
		err = json.Unmarshal(b, &entry)
	}
	if err != nil {
		return nil, a.errorf("ADD", "read the cached result: %w", err)
	}
	return entry.Result, nil
}

// Forget removes a from the cache without DEL, for one whose DEL always fails. What its plugins hold stays theirs.
func (r *Runtime) Forget(a Attachment) error {
	if _, mine := r.lookup(a); !mine {
		return nil
	}
	if err := os.Remove(r.cacheFile(a)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return a.errorf("DEL", "forget it: %w", err)
	}
	return nil
}

// Cached gives what the cache says is attached, in the order of the file names. A file that is no entry is an error and
// does not hide the rest.
func (r *Runtime) Cached() ([]Attachment, error) {
	out, err := r.entries("")
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(r.cacheFile(Attachment{}))
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return out, fmt.Errorf("read the CNI cache: %w", err)
	}
	var errs []error
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		if !slices.ContainsFunc(out, func(a Attachment) bool { return r.cacheFile(a) == path }) {
			errs = append(errs, fmt.Errorf("read the CNI cache: %s is not an entry of it (a crash while it was written leaves one)", path))
		}
	}
	return out, errors.Join(errs...)
}

// noCache is a directory that is never made: libcni finds nothing there and has nothing to remove. It has to be
// missing, not unreadable: GC would end there without an error.
func (r *Runtime) noCache() string { return filepath.Join(r.CacheDir, "none") }

// cacheFile is where libcni keeps a. It joins the names with "-", which they may contain: two attachments can share a
// file.
func (r *Runtime) cacheFile(a Attachment) string {
	return filepath.Join(r.CacheDir, "results", strings.Join([]string{a.Name, a.ContainerID, a.IfName}, "-"))
}

// lookup gives what the cache has for a, or a itself and false.
func (r *Runtime) lookup(a Attachment) (Attachment, bool) {
	all, _ := r.entries(a.ContainerID) // an unreadable cache is as good as none
	for _, c := range all {
		if c.Name == a.Name && c.IfName == a.IfName && c.ContainerID == a.ContainerID {
			return c, true
		}
	}
	return a, false
}

// owns says whether the cache file of a is not another attachment's.
func (r *Runtime) owns(a Attachment, mine bool) bool {
	if mine {
		return true
	}
	all, err := r.entries("")
	return err == nil && !slices.ContainsFunc(all, func(c Attachment) bool { return r.cacheFile(c) == r.cacheFile(a) })
}

func (r *Runtime) entries(containerID string) ([]Attachment, error) {
	if r.CacheDir == "" {
		return nil, fmt.Errorf("read the CNI cache: %w", errNoCache)
	}
	all, err := r.libcni(&runner{}, r.CacheDir).GetCachedAttachments(containerID)
	if err != nil {
		return nil, fmt.Errorf("read the CNI cache: %w", err)
	}
	var out []Attachment
	for _, c := range all {
		out = append(out, Attachment{
			Network: c.Config, Name: c.Network, ContainerID: c.ContainerID, NetNS: c.NetNS, IfName: c.IfName,
			Args: c.CniArgs, CapabilityArgs: c.CapabilityArgs,
		})
	}
	return out, nil
}
