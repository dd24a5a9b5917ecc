package podnet

import (
	"cmp"
	"encoding/binary"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// headers finds what rules look at, as nftables does for its own (nft_set_pktinfo_ipv4_validate, ipv6_find_hdr). Where there are
// too many IPv6 extension headers to walk it goes to a label; without one it takes them for broken. Until it is done, R7 is the
// length of the head, R8 the offset of the header in turn, and R9 its kind.
func (p *program) headers(hidden string) {
	done, short, long, v6 := p.newLabel(), p.newLabel(), p.newLabel(), p.newLabel()
	p.emit(asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R2, 0))
	// What is copied to the stack is as long as the frame is, so all of it has to have a value before.
	for at := int16(stackL4); at < 0; at += 8 {
		p.emit(asm.StoreMem(asm.RFP, at, asm.R2, asm.DWord))
	}
	p.emit(asm.Mov.Imm(asm.R3, noTransport))
	for _, at := range []int16{foundL4, foundFrag, foundHasFrag} {
		p.found(at, asm.R2)
	}
	p.found(foundTransport, asm.R3)
	p.skb(asm.R7, skbLen)
	p.emit(asm.JLT.Imm(asm.R7, headSize, long), asm.Mov.Imm(asm.R7, headSize))
	p.place(long)
	p.emit(asm.JLT.Imm(asm.R7, etherSize, short)) // no device delivers one
	p.found(foundHead, asm.R7)
	p.emit(asm.Mov.Imm(asm.R2, 0), asm.Mov.Reg(asm.R4, asm.R7))
	p.copyFrame(stackHead, short)
	datagram := p.newLabel()
	p.skb(asm.R2, skbProtocol)
	p.jump(asm.JEq, number(ipv6.data, binary.NativeEndian), v6)
	p.jump(asm.JNE, number(ipv4.data, binary.NativeEndian), done)
	p.ipv4(datagram, done)
	p.place(short)
	p.emit(asm.Mov.Imm(asm.R0, verdictDrop), asm.Return())
	p.place(v6)
	p.ipv6(datagram, done, cmp.Or(hidden, done))
	p.place(datagram)
	p.datagram(done)
	p.place(done)
}

// found notes what a register has.
func (p *program) found(at int16, reg asm.Register) {
	p.emit(asm.StoreMem(asm.R6, at, reg, asm.Word))
}

// inner is where the stack has a byte of the network header.
func inner(offset int16) int16 { return stackHead + etherSize + offset }

// ipv4 notes the protocol and, but for later fragments, goes on with the transport header; with neither where the header is
// broken.
func (p *program) ipv4(datagram, done string) {
	const header = 20
	p.emit(
		asm.JLT.Imm(asm.R7, etherSize+header, done),
		asm.LoadMem(asm.R8, asm.RFP, inner(0), asm.Byte),
		asm.Mov.Reg(asm.R3, asm.R8), asm.RSh.Imm(asm.R3, 4), asm.JNE.Imm(asm.R3, 4, done),
		asm.And.Imm(asm.R8, 15), asm.LSh.Imm(asm.R8, 2), asm.JLT.Imm(asm.R8, header, done), // the header's length
		asm.LoadMem(asm.R3, asm.RFP, inner(2), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), // the packet's
		asm.JLT.Reg(asm.R3, asm.R8, done),
		asm.LoadMem(asm.R4, asm.R6, skbLen, asm.Word), asm.Sub.Imm(asm.R4, etherSize),
		asm.JLT.Reg(asm.R4, asm.R3, done),
		asm.LoadMem(asm.R9, asm.RFP, inner(9), asm.Byte),
	)
	p.found(foundTransport, asm.R9)
	p.emit(
		asm.LoadMem(asm.R3, asm.RFP, inner(6), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), asm.And.Imm(asm.R3, 0x1fff),
		asm.JNE.Imm(asm.R3, 0, done),
		asm.Add.Imm(asm.R8, etherSize), asm.Ja.Label(datagram),
	)
}

// extensions are the headers that ipv6_ext_hdr of the kernel walks over, a bit for each: hop-by-hop options, routing, fragment,
// authentication, destination options. (It also calls "no next header" one, and ends there.)
const extensions = 1<<unix.IPPROTO_HOPOPTS | 1<<unix.IPPROTO_ROUTING | 1<<unix.IPPROTO_FRAGMENT | 1<<unix.IPPROTO_AH | 1<<unix.IPPROTO_DSTOPTS

// isExtension goes to a label where the kind in a register is not among those. It spoils R5.
func (p *program) isExtension(kind asm.Register, among int64, no string) {
	p.emit(
		asm.JGT.Imm(kind, 63, no),
		asm.LoadImm(asm.R5, among, asm.DWord), asm.RSh.Reg(asm.R5, kind), asm.And.Imm(asm.R5, 1),
		asm.JEq.Imm(asm.R5, 0, no),
	)
}

