package podnet

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// program is an eBPF program in the making: rules as instructions, written here and checked by the kernel's verifier. R6 is the
// frame's struct __sk_buff for the whole of it; the other registers hold a value for a few instructions.
//
// What was found out about headers is in the control buffer (cb) that a frame has for programs, and not in registers: of what it
// reads there the verifier knows nothing, so that however a rule was come to, it is the same to it. It would follow each
// combination else, which took a hundred times as long.
type program struct {
	ins    asm.Instructions
	label  string // of the instruction to come
	labels int
}

// The stack, from the frame pointer down. Each part of a header that rules compare is aligned there, as the verifier wants.
const (
	stackHead     = -78 // the Ethernet header and, aligned to 8 bytes, what is behind it
	headSize      = etherSize + 40
	stackL4       = -112 // the begin of the transport header
	l4Size        = 32
	stackWalk     = -116 // 4 bytes of the IPv6 extension header that is looked at
	etherSize     = 14
	maxExtensions = 8 // IPv6 extension headers that are walked; nobody sends nearly as many
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
	skbCB          = 48
)

// What the control buffer has, each in 4 bytes of its 20.
const (
	foundHead      = skbCB      // how many bytes there are at stackHead
	foundL4        = skbCB + 4  // how many there are at stackL4; 0: no transport header, or none of interest
	foundTransport = skbCB + 8  // the transport protocol, or noTransport
	foundFrag      = skbCB + 12 // of the first IPv6 fragment header
	foundHasFrag   = skbCB + 16 // 1: there was one

	noTransport = 0xffff
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

// copyFrame copies size bytes of the frame, which a register has, from an offset in another to the stack, and goes to a label
// where there are not as many. It also finds those that are not in the frame's linear part.
func (p *program) copyFrame(to int32, short string) {
	p.emit(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, to),
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

// skew is how far a region begins behind a multiple of 8 on the stack.
func (r region) skew() uint32 {
	if at, on := r.stack(); on {
		return uint32(at+128) % 8
	}
	return 0
}

// stack is where a region is copied to.
func (r region) stack() (at int16, on bool) {
	switch r {
	case frame:
		return stackHead, true
	case network:
		return stackHead + etherSize, true
	case layer4:
		return stackL4, true
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
		p.skb(asm.R2, foundHead)
		p.emit(asm.JLT.Imm(asm.R2, end, no))
	case network:
		p.skb(asm.R2, foundHead)
		p.emit(asm.JLT.Imm(asm.R2, etherSize+end, no))
	case layer4:
		p.skb(asm.R2, foundL4)
		p.emit(asm.JLT.Imm(asm.R2, end, no))
	case transport:
		p.skb(asm.R2, foundTransport)
		p.emit(asm.JEq.Imm(asm.R2, noTransport, no))
	case fragHeader:
		p.skb(asm.R2, foundHasFrag)
		p.emit(asm.JEq.Imm(asm.R2, 0, no))
	case tagged:
		p.skb(asm.R2, skbVLANPresent)
		p.emit(asm.JEq.Imm(asm.R2, 0, no))
	}
}

// load gets a chunk of a part into R2, in the frame's order of bytes.
func (p *program) load(pt part, c chunk) {
	if at, on := pt.from.stack(); on {
		p.emit(asm.LoadMem(asm.R2, asm.RFP, at+int16(pt.offset+c.at), c.size))
		return
	}
	switch pt.from {
	case etherKind:
		p.skb(asm.R2, skbProtocol)
	case transport:
		p.skb(asm.R2, foundTransport)
	case hasFrag:
		p.skb(asm.R2, foundHasFrag)
	case fragHeader:
		p.emit(asm.LoadMem(asm.R2, asm.R6, foundFrag+int16(pt.offset+c.at), c.size))
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

// same goes to a label where a part differs from a value.
func (p *program) same(t *test, no string) {
	for _, c := range t.part.chunks() {
		piece := func(b []byte) []byte { return b[c.at : c.at+uint32(c.size.Sizeof())] }
		p.load(t.part, c)
		if t.mask != nil {
			p.emit(asm.And.Imm(asm.R2, int32(number(piece(t.mask), binary.NativeEndian))))
		}
		p.jump(asm.JNE, number(piece(t.with), binary.NativeEndian), no)
	}
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
// to it, too. m has the counters; the last is for what comes to the label hidden.
func (p *program) rules(rules []rule, m *ruleMap, pass, hidden string) {
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
			p.emit(asm.LoadMapValue(asm.R1, m.fd(), m.counter(i)), asm.Ja.Label(drop))
		}
		p.place(next)
	}
	if after != "" {
		p.place(after)
	}
	p.emit(asm.Ja.Label(pass))
	if hidden != "" {
		p.place(hidden)
		p.emit(asm.LoadMapValue(asm.R1, m.fd(), m.counter(len(rules))))
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

// needHeaders says whether rules look at more than the mark, so that headers have to be found.
func needHeaders(rules []rule) bool {
	for _, r := range rules {
		for _, t := range r.whole().tests {
			if t.part.from != skbMark {
				return true
			}
		}
	}
	return false
}

// next lets a frame go on to what else is at its hook.
func (p *program) next() {
	p.emit(asm.Mov.Imm(asm.R0, verdictNext), asm.Return())
}

// redirect hands a frame to a device: to be sent by it, or to be received by its peer in another namespace.
func (p *program) redirect(index int, marks, peer bool) {
	if marks {
		p.emit(asm.LoadImm(asm.R2, ourMark, asm.DWord), asm.StoreMem(asm.R6, skbMarkAt, asm.R2, asm.Word))
	}
	fn := asm.FnRedirect
	if peer {
		fn = asm.FnRedirectPeer
		// The TAP has found that the frame is for another MAC than its own. The peer would not look again, and a node that
		// routes would not take it (ip_rcv). As with any frame on a wire, it is a bridge that finds out what is whose.
		known := p.newLabel()
		p.skb(asm.R2, skbPktType)
		p.emit(
			asm.JNE.Imm(asm.R2, unix.PACKET_OTHERHOST, known),
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, unix.PACKET_HOST), asm.FnSkbChangeType.Call(),
		)
		p.place(known)
	}
	p.emit(asm.Mov.Imm(asm.R1, int32(index)), asm.Mov.Imm(asm.R2, 0), fn.Call(), asm.Return())
}

// instructions is the whole program of a hook. hides: the entry behind those of the rules counts what hides behind too many
// headers.
func instructions(w work, hides bool, h hook, m *ruleMap, index int, peer bool) asm.Instructions {
	p := &program{}
	pass, hidden := p.newLabel(), ""
	if len(w.leave) > 0 || needHeaders(w.rules) {
		if hides {
			hidden = p.newLabel()
		}
		p.headers(hidden)
	} else {
		p.emit(asm.Mov.Reg(asm.R6, asm.R1))
	}
	for _, leave := range w.leave {
		no := p.newLabel()
		p.match(leave, no)
		p.next()
		p.place(no)
	}
	p.rules(w.rules, m, pass, hidden)
	p.place(pass)
	if h.to == "" {
		p.next()
	} else {
		p.redirect(index, h.marks, peer)
	}
	return reached(p.ins)
}

// reached leaves out what no path leads to, which the kernel refuses: behind a rule that every frame matches, or where there is
// no rule.
func reached(ins asm.Instructions) (out asm.Instructions) {
	at := map[string]int{}
	for i, in := range ins {
		at[in.Symbol()] = i
	}
	seen := make([]bool, len(ins))
	for paths := []int{0}; len(paths) > 0; {
		i := paths[len(paths)-1]
		paths = paths[:len(paths)-1]
		if seen[i] {
			continue
		}
		seen[i] = true
		op := ins[i].OpCode.JumpOp()
		if to := ins[i].Reference(); op != asm.InvalidJumpOp && op != asm.Call && op != asm.Exit && to != "" {
			paths = append(paths, at[to])
		}
		if op != asm.Ja && op != asm.Exit {
			paths = append(paths, i+1)
		}
	}
	for i, in := range ins {
		if seen[i] {
			out = append(out, in)
		}
	}
	return out
}
