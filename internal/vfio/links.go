package vfio

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/pci"
)

// Where drivers make the network devices of functions, and where physical functions are: the kernel's first namespace. It is
// that of process 1, and without CAP_SYS_PTRACE, which it takes to look at that, it is taken to be our own.
const nodeNetNS, ownNetNS = "/proc/1/ns/net", "/proc/self/ns/net"

// Open opens the node, for functions of a pod. The caller closes it. pod stays the caller's; it may be nil: then it is gone.
func Open(pod *netns.NS) (*Machine, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("tell one boot from another: %w", err)
	}
	node, err := netns.Open(nodeNetNS)
	if errors.Is(err, os.ErrPermission) {
		node, err = netns.Open(ownNetNS)
	}
	if err != nil {
		return nil, err
	}
	const patience = 30 * time.Second // cards whose firmware is slow take several
	var fs pci.FS
	return &Machine{
		fs: fs, links: &kernelLinks{node, pod}, inUse: fs.InUse, close: node.Close, boot: strings.TrimSpace(string(boot)), patience: patience,
	}, nil
}

// Close closes the node.
func (m *Machine) Close() error { return m.close() }

// kernelLinks are the kernel's own.
type kernelLinks struct{ node, pod *netns.NS }

func (k *kernelLinks) State(pf string, index int) (s State, err error) {
	err = k.node.Do(func() error {
		s, err = vfState(pf, index)
		return err
	})
	return s, err
}

func (k *kernelLinks) Set(pf string, c change) error {
	return k.node.Do(func() error {
		link, err := k.node.Netlink().LinkByName(pf)
		if err != nil {
			return err
		}
		return setVF(link.Attrs().Index, c)
	})
}

func (k *kernelLinks) Find(bdf string) (index int, inPod bool, err error) {
	for _, ns := range []*netns.NS{k.pod, k.node} {
		if ns == nil {
			continue
		}
		links, err := netns.Dump(ns.Netlink().LinkList)
		if err != nil {
			return 0, false, fmt.Errorf("look for the network device of %s: %w", bdf, err)
		}
		for _, l := range links {
			if a := l.Attrs(); a.ParentDevBus == "pci" && a.ParentDev == bdf {
				return a.Index, ns == k.pod, nil
			}
		}
	}
	return 0, false, nil
}

func (k *kernelLinks) Bring(index int, inPod bool, name string) error {
	if k.pod == nil {
		return nil
	}
	if !inPod {
		return k.move(index, name)
	}
	h := k.pod.Netlink()
	link, err := h.LinkByIndex(index)
	if err != nil || link.Attrs().Name == name {
		return err
	}
	// The kernel renames one that is up since Linux 6.2 only.
	return errors.Join(h.LinkSetDown(link), h.LinkSetName(link, name))
}

// move gives a device of the node to the pod under another name, in one message: the pod may have its name of now.
func (k *kernelLinks) move(index int, name string) error {
	pod, err := os.Open(k.pod.Path())
	if err != nil {
		return err
	}
	defer pod.Close()
	return k.node.Do(func() error {
		if err := k.node.Netlink().LinkSetDown(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}); err != nil {
			return err
		}
		req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(index)
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pod.Fd()))))
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}
