// Package vfio hands PCI functions of a pod, such as SR-IOV VFs, over to QEMU by the kernel's VFIO, and takes them back.
//
// [Machine.Plan] records each function as it is: its [Handover], which is written down before [Machine.Take] changes anything.
// [Machine.GiveBack] undoes that, wholly or in part, from any process, any number of times, and leaves alone what is somebody else's
// by now. MAC and VLAN are set at the physical function, where the guest cannot change them.
package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/pci"
)

// Handover is a PCI function that goes to the guest, as it was before. All that is done to it is undone from that.
type Handover struct {
	NIC    string     `json:"nic"` // its link in the namespace; of one that was with VFIO already, of a name alone
	BDF    string     `json:"bdf"`
	PF     string     `json:"pf,omitempty"` // address of its physical function; "": it has none
	Index  int        `json:"index"`
	Group  int        `json:"group"`
	Driver string     `json:"driver"`
	Forced string     `json:"forced,omitempty"` // driver_override
	MAC    nic.MAC    `json:"mac"`              // the guest's, which the PF holds it to
	State  *State     `json:"state,omitempty"`  // at the PF
	Node   *pci.Owner `json:"node,omitempty"`   // of the group's device file; nil: there was none
	UID    uint32     `json:"uid,omitempty"`    // whom that is given to; 0: nobody
	Boot   string     `json:"boot"`             // of the kernel; nothing of all this outlives it
}

// detached says that the function was with VFIO before, and stays there.
func (h *Handover) detached() bool { f := pci.Function{Driver: h.Driver}; return f.WithVFIO() }

// Options say how functions are handed over.
type Options struct {
	UID           uint32 // whom QEMU runs as
	IOMMUFD       bool   // QEMU takes descriptors of devices
	AllowPhysical bool   // a function that is no virtual one may go to a guest
}

// Passed is a function that is ready for QEMU. Who has it closes it.
type Passed struct {
	BDF    string
	Group  string   // device file of its IOMMU group, which the uid of Options may open; "": Device is used
	Device *os.File // the function's own, with IOMMU
	IOMMU  *os.File // /dev/iommu; of several ports, the first that has Device has it for all
}

// Close closes the files. QEMU has copies.
func (p *Passed) Close() error {
	var errs []error
	for _, f := range []**os.File{&p.Device, &p.IOMMU} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

// Renew opens the files again that QEMU was given, for another guest: the kernel ties that of a function to the first IOMMU
// context (VFIO_DEVICE_BIND_IOMMUFD).
func (p *Passed) Renew() error {
	for _, f := range []**os.File{&p.Device, &p.IOMMU} {
		if *f == nil {
			continue // QEMU opens the group itself
		}
		name := (*f).Name()
		err := (*f).Close()
		if *f = nil; err == nil {
			*f, err = os.OpenFile(name, os.O_RDWR, 0)
		}
		if err != nil {
			return fmt.Errorf("open PCI function %s for another guest: %w", p.BDF, err)
		}
	}
	return nil
}

// Machine is what is around the namespace, as far as PCI functions go.
type Machine struct {
	fs       pci.FS
	links    vfLinks
	inUse    func(group int) (bool, error)
	close    func() error
	boot     string
	patience time.Duration // for a driver to make a network device, and for VFIO to let go
}

// vfLinks are the network devices of functions.
type vfLinks interface {
	// State reads what a PF, of that name on the node, has set for a VF; Set makes one change.
	State(pf string, index int) (State, error)
	Set(pf string, c change) error
	// Find gives the index of the network device of a function, and whether it is in the pod. 0: neither there nor on
	// the node.
	Find(bdf string) (index int, inPod bool, err error)
	// Bring gives that device to the pod, where there is one still, under a name.
	Bring(index int, inPod bool, name string) error
}

// Functions looks up the PCI functions that [nic.Functions] has named. One that is not there is left out.
func Functions(bdfs []string) ([]nic.VF, error) {
	if len(bdfs) == 0 {
		return nil, nil
	}
	m, err := Open(nil)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return m.functions(bdfs)
}

// Virtual gives the PCI address of a VF by the network device of its PF on the node, and its number there.
func Virtual(pf string, number int) (string, error) { return pci.FS{}.Virtual(pf, number) }

func (m *Machine) functions(bdfs []string) ([]nic.VF, error) {
	var all []nic.VF
	for _, bdf := range bdfs {
		f, err := m.fs.Function(bdf)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		vf := nic.VF{BDF: bdf, Index: f.Index, Group: f.Group, Detached: f.WithVFIO()}
		if f.PF != "" {
			if vf.PF, err = m.pf(f.PF); err != nil {
				return nil, err
			}
			s, err := m.links.State(vf.PF, f.Index)
			if err != nil {
				return nil, err
			}
			vf.MAC, vf.VLAN = s.MAC, int(s.VLAN)
		}
		all = append(all, vf)
	}
	return all, nil
}

// pf gives the network device of a physical function.
func (m *Machine) pf(bdf string) (string, error) {
	name, err := m.fs.Netdev(bdf)
	if err == nil && name == "" {
		err = fmt.Errorf("physical function %s has no network device on the node: without it nobody holds a guest to its MAC and VLAN; give the function its kernel driver back, and its device to the node's namespace", bdf)
	}
	return name, err
}

// Plan records every function as it is, and refuses those that cannot go to a guest. It changes nothing.
func (m *Machine) Plan(nics []nic.NIC, o Options) ([]Handover, error) {
	var all []Handover
	var with []string
	for _, n := range nics {
		if n.VF != nil {
			with = append(with, n.VF.BDF)
		}
	}
	for _, n := range nics {
		if n.VF == nil {
			continue
		}
		h, err := m.record(n, with, o)
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", n.Name, err)
		}
		all = append(all, h)
	}
	return all, nil
}

