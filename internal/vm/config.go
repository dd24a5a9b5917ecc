package vm

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/virtlet/virtlet/internal/cloudinit"
	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/image"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
	"github.com/virtlet/virtlet/internal/ssh"
)

// Config is a VM as asked for. It is kept in the VM's state.
type Config struct {
	Name   string `json:"name"`
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory"` // MiB

	Image *Disk  `json:"image,omitempty"` // boot disk; never written, an overlay takes the writes
	Disks []Disk `json:"disks,omitempty"` // further disks, written in place
	Root  bool   `json:"root,omitempty"`  // boot from Disks[0]; Image is nil then
	// DiskBus is how the guest reaches its disks: virtio, scsi (virtio-scsi), sata; "": virtio.
	DiskBus string `json:"diskBus,omitempty"`
	Kernel  string `json:"kernel,omitempty"`
	Initrd  string `json:"initrd,omitempty"`
	Append  string `json:"append,omitempty"`

	// Networks are attached in this order. Start fills in ContainerID and NetNS.
	Networks []cni.Attachment `json:"networks,omitempty"`
	Plugins  Plugins          `json:"plugins,omitzero"`
	// DeviceInfos is the directory of device info by the Network Plumbing Working Group; "": the usual one.
	DeviceInfos string        `json:"deviceInfos,omitempty"`
	CNITimeout  time.Duration `json:"cniTimeout,omitempty"` // of one ADD; 0: 60 s

	// NetNS is the path of a namespace that somebody else has configured and keeps: no ADD and no DEL then.
	NetNS   string           `json:"netns,omitempty"`
	Results []nic.Attachment `json:"-"` // what is known of how NetNS was configured; may be empty

	Hostname string   `json:"hostname,omitempty"` // "": Name
	DNS      []string `json:"dns,omitempty"`      // servers, after what the networks say
	Search   []string `json:"search,omitempty"`   // domains, likewise
	NTP      []string `json:"ntp,omitempty"`      // servers, by DHCP
	UserData []byte   `json:"userData,omitempty"` // cloud-init
	SSHKeys  []string `json:"sshKeys,omitempty"`  // authorized_keys files or lines; check makes lines of them

	Seed          string `json:"seed,omitempty"`          // nocloud, configdrive, none; "": nocloud where there is a use for it
	NetworkConfig string `json:"networkConfig,omitempty"` // how the seed carries it: v1, v2, user-data, none; "": v1
	GuestNetwork  string `json:"guestNetwork,omitempty"`  // dhcp, static; "": dhcp. A VF's is always static
	InstanceID    string `json:"instanceID,omitempty"`    // cloud-init's; "": of Disks[0]'s path with Root, else of this run

	// For [Store.SSH] alone: the user who has the keys, and files of private ones, which need not be there.
	SSHUser    string   `json:"sshUser,omitempty"` // "": [DefaultSSHUser]
	Identities []string `json:"identities,omitempty"`

	// A NIC of a network whose own DHCP servers or routers are to be heard: ours is off there then, and so is the check.
	ExternalDHCP bool `json:"externalDHCP,omitempty"`
	ExternalRA   bool `json:"externalRA,omitempty"`
	// NoSpoofCheck lets the guest send from any address. By default it may use those of its NICs alone; a NIC without
	// addresses is not checked.
	NoSpoofCheck bool `json:"noSpoofCheck,omitempty"`
	// Datapath joins NICs and links: auto, bridge, redirect; "": auto, which is a bridge for a veth, and redirect for what a
	// bridge cannot serve.
	Datapath string `json:"datapath,omitempty"`
	// AllowPhysical lets a PCI function that is no SR-IOV virtual function go to the guest. Nothing holds it to MAC or VLAN.
	AllowPhysical bool `json:"allowPhysical,omitempty"`
	// Localhost leads TCP connections that programs in the namespace make to localhost to the guest.
	Localhost bool `json:"localhost,omitempty"`

	Accel   string `json:"accel,omitempty"`   // kvm, tcg; "" or auto: what the CPU has
	QEMU    string `json:"qemu,omitempty"`    // "": qemu-system-* of this architecture
	QEMUImg string `json:"qemuImg,omitempty"` // "": qemu-img

	Remove bool `json:"remove,omitempty"` // erase the VM when it has ended and everything is undone

	// Of a VM that is a pod of Kubernetes: namespace/name. Whoever made the pod ends it, and Stop refuses.
	Pod       string          `json:"pod,omitempty"`
	DiskDir   string          `json:"diskDir,omitempty"` // where the overlay goes; "": to the VM's other files
	Inside    bool            `json:"-"`                 // this process lives in NetNS, which is not the node's
	NetNSEnds bool            `json:"-"`                 // its owner removes NetNS once he is told of the VM's end: what DEL does not look at may stay
	Volumes   Volumes         `json:"-"`                 // a disk of files; Secrets are among them
	Started   func(int) error `json:"-"`                 // called with QEMU's pid before its guest runs; an error ends the start

	Log *slog.Logger `json:"-"` // what happens while the guest runs; nil: nobody listens
}

