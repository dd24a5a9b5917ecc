package vm

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/virtlet/virtlet/internal/dhcp"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

// Status of a VM.
type Status string

// The life of a VM. Idle is a pod's without a guest. Dead is never written: it is a VM whose supervisor ended without cleaning up.
const (
	Starting Status = "starting"
	Running  Status = "running"
	Idle     Status = "idle"
	Stopped  Status = "stopped"
	Dead     Status = "dead"
)

// State is what is known of a VM. The supervisor writes it, everybody reads it.
type State struct {
	Config     Config        `json:"config"`
	Status     Status        `json:"status"`
	Created    time.Time     `json:"created"`
	Started    time.Time     `json:"started,omitzero"` // QEMU answered
	Finished   time.Time     `json:"finished,omitzero"`
	Supervisor Process       `json:"supervisor"`
	QEMU       Process       `json:"qemu,omitzero"`
	Exit       *Exit         `json:"exit,omitempty"`
	NetNS      string        `json:"netns"`
	Results    []Result      `json:"results,omitempty"`
	NICs       []nic.NIC     `json:"nics"`
	Left       string        `json:"left,omitempty"` // what could not be undone at the end, and why
	Ports      []PortState   `json:"ports,omitempty"`
	Leases     []dhcp.Lease  `json:"leases,omitempty"`
	Leases6    []dhcp.Lease6 `json:"leases6,omitempty"`
	Accel      string        `json:"accel,omitempty"`
	Command    string        `json:"command,omitempty"`    // QEMU's command line, quoted for a shell
	InstanceID string        `json:"instanceID,omitempty"` // what cloud-init knows the installation by
	Notes      []string      `json:"notes,omitempty"`      // what the user should know about the network
}

// Result is what a CNI network answered.
type Result struct {
	Network string `json:"network"`
	IfName  string `json:"ifName"`
	Result  any    `json:"result"` // a CNI result, spec 1.x
}

// PortState is how one NIC is joined.
type PortState struct {
	podnet.Join
	Queues int  `json:"queues"`
	Vhost  bool `json:"vhost"`
	// Passed says by what QEMU has a NIC that is a PCI function: the device file of its IOMMU group, or "iommufd".
	Passed string `json:"passed,omitempty"`
}

// VF is a PCI function that is a NIC of the guest.
type VF = nic.VF

// Get reads the state of a VM. [ErrNotFound] when there is none of that name.
func (s Store) Get(name string) (State, error) {
	if err := CheckName(name); err != nil {
		return State{}, err
	}
	for {
		// The order matters: a supervisor that ends between the two looks has written its last state.
		alive := s.alive(name)
		st, err := s.read(name, alive)
		if alive || !s.alive(name) {
			return st, err
		}
		// Somebody has taken the name in between.
	}
}

// read gives the state on disk of a VM that is alive or not.
func (s Store) read(name string, alive bool) (State, error) {
	st := State{Config: Config{Name: name}, Status: Starting}
	err := readJSON(s.run(name, "state.json"), &st)
	if errors.Is(err, fs.ErrNotExist) {
		err = readJSON(s.data(name, "state.json"), &st)
	}
	if errors.Is(err, fs.ErrNotExist) && !alive {
		if names, err := s.names(); err != nil || !slices.Contains(names, name) {
			return State{}, errors.Join(fmt.Errorf("VM %q: %w: `virtlet ps` lists those that are there", name, ErrNotFound), err)
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return State{}, fmt.Errorf("%w: virtlet rm -f %s removes the VM", err, name)
	}
	if !alive && st.Status != Stopped {
		st.Status = Dead
	}
	return st, nil
}

// writeLast keeps the state of a VM that has ended, where it outlives a reboot. The VM's lock is held.
func (s Store) writeLast(st State) error {
	name := st.Config.Name
	if err := writeJSON(s.data(name, "state.json"), &st, false); err != nil {
		return errors.Join(err, writeJSON(s.run(name, "state.json"), &st, false)) // the disk may be full
	}
	return os.RemoveAll(s.run(name))
}

// List gives the states of all VMs, the oldest first. A VM that cannot be read is an error beside the others.
func (s Store) List() ([]State, error) {
	names, err := s.names()
	if err != nil {
		return nil, fmt.Errorf("list VMs: %w (virtlet needs root)", err)
	}
	var all []State
	var errs []error
	for _, name := range names {
		st, err := s.Get(name)
		if errors.Is(err, ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, st)
	}
	slices.SortStableFunc(all, func(a, b State) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Config.Name, b.Config.Name))
	})
	return all, errors.Join(errs...)
}
