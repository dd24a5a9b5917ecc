package vfio

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"

	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/pci"
	"github.com/virtlet/virtlet/internal/testpci"
)

// killed is what a process dies of in these tests: nothing of it runs after that.
type killed struct{}

// node is a machine with a PF, two VFs and a pod that has the first, whose kernel the test plays: sysfs by testpci, and
// the network devices here. It counts what is changed, and can kill the process that changes it.
type node struct {
	*testpci.Tree
	states map[int]State
	links  map[string]place // by address
	open   map[int]bool     // IOMMU groups that a program has open
	next   int

	steps, dieAt int
	forgetful    bool // the driver of the PF forgets a VF's VLAN when the VF changes hands
}

type place struct {
	ns, name string
	index    int
}

const pfAddr, vfAddr, otherVF = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"

func newNode(t testing.TB, vfDriver string) *node {
	n := &node{
		Tree: testpci.New(t, []string{"igb", "igbvf", pci.VFIO, "uio_pci_generic"},
			testpci.Device{BDF: pfAddr, Driver: "igb", Total: 7, Group: 14, Net: []testpci.Net{{Name: "enp1s0"}}},
			testpci.Device{BDF: vfAddr, Driver: vfDriver, PF: pfAddr, Index: 0, Group: 15},
			testpci.Device{BDF: otherVF, Driver: "igbvf", PF: pfAddr, Index: 1, Group: 16}).IOMMU(),
		states: map[int]State{
			0: {MAC: nic.MAC{2, 0, 0, 0, 1, 0}, VLAN: 100, QoS: 3, SpoofChk: 1, Trust: unsaid, MaxRate: 1000},
			1: {SpoofChk: 1, Trust: unsaid},
		},
		links: map[string]place{otherVF: {"node", "enp1s0v1", 8}},
		open:  map[int]bool{},
		next:  10,
	}
	if vfDriver == "igbvf" {
		n.links[vfAddr] = place{"pod", "net1", 7}
	}
	n.Bound = func(bdf, driver string) {
		if driver == "igbvf" {
			n.links[bdf] = place{"node", fmt.Sprintf("eth%d", n.next), n.next}
			n.next++
		}
	}
	n.Unbound = func(bdf, _ string) {
		delete(n.links, bdf)
		if s := n.states[0]; n.forgetful && bdf == vfAddr {
			s.VLAN = 0
			n.states[0] = s
		}
	}
	written := n.FS.Written
	n.FS.Written = func(file, value string) {
		written(file, value)
		n.step()
	}
	return n
}

// step is after every change.
func (n *node) step() {
	n.steps++
	if n.steps == n.dieAt {
		panic(killed{})
	}
}

func (n *node) State(pf string, index int) (State, error) {
	if s, ok := n.states[index]; pf == "enp1s0" && ok {
		return s, nil
	}
	return State{}, errors.New("no such VF")
}

func (n *node) Set(pf string, c change) error {
	s, err := n.State(pf, 0)
	if err != nil {
		return err
	}
	var list []byte
	list = append(list, c.attr.Serialize()...)
	vf := mustAttrs(list)
	s.read(vf)
	n.states[0] = s
	n.step()
	return nil
}

func (n *node) Find(bdf string) (int, bool, error) {
	l, ok := n.links[bdf]
	if !ok || l.ns == "elsewhere" {
		return 0, false, nil
	}
	return l.index, l.ns == "pod", nil
}

func (n *node) Bring(index int, _ bool, name string) error {
	for bdf, l := range n.links {
		if l.index == index {
			n.links[bdf] = place{"pod", name, index}
		}
	}
	n.step()
	return nil
}

func (n *node) machine(boot string) *Machine {
	return &Machine{
		fs: n.FS, links: n, boot: boot, patience: 50 * time.Millisecond,
		inUse: func(group int) (bool, error) { return n.open[group], nil },
	}
}

