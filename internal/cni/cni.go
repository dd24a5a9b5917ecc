// Package cni reads CNI network configurations and calls the plugins that they name, through libcni: ADD, DEL, CHECK,
// GC and STATUS, for CNI versions 0.3.0 to 1.1.0.
//
// A [Network] comes from [Load], [Parse] or [Default]. An [Attachment] is one network for one interface of one
// namespace; whoever attaches writes it to disk before [Runtime.Add] and keeps it until [Runtime.Del] succeeded, as it
// is all that Del needs, from any process, however far Add came. Add that fails has called Del. Nothing here stays open
// or runs on: every method returns after its plugins have ended.
//
// Plugins are not trusted: what they print is bounded, checked and escaped, and they are killed, with the processes of
// their group, at their time limit and when the context is done. When the calling process dies, the plugin dies too, but
// not the plugins that it called. A process that left the group (setsid) outlives all that; none can hold a call up.
//
// A plugin starts in the network namespace of the thread that calls, which stands for the host. Methods run plugins on
// the calling goroutine's thread and start no goroutine for them, so inside [netns.NS.Do] that is the namespace of Do.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/virtlet/virtlet/internal/netns"
)

// ErrUnsupported says that the network's CNI version does not have the verb.
var ErrUnsupported = errors.New("the network's CNI version does not have this verb")

// ErrAttached says that the cache holds something for the attachment already.
var ErrAttached = errors.New("attached already")

// UndoError says that Add failed and Del after it too: something may be left, and the attachment must not be forgotten.
type UndoError struct{ Err error }

func (e *UndoError) Error() string { return fmt.Sprintf("and undoing it: %v", e.Err) }

// Unwrap gives Del's error.
func (e *UndoError) Unwrap() error { return e.Err }

// ErrNotAttached says that the cache holds no result for the attachment.
var ErrNotAttached = errors.New("not attached")

var errNoCache = errors.New("no cache directory is set")

// defaultTimeout is the time limit when none is given. Plugins need tenths of seconds; one that waits for a daemon's
// quorum waits for ever.
const defaultTimeout = 60 * time.Second

// Runtime calls plugins. Its methods may be called by several goroutines, but not two at a time for one attachment.
type Runtime struct {
	BinDirs  []string // where plugins are, in order of search; CNI_PATH for the plugins that they call
	CacheDir string   // libcni keeps what it added in <CacheDir>/results; not to be shared with another runtime
	// Timeout limits ADD, CHECK, GC and STATUS of a network, and DEL of each of its plugins, as one that hangs must not
	// keep the others from undoing. 0 stands for 60 s.
	Timeout time.Duration
	// Stderr gets what plugins print there, unescaped, at most 1 MiB of each call. It is written to by as many
	// goroutines as call methods. nil: only the end of it is kept, for the error.
	Stderr io.Writer
}

// Attachment is one network for one interface of one namespace. It is JSON, to be written down before Add.
type Attachment struct {
	Network        json.RawMessage `json:"network"`          // the list, as by Network.Bytes
	Name           string          `json:"name"`             // of the network
	Plugin         string          `json:"plugin,omitempty"` // its first, which makes the interface, for messages
	ContainerID    string          `json:"containerID"`
	NetNS          string          `json:"netns"` // the file that the namespace is pinned at
	IfName         string          `json:"ifName"`
	Args           [][2]string     `json:"args,omitempty"` // CNI_ARGS
	CapabilityArgs map[string]any  `json:"capabilityArgs,omitempty"`
}

// Attachment gives the attachment of a namespace to n. Args and CapabilityArgs are the caller's to add.
func (n *Network) Attachment(containerID, netns, ifName string) Attachment {
	var plugin string
	if len(n.list.Plugins) > 0 {
		plugin = n.list.Plugins[0].Network.Type
	}
	return Attachment{Network: n.Bytes(), Name: n.Name, Plugin: plugin, ContainerID: containerID, NetNS: netns, IfName: ifName}
}

// Types gives the types of the plugins of a's network, in the order of the chain.
func (a Attachment) Types() []string {
	var list struct {
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if json.Unmarshal(a.Network, &list) != nil {
		return nil // it was no list of ours
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Type)
	}
	return types
}

