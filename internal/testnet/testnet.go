// Package testnet is for tests only: throw-away network namespaces that stand for a node and for pods, a peer beside
// them, frame captures, and a guest that is not a VM but a namespace whose TAP is cross-connected to the pod's.
//
// Everything is made in namespaces of its own with random names and goes with the test, also when the test fails.
// Addresses are from the documentation ranges (RFC 5737, RFC 3849).
package testnet

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// Bridge is the name of a node's bridge, as the CNI bridge plugin's default.
const Bridge = "cni0"

// NeedRoot skips a test that cannot make namespaces.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// Namespace is a network namespace that goes with the test.
type Namespace struct {
	*netns.NS
	Name string
	t    testing.TB
}

// New makes an empty namespace with the loopback up.
func New(t testing.TB, label string) *Namespace {
	t.Helper()
	NeedRoot(t)
	var b [4]byte
	rand.Read(b[:])
	name := "vlt-" + label + "-" + hex.EncodeToString(b[:])
	ns, err := netns.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		if err := netns.Remove(ns.Path()); err != nil {
			t.Error(err)
		}
	})
	return &Namespace{NS: ns, Name: name, t: t}
}

// Link gives the rtnetlink handle.
func (n *Namespace) Link() *netlink.Handle {
	n.t.Helper()
	return n.Netlink()
}

// Must runs fn inside and ends the test on an error.
func (n *Namespace) Must(fn func() error) {
	n.t.Helper()
	if err := n.Do(fn); err != nil {
		n.t.Fatal(err)
	}
}

// Run executes a program inside the namespace and gives what it printed, standard output and error together.
func (n *Namespace) Run(name string, args ...string) (string, error) {
	var out []byte
	err := n.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput() // forks from the thread inside
		return err
	})
	return strings.TrimSpace(string(out)), err
}

// MustRun is Run that ends the test when the program fails.
func (n *Namespace) MustRun(name string, args ...string) string {
	n.t.Helper()
	out, err := n.Run(name, args...)
	if err != nil {
		n.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// Ping sends echo requests until one is answered, and says whether one was before the address turned out to be
// unreachable or ten seconds had passed.
func (n *Namespace) Ping(to netip.Addr, args ...string) bool {
	n.t.Helper()
	out, err := n.Run("ping", append(append([]string{"-c", "1", "-i", "0.2", "-w", "10"}, args...), to.String())...)
	if err != nil {
		n.t.Logf("%s: ping %s: %v\n%s", n.Name, to, err, out)
	}
	return err == nil
}

// Ready waits until the kernel's link watch has caught up with links that are up, with all if none is named (netif_oper_up
// of the kernel). A link that has just come up loses what is sent before.
func (n *Namespace) Ready(names ...string) {
	n.t.Helper()
	for end := time.Now().Add(30 * time.Second); !n.ready(names); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("%s: links stay down:\n%s", n.Name, n.MustRun("ip", "-d", "link"))
		}
	}
}

func (n *Namespace) ready(names []string) bool {
	links, err := netns.Dump(n.Link().LinkList)
	check(n.t, err)
	for _, l := range links {
		a := l.Attrs()
		if len(names) > 0 && !slices.Contains(names, a.Name) {
			continue
		}
		if a.RawFlags&unix.IFF_UP != 0 && a.OperState != netlink.OperUp && a.OperState != netlink.OperUnknown {
			return false
		}
	}
	return true
}

// Sysctl sets a value below /proc/sys/net of the namespace.
func (n *Namespace) Sysctl(path, value string) {
	n.t.Helper()
	n.Must(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0o644) })
}

// Node is a namespace that stands for a host: a bridge with a gateway address for pods.
type Node struct {
	*Namespace
	Gateways []netip.Prefix
	pods     int
}

// NewNode makes a node whose bridge has the given addresses.
func NewNode(t testing.TB, gateways ...netip.Prefix) *Node {
	t.Helper()
	n := &Node{Namespace: New(t, "node"), Gateways: gateways}
	h := n.Link()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge, TxQLen: -1}}
	check(t, h.LinkAdd(br))
	check(t, h.LinkSetUp(br))
	for _, g := range gateways {
		check(t, h.AddrAdd(br, Address(g)))
	}
	return n
}

// PodSpec says what a pod's veth is like.
type PodSpec struct {
	Name    string // eth0 if empty
	MAC     nic.MAC
	MTU     int
	Addrs   []netip.Prefix
	Routes  []netlink.Route // LinkIndex is filled in
	Hairpin bool            // the host side reflects frames, as hairpinMode does
	NoPort  bool            // the host side stays off the bridge
}

// AddPod makes a pod namespace joined to the node by a veth, and gives it and the name of the veth's host side.
func (n *Node) AddPod(t testing.TB, spec PodSpec) (*Namespace, string) {
	t.Helper()
	pod := New(t, "pod")
	return pod, n.AddLink(t, pod, spec)
}

// AddLink joins a pod to the node by one more veth and gives the name of the veth's host side.
func (n *Node) AddLink(t testing.TB, pod *Namespace, spec PodSpec) string {
	t.Helper()
	n.pods++
	if spec.Name == "" {
		spec.Name = "eth0"
	}
	host := fmt.Sprintf("veth%d", n.pods)
	h := n.Link()
	f, err := os.Open(pod.Path())
	check(t, err)
	defer f.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = host, spec.MTU
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: spec.Name, PeerNamespace: netlink.NsFd(f.Fd()), PeerMTU: uint32(spec.MTU),
		PeerHardwareAddr: func() net.HardwareAddr {
			if spec.MAC.IsZero() {
				return nil
			}
			return spec.MAC.HardwareAddr()
		}(),
	}
	check(t, h.LinkAdd(veth))
	if !spec.NoPort {
		br, err := h.LinkByName(Bridge)
		check(t, err)
		check(t, h.LinkSetMaster(veth, br))
		check(t, h.LinkSetHairpin(veth, spec.Hairpin))
	}
	check(t, h.LinkSetUp(veth))
	p := pod.Link()
	eth, err := p.LinkByName(spec.Name)
	check(t, err)
	check(t, p.LinkSetUp(eth))
	for _, a := range spec.Addrs {
		check(t, p.AddrAdd(eth, Address(a)))
	}
	for _, r := range spec.Routes {
		r.LinkIndex = eth.Attrs().Index
		check(t, p.RouteAdd(&r))
	}
	n.Ready(host)
	pod.Ready(spec.Name)
	return host
}

// Address is p as netlink wants it, without duplicate address detection.
func Address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: IPNet(p)}
	if p.Addr().Is6() {
		a.Flags = 0x02 // IFA_F_NODAD: usable at once
	}
	return a
}

// IPNet is p with its host bits.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Via is a route to dst by gw; an unset gw puts dst on the link.
func Via(dst string, gw string) netlink.Route {
	r := netlink.Route{Dst: IPNet(netip.MustParsePrefix(dst))}
	if gw != "" {
		r.Gw = net.ParseIP(gw)
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