// sight is all that matters of the node, but for the numbers of devices.
func (n *node) sight(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	for _, bdf := range []string{pfAddr, vfAddr, otherVF} {
		f, err := n.FS.Function(bdf)
		if err != nil {
			t.Fatal(err)
		}
		l := n.links[bdf]
		fmt.Fprintf(&b, "%s driver %q override %q in %q as %q\n", bdf, f.Driver, f.Override, l.ns, strings.TrimRight(l.name, "0123456789")+"N")
	}
	for _, i := range []int{0, 1} {
		fmt.Fprintf(&b, "VF %d %+v\n", i, n.states[i])
	}
	for _, group := range []int{15, 16} {
		o, err := n.FS.Owner(group)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "group %d %+v\n", group, o)
	}
	return b.String()
}

var guestNIC = nic.NIC{Name: "net1", MAC: nic.MAC{2, 0, 0, 0, 1, 0}, MTU: 1500, VF: &nic.VF{BDF: vfAddr}}

func record(t testing.TB, n *node, o Options) Handover {
	t.Helper()
	hs, err := n.machine("boot").Plan([]nic.NIC{{Name: "eth0"}, guestNIC}, o)
	if err != nil || len(hs) != 1 {
		t.Fatalf("plan: %v, %v", hs, err)
	}
	// By way of the disk, as a record is.
	b, err := json.Marshal(hs[0])
	if err != nil {
		t.Fatal(err)
	}
	var h Handover
	if err := json.Unmarshal(b, &h); err != nil {
		t.Fatal(err)
	}
	return h
}

// kill runs do in a process that dies after its step of that number, and says whether it came that far.
func (n *node) kill(at int, do func()) (died bool) {
	n.steps, n.dieAt = 0, at
	defer func() {
		n.dieAt = 0
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
			died = true
		}
	}()
	do()
	return false
}

func TestHandover(t *testing.T) {
	for _, driver := range []string{"igbvf", pci.VFIO} {
		t.Run(driver, func(t *testing.T) {
			n := newNode(t, driver)
			n.forgetful = true
			before := n.sight(t)
			o := Options{UID: 0x70000001}
			h := record(t, n, o)
			if now := n.sight(t); now != before {
				t.Fatalf("planning has changed the node: %s", cmp.Diff(before, now))
			}
			m := n.machine("boot")
			p, err := m.Take(h, o)
			if err != nil {
				t.Fatal(err)
			}
			owner, err := n.FS.Owner(15)
			if p.Group != n.FS.Root+"/dev/vfio/15" || p.Device != nil || err != nil || owner.UID != o.UID {
				t.Errorf("passed %+v, owner %+v, %v", p, owner, err)
			}
			if s := n.states[0]; n.Driver(vfAddr) != pci.VFIO || s.VLAN != 100 || s.MAC != guestNIC.MAC {
				t.Errorf("driver %s, %+v", n.Driver(vfAddr), s)
			}
			if err := m.Check(h); err != nil {
				t.Error(err)
			}
			s := n.states[0]
			s.VLAN = 7
			n.states[0] = s
			if err := m.Check(h); err == nil || !strings.Contains(err.Error(), "VLAN 100") {
				t.Errorf("somebody changed the VLAN: %v", err)
			}
			for range 2 {
				if err := n.machine("boot").GiveBack(h); err != nil {
					t.Fatal(err)
				}
				if now := n.sight(t); now != before {
					t.Fatalf("not as before:\n%s", cmp.Diff(before, now))
				}
			}
			if err := m.Check(h); driver == "igbvf" && (err == nil || !strings.Contains(err.Error(), "igbvf")) {
				t.Errorf("it is not the guest's any more: %v", err)
			}
		})
	}
}