func (m *Machine) record(n nic.NIC, with []string, o Options) (h Handover, err error) {
	f, err := m.fs.Function(n.VF.BDF)
	if err != nil {
		return h, err
	}
	if err := m.fs.Passable(f, with, o.AllowPhysical); err != nil {
		return h, err
	}
	if f.WithVFIO() {
		if busy, err := m.inUse(f.Group); err != nil {
			return h, err
		} else if busy {
			return h, fmt.Errorf("PCI function %s: a program has its IOMMU group %d open: another VM has it", f.BDF, f.Group)
		}
	}
	h = Handover{
		NIC: n.Name, BDF: f.BDF, PF: f.PF, Index: f.Index, Group: f.Group, Driver: f.Driver, Forced: f.Override,
		MAC: n.MAC, UID: o.UID, Boot: m.boot,
	}
	if f.PF != "" {
		pf, err := m.pf(f.PF)
		if err != nil {
			return h, err
		}
		s, err := m.links.State(pf, f.Index)
		if err != nil {
			return h, err
		}
		h.State = &s
	}
	h.Node, err = m.fs.Owner(f.Group)
	return h, err
}

// Take hands a function over to QEMU. The record of it is on disk.
func (m *Machine) Take(h Handover, o Options) (p *Passed, err error) {
	if h.State != nil {
		want := *h.State
		want.MAC = h.MAC
		// Always: a MAC that the PF shows may be one that the VF itself asked for, and may change.
		free := *h.State
		free.MAC = nic.MAC{}
		if err := m.set(h, free, want); err != nil {
			return nil, err
		}
		defer func() {
			if err == nil {
				err = m.settle(h, want)
			}
		}()
	}
	if !h.detached() {
		if err := m.fs.Bind(h.BDF, pci.VFIO); err != nil {
			return nil, err
		}
	}
	f, err := m.fs.Function(h.BDF)
	if err != nil {
		return nil, err
	}
	p = &Passed{BDF: h.BDF}
	nodes := m.fs.Nodes(f)
	if o.IOMMUFD && nodes.Device != "" {
		if p.Device, err = os.OpenFile(nodes.Device, os.O_RDWR, 0); err == nil {
			p.IOMMU, err = os.OpenFile(nodes.IOMMU, os.O_RDWR, 0)
		}
		if err != nil {
			return p, fmt.Errorf("open PCI function %s: %w", h.BDF, err)
		}
		return p, nil
	}
	p.Group = nodes.Group
	if h.UID == 0 {
		return p, nil
	}
	return p, m.fs.Own(h.Group, pci.Owner{UID: h.UID, GID: h.UID, Mode: 0o600})
}

// set makes one state of a VF at its PF of another.
func (m *Machine) set(h Handover, from, to State) error {
	changes := to.changes(from, h.Index)
	if len(changes) == 0 {
		return nil
	}
	pf, err := m.pf(h.PF)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range changes {
		if err := m.links.Set(pf, c); err != nil {
			errs = append(errs, fmt.Errorf("set %s of VF %d of %s: %w", c.what, h.Index, pf, err))
		}
	}
	return errors.Join(errs...)
}

// settle sees that the PF has what is wanted, and sets again what a change of the driver may have lost.
func (m *Machine) settle(h Handover, want State) error {
	pf, err := m.pf(h.PF)
	if err != nil {
		return err
	}
	for range 2 {
		is, err := m.links.State(pf, h.Index)
		if err != nil {
			return err
		}
		if want.differs(is) == "" {
			return nil
		}
		if err := m.set(h, is, want); err != nil {
			return err
		}
	}
	is, err := m.links.State(pf, h.Index)
	if left := want.differs(is); err == nil && left != "" {
		err = fmt.Errorf("VF %d of %s does not keep its %s", h.Index, pf, left)
	}
	return err
}

