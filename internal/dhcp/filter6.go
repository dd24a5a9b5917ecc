package dhcp

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
)

// Offsets in an untagged frame of IPv6 without extension headers.
const (
	offIP6Proto  = etherHdrLen + 6
	offUDP6To    = etherHdrLen + ip6HeaderLen + 2
	offICMP6Type = etherHdrLen + ip6HeaderLen
	offND6Target = etherHdrLen + ip6HeaderLen + offNDTarget
)

// Filter is the socket filter for the packet socket that a [Server6] with this lease gets. From the guest it hears UDP
// to port 547, router solicitations, and neighbour solicitations for addresses that stand for a gateway. A packet socket
// hears both directions of a link; of the frames on their way to the guest it hears the neighbour advertisements of
// those gateways. VLAN tags are looked for where the kernel has put them by then.
func (l *Lease6) Filter() []bpf.RawInstruction {
	var ours, gateways []netip.Addr
	for _, r := range l.Routers {
		if r.stands() {
			ours, gateways = append(ours, r.Source), append(gateways, r.Gateway)
		}
	}
	pass, drop := bpf.RetConstant{Val: snapLen}, bpf.RetConstant{Val: 0}
	unless := func(v uint32, then ...bpf.Instruction) []bpf.Instruction { // what to do where the loaded value is not v
		return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: uint8(len(then))}}, then...)
	}
	where := func(v uint32, then ...bpf.Instruction) []bpf.Instruction {
		return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: uint8(len(then))}}, then...)
	}
	load := func(off, size int) []bpf.Instruction {
		return []bpf.Instruction{bpf.LoadAbsolute{Off: uint32(off), Size: size}}
	}
	target := func(addrs []netip.Addr) (prog []bpf.Instruction) {
		for _, a := range addrs {
			b, test := a.As16(), []bpf.Instruction{pass}
			for i := 12; i >= 0; i -= 4 {
				test = append(load(offND6Target+i, 4), where(binary.BigEndian.Uint32(b[i:]), test...)...)
			}
			prog = append(prog, test...)
		}
		return append(prog, drop)
	}
	join := func(parts ...[]bpf.Instruction) (prog []bpf.Instruction) {
		for _, p := range parts {
			prog = append(prog, p...)
		}
		return prog
	}
	fromGuest := join(
		load(offIP6Proto, 1), where(protoUDP, join(load(offUDP6To, 2), unless(serverPort6, drop), []bpf.Instruction{pass})...),
		unless(protoICMPv6, drop),
		load(offICMP6Type, 1), where(typeRouterSolicit, pass), unless(typeNeighborSolicit, drop), target(ours),
	)
	toGuest := join(
		load(offIP6Proto, 1), unless(protoICMPv6, drop), load(offICMP6Type, 1), unless(typeNeighborAdvert, drop), target(gateways),
	)
	prog, err := bpf.Assemble(join(
		[]bpf.Instruction{bpf.LoadExtension{Num: bpf.ExtVLANTagPresent}}, unless(0, drop),
		load(offEtherType, 2), unless(etherTypeIPv6, drop),
		[]bpf.Instruction{bpf.LoadExtension{Num: bpf.ExtType}}, unless(packetOutgoing, bpf.Jump{Skip: uint32(len(toGuest))}),
		toGuest, fromGuest,
	))
	if err != nil {
		panic("assemble the IPv6 socket filter: " + err.Error()) // constant but for the values compared with
	}
	return prog
}