// TestHandoverKilledAtEveryStep kills the process that takes a function, and then the one that returns it, after every change
// that they make.
func TestHandoverKilledAtEveryStep(t *testing.T) {
	for _, driver := range []string{"igbvf", pci.VFIO} {
		for _, mac := range []nic.MAC{guestNIC.MAC, {}, {2, 0, 0, 0, 9, 9}} { // pinned before, nowhere, another
			o := Options{UID: 0x70000001}
			cases := 0
			for take := 1; ; take++ {
				cut := false
				for back := 1; ; back++ {
					n := newNode(t, driver)
					s := n.states[0]
					s.MAC = mac
					n.states[0], n.forgetful = s, true
					before := n.sight(t)
					h := record(t, n, o)
					cut = n.kill(take, func() {
						if _, err := n.machine("boot").Take(h, o); err != nil {
							t.Fatal(err)
						}
					})
					again := n.kill(back, func() {
						if err := n.machine("boot").GiveBack(h); err != nil {
							t.Fatal(err)
						}
					})
					if again {
						if err := n.machine("boot").GiveBack(h); err != nil {
							t.Fatalf("taking killed at step %d, returning at %d: %v", take, back, err)
						}
					}
					if now := n.sight(t); now != before {
						t.Fatalf("%s, MAC %s: taking killed at step %d, returning at %d:\n%s", driver, mac, take, back, cmp.Diff(before, now))
					}
					cases++
					if !again {
						break
					}
				}
				if !cut {
					break
				}
			}
			if cases < 2 {
				t.Errorf("%s: only %d cases", driver, cases)
			}
		}
	}
}

