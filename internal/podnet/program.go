package podnet

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// program is an eBPF program in the making: rules as instructions, written here and checked by the kernel's verifier. R6 is the
// frame's struct __sk_buff for the whole of it and R9 the scratch; the other registers hold a value for a few instructions.
//
// Headers, and what was found out about them, are in the scratch, a map's value, and neither on the stack nor in registers: of
// what it reads there the verifier knows nothing, so that however a rule was come to, it is the same to it, and there is little
// to compare. It would follow each combination else, which took a hundred times as long.
type program struct {
	maps   programMaps
	ins    asm.Instructions
	label  string // of the instruction to come
	labels int
}

// The scratch, of which each CPU has one: nothing interrupts a program for a frame by another (preempts refuses kernels where
// that may be). First what was found, each in 4 bytes; then parts of the frame, each aligned there as the verifier wants what
// rules compare.
const (
	foundHead      = 0  // how many bytes there are at scratchHead
	foundL4        = 4  // how many there are at scratchL4; 0: no transport header, or none of interest
	foundTransport = 8  // the transport protocol, or noTransport
	foundFrag      = 12 // of the first IPv6 fragment header
	foundHasFrag   = 16 // 1: there was one
	headerKind     = 20 // of the header in turn: the IP protocol number
	headerAt       = 24 // where it begins in the frame
	scratchWalk    = 28 // its begin, if it is an IPv6 extension header
	scratchL4      = 32 // the begin of the transport header
	scratchHead    = 66 // the Ethernet header and, aligned to 8 bytes, what is behind it
	scratchSize    = scratchHead + headSize

	etherSize     = 14
	headSize      = etherSize + 40
	l4Size        = 32
	maxExtensions = 8 // IPv6 extension headers that are walked; nobody sends nearly as many

	noTransport = 0xffff
)

// What a program returns (linux/pkt_cls.h, and for tcx linux/bpf.h, which gave them the same numbers).
const (
	verdictNext     = -1
	verdictDrop     = 2
	verdictRedirect = 7 // what bpf_redirect gives
)

// Offsets in struct __sk_buff (linux/bpf.h), in which a field of theirs is 4 bytes.
const (
	skbLen         = 0
	skbPktType     = 4
	skbMarkAt      = 8
	skbProtocol    = 16
	skbVLANPresent = 20
	skbVLANTag     = 24
)

func (p *program) emit(ins ...asm.Instruction) {
	if p.label != "" {
		ins[0] = ins[0].WithSymbol(p.label)
		p.label = ""
	}
	p.ins = append(p.ins, ins...)
}

// newLabel gives a name to jump to, for place.
func (p *program) newLabel() string {
	p.labels++
	return fmt.Sprintf("l%d", p.labels)
}

// place names the instruction to come. One that has a name already gets a jump to itself in front.
func (p *program) place(label string) {
	if p.label != "" {
		p.emit(asm.Ja.Label(label))
	}
	p.label = label
}

// skb loads a field of the frame's struct __sk_buff.
func (p *program) skb(to asm.Register, offset int16) {
	p.emit(asm.LoadMem(to, asm.R6, offset, asm.Word))
}

// found notes what a register has.
func (p *program) found(at int16, reg asm.Register) {
	p.emit(asm.StoreMem(asm.R9, at, reg, asm.Word))
}

// finding loads what was found.
func (p *program) finding(to asm.Register, at int16) {
	p.emit(asm.LoadMem(to, asm.R9, at, asm.Word))
}

// copyFrame copies as many bytes of the frame as R4 says, from the offset in R2 to the scratch, and goes to a label where there
// are not as many. It also finds those that are not in the frame's linear part.
func (p *program) copyFrame(to int32, short string) {
	p.emit(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R3, asm.R9), asm.Add.Imm(asm.R3, to),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, short),
	)
}

// chunk is a piece of a part that one load gets.
type chunk struct {
	at   uint32 // behind the begin of the part
	size asm.Size
}

// chunks cuts a part into as few pieces as its alignment lets.
func (pt part) chunks() (all []chunk) {
	for at := uint32(0); at < pt.size; {
		size := uint32(8)
		for size > pt.size-at || (pt.offset+at+pt.from.skew())%size != 0 {
			size /= 2
		}
		all = append(all, chunk{at, map[uint32]asm.Size{1: asm.Byte, 2: asm.Half, 4: asm.Word, 8: asm.DWord}[size]})
		at += size
	}
	return all
}

// skew is how far a region begins behind a multiple of 8 in the scratch.
func (r region) skew() uint32 {
	at, _ := r.scratch()
	return uint32(at) % 8
}

// scratch is where a region is copied to.
func (r region) scratch() (at int16, is bool) {
	switch r {
	case frame:
		return scratchHead, true
	case network:
		return scratchHead + etherSize, true
	case layer4:
		return scratchL4, true
	}
	return 0, false
}