// Add runs ADD of every plugin and gives the result, converted from whatever CNI version the last plugin answered in.
// Interface indices, names and addresses in it are not checked. When a plugin fails, Add runs Del, also when ctx is
// done, and joins its error as an [*UndoError]. Errors before the first plugin ran change nothing: [ErrMissing], [ErrAttached], a
// namespace that is not there.
func (r *Runtime) Add(ctx context.Context, a Attachment) (*types100.Result, error) {
	n, rt, err := r.open("ADD", a)
	if err != nil {
		return nil, err
	}
	if !netns.Exists(a.NetNS) {
		return nil, a.errorf("ADD", "there is no network namespace at %q", a.NetNS)
	}
	if err := r.search(n); err != nil {
		return nil, err
	}
	// An ADD of what is there fails, and undoing it would take down what works.
	if _, err := os.Lstat(r.cacheFile(a)); err == nil {
		return nil, a.errorf("ADD", "%w, or left so by a crash (%s): run DEL first", ErrAttached, r.cacheFile(a))
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, a.errorf("ADD", "look into the cache: %w", err)
	}
	run := r.runner(n, "ADD")
	res, err := r.add(ctx, n, rt, run)
	if err == nil {
		return res, nil
	}
	if !run.started {
		return nil, err
	}
	undo := *r
	undo.Timeout = max(r.timeout(), defaultTimeout) // a short limit is for ADD; what it left has to go all the same
	if uerr := undo.Del(context.WithoutCancel(ctx), a); uerr != nil {
		err = errors.Join(err, &UndoError{uerr})
	}
	return nil, err
}

func (r *Runtime) add(ctx context.Context, n *Network, rt *libcni.RuntimeConf, run *runner) (*types100.Result, error) {
	ctx, cancel := withLimit(ctx, r.timeout())
	defer cancel()
	res, err := r.libcni(run, r.CacheDir).AddNetworkList(ctx, n.list, rt)
	if err != nil {
		return nil, plain("ADD", n, err)
	}
	out, err := types100.NewResultFromResult(res)
	if err != nil {
		return nil, plain("ADD", n, fmt.Errorf("convert the result: %w", err))
	}
	return out, nil
}

// Del runs DEL of every plugin, last one first, with the configuration and arguments that libcni's cache has for a, and
// the result there if the version has that, else with those in a. A namespace that is gone is no error: the plugins are
// told that there is none (the bridge plugin then frees the address but leaves its masquerading rules, so call Del
// while the namespace is there). Del may be called again.
//
// A plugin that fails does not stop the others, unlike in the specification: that a firewall program is missing must
// not keep an address leased. The cache keeps the entry until all have succeeded.
func (r *Runtime) Del(ctx context.Context, a Attachment) error {
	cached, mine := r.lookup(a)
	n, rt, err := r.open("DEL", cached)
	if err != nil && mine {
		n, rt, err = r.open("DEL", a) // what the cache has cannot be used
	}
	if err != nil {
		return err
	}
	if !netns.Exists(rt.NetNS) {
		rt.NetNS = ""
	}
	var prev types.Result
	if mine && atLeast(n.Version, "0.4.0") {
		// An unreadable result is as good as none.
		prev, _ = r.libcni(&runner{}, r.CacheDir).GetNetworkListCachedResult(n.list, rt)
	}
	run := r.runner(n, "DEL")
	run.each = r.timeout()
	// One plugin at a time, and without the cache, which libcni would empty after the first.
	lib := r.libcni(run, r.noCache())
	var errs []error
	for _, p := range slices.Backward(n.list.Plugins) {
		if prev != nil {
			if p, err = libcni.InjectConf(p, map[string]any{"prevResult": prev}); err != nil {
				errs = append(errs, plain("DEL", n, err))
				continue
			}
		}
		one := &libcni.NetworkConfigList{Name: n.Name, CNIVersion: n.Version, Plugins: []*libcni.PluginConfig{p}}
		if err := lib.DelNetworkList(ctx, one, rt); err != nil {
			errs = append(errs, plain("DEL", n, err))
		}
	}
	if len(errs) == 0 && r.owns(a, mine) {
		if err := os.Remove(r.cacheFile(a)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, a.errorf("DEL", "empty the cache: %w", err))
		}
	}
	return errors.Join(errs...)
}

// GC runs Del for every cached attachment of n that is not in keep, and then GC of every plugin, which frees what
// belongs to none of keep. So keep must hold all attachments of the network on this machine, whoever made them. It is
// [ErrUnsupported] before CNI 1.1.0, and does nothing for a list that sets disableGC.
func (r *Runtime) GC(ctx context.Context, n *Network, keep []Attachment) error {
	if !atLeast(n.Version, "1.1.0") {
		return fmt.Errorf("GC network %q: %w: it is %s, and GC came with 1.1.0", n.Name, ErrUnsupported, n.Version)
	}
	if n.list.DisableGC {
		return nil
	}
	valid := []types.GCAttachment{} // not nil: null is not a list
	for _, a := range keep {
		if a.Name == n.Name {
			valid = append(valid, types.GCAttachment{ContainerID: a.ContainerID, IfName: a.IfName})
		}
	}
	if r.CacheDir == "" {
		return plain("GC", n, errNoCache)
	}
	cached, err := r.Cached()
	errs := []error{err}
	for _, a := range cached {
		if a.Name == n.Name && !slices.Contains(valid, types.GCAttachment{ContainerID: a.ContainerID, IfName: a.IfName}) {
			errs = append(errs, r.Del(ctx, a))
		}
	}
	ctx, cancel := withLimit(ctx, r.timeout())
	defer cancel()
	// Without the cache: libcni would repeat the DELs that failed, with today's configuration.
	err = r.libcni(r.runner(n, "GC"), r.noCache()).GCNetworkList(ctx, n.list, &libcni.GCArgs{ValidAttachments: valid})
	return errors.Join(append(errs, err)...)
}

