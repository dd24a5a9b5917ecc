package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/qemu"
)

// Journal is what a VM has done to its machine beyond its own files. Each entry is on disk before its effect happens,
// so that any process can undo it: the supervisor after a failed start or at the end, and `virtlet gc` or `rm` after a
// supervisor that was killed.
type Journal struct {
	NetNS       string           `json:"netns,omitempty"`
	OwnNetNS    bool             `json:"ownNetNS,omitempty"` // virtlet makes it, virtlet removes it
	Inode       uint64           `json:"inode,omitempty"`    // of a namespace that is not virtlet's own
	Attachments []cni.Attachment `json:"attachments,omitempty"`
	Plugins     Plugins          `json:"plugins,omitzero"` // where the plugins of the attachments are
	Network     *podnet.Record   `json:"network,omitempty"`
	// NodeLinks are what the plugins have made on the node for this VM: seen after ADD, to see what DEL has left.
	NodeLinks []podnet.NodeLink `json:"nodeLinks,omitempty"`
	QEMU      *Process          `json:"qemu,omitempty"`
}

// Process names a process so that a reused number is told apart.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot: field 22 of /proc/PID/stat
}

// undoTimeout bounds one CNI DEL while undoing.
const undoTimeout = 60 * time.Second

func (s Store) writeJournal(name string, j *Journal) error {
	err := writeJSON(s.data(name, "journal.json"), j, true) // addresses that plugins have leased outlive a power cut
	if s.recorded != nil {
		s.recorded()
	}
	return err
}

// undo takes back what the journal of a VM says, and then the journal itself. It never stops early, takes what is gone
// already as done, and may be called again. With force a CNI plugin that fails is an error, but does not keep the
// journal. left are sentences about what plugins without an error have left on the node: nobody tries again, so the user
// is told. The VM's lock is held.
func (s Store) undo(ctx context.Context, name string, force bool) (left []string, err error) {
	var j Journal
	err = readJSON(s.data(name, "journal.json"), &j)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil && force {
		return nil, s.undoUnread(name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("undo VM %s (virtlet rm -f %[1]s does what can be done without it): %w", name, err)
	}
	own, plugins := s.undoJournal(ctx, j)
	left, err = j.leftOnNode()
	own = errors.Join(own, err)
	if err := errors.Join(own, plugins); err != nil && (own != nil || !force) {
		return left, fmt.Errorf("undo VM %s (virtlet gc tries it again, virtlet rm -f %[1]s without insisting): %w", name, err)
	}
	if plugins != nil {
		plugins = fmt.Errorf("removed VM %s, but a CNI plugin may have left something: %w", name, plugins)
	}
	return left, errors.Join(plugins, os.Remove(s.data(name, "journal.json")))
}

// removal is how long links may take to go with their namespace, which the kernel removes in the background.
const removal = 3 * time.Second

// leftOnNode looks for links that the plugins have made on the node and that neither DEL nor the end of the namespace has
// taken away.
func (j *Journal) leftOnNode() ([]string, error) {
	if len(j.NodeLinks) == 0 {
		return nil, nil
	}
	var links []podnet.NodeLink
	for end := time.Now().Add(removal); ; time.Sleep(10 * time.Millisecond) {
		var err error
		if links, err = podnet.Left(j.NodeLinks); err != nil {
			return nil, err
		}
		if len(links) == 0 || time.Now().After(end) {
			break
		}
	}
	var networks []string
	for _, a := range j.Attachments {
		networks = append(networks, a.Name)
	}
	var left []string
	for _, l := range links {
		left = append(left, fmt.Sprintf("link %s (%s) is left on the node: the plugins of %s made it and have not removed it; if nothing needs it: ip link del %[1]s",
			l.Name, l.Kind, strings.Join(networks, ", ")))
	}
	return left, nil
}

// undoUnread does without a journal that cannot be read: it removes the namespace that has the VM's name, and says that
// more may be left.
func (s Store) undoUnread(name string, unread error) error {
	err := netns.Remove(ownNetNS(name))
	if err == nil {
		err = os.Remove(s.data(name, "journal.json"))
	}
	return errors.Join(fmt.Errorf("removed VM %s without its journal; CNI plugins may have left something (virtlet gc ends what is cached): %w", name, unread), err)
}

// undoJournal gives apart what virtlet could not undo and what plugins could not.
func (s Store) undoJournal(ctx context.Context, j Journal) (own, plugins error) {
	if j.QEMU != nil {
		// With QEMU alive nothing of its network can be put back.
		if err := qemu.KillPID(j.QEMU.PID, j.QEMU.Start); err != nil {
			return err, nil
		}
	}
	switch {
	case j.Network == nil:
	case j.there():
		own = j.detach()
	default:
		own = podnet.Detach(nil, *j.Network)
	}
	if own != nil && len(j.Network.VFs) > 0 {
		// A plugin's DEL finds its function where ADD put it, or it is not called: what it resets at the PF is how we know
		// the function as the one that we took.
		return own, nil
	}
	for _, a := range slices.Backward(j.Attachments) {
		runtime := cni.Runtime{BinDirs: j.Plugins.For(a.Name), CacheDir: s.cniCache(), Timeout: undoTimeout}
		own = errors.Join(own, cni.EndOrphans(a.ContainerID))
		plugins = errors.Join(plugins, runtime.Del(context.WithoutCancel(ctx), a))
	}
	if j.OwnNetNS {
		// Whatever the plugins left inside goes with the namespace.
		own = errors.Join(own, netns.Remove(j.NetNS))
	}
	return own, plugins
}

// there says whether the namespace still is, and is the one that was meant.
func (j *Journal) there() bool {
	var st unix.Stat_t
	return netns.Exists(j.NetNS) && (j.Inode == 0 || unix.Stat(j.NetNS, &st) == nil && st.Ino == j.Inode)
}

func (j *Journal) detach() error {
	ns, err := netns.Open(j.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	if j.OwnNetNS { // with which all goes that DEL does not look at
		return podnet.Release(ns, *j.Network)
	}
	return podnet.Detach(ns, *j.Network)
}
