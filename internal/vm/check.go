package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/pci"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
)

// Level of a [Finding].
type Level string

// Levels, from good to bad. With a Fail no VM will start; with a Warn some, or slower.
const (
	OK   Level = "ok"
	Warn Level = "warn"
	Fail Level = "fail"
)

// Finding is one thing that [Check] looked at.
type Finding struct {
	Level Level  `json:"level"`
	What  string `json:"what"`
	Is    string `json:"is"`           // what was found
	Do    string `json:"do,omitempty"` // what to do about it
}

// CheckRequest is what Check looks for.
type CheckRequest struct {
	Store   Store
	ConfDir string // of CNI configurations
	Plugins Plugins
	QEMU    string // "": qemu-system-* of this architecture
	QEMUImg string // "": qemu-img
	PCI     pci.FS
}

// Check looks whether this machine can run VMs, and leaves it as it is.
func Check(ctx context.Context, r CheckRequest) []Finding {
	var all []Finding
	for _, look := range []func(context.Context) []Finding{
		r.privileges, r.qemu, r.devices, r.network, r.functions, r.networks, r.directories,
	} {
		all = append(all, look(ctx)...)
	}
	return all
}

func found(what string, err error, is, do string) Finding {
	if err != nil {
		return Finding{Fail, what, err.Error(), do}
	}
	return Finding{Level: OK, What: what, Is: is}
}

func (r CheckRequest) privileges(context.Context) []Finding {
	if uid := os.Geteuid(); uid != 0 {
		return []Finding{{Fail, "user", fmt.Sprintf("uid %d", uid), "run virtlet as root: it makes namespaces, links and TAPs"}}
	}
	return []Finding{{Level: OK, What: "user", Is: "root"}}
}

func (r CheckRequest) qemu(ctx context.Context) []Finding {
	binary := r.QEMU
	if binary == "" {
		binary = qemu.DefaultBinary(arch)
	}
	v, err := qemu.Version(ctx, binary)
	q := found("QEMU", err, v, "install it: apt-get install qemu-system-x86 (qemu-system-arm on arm64), or give --qemu PATH")
	img := r.QEMUImg
	if img == "" {
		img = qemuImg
	}
	v, err = qemu.Version(ctx, img)
	return []Finding{q, found("qemu-img", err, v, "install it: apt-get install qemu-utils")}
}

func (r CheckRequest) devices(context.Context) []Finding { return CheckDevices("/") }

// CheckDevices looks at the devices that VMs use, and at what accelerates them. root is the machine's root directory: "/", or
// where that is mounted.
func CheckDevices(root string) []Finding {
	accel, why := qemu.DetectAccel(root)
	a := Finding{Level: OK, What: "acceleration", Is: fmt.Sprintf("%s: %s", accel, why)}
	if accel != qemu.KVM {
		a.Level, a.Do = Warn, "guests run, but slowly: enable virtualisation (VT-x, AMD-V) in the firmware, or nested virtualisation in the hypervisor"
	}
	open := func(path string) error {
		fd, err := unix.Open(filepath.Join(root, path), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return nil
		}
		return fmt.Errorf("open %s: %w", path, err)
	}
	tun := found("TAP devices", open("/dev/net/tun"), "/dev/net/tun opens", "load the driver (modprobe tun) as root, and run virtlet as root")
	vhost := found("vhost-net", open("/dev/vhost-net"), "/dev/vhost-net opens", "optional, for speed: modprobe vhost_net")
	if vhost.Level == Fail {
		vhost.Level = Warn
	}
	return []Finding{a, tun, vhost}
}

func (r CheckRequest) network(context.Context) []Finding {
	return []Finding{CheckNetwork(), checkRedirect()}
}

// checkRedirect says whether a veth can be joined by eBPF.
func checkRedirect() Finding {
	const what, do = "datapath redirect", "--datapath redirect needs CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS; another datapath serves without them"
	lacks, err := podnet.Probe(podnet.WishRedirect)
	if err != nil || lacks != "" {
		return Finding{Warn, what, cmp.Or(lacks, fmt.Sprint(err)), do}
	}
	return Finding{Level: OK, What: what, Is: "eBPF works"}
}

// CheckNetwork tries what every VM needs of the kernel in a namespace of its own, which goes again. It takes root.
func CheckNetwork() Finding {
	do := "the kernel needs veth, bridge, tun and nf_tables (CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_INGRESS), and virtlet needs root"
	lacks, err := podnet.Probe(podnet.WishAuto)
	return found("namespace, bridge, TAP, filters", err, cmp.Or(lacks, "all of them work"), do)
}

// checkTimeout bounds the question whether a network is ready.
const checkTimeout = 10 * time.Second

func (r CheckRequest) networks(ctx context.Context) []Finding {
	nets, bad, err := cni.Load(r.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return []Finding{{Fail, "CNI configurations", err.Error(), "give another --cni-conf-dir"}}
	}
	var all []Finding
	for _, b := range bad {
		all = append(all, Finding{Warn, "CNI configuration " + b.File, b.Err.Error(), "correct the file, or remove it"})
	}
	if len(nets) == 0 {
		all = append(all, Finding{Level: OK, What: "CNI configurations", Is: "none in " + r.ConfDir + ": the embedded network serves"})
	}
	for _, n := range append(nets, r.Store.embedded()) {
		f := Finding{Level: OK, What: fmt.Sprintf("CNI network %q", n.Name), Is: fmt.Sprintf("%s, version %s", n.File, n.Version)}
		plugins := cni.Runtime{BinDirs: r.Plugins.For(n.Name), CacheDir: r.Store.cniCache(), Timeout: checkTimeout}
		if missing := plugins.Missing(n); len(missing) > 0 {
			f.Level = Warn
			f.Is += ": plugins not found: " + strings.Join(missing, ", ")
			f.Do = "install them in one of " + strings.Join(plugins.BinDirs, ", ")
		} else if tools := n.MissingTools(); len(tools) > 0 {
			f.Level = Warn
			f.Is += ": its plugins run programs that are not in PATH: " + strings.Join(tools, ", ")
			f.Do = "install them: apt-get install iptables nftables"
		} else if err := plugins.Validate(ctx, n); err != nil {
			f.Level = Warn
			f.Is += ": " + err.Error()
			f.Do = "install newer plugins, or lower the cniVersion of the configuration"
		} else if err := plugins.Status(ctx, n); err != nil && !errors.Is(err, cni.ErrUnsupported) {
			f.Level = Warn
			f.Is += ": not ready: " + err.Error()
			f.Do = "look after the network's daemon, if it has one"
		}
		all = append(all, f)
	}
	return all
}

func (r CheckRequest) directories(context.Context) []Finding {
	var all []Finding
	for _, dir := range []string{r.Store.Run, r.Store.Data} {
		// The nearest that is there: Check makes none.
		at := dir
		for at != "/" {
			if _, err := os.Stat(at); err == nil {
				break
			}
			at = filepath.Dir(at)
		}
		f := found("directory "+dir, unix.Access(at, unix.W_OK), "can be written", "make "+at+" writable")
		var fs unix.Statfs_t
		if unix.Statfs(at, &fs) == nil && f.Level == OK {
			const enough = 1 << 30
			free := fs.Bavail * uint64(fs.Bsize)
			f.Is += fmt.Sprintf(", %d MiB free", free>>20)
			if dir == r.Store.Data && free < enough {
				f.Level, f.Do = Warn, "what guests write to their disks goes here: make room"
			}
		}
		all = append(all, f)
	}
	return all
}