// Disk is a disk image or block device of the host.
type Disk struct {
	Path     string `json:"path"`
	Format   string `json:"format,omitempty"` // raw or qcow2; "": by its header
	ReadOnly bool   `json:"readOnly,omitempty"`
	Serial   string `json:"serial,omitempty"` // by which the guest finds it; at most 20 bytes of ASCII
	Mount    string `json:"mount,omitempty"`  // where cloud-init mounts it, with a file system made if it has nothing; needs Serial
}

const (
	maxDisks      = qemu.MaxDrives - 2 // beside the image and the seed
	maxUserData   = 512 << 10          // bytes; larger ones are a mistake
	defaultCNI    = 60 * time.Second
	qemuImg       = "qemu-img"
	defaultQueues = 8 // at most; more queues than that gain nothing and cost memory in guest and host
)

// diskBuses are the values of DiskBus.
var diskBuses = map[string]qemu.DiskBus{"": qemu.VirtioBlock, "virtio": qemu.VirtioBlock, "scsi": qemu.VirtioSCSI, "sata": qemu.SATA}

// clone gives a copy that shares nothing that Start changes.
func (c Config) clone() Config {
	if c.Image != nil {
		image := *c.Image
		c.Image = &image
	}
	c.Disks, c.Networks, c.Results = slices.Clone(c.Disks), slices.Clone(c.Networks), slices.Clone(c.Results)
	c.Identities = slices.Clone(c.Identities)
	return c
}

// ConfigError says what of a configuration cannot be.
type ConfigError struct{ Err error }

func (e *ConfigError) Error() string { return e.Err.Error() }

// Unwrap gives the causes.
func (e *ConfigError) Unwrap() error { return e.Err }

