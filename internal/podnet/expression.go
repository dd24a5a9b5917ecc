package podnet

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// expression gives one expression of a rule. They work on one register.
func expression(name string, data attrs) attrs {
	return attrs{}.nest(unix.NFTA_LIST_ELEM, attrs{}.text(unix.NFTA_EXPR_NAME, name).nest(unix.NFTA_EXPR_DATA, data))
}

const register = unix.NFT_REG_1

// exprs are the expressions of a match. One that compares what the one before did finds it in the register.
func (m match) exprs() (all attrs) {
	loaded := ""
	for i := range m.tests {
		t := &m.tests[i]
		if loaded != t.part.name {
			all = append(all, t.part.load...)
		}
		if loaded = t.part.name; t.mask != nil {
			all, loaded = append(all, mask(t.mask)...), "" // the register has less now
		}
		all = append(all, t.compare()...)
	}
	return all
}

// expression gets a part into the register. Where a frame ends too early there is nothing, and the rule does not match.
func (p part) expression() attrs {
	switch p.from {
	case etherKind:
		return loadMeta(unix.NFT_META_PROTOCOL)
	case transport:
		return loadMeta(unix.NFT_META_L4PROTO)
	case skbMark:
		return loadMeta(unix.NFT_META_MARK)
	case hasFrag:
		return loadFragment(p, unix.NFT_EXTHDR_F_PRESENT)
	case fragHeader:
		return loadFragment(p, 0)
	}
	return loadPayload(p.from, p.offset, p.size)
}

func loadPayload(from region, offset, size uint32) attrs {
	return expression("payload", attrs{}.u32(unix.NFTA_PAYLOAD_DREG, register).u32(unix.NFTA_PAYLOAD_BASE, from.header()).
		u32(unix.NFTA_PAYLOAD_OFFSET, offset).u32(unix.NFTA_PAYLOAD_LEN, size))
}

// header is nftables' number for a header of the frame.
func (r region) header() uint32 {
	switch r {
	case network:
		return unix.NFT_PAYLOAD_NETWORK_HEADER
	case layer4:
		return unix.NFT_PAYLOAD_TRANSPORT_HEADER
	}
	return unix.NFT_PAYLOAD_LL_HEADER
}

// checksums are those that go with a part of a frame.
type checksums struct {
	kind   uint32 // NFT_PAYLOAD_CSUM_*
	offset uint32 // where that one is, in the part's header
	pseudo bool   // the transport protocol's has the part in its pseudo header
}

var none checksums

// store puts what the register has into the frame, and its checksums right.
func store(to region, offset, size uint32, sums checksums) attrs {
	a := attrs{}.u32(unix.NFTA_PAYLOAD_SREG, register).u32(unix.NFTA_PAYLOAD_BASE, to.header()).u32(unix.NFTA_PAYLOAD_OFFSET, offset).
		u32(unix.NFTA_PAYLOAD_LEN, size).u32(unix.NFTA_PAYLOAD_CSUM_TYPE, sums.kind).u32(unix.NFTA_PAYLOAD_CSUM_OFFSET, sums.offset)
	if sums.pseudo {
		a = a.u32(unix.NFTA_PAYLOAD_CSUM_FLAGS, unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR)
	}
	return expression("payload", a)
}

func loadMeta(key uint32) attrs {
	return expression("meta", attrs{}.u32(unix.NFTA_META_DREG, register).u32(unix.NFTA_META_KEY, key))
}

// loadFragment loads a part of an IPv6 fragment header; with NFT_EXTHDR_F_PRESENT whether there is such a header.
func loadFragment(p part, flags uint32) attrs {
	return expression("exthdr", attrs{}.u32(unix.NFTA_EXTHDR_DREG, register).u8(unix.NFTA_EXTHDR_TYPE, unix.IPPROTO_FRAGMENT).
		u32(unix.NFTA_EXTHDR_OFFSET, p.offset).u32(unix.NFTA_EXTHDR_LEN, p.size).
		u32(unix.NFTA_EXTHDR_OP, unix.NFT_EXTHDR_OP_IPV6).u32(unix.NFTA_EXTHDR_FLAGS, flags))
}

// compare ends the rule where what is loaded does not compare as wanted.
func (t *test) compare() attrs {
	op := uint32(unix.NFT_CMP_EQ)
	switch t.op {
	case unequal:
		op = unix.NFT_CMP_NEQ
	case greater:
		op = unix.NFT_CMP_GT
	case inside:
		return t.ranged(unix.NFT_RANGE_EQ)
	case outside:
		return t.ranged(unix.NFT_RANGE_NEQ)
	}
	return expression("cmp", attrs{}.u32(unix.NFTA_CMP_SREG, register).u32(unix.NFTA_CMP_OP, op).data(unix.NFTA_CMP_DATA, t.with))
}

func (t *test) ranged(op uint32) attrs {
	return expression("range", attrs{}.u32(unix.NFTA_RANGE_SREG, register).u32(unix.NFTA_RANGE_OP, op).
		data(unix.NFTA_RANGE_FROM_DATA, t.with).data(unix.NFTA_RANGE_TO_DATA, t.to))
}

func mask(with []byte) attrs {
	return expression("bitwise", attrs{}.u32(unix.NFTA_BITWISE_SREG, register).u32(unix.NFTA_BITWISE_DREG, register).
		u32(unix.NFTA_BITWISE_LEN, uint32(len(with))).data(unix.NFTA_BITWISE_MASK, with).data(unix.NFTA_BITWISE_XOR, make([]byte, len(with))))
}

func join(parts ...attrs) attrs { return slices.Concat(parts...) }

// setMeta sets a number that goes with the frame.
func setMeta(key, value uint32) attrs {
	return join(loadNumber(value), expression("meta", attrs{}.u32(unix.NFTA_META_KEY, key).u32(unix.NFTA_META_SREG, register)))
}

// load puts a value into the register.
func load(value []byte) attrs {
	return expression("immediate", attrs{}.u32(unix.NFTA_IMMEDIATE_DREG, register).data(unix.NFTA_IMMEDIATE_DATA, value))
}

// loadNumber puts a number of the machine's order there.
func loadNumber(value uint32) attrs { return load(binary.NativeEndian.AppendUint32(nil, value)) }

// forward hands the frame to a device, which sends it; the kernel clears its time stamp and takes it from all that follows.
func forward(index int) attrs {
	return join(loadNumber(uint32(index)), expression("fwd", attrs{}.u32(unix.NFTA_FWD_SREG_DEV, register)))
}

// Verdicts (linux/netfilter.h, linux/netfilter/nf_tables.h).
const (
	drop   = 0
	accept = 1
	jump   = unix.NFT_JUMP
	follow = unix.NFT_GOTO // a jump without return
)

// How rules end.
var (
	passes  = verdict(accept, "")
	dropped = join(expression("counter", nil), verdict(drop, ""))
)

// verdict ends a rule; chain is where a jump leads, or a goto.
func verdict(code int32, chain string) attrs {
	v := attrs{}.u32(unix.NFTA_VERDICT_CODE, uint32(code))
	if chain != "" {
		v = v.text(unix.NFTA_VERDICT_CHAIN, chain)
	}
	return expression("immediate", attrs{}.u32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT).
		nest(unix.NFTA_IMMEDIATE_DATA, attrs{}.nest(unix.NFTA_DATA_VERDICT, v)))
}
