package dhcp

import (
	"encoding/binary"

	"golang.org/x/net/bpf"
)

// Offsets in an untagged frame.
const (
	offEtherType = 12
	offIPFrag    = etherHdrLen + 6
	offIPProto   = etherHdrLen + 9
	offUDPTo     = etherHdrLen + 2 // and the length of the IP header
	offARPOp     = etherHdrLen + 6
	offARPTarget = etherHdrLen + 24
)

// packetOutgoing is the kernel's mark of a frame that leaves by the link (PACKET_OUTGOING, linux/if_packet.h).
const packetOutgoing = 4

// snapLen is how much of a matching frame is read: all.
const snapLen = 1 << 18

// Filter is the socket filter for the packet socket that a [Server] gets: untagged, unfragmented IPv4 UDP to port 67,
// and ARP requests for the server identifier of a NIC without a gateway. A packet socket hears both directions of a
// link, so frames on their way to the guest are left out: a DISCOVER that somebody broadcasts on the cluster's side is
// one of those. A VLAN tag is looked for beside the frame, where the kernel has put it by then.
func Filter() []bpf.RawInstruction {
	const arp, pass, drop = 14, 18, 19 // lines of the program
	to := func(line, here int) uint8 { return uint8(line - here - 1) }
	server := linkLocalServer.As4()
	prog, err := bpf.Assemble([]bpf.Instruction{
		0:    bpf.LoadExtension{Num: bpf.ExtType},
		1:    bpf.JumpIf{Cond: bpf.JumpEqual, Val: packetOutgoing, SkipTrue: to(drop, 1)},
		2:    bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		3:    bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: to(drop, 3)},
		4:    bpf.LoadAbsolute{Off: offEtherType, Size: 2},
		5:    bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherTypeARP, SkipTrue: to(arp, 5)},
		6:    bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherTypeIPv4, SkipTrue: to(drop, 6)},
		7:    bpf.LoadAbsolute{Off: offIPProto, Size: 1},
		8:    bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protoUDP, SkipTrue: to(drop, 8)},
		9:    bpf.LoadAbsolute{Off: offIPFrag, Size: 2},
		10:   bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: ipMoreOrOffset, SkipTrue: to(drop, 10)},
		11:   bpf.LoadMemShift{Off: etherHdrLen}, // X = length of the IP header
		12:   bpf.LoadIndirect{Off: offUDPTo, Size: 2},
		13:   bpf.JumpIf{Cond: bpf.JumpEqual, Val: serverPort, SkipTrue: to(pass, 13), SkipFalse: to(drop, 13)},
		arp:  bpf.LoadAbsolute{Off: offARPOp, Size: 2},
		15:   bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: arpRequest, SkipTrue: to(drop, 15)},
		16:   bpf.LoadAbsolute{Off: offARPTarget, Size: 4},
		17:   bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(server[:]), SkipTrue: to(drop, 17)},
		pass: bpf.RetConstant{Val: snapLen},
		drop: bpf.RetConstant{Val: 0},
	})
	if err != nil {
		panic("assemble the DHCP socket filter: " + err.Error()) // a constant program
	}
	return prog
}