// ipv6 does the same behind all extension headers, and notes the first fragment header. R7 counts meanwhile.
func (p *program) ipv6(datagram, done, hidden string) {
	const header = 40
	walk, end := p.newLabel(), p.newLabel()
	p.emit(
		asm.JLT.Imm(asm.R7, etherSize+header, done),
		asm.LoadMem(asm.R2, asm.RFP, inner(0), asm.Byte), asm.RSh.Imm(asm.R2, 4), asm.JNE.Imm(asm.R2, 6, done),
		asm.LoadMem(asm.R3, asm.RFP, inner(4), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), asm.Add.Imm(asm.R3, etherSize+header),
		asm.LoadMem(asm.R4, asm.R6, skbLen, asm.Word), asm.JLT.Reg(asm.R4, asm.R3, done),
		asm.LoadMem(asm.R9, asm.RFP, inner(6), asm.Byte), asm.Mov.Imm(asm.R8, etherSize+header), asm.Mov.Imm(asm.R7, 0),
	)
	p.place(walk)
	p.isExtension(asm.R9, extensions, end)
	p.emit(
		asm.JGE.Imm(asm.R7, maxExtensions, hidden), asm.Add.Imm(asm.R7, 1),
		asm.Mov.Reg(asm.R2, asm.R8), asm.Mov.Imm(asm.R4, 4),
	)
	p.copyFrame(stackWalk, done)
	p.extension(walk, done)
	p.place(end)
	p.found(foundTransport, asm.R9)
	p.emit(asm.Ja.Label(datagram))
}

// extension goes over one header, of kind R9 at R8.
func (p *program) extension(walk, done string) {
	fragment, auth, onward, known, later := p.newLabel(), p.newLabel(), p.newLabel(), p.newLabel(), p.newLabel()
	p.emit(
		asm.LoadMem(asm.R2, asm.RFP, stackWalk, asm.Byte),   // the kind of the next
		asm.LoadMem(asm.R3, asm.RFP, stackWalk+1, asm.Byte), // the length of this, in units of its own
		asm.JEq.Imm(asm.R9, unix.IPPROTO_FRAGMENT, fragment), asm.JEq.Imm(asm.R9, unix.IPPROTO_AH, auth),
		asm.Add.Imm(asm.R3, 1), asm.LSh.Imm(asm.R3, 3), // RFC 8200, section 4.2
		asm.Ja.Label(onward),
	)
	p.place(auth)
	p.emit(asm.Add.Imm(asm.R3, 2), asm.LSh.Imm(asm.R3, 2), asm.Ja.Label(onward)) // RFC 4302, section 2.2
	p.place(fragment)
	p.skb(asm.R4, foundHasFrag)
	p.emit(asm.JNE.Imm(asm.R4, 0, known), asm.Mov.Imm(asm.R4, 1))
	p.found(foundHasFrag, asm.R4)
	p.emit(asm.LoadMem(asm.R4, asm.RFP, stackWalk, asm.Word))
	p.found(foundFrag, asm.R4)
	p.place(known)
	p.emit(
		asm.LoadMem(asm.R4, asm.RFP, stackWalk+2, asm.Half), asm.HostTo(asm.BE, asm.R4, asm.Half), asm.And.Imm(asm.R4, 0xfff8),
		asm.JNE.Imm(asm.R4, 0, later),
		asm.Mov.Imm(asm.R3, 8),
	)
	p.place(onward)
	p.emit(asm.Mov.Reg(asm.R9, asm.R2), asm.Add.Reg(asm.R8, asm.R3), asm.Ja.Label(walk))
	// What a later fragment has is data, of a protocol that its header names, unless that is one more extension header.
	p.place(later)
	transport := p.newLabel()
	p.isExtension(asm.R2, extensions|1<<unix.IPPROTO_NONE, transport)
	p.emit(asm.Ja.Label(done))
	p.place(transport)
	p.found(foundTransport, asm.R2)
	p.emit(asm.Ja.Label(done))
}

// datagram copies what rules look at of the transport header at offset R8, of the protocols that they look into.
func (p *program) datagram(done string) {
	wanted, long, none := p.newLabel(), p.newLabel(), p.newLabel()
	p.emit(asm.JEq.Imm(asm.R9, unix.IPPROTO_UDP, wanted), asm.JNE.Imm(asm.R9, unix.IPPROTO_ICMPV6, done))
	p.place(wanted)
	p.emit(asm.Mov.Reg(asm.R2, asm.R8))
	p.skb(asm.R7, skbLen)
	p.emit(asm.JLE.Reg(asm.R7, asm.R2, done), asm.Sub.Reg(asm.R7, asm.R2))
	// The verifier wants to know a length all the way back, through each header that may have been walked over, but for what
	// it has from here.
	p.found(foundL4, asm.R7)
	p.skb(asm.R7, foundL4)
	p.emit(asm.JLE.Imm(asm.R7, l4Size, long), asm.Mov.Imm(asm.R7, l4Size))
	p.place(long)
	p.emit(asm.JLT.Imm(asm.R7, 1, none), asm.Mov.Reg(asm.R4, asm.R7))
	p.copyFrame(stackL4, none)
	p.found(foundL4, asm.R7)
	p.emit(asm.Ja.Label(done))
	p.place(none)
	p.emit(asm.Mov.Imm(asm.R7, 0))
	p.found(foundL4, asm.R7)
	p.emit(asm.Ja.Label(done))
}