// Status asks the plugins of n whether they can serve an ADD now. It is [ErrUnsupported] before CNI 1.1.0.
func (r *Runtime) Status(ctx context.Context, n *Network) error {
	if !atLeast(n.Version, "1.1.0") {
		return fmt.Errorf("STATUS network %q: %w: it is %s, and STATUS came with 1.1.0", n.Name, ErrUnsupported, n.Version)
	}
	ctx, cancel := withLimit(ctx, r.timeout())
	defer cancel()
	return plain("STATUS", n, r.libcni(r.runner(n, "STATUS"), r.noCache()).GetStatusNetworkList(ctx, n.list))
}

// Validate asks the plugins of n whether they speak its CNI version and can be found.
func (r *Runtime) Validate(ctx context.Context, n *Network) error {
	ctx, cancel := withLimit(ctx, r.timeout())
	defer cancel()
	_, err := r.libcni(r.runner(n, "VERSION"), os.DevNull).ValidateNetworkList(ctx, n.list)
	return plain("VERSION", n, err)
}

// Missing gives the plugins of n, those for addresses included, that no directory of BinDirs has: each once, in the
// order of the list.
func (r *Runtime) Missing(n *Network) []string {
	var out []string
	for _, p := range n.list.Plugins {
		for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if _, err := find(name, r.BinDirs); name != "" && err != nil && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	return out
}

// search is Missing as an error.
func (r *Runtime) search(n *Network) error {
	var errs []error
	for _, name := range r.Missing(n) {
		_, err := find(name, r.BinDirs)
		errs = append(errs, &PluginError{Network: n.Name, Verb: "ADD", Plugin: name, Err: err})
	}
	return errors.Join(errs...)
}

func (r *Runtime) timeout() time.Duration {
	if r.Timeout > 0 {
		return r.Timeout
	}
	return defaultTimeout
}

func (r *Runtime) runner(n *Network, verb string) *runner {
	return &runner{network: n.Name, verb: verb, version: n.Version, stderr: r.Stderr}
}

// libcni gives libcni with a cache in dir.
func (r *Runtime) libcni(run *runner, dir string) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(r.BinDirs, dir, run)
}

// open checks a and gives it as libcni wants it.
func (r *Runtime) open(verb string, a Attachment) (*Network, *libcni.RuntimeConf, error) {
	fail := func(format string, args ...any) (*Network, *libcni.RuntimeConf, error) {
		return nil, nil, a.errorf(verb, format, args...)
	}
	if r.CacheDir == "" { // libcni would take its own, which other runtimes use
		return fail("%w", errNoCache)
	}
	n, err := Parse("of attachment "+printable(a.ContainerID, 64), a.Network)
	if err != nil {
		return nil, nil, err
	}
	if n.Name != a.Name {
		return fail("the configuration is of network %q", n.Name)
	}
	if err := utils.ValidateContainerID(a.ContainerID); err != nil {
		return fail("container ID: %s", err.Msg)
	}
	if err := utils.ValidateInterfaceName(a.IfName); err != nil {
		return fail("interface name: %s", err.Msg)
	}
	const nameMax = 255 // NAME_MAX of <linux/limits.h>
	if l := len(filepath.Base(r.cacheFile(a))); l > nameMax {
		return fail("the names of network, container and interface are too long for one file name: %d bytes, more than %d", l, nameMax)
	}
	for _, kv := range a.Args {
		// They make one string, KEY=VALUE;KEY=VALUE.
		if kv[0] == "" || strings.ContainsAny(kv[0], "=;\x00") || strings.ContainsAny(kv[1], ";\x00") {
			return fail("argument %q=%q: a key has no = and neither has a ;", kv[0], kv[1])
		}
	}
	return n, &libcni.RuntimeConf{
		ContainerID: a.ContainerID, NetNS: a.NetNS, IfName: a.IfName,
		Args: slices.Clone(a.Args), CapabilityArgs: maps.Clone(a.CapabilityArgs),
	}, nil
}

func (a Attachment) errorf(verb, format string, args ...any) error {
	return fmt.Errorf("%s network %q for %q of %q: %w", verb, a.Name, a.IfName, a.ContainerID, fmt.Errorf(format, args...))
}

// plain gives a plugin's failure without libcni's words around it, and names the network in any other.
func plain(verb string, n *Network, err error) error {
	if err == nil {
		return nil
	}
	var pe *PluginError
	if errors.As(err, &pe) {
		return pe
	}
	return fmt.Errorf("%s network %q: %w", verb, n.Name, err)
}
