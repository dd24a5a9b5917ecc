package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// State is what a PF has set for one of its VFs, by rtnetlink's IFLA_VFINFO_LIST. A guest that owns the VF cannot change
// it, unless the VF is trusted.
type State struct {
	MAC       nic.MAC `json:"mac,omitzero"`
	VLAN      uint32  `json:"vlan,omitempty"`
	QoS       uint32  `json:"qos,omitempty"`
	Protocol  uint16  `json:"protocol,omitempty"`  // EtherType of the tag; 0: nobody says
	SpoofChk  uint32  `json:"spoofChk,omitempty"`  // 0, 1, or unsaid
	Trust     uint32  `json:"trust,omitempty"`     // likewise
	LinkState uint32  `json:"linkState,omitempty"` // IFLA_VF_LINK_STATE_*: 0 as the PF's, 1 up, 2 down
	MinRate   uint32  `json:"minRate,omitempty"`   // Mbit/s; 0: none
	MaxRate   uint32  `json:"maxRate,omitempty"`
}

// unsaid is what the kernel gives for what a driver does not have: -1.
const unsaid = 1<<32 - 1

// The attributes of one VF, of which each begins with the VF's number (linux/if_link.h: struct ifla_vf_*). The library's
// own reading takes the place in the list for the number, and -1 for yes.
func (s *State) read(attrs []syscall.NetlinkRouteAttr) (number uint32) {
	number = unsaid
	for _, a := range attrs {
		word := func(i int) uint32 {
			if len(a.Value) < 4*i+4 {
				return 0
			}
			return binary.NativeEndian.Uint32(a.Value[4*i:])
		}
		switch a.Attr.Type {
		case nl.IFLA_VF_MAC:
			number = word(0)
			if len(a.Value) >= 4+len(s.MAC) {
				s.MAC = nic.MAC(a.Value[4 : 4+len(s.MAC)])
			}
		case nl.IFLA_VF_VLAN:
			s.VLAN, s.QoS = word(1), word(2)
		case nl.IFLA_VF_VLAN_LIST:
			// One IFLA_VF_VLAN_INFO: number, VLAN, QoS, and the protocol in the order of the network.
			if list, err := nl.ParseRouteAttr(a.Value); err == nil && len(list) > 0 && len(list[0].Value) >= 14 {
				v := list[0].Value
				s.VLAN, s.QoS = binary.NativeEndian.Uint32(v[4:]), binary.NativeEndian.Uint32(v[8:])
				s.Protocol = binary.BigEndian.Uint16(v[12:])
			}
		case nl.IFLA_VF_SPOOFCHK:
			s.SpoofChk = word(1)
		case nl.IFLA_VF_TRUST:
			s.Trust = word(1)
		case nl.IFLA_VF_LINK_STATE:
			s.LinkState = word(1)
		case nl.IFLA_VF_RATE:
			s.MinRate, s.MaxRate = word(1), word(2)
		}
	}
	return number
}

// change is one attribute to be set.
type change struct {
	what string
	attr *nl.RtAttr
}

// changes gives what makes from to: one attribute each, as a driver that does not have one refuses all of a message.
func (s State) changes(from State, index int) []change {
	var all []change
	add := func(differs bool, what string, kind int, words ...uint32) {
		if differs {
			all = append(all, change{what, nl.NewRtAttr(kind, vfWords(index, words...))})
		}
	}
	if s.MAC != from.MAC {
		// struct ifla_vf_mac has room for 32 bytes of address.
		data := append(vfWords(index), append(s.MAC[:], make([]byte, 32-len(s.MAC))...)...)
		all = append(all, change{"MAC " + s.MAC.String(), nl.NewRtAttr(nl.IFLA_VF_MAC, data)})
	}
	if s.VLAN != from.VLAN || s.QoS != from.QoS || s.Protocol != from.Protocol {
		what := fmt.Sprintf("VLAN %d", s.VLAN)
		if s.Protocol == 0 || s.Protocol == unix.ETH_P_8021Q {
			add(true, what, nl.IFLA_VF_VLAN, s.VLAN, s.QoS)
		} else {
			list := nl.NewRtAttr(nl.IFLA_VF_VLAN_LIST, nil)
			list.AddRtAttr(nl.IFLA_VF_VLAN_INFO, append(vfWords(index, s.VLAN, s.QoS), byte(s.Protocol>>8), byte(s.Protocol), 0, 0))
			all = append(all, change{what, list})
		}
	}
	add(s.MinRate != from.MinRate || s.MaxRate != from.MaxRate, "rates", nl.IFLA_VF_RATE, s.MinRate, s.MaxRate)
	add(s.LinkState != from.LinkState, "link state", nl.IFLA_VF_LINK_STATE, s.LinkState)
	add(s.SpoofChk != from.SpoofChk && s.SpoofChk != unsaid, "spoof check", nl.IFLA_VF_SPOOFCHK, s.SpoofChk)
	add(s.Trust != from.Trust && s.Trust != unsaid, "trust", nl.IFLA_VF_TRUST, s.Trust)
	return all
}

func vfWords(index int, words ...uint32) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(index))
	for _, w := range words {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return b
}

// differs says in which words two states are not the same; "" if they are.
func (s State) differs(is State) string {
	var words []string
	for _, c := range s.changes(is, 0) {
		words = append(words, c.what)
	}
	return strings.Join(words, ", ")
}

// setVF sets one attribute of a VF through its PF. It runs in the PF's namespace.
func setVF(pf int, c change) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(pf)
	req.AddData(msg)
	list := nl.NewRtAttr(unix.IFLA_VFINFO_LIST, nil)
	list.AddRtAttr(nl.IFLA_VF_INFO, nil).AddChild(c.attr)
	req.AddData(list)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// vfState asks the PF of that name for one of its VFs. It runs in the PF's namespace.
func vfState(pf string, index int) (State, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(nl.RTEXT_FILTER_VF)))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(pf)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return State{}, fmt.Errorf("ask %s for its VF %d: %w", pf, index, err)
	}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
		if err != nil {
			return State{}, fmt.Errorf("ask %s for its VF %d: %w", pf, index, err)
		}
		for _, a := range attrs {
			if a.Attr.Type&^unix.NLA_F_NESTED != unix.IFLA_VFINFO_LIST {
				continue
			}
			s, err := findVF(a.Value, index)
			if err != nil {
				return State{}, fmt.Errorf("ask %s for its VF %d: %w", pf, index, err)
			}
			return s, nil
		}
	}
	return State{}, fmt.Errorf("ask %s for its VF %d: it has none", pf, index)
}

// findVF finds one VF in the value of IFLA_VFINFO_LIST. The kernel leaves out those whose driver fails to say anything.
func findVF(list []byte, index int) (State, error) {
	vfs, err := nl.ParseRouteAttr(list)
	if err != nil {
		return State{}, err
	}
	for _, vf := range vfs {
		attrs, err := nl.ParseRouteAttr(vf.Value)
		if err != nil {
			return State{}, err
		}
		var s State
		if s.read(attrs) == uint32(index) {
			return s, nil
		}
	}
	return State{}, errors.New("its driver says nothing of it")
}
