package cni

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Verdict is what CHECK of one plugin of an attachment came to.
type Verdict struct {
	Plugin string
	Err    error // what the plugin has against the result of ADD; nil: nothing
	// Moved says that the plugin has nothing against the result as it is now: what it misses is what somebody took away
	// on purpose, and no more.
	Moved bool
}

// Check runs CHECK of every plugin against the result of ADD, and joins what they say. Its other errors are those of
// [Runtime.CheckEach].
func (r *Runtime) Check(ctx context.Context, a Attachment) error {
	verdicts, err := r.CheckEach(ctx, a, nil)
	errs := []error{err}
	for _, v := range verdicts {
		errs = append(errs, v.Err)
	}
	return errors.Join(errs...)
}

// CheckEach runs CHECK of every plugin against the result of ADD, and gives a verdict for each, in the order of the list.
// Where the first fails, which makes the interface, its CHECK runs again against what now makes of the result, if that is
// given: the result as the namespace has it now. (Later ones look at the node, and without addresses they would find
// nothing to look for.) It is [ErrUnsupported] before CNI 0.4.0 and [ErrNotAttached] without a result of ADD, and has no
// verdicts on a list that sets disableCheck.
func (r *Runtime) CheckEach(ctx context.Context, a Attachment, now func(added *types100.Result)) ([]Verdict, error) {
	cached, mine := r.lookup(a)
	n, rt, err := r.open("CHECK", cached)
	if err != nil {
		return nil, err
	}
	if !atLeast(n.Version, "0.4.0") {
		return nil, a.errorf("CHECK", "%w: it is %s, and CHECK came with 0.4.0", ErrUnsupported, n.Version)
	}
	if !mine {
		return nil, a.errorf("CHECK", "%w: the cache has no result of ADD", ErrNotAttached)
	}
	if n.list.DisableCheck {
		return nil, nil
	}
	added, err := r.added(n, rt)
	if err != nil {
		return nil, a.errorf("CHECK", "read the result of ADD from the cache: %w", err)
	}
	var moved *types100.Result
	if now != nil {
		if moved, err = r.added(n, rt); err != nil {
			return nil, a.errorf("CHECK", "read the result of ADD from the cache: %w", err)
		}
		now(moved)
	}
	ctx, cancel := withLimit(ctx, r.timeout())
	defer cancel()
	var verdicts []Verdict
	for i, p := range n.list.Plugins {
		v := Verdict{Plugin: p.Network.Type, Err: r.check(ctx, n, p, rt, added)}
		if i == 0 && v.Err != nil && moved != nil {
			v.Moved = r.check(ctx, n, p, rt, moved) == nil
		}
		verdicts = append(verdicts, v)
	}
	return verdicts, nil
}

// added reads the result of ADD from the cache; nobody else has a part of it.
func (r *Runtime) added(n *Network, rt *libcni.RuntimeConf) (*types100.Result, error) {
	cached, err := r.libcni(&runner{}, r.CacheDir).GetNetworkListCachedResult(n.list, rt)
	if err == nil && cached == nil {
		err = errors.New("the file is there, the result is not")
	}
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(cached)
}

// check runs CHECK of one plugin against a result.
func (r *Runtime) check(ctx context.Context, n *Network, p *libcni.PluginConfig, rt *libcni.RuntimeConf, with *types100.Result) error {
	result, err := with.GetAsVersion(n.Version)
	if err != nil {
		return plain("CHECK", n, err)
	}
	if p, err = libcni.InjectConf(p, map[string]any{"prevResult": result}); err != nil {
		return plain("CHECK", n, err)
	}
	one := &libcni.NetworkConfigList{Name: n.Name, CNIVersion: n.Version, Plugins: []*libcni.PluginConfig{p}}
	// Without the cache, whose result would take the place of this one.
	return plain("CHECK", n, r.libcni(r.runner(n, "CHECK"), r.noCache()).CheckNetworkList(ctx, one, rt))
}
