package podnet

import (
	"cmp"
	"encoding/binary"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// headers finds what rules look at, as nftables does for its own (nft_set_pktinfo_ipv4_validate, ipv6_find_hdr). Where there are
// too many IPv6 extension headers to walk it goes to a label; without one it takes them for broken. R7 is the length of the head,
// and then how many headers were walked over.
func (p *program) headers(hidden string) {
	done, short, long, v6 := p.newLabel(), p.newLabel(), p.newLabel(), p.newLabel()
	p.scratch()
	p.emit(asm.Mov.Imm(asm.R2, 0), asm.Mov.Imm(asm.R3, noTransport))
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
	p.copyFrame(scratchHead, short)
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

// inner is where the scratch has a byte of the network header.
func inner(offset int16) int16 { return scratchHead + etherSize + offset }

// ipv4 notes the protocol and, but for later fragments, goes on with the transport header; with neither where the header is
// broken.
func (p *program) ipv4(datagram, done string) {
	const header = 20
	p.emit(
		asm.JLT.Imm(asm.R7, etherSize+header, done),
		asm.LoadMem(asm.R2, asm.R9, inner(0), asm.Byte),
		asm.Mov.Reg(asm.R3, asm.R2), asm.RSh.Imm(asm.R3, 4), asm.JNE.Imm(asm.R3, 4, done),
		asm.And.Imm(asm.R2, 15), asm.LSh.Imm(asm.R2, 2), asm.JLT.Imm(asm.R2, header, done), // the header's length
		asm.LoadMem(asm.R3, asm.R9, inner(2), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), // the packet's
		asm.JLT.Reg(asm.R3, asm.R2, done),
		asm.LoadMem(asm.R4, asm.R6, skbLen, asm.Word), asm.Sub.Imm(asm.R4, etherSize),
		asm.JLT.Reg(asm.R4, asm.R3, done),
		asm.Add.Imm(asm.R2, etherSize),
		asm.LoadMem(asm.R3, asm.R9, inner(9), asm.Byte),
	)
	p.found(headerAt, asm.R2)
	p.found(foundTransport, asm.R3)
	p.emit(
		asm.LoadMem(asm.R3, asm.R9, inner(6), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), asm.And.Imm(asm.R3, 0x1fff),
		asm.JNE.Imm(asm.R3, 0, done), asm.Ja.Label(datagram),
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
		asm.LoadMem(asm.R2, asm.R9, inner(0), asm.Byte), asm.RSh.Imm(asm.R2, 4), asm.JNE.Imm(asm.R2, 6, done),
		asm.LoadMem(asm.R3, asm.R9, inner(4), asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), asm.Add.Imm(asm.R3, etherSize+header),
		asm.LoadMem(asm.R4, asm.R6, skbLen, asm.Word), asm.JLT.Reg(asm.R4, asm.R3, done),
		asm.LoadMem(asm.R2, asm.R9, inner(6), asm.Byte), asm.Mov.Imm(asm.R3, etherSize+header), asm.Mov.Imm(asm.R7, 0),
	)
	p.found(headerKind, asm.R2)
	p.found(headerAt, asm.R3)
	p.place(walk)
	p.finding(asm.R4, headerKind)
	p.isExtension(asm.R4, extensions, end)
	p.emit(asm.JGE.Imm(asm.R7, maxExtensions, hidden), asm.Add.Imm(asm.R7, 1), asm.Mov.Imm(asm.R4, 4))
	p.finding(asm.R2, headerAt)
	p.copyFrame(scratchWalk, done)
	p.extension(walk, done)
	p.place(end)
	p.found(foundTransport, asm.R4)
	p.emit(asm.Ja.Label(datagram))
}

// extension goes over one header. Its length is found without jumps, of which each is one more way for the verifier to go.
func (p *program) extension(walk, done string) {
	known := p.newLabel()
	p.finding(asm.R4, headerKind)
	p.emit(
		// The length is in units of 8 bytes without the first (RFC 8200, section 4.2); of an authentication header in units of
		// 4 without the first two (RFC 4302, section 2.2); and a fragment header's is 8, whatever it has there.
		asm.LoadMem(asm.R3, asm.R9, scratchWalk+1, asm.Byte),
		asm.Mov.Reg(asm.R2, asm.R4), asm.Xor.Imm(asm.R2, unix.IPPROTO_FRAGMENT), asm.Sub.Imm(asm.R2, 1), asm.ArSh.Imm(asm.R2, 63), // all ones, if it is one
		asm.Xor.Imm(asm.R2, -1), asm.And.Reg(asm.R3, asm.R2),
		asm.Mov.Reg(asm.R2, asm.R4), asm.Xor.Imm(asm.R2, unix.IPPROTO_AH), asm.Sub.Imm(asm.R2, 1), asm.RSh.Imm(asm.R2, 63), // 1, if it is one
		asm.Add.Imm(asm.R3, 1), asm.Add.Reg(asm.R3, asm.R2),
		asm.LSh.Imm(asm.R3, 3), asm.RSh.Reg(asm.R3, asm.R2),
	)
	p.finding(asm.R2, headerAt)
	p.emit(asm.Add.Reg(asm.R2, asm.R3), asm.LoadMem(asm.R3, asm.R9, scratchWalk, asm.Byte)) // the kind of the next
	p.found(headerAt, asm.R2)
	p.found(headerKind, asm.R3)
	p.emit(asm.JNE.Imm(asm.R4, unix.IPPROTO_FRAGMENT, walk))
	p.finding(asm.R4, foundHasFrag)
	p.emit(asm.JNE.Imm(asm.R4, 0, known), asm.Mov.Imm(asm.R4, 1))
	p.found(foundHasFrag, asm.R4)
	p.emit(asm.LoadMem(asm.R4, asm.R9, scratchWalk, asm.Word))
	p.found(foundFrag, asm.R4)
	p.place(known)
	p.emit(
		asm.LoadMem(asm.R4, asm.R9, scratchWalk+2, asm.Half), asm.HostTo(asm.BE, asm.R4, asm.Half), asm.And.Imm(asm.R4, 0xfff8),
		asm.JEq.Imm(asm.R4, 0, walk),
	)
	// What a later fragment has is data, of a protocol that its header names, unless that is one more extension header.
	transport := p.newLabel()
	p.isExtension(asm.R3, extensions|1<<unix.IPPROTO_NONE, transport)
	p.emit(asm.Ja.Label(done))
	p.place(transport)
	p.found(foundTransport, asm.R3)
	p.emit(asm.Ja.Label(done))
}

// datagram copies what rules look at of the transport header, of the protocols that they look into.
func (p *program) datagram(done string) {
	wanted, long := p.newLabel(), p.newLabel()
	p.finding(asm.R2, foundTransport)
	p.emit(asm.JEq.Imm(asm.R2, unix.IPPROTO_UDP, wanted), asm.JNE.Imm(asm.R2, unix.IPPROTO_ICMPV6, done))
	p.place(wanted)
	p.finding(asm.R2, headerAt)
	p.skb(asm.R7, skbLen)
	p.emit(
		asm.JLE.Reg(asm.R7, asm.R2, done), asm.Sub.Reg(asm.R7, asm.R2),
		asm.JLE.Imm(asm.R7, l4Size, long), asm.Mov.Imm(asm.R7, l4Size),
	)
	p.place(long)
	p.emit(asm.JLT.Imm(asm.R7, 1, done), asm.Mov.Reg(asm.R4, asm.R7)) // it is more, which the verifier does not know
	p.copyFrame(scratchL4, done)
	p.found(foundL4, asm.R7)
	p.emit(asm.Ja.Label(done))
}