// match goes on where a frame matches, and to a label where it does not, or is too short to have what is compared.
func (p *program) match(m match, no string) {
	for i := range m.tests {
		t := &m.tests[i]
		p.present(t.part, no)
		switch t.op {
		case equal:
			p.same(t, no)
		case unequal:
			differs := p.newLabel()
			p.same(t, differs)
			p.emit(asm.Ja.Label(no))
			p.place(differs)
		case greater:
			within := p.newLabel()
			p.less(t.part, t.with, no, within) // less or equal: no
			p.place(within)
		case inside:
			p.ranged(t, no)
		case outside:
			beyond := p.newLabel()
			p.ranged(t, beyond)
			p.emit(asm.Ja.Label(no))
			p.place(beyond)
		}
	}
}

// present goes to a label where the frame does not have the part.
func (p *program) present(pt part, no string) {
	end := int32(pt.offset + pt.size)
	switch pt.from {
	case frame:
		p.finding(asm.R2, foundHead)
		p.emit(asm.JLT.Imm(asm.R2, end, no))
	case network:
		p.finding(asm.R2, foundHead)
		p.emit(asm.JLT.Imm(asm.R2, etherSize+end, no))
	case layer4:
		p.finding(asm.R2, foundL4)
		p.emit(asm.JLT.Imm(asm.R2, end, no))
	case transport:
		p.finding(asm.R2, foundTransport)
		p.emit(asm.JEq.Imm(asm.R2, noTransport, no))
	case fragHeader:
		p.finding(asm.R2, foundHasFrag)
		p.emit(asm.JEq.Imm(asm.R2, 0, no))
	case tagged:
		p.skb(asm.R2, skbVLANPresent)
		p.emit(asm.JEq.Imm(asm.R2, 0, no))
	}
}

// load gets a chunk of a part into R2, in the frame's order of bytes.
func (p *program) load(pt part, c chunk) {
	if at, is := pt.from.scratch(); is {
		p.emit(asm.LoadMem(asm.R2, asm.R9, at+int16(pt.offset+c.at), c.size))
		return
	}
	switch pt.from {
	case etherKind:
		p.skb(asm.R2, skbProtocol)
	case transport:
		p.finding(asm.R2, foundTransport)
	case hasFrag:
		p.finding(asm.R2, foundHasFrag)
	case fragHeader:
		p.emit(asm.LoadMem(asm.R2, asm.R9, foundFrag+int16(pt.offset+c.at), c.size))
	case skbMark:
		p.skb(asm.R2, skbMarkAt)
	case tagged:
		p.skb(asm.R2, skbVLANTag)
		p.emit(asm.HostTo(asm.BE, asm.R2, asm.Half))
	}
}

// number reads bytes as a load of them would.
func number(b []byte, order binary.ByteOrder) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(order.Uint16(b))
	case 4:
		return uint64(order.Uint32(b))
	}
	return order.Uint64(b)
}

// jump compares R2 with a number and goes to a label. An immediate operand is 32 bits, and extended by its sign.
func (p *program) jump(op asm.JumpOp, n uint64, to string) {
	if n <= math.MaxInt32 {
		p.emit(op.Imm(asm.R2, int32(n), to))
		return
	}
	p.emit(asm.LoadImm(asm.R3, int64(n), asm.DWord), op.Reg(asm.R2, asm.R3, to))
}

// same goes to a label where a part differs from a value. The differences of its pieces are gathered in R4, as each jump is one
// more way for the verifier to go.
func (p *program) same(t *test, no string) {
	chunks := t.part.chunks()
	for i, c := range chunks {
		piece := func(b []byte) []byte { return b[c.at : c.at+uint32(c.size.Sizeof())] }
		p.load(t.part, c)
		if t.mask != nil {
			p.emit(asm.And.Imm(asm.R2, int32(number(piece(t.mask), binary.NativeEndian))))
		}
		n := number(piece(t.with), binary.NativeEndian)
		if len(chunks) == 1 {
			p.jump(asm.JNE, n, no)
			return
		}
		if n <= math.MaxInt32 {
			p.emit(asm.Xor.Imm(asm.R2, int32(n)))
		} else {
			p.emit(asm.LoadImm(asm.R3, int64(n), asm.DWord), asm.Xor.Reg(asm.R2, asm.R3))
		}
		if i == 0 {
			p.emit(asm.Mov.Reg(asm.R4, asm.R2))
		} else {
			p.emit(asm.Or.Reg(asm.R4, asm.R2))
		}
	}
	p.emit(asm.JNE.Imm(asm.R4, 0, no))
}

// less goes to yes where a part is less than a value or equal, and to no where it is greater, by the order of its bytes.
func (p *program) less(pt part, than []byte, yes, no string) {
	for _, c := range pt.chunks() {
		p.load(pt, c)
		p.bigEndian(c)
		n := number(than[c.at:c.at+uint32(c.size.Sizeof())], binary.BigEndian)
		p.jump(asm.JLT, n, yes)
		p.jump(asm.JGT, n, no)
	}
	p.emit(asm.Ja.Label(yes))
}