// check fills in defaults, makes paths absolute and finds what can be found wrong without touching the machine. boots
// says that the guest is known, too.
func (c *Config) check(boots bool) error {
	if err := CheckName(c.Name); err != nil {
		return &ConfigError{err}
	}
	var errs []error
	bad := func(is bool, format string, a ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, a...))
		}
	}
	bad(c.CPUs < 1 || c.CPUs > qemu.MaxCPUs, "cpus: %d: use 1 to %d", c.CPUs, qemu.MaxCPUs)
	bad(c.Memory < qemu.MinMemory || c.Memory > qemu.MaxMemory, "memory: %d MiB: use %d to %d MiB", c.Memory, qemu.MinMemory, qemu.MaxMemory)
	bad(boots && c.Image == nil && c.Kernel == "" && !c.Root, "nothing to boot: give an IMAGE, --disk PATH --root, or --kernel")
	bad(c.Root && (c.Image != nil || c.Kernel != ""), "--root boots from the first --disk: leave IMAGE and --kernel out")
	bad(c.Root && (len(c.Disks) == 0 || c.Disks[0].ReadOnly), "--root boots from the first --disk, and writes to it: give one, without ro")
	_, ok := diskBuses[c.DiskBus]
	bad(!ok, "disk-bus %q: use virtio, scsi or sata", c.DiskBus)
	bad(c.DiskBus == "sata" && slices.ContainsFunc(c.Disks, func(d Disk) bool { return d.ReadOnly }), "disk-bus sata: a disk there cannot be read-only: use virtio or scsi")
	bad(c.Kernel == "" && (c.Initrd != "" || c.Append != ""), "--initrd and --append need --kernel")
	most := maxDisks - min(1, len(c.Volumes.Mounts))
	bad(len(c.Disks) > most, "%d disks: use at most %d", len(c.Disks), most)
	bad(c.NetNS != "" && len(c.Networks) > 0, "--netns joins a configured namespace: it cannot go with --network")
	bad(c.NetNS == "" && len(c.Networks) == 0, "no network: give one, or a namespace to join")
	bad(!slices.Contains([]string{"", "auto", "kvm", "tcg"}, c.Accel), "accel %q: use auto, kvm or tcg", c.Accel)
	bad(c.Datapath != "" && !slices.Contains(podnet.Wishes(), podnet.Wish(c.Datapath)), "datapath %q: use auto, bridge or redirect", c.Datapath)
	bad(len(c.UserData) > maxUserData, "user-data: %d bytes: use at most %d", len(c.UserData), maxUserData)
	if c.Hostname == "" {
		c.Hostname = c.Name
	}
	errs = append(errs, cloudinit.CheckHostname(c.Hostname))
	if c.UserData != nil {
		errs = append(errs, cloudinit.CheckUserData(c.UserData))
	}
	var keys []string
	for _, k := range c.SSHKeys {
		lines, err := cloudinit.ParseSSHKeys([]byte(k))
		keys, errs = append(keys, lines...), append(errs, err)
	}
	c.SSHKeys = keys
	c.checkSeed(bad)
	if c.SSHUser == "" {
		c.SSHUser = DefaultSSHUser
	}
	errs = append(errs, ssh.CheckUser(c.SSHUser))
	for _, a := range c.DNS {
		_, err := netip.ParseAddr(a)
		bad(err != nil, "dns %q: use an IP address", a)
	}
	for _, a := range c.NTP {
		_, err := netip.ParseAddr(a)
		bad(err != nil, "ntp %q: use an IP address", a)
	}
	disks := c.Disks
	if c.Image != nil {
		disks = append([]Disk{*c.Image}, disks...)
	}
	for _, d := range disks {
		bad(!slices.Contains([]image.Format{"", image.Raw, image.QCOW2}, image.Format(d.Format)), "disk %s: format %q: use raw or qcow2", d.Path, d.Format)
	}
	bad(c.CNITimeout < 0, "cni-timeout %s: use a positive time", c.CNITimeout)
	if c.CNITimeout == 0 {
		c.CNITimeout = defaultCNI
	}
	if c.QEMUImg == "" {
		c.QEMUImg = qemuImg
	}
	for _, p := range c.paths() {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*p = abs
	}
	if err := errors.Join(errs...); err != nil {
		return &ConfigError{err}
	}
	return nil
}

func (c *Config) paths() []*string {
	all := []*string{&c.Kernel, &c.Initrd, &c.NetNS}
	if c.Image != nil {
		all = append(all, &c.Image.Path)
	}
	for i := range c.Disks {
		all = append(all, &c.Disks[i].Path)
	}
	for i := range c.Identities {
		all = append(all, &c.Identities[i])
	}
	return all
}

// queues gives the number of queue pairs of each NIC: one for each CPU, within reason.
func (c *Config) queues() int { return min(c.CPUs, defaultQueues) }

// arch is the guest's architecture: the host's.
const arch = runtime.GOARCH
