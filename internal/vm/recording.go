package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/virtlet/virtlet/internal/cni"
	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
	"github.com/virtlet/virtlet/internal/podnet"
)

const recordingFile = "recording.json"

// anyPod stands for the path of the namespace, in which there may be the VM's name.
const anyPod = "/run/netns/pod"

// keepRecording writes down what the plugins answered and did, before virtlet changes anything: it is asked for when
// something is wrong, and then it is too late to look.
func (v *VM) keepRecording(snap nic.Snapshot, nics []nic.NIC, notes []string) error {
	r := nic.Recording{
		Attachments: []nic.Answer{}, Snapshot: snap, Want: nic.Want{NICs: slices.Clone(nics), Notes: notes},
	}
	var types []string
	for _, a := range v.cfg.Results {
		answer := nic.Answer{Network: a.Network, IfName: a.IfName, Device: a.Device, Type: a.DeviceType}
		// Of what Multus attached by itself no more than the result is known.
		i := slices.IndexFunc(v.cfg.Networks, func(n cni.Attachment) bool { return n.Name == a.Network && n.IfName == a.IfName })
		if i >= 0 {
			n := v.cfg.Networks[i]
			answer.Plugins = n.Types()
			types = append(types, strings.Join(answer.Plugins, ", "))
			runtime := cni.Runtime{CacheDir: v.store.cniCache()}
			answer.Result, _ = runtime.Answer(n) // else the converted one
		}
		if answer.Result == nil && a.Result != nil {
			var err error
			if answer.Result, err = json.Marshal(a.Result); err != nil {
				return err
			}
		}
		answer.Result = anonymous(answer.Result)
		r.Attachments = append(r.Attachments, answer)
	}
	r.About = "recorded by virtlet inspect --snapshot: " + strings.Join(types, "; ")
	if types == nil {
		r.About = "recorded by virtlet inspect --snapshot: a namespace that somebody else configured"
	}
	return writeJSON(v.store.data(v.cfg.Name, recordingFile), r, false)
}

// anonymous takes the path of the namespace out of a CNI result.
func anonymous(result json.RawMessage) json.RawMessage {
	var r map[string]any
	if json.Unmarshal(result, &r) != nil {
		return nil
	}
	interfaces, _ := r["interfaces"].([]any)
	for _, i := range interfaces {
		if i, ok := i.(map[string]any); ok && i["sandbox"] != nil && i["sandbox"] != "" {
			i["sandbox"] = anyPod
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil
	}
	return b
}

// Recording gives the network of a VM as a file that a test can be made of: as it was before virtlet took it over, and,
// while the VM runs, with the node's side of it. It is given beside an error of the look at the node.
func (s Store) Recording(name string) (nic.Recording, error) {
	st, err := s.Get(name)
	if err != nil {
		return nic.Recording{}, err
	}
	var r nic.Recording
	if err := readJSON(s.data(name, recordingFile), &r); errors.Is(err, fs.ErrNotExist) {
		return nic.Recording{}, fmt.Errorf("VM %q: nothing of its network is recorded: its start has not come so far, or was by an older virtlet", name)
	} else if err != nil {
		return nic.Recording{}, err
	}
	if st.Status != Running && st.Status != Dead || !netns.Exists(st.NetNS) {
		return r, nil
	}
	ns, err := netns.Open(st.NetNS)
	if err != nil {
		return r, err
	}
	defer ns.Close()
	r.Host, r.NoTxChecksum, err = podnet.ObserveHost(ns, r.Snapshot)
	return r, err
}