// GiveBack undoes Take, wholly or in part, and brings the function's network device back to the pod. QEMU must have ended.
// A function that is somebody else's by now is left alone: one of another boot, or of another physical function; with
// another MAC, another driver, another program, or in another namespace.
func (m *Machine) GiveBack(h Handover) error {
	if h.Boot != m.boot {
		return nil
	}
	f, err := m.fs.Function(h.BDF)
	if errors.Is(err, fs.ErrNotExist) || err == nil && f.PF != h.PF {
		return nil
	}
	if err != nil {
		return err
	}
	ours, err := m.ours(h, f)
	if err != nil || !ours {
		return err
	}
	var errs []error
	if h.State != nil {
		// First: the driver finds what it found before.
		errs = append(errs, m.settle(h, *h.State))
	}
	fresh := f.Driver != h.Driver
	if !h.detached() {
		errs = append(errs, m.fs.Bind(h.BDF, h.Driver), m.fs.Override(h.BDF, h.Forced))
	}
	if h.Node != nil && h.UID != 0 {
		if is, err := m.fs.Owner(h.Group); err == nil && is != nil && is.UID == h.UID {
			errs = append(errs, m.fs.Own(h.Group, *h.Node))
		}
	}
	if err := errors.Join(errs...); err != nil || h.detached() {
		return err
	}
	if err := m.bring(h, fresh); err != nil {
		return err
	}
	if h.State == nil {
		return nil
	}
	want := *h.State
	if want.MAC.IsZero() { // then the PF shows the one that the VF has asked for
		pf, err := m.pf(h.PF)
		if err != nil {
			return err
		}
		is, err := m.links.State(pf, h.Index)
		if err != nil {
			return err
		}
		want.MAC = is.MAC
	}
	return m.settle(h, want)
}

// ours says whether a function can still be the one that was taken.
func (m *Machine) ours(h Handover, f pci.Function) (bool, error) {
	if h.State != nil {
		pf, err := m.pf(h.PF)
		if err != nil {
			return false, err
		}
		is, err := m.links.State(pf, h.Index)
		if err != nil {
			return false, err
		}
		if is.MAC != h.MAC && is.MAC != h.State.MAC && !is.MAC.IsZero() {
			return false, nil
		}
	}
	if !f.WithVFIO() {
		return f.Driver == "" || f.Driver == h.Driver, nil
	}
	// VFIO may take a moment to let go.
	busy := true
	_, err := m.await(func() (bool, error) {
		var err error
		busy, err = m.inUse(h.Group)
		return !busy, err
	})
	return !busy, err
}

// bring looks for the network device, which the driver makes on the node if it is fresh, and gives it to the pod.
func (m *Machine) bring(h Handover, fresh bool) error {
	index, inPod := 0, false
	found, err := m.await(func() (bool, error) {
		var err error
		index, inPod, err = m.links.Find(h.BDF)
		return index != 0 || !fresh, err
	})
	switch {
	case err != nil:
		return err
	case !found:
		return fmt.Errorf("driver %s has %s again, but made no network device of it in %s", h.Driver, h.BDF, m.patience)
	case index == 0:
		return nil // it is in another namespace
	}
	if err := m.links.Bring(index, inPod, h.NIC); err != nil {
		return fmt.Errorf("bring the network device of %s back to the pod as %s: %w", h.BDF, h.NIC, err)
	}
	return nil
}

// await asks until the answer is yes or patience has ended.
func (m *Machine) await(ask func() (bool, error)) (bool, error) {
	const tick = 20 * time.Millisecond // sysfs and VFIO tell nobody
	for end := time.Now().Add(m.patience); ; time.Sleep(tick) {
		if yes, err := ask(); yes || err != nil || time.Now().After(end) {
			return yes, err
		}
	}
}

// Check says what is not any more as Take left it.
func (m *Machine) Check(h Handover) error {
	fail := func(err error) error {
		return fmt.Errorf("%s is not the guest's as it was: %w", h.NIC, err)
	}
	f, err := m.fs.Function(h.BDF)
	if err != nil {
		return fail(err)
	}
	if !f.WithVFIO() {
		return fail(fmt.Errorf("PCI function %s is with driver %q", h.BDF, f.Driver))
	}
	if h.State == nil {
		return nil
	}
	pf, err := m.pf(h.PF)
	if err != nil {
		return fail(err)
	}
	is, err := m.links.State(pf, h.Index)
	if err != nil {
		return fail(err)
	}
	want := *h.State
	want.MAC = h.MAC
	if diff := want.differs(is); diff != "" {
		return fail(fmt.Errorf("VF %d of %s does not have %s any more", h.Index, pf, diff))
	}
	return nil
}