// TestSomebodyElses: a function that has changed hands since is not touched, and that is no error.
func TestSomebodyElses(t *testing.T) {
	tests := []struct {
		name      string
		boot      string
		meanwhile func(t *testing.T, n *node)
	}{
		{"another boot", "next", func(*testing.T, *node) {}},
		{"another program has it open", "boot", func(_ *testing.T, n *node) { n.open[15] = true }},
		{"another MAC", "boot", func(_ *testing.T, n *node) {
			s := n.states[0]
			s.MAC = nic.MAC{2, 0, 0, 0, 7, 7}
			n.states[0] = s
		}},
		{"another driver", "boot", func(t *testing.T, n *node) {
			if err := n.FS.Bind(vfAddr, "uio_pci_generic"); err != nil {
				t.Fatal(err)
			}
		}},
		{"its own driver, and in another pod", "boot", func(t *testing.T, n *node) {
			if err := errors.Join(n.FS.Bind(vfAddr, "igbvf"), n.FS.Override(vfAddr, "")); err != nil {
				t.Fatal(err)
			}
			n.links[vfAddr] = place{"elsewhere", "net1", 77}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, "igbvf")
			o := Options{} // the owner of the file is no sign here
			h := record(t, n, o)
			if _, err := n.machine("boot").Take(h, o); err != nil {
				t.Fatal(err)
			}
			tt.meanwhile(t, n)
			before := n.sight(t)
			if err := n.machine(tt.boot).GiveBack(h); err != nil {
				t.Error(err)
			}
			if now := n.sight(t); now != before {
				t.Errorf("touched:\n%s", cmp.Diff(before, now))
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	n := newNode(t, pci.VFIO)
	n.open[15] = true
	if _, err := n.machine("boot").Plan([]nic.NIC{guestNIC}, Options{}); err == nil || !strings.Contains(err.Error(), "another VM") {
		t.Errorf("in use: %v", err)
	}
	n = newNode(t, "igbvf")
	n.Unbind(pfAddr)
	if _, err := n.machine("boot").Plan([]nic.NIC{guestNIC}, Options{}); err == nil || !strings.Contains(err.Error(), "no network device on the node") {
		t.Errorf("a PF without a driver: %v", err)
	}
	n = newNode(t, "igbvf")
	physical := nic.NIC{Name: "net1", VF: &nic.VF{BDF: pfAddr}}
	if _, err := n.machine("boot").Plan([]nic.NIC{physical}, Options{}); !errors.Is(err, pci.ErrNotVirtual) {
		t.Errorf("a PF: %v", err)
	}
}

// TestPhysical: a card that is no VF goes on purpose, and comes back; nothing is held to anything.
func TestPhysical(t *testing.T) {
	const addr = "0000:04:00.0"
	n := newNode(t, "igbvf")
	n.Tree = testpci.New(t, []string{"igb", pci.VFIO}, testpci.Device{BDF: addr, Driver: "igb", Group: 20}).IOMMU()
	n.links = map[string]place{addr: {"pod", "net1", 7}}
	n.Bound = func(bdf, driver string) {
		if driver == "igb" {
			n.links[bdf] = place{"node", "eth9", 9}
		}
	}
	n.Unbound = func(bdf, _ string) { delete(n.links, bdf) }
	m, card := n.machine("boot"), nic.NIC{Name: "net1", VF: &nic.VF{BDF: addr}}
	hs, err := m.Plan([]nic.NIC{card}, Options{AllowPhysical: true})
	if err != nil || hs[0].State != nil {
		t.Fatalf("%+v, %v", hs, err)
	}
	if _, err := m.Take(hs[0], Options{}); err != nil || n.Driver(addr) != pci.VFIO {
		t.Errorf("driver %s, %v", n.Driver(addr), err)
	}
	if err := m.GiveBack(hs[0]); err != nil || n.Driver(addr) != "igb" || n.links[addr] != (place{"pod", "net1", 9}) {
		t.Errorf("driver %s, %+v, %v", n.Driver(addr), n.links[addr], err)
	}
}

func TestFunctionsSeen(t *testing.T) {
	n := newNode(t, "igbvf")
	vfs, err := n.machine("boot").functions([]string{vfAddr, "0000:09:00.0", pfAddr})
	want := []nic.VF{
		{BDF: vfAddr, PF: "enp1s0", Index: 0, Group: 15, MAC: guestNIC.MAC, VLAN: 100},
		{BDF: pfAddr, Group: 14},
	}
	if !slices.Equal(vfs, want) || err != nil {
		t.Errorf("got %+v, %v", vfs, err)
	}
}

func TestState(t *testing.T) {
	all := State{MAC: nic.MAC{2, 0, 0, 0, 0, 9}, VLAN: 100, QoS: 5, Protocol: 0x88a8, SpoofChk: 1, Trust: 1, LinkState: 2, MinRate: 10, MaxRate: 20}
	none := State{SpoofChk: unsaid, Trust: unsaid}
	for _, tt := range []struct{ from, to, want State }{
		{none, all, all},
		{all, State{}, State{Protocol: 0x88a8}}, // without a VLAN there is none to say
		{State{SpoofChk: 1, Trust: 1}, none, State{SpoofChk: 1, Trust: 1}}, // unsaid is no wish
	} {
		is := tt.from
		for _, c := range tt.to.changes(tt.from, 3) {
			if number := is.read(mustAttrs(c.attr.Serialize())); number != 3 && number != unsaid {
				t.Errorf("%s is for VF %d", c.what, number)
			}
		}
		if is != tt.want {
			t.Errorf("from %+v: got %+v, want %+v", tt.from, is, tt.want)
		}
	}
	if all.differs(all) != "" || all.differs(none) == "" {
		t.Error("what differs is not told from what does not")
	}
}

func mustAttrs(b []byte) []syscall.NetlinkRouteAttr {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		panic(err)
	}
	return attrs
}

// A guest that is started again in the same pod gets the function by new descriptors: the old ones are tied to the IOMMU
// context of the guest before.
func TestPassedAgain(t *testing.T) {
	n := newNode(t, "igbvf")
	n.Cdev()
	o := Options{IOMMUFD: true}
	h := record(t, n, o)
	p, err := n.machine("boot").Take(h, o)
	if err != nil {
		t.Fatal(err)
	}
	device, iommu := p.Device, p.IOMMU
	if device == nil || iommu == nil {
		t.Fatalf("passed %+v", p)
	}
	if err := p.Renew(); err != nil {
		t.Fatal(err)
	}
	if p.Device == device || p.IOMMU == iommu || p.Device.Name() != device.Name() || p.IOMMU.Name() != iommu.Name() {
		t.Errorf("renewed %+v", p)
	}
	if err := device.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the old descriptor is open: %v", err)
	}
	if err := os.Remove(p.Device.Name()); err != nil {
		t.Fatal(err)
	}
	if err := p.Renew(); err == nil || !strings.Contains(err.Error(), vfAddr) {
		t.Errorf("a function that has gone: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := (&Passed{BDF: vfAddr, Group: "/dev/vfio/15"}).Renew(); err != nil {
		t.Errorf("a function by its group: %v", err)
	}
}