// ranged goes to a label where a part is not in a range.
func (p *program) ranged(t *test, no string) {
	above, within := p.newLabel(), p.newLabel()
	for _, c := range t.part.chunks() { // not below the begin
		p.load(t.part, c)
		p.bigEndian(c)
		n := number(t.with[c.at:c.at+uint32(c.size.Sizeof())], binary.BigEndian)
		p.jump(asm.JLT, n, no)
		p.jump(asm.JGT, n, above)
	}
	p.place(above)
	p.less(t.part, t.to, within, no)
	p.place(within)
}

// bigEndian makes of a chunk in R2 the number that its bytes are.
func (p *program) bigEndian(c chunk) {
	if c.size != asm.Byte {
		p.emit(asm.HostTo(asm.BE, asm.R2, c.size))
	}
}

// rules appends a hook's rules. The first that matches counts, or lets the frame pass to the label; what none matches goes
// to it, too. The last counter is for what comes to the label hidden.
func (p *program) rules(rules []rule, pass, hidden string) {
	drop := p.newLabel()
	var under *group
	after := "" // the rules that begin alike
	for i, r := range rules {
		if r.under != under {
			if after != "" {
				p.place(after)
			}
			if under, after = r.under, ""; under != nil {
				after = p.newLabel()
				p.match(under.match, after)
			}
		}
		next := p.newLabel()
		p.match(r.match, next)
		if r.reason == "" {
			p.emit(asm.Ja.Label(pass))
		} else {
			p.emit(asm.LoadMapValue(asm.R1, p.maps.rules.FD(), counterAt(i)), asm.Ja.Label(drop))
		}
		p.place(next)
	}
	if after != "" {
		p.place(after)
	}
	p.emit(asm.Ja.Label(pass))
	if hidden != "" {
		p.place(hidden)
		p.emit(asm.LoadMapValue(asm.R1, p.maps.rules.FD(), counterAt(len(rules))))
	}
	p.place(drop)
	p.emit(asm.Mov.Imm(asm.R2, 1), asm.StoreXAdd(asm.R1, asm.R2, asm.DWord))
	p.skb(asm.R2, skbLen)
	p.emit(
		asm.Sub.Imm(asm.R2, etherSize),
		asm.Add.Imm(asm.R1, counterBytes), asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
		asm.Mov.Imm(asm.R0, verdictDrop), asm.Return(),
	)
}

// next lets a frame go on to what else is at its hook.
func (p *program) next() {
	p.emit(asm.Mov.Imm(asm.R0, verdictNext), asm.Return())
}

// redirect hands a frame to the device that the map names: to be sent by it or, where mayPeer and the map say so, to be received
// by its peer in another namespace.
func (p *program) redirect(marks, mayPeer bool) {
	if marks {
		p.emit(asm.LoadImm(asm.R2, ourMark, asm.DWord), asm.StoreMem(asm.R6, skbMarkAt, asm.R2, asm.Word))
	}
	to := func(fn asm.BuiltinFunc) {
		p.emit(
			asm.LoadMapValue(asm.R1, p.maps.rules.FD(), 0), asm.LoadMem(asm.R1, asm.R1, targetIndex, asm.Word),
			asm.Mov.Imm(asm.R2, 0), fn.Call(), asm.Return(),
		)
	}
	if mayPeer {
		plain, known := p.newLabel(), p.newLabel()
		p.emit(
			asm.LoadMapValue(asm.R1, p.maps.rules.FD(), 0), asm.LoadMem(asm.R1, asm.R1, targetPeer, asm.Word),
			asm.JEq.Imm(asm.R1, 0, plain),
		)
		// The TAP has found that the frame is for another MAC than its own. The peer would not look again, and a node that
		// routes would not take it (ip_rcv). As with any frame on a wire, it is a bridge that finds out what is whose.
		p.skb(asm.R2, skbPktType)
		p.emit(
			asm.JNE.Imm(asm.R2, unix.PACKET_OTHERHOST, known),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, unix.PACKET_HOST), asm.FnSkbChangeType.Call(),
		)
		p.place(known)
		to(asm.FnRedirectPeer)
		p.place(plain)
	}
	to(asm.FnRedirect)
}

// scratch gets that of the CPU.
func (p *program) scratch() {
	const key = -4 // on the stack
	there := p.newLabel()
	p.emit(
		asm.Mov.Imm(asm.R2, 0), asm.StoreMem(asm.RFP, key, asm.R2, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
		asm.LoadMapPtr(asm.R1, p.maps.scratch.FD()), asm.FnMapLookupElem.Call(),
		asm.JNE.Imm(asm.R0, 0, there),
		asm.Mov.Imm(asm.R0, verdictDrop), asm.Return(), // it always is, which the verifier does not know
	)
	p.place(there)
	p.emit(asm.Mov.Reg(asm.R9, asm.R0))
}
