package podnet

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// batch is a transaction of nftables in the making, as it goes over the wire (linux/netfilter/nfnetlink.h): all of it
// takes effect, or nothing. It does not use package nftables, which asks the kernel for two answers to each rule and
// allocates for each attribute: that took longer than all the rest of Attach.
type batch struct {
	buf  []byte
	last int // where the latest message begins
	seq  uint32
}

func newBatch() *batch {
	b := &batch{buf: make([]byte, 0, 16<<10)} // about what one NIC takes
	b.message(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, unix.NFNL_SUBSYS_NFTABLES, nil)
	return b
}

const (
	create    = unix.NLM_F_REQUEST | unix.NLM_F_CREATE | unix.NLM_F_APPEND
	flagsAt   = 6  // of struct nlmsghdr
	seqAt     = 8  // of the same
	errnoAt   = 16 // of struct nlmsgerr, behind it
	nlmsgerr  = 20 // at least
	nfgenmsg  = 4  // struct nfgenmsg, behind it in a request
	sizeofMsg = unix.SizeofNlMsghdr + nfgenmsg
)

func (b *batch) message(kind, flags, resource uint16, a attrs) {
	b.last = len(b.buf)
	b.seq++
	b.buf = binary.NativeEndian.AppendUint32(b.buf, uint32(sizeofMsg+len(a)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, kind)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, flags)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, b.seq)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0) // whose it is the kernel knows
	b.buf = append(b.buf, unix.NFPROTO_NETDEV, unix.NFNETLINK_V0)
	b.buf = binary.BigEndian.AppendUint16(b.buf, resource)
	b.buf = append(b.buf, a...)
}

func (b *batch) add(kind uint16, a attrs) { b.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, create, 0, a) }

func (b *batch) addTable() {
	b.add(unix.NFT_MSG_NEWTABLE, attrs{}.text(unix.NFTA_TABLE_NAME, table.Name))
}

// addChain adds a chain that rules jump to.
func (b *batch) addChain(name string) {
	b.add(unix.NFT_MSG_NEWCHAIN, attrs{}.text(unix.NFTA_CHAIN_TABLE, table.Name).text(unix.NFTA_CHAIN_NAME, name))
}

// addHook adds the chain of a hook.
func (b *batch) addHook(h hook) {
	number := uint32(unix.NF_NETDEV_INGRESS)
	if h.egress {
		number = unix.NF_NETDEV_EGRESS
	}
	priority := int32(0)
	if h.local != "" {
		priority = -1
	}
	at := attrs{}.u32(unix.NFTA_HOOK_HOOKNUM, number).u32(unix.NFTA_HOOK_PRIORITY, uint32(priority)).text(unix.NFTA_HOOK_DEV, h.device)
	b.add(unix.NFT_MSG_NEWCHAIN, attrs{}.text(unix.NFTA_CHAIN_TABLE, table.Name).text(unix.NFTA_CHAIN_NAME, h.chain()).
		nest(unix.NFTA_CHAIN_HOOK, at).text(unix.NFTA_CHAIN_TYPE, "filter"))
}

// addRule appends a rule to a chain; exprs are attributes NFTA_LIST_ELEM.
func (b *batch) addRule(chain string, exprs attrs, userData []byte) {
	a := attrs{}.text(unix.NFTA_RULE_TABLE, table.Name).text(unix.NFTA_RULE_CHAIN, chain).nest(unix.NFTA_RULE_EXPRESSIONS, exprs)
	if len(userData) > 0 {
		a = a.raw(unix.NFTA_RULE_USERDATA, userData)
	}
	b.add(unix.NFT_MSG_NEWRULE, a)
}

// send puts the batch into force by a socket of NETLINK_NETFILTER. After an error the socket is of no more use.
func (b *batch) send(fd int) error {
	// The kernel answers this last message when all are in force, and before it those with an error, asked or not.
	binary.NativeEndian.PutUint16(b.buf[b.last+flagsAt:], create|unix.NLM_F_ACK)
	asked := b.seq
	b.message(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, unix.NFNL_SUBSYS_NFTABLES, nil)
	if err := unix.Sendto(fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to nftables: %w", err)
	}
	for {
		var answer [512]byte // an error brings the message back, which is of no interest
		n, _, err := unix.Recvfrom(fd, answer[:], 0)
		switch {
		case err != nil:
			return fmt.Errorf("hear from nftables: %w", err)
		case n < nlmsgerr || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR:
			return fmt.Errorf("nftables answers with %d bytes of something else", n)
		}
		if code := int32(binary.NativeEndian.Uint32(answer[errnoAt:])); code != 0 {
			return unix.Errno(-code)
		}
		if binary.NativeEndian.Uint32(answer[seqAt:]) == asked {
			return nil
		}
	}
}

// attrs are netlink attributes one after another. Numbers of nftables are in network order.
type attrs []byte

func (a attrs) raw(kind uint16, data []byte) attrs {
	if cap(a) == 0 {
		a = make(attrs, 0, 64+len(data)) // enough for most
	}
	a = binary.NativeEndian.AppendUint16(a, uint16(unix.SizeofNlAttr+len(data)))
	a = binary.NativeEndian.AppendUint16(a, kind)
	a = append(a, data...)
	for len(a)%unix.NLA_ALIGNTO != 0 {
		a = append(a, 0)
	}
	return a
}

func (a attrs) nest(kind uint16, inner attrs) attrs { return a.raw(kind|unix.NLA_F_NESTED, inner) }
func (a attrs) text(kind uint16, s string) attrs    { return a.raw(kind, append([]byte(s), 0)) }
func (a attrs) u8(kind uint16, v uint8) attrs       { return a.raw(kind, []byte{v}) }
func (a attrs) data(kind uint16, value []byte) attrs {
	return a.nest(kind, attrs{}.raw(unix.NFTA_DATA_VALUE, value))
}

func (a attrs) u32(kind uint16, v uint32) attrs {
	return a.raw(kind, binary.BigEndian.AppendUint32(make([]byte, 0, 4), v))
}

// expression gives one expression of a rule. They work on one register.
func expression(name string, data attrs) attrs {
	return attrs{}.nest(unix.NFTA_LIST_ELEM, attrs{}.text(unix.NFTA_EXPR_NAME, name).nest(unix.NFTA_EXPR_DATA, data))
}

const register = unix.NFT_REG_1

func loadPayload(base, offset, size uint32) attrs {
	return expression("payload", attrs{}.u32(unix.NFTA_PAYLOAD_DREG, register).u32(unix.NFTA_PAYLOAD_BASE, base).
		u32(unix.NFTA_PAYLOAD_OFFSET, offset).u32(unix.NFTA_PAYLOAD_LEN, size))
}

func loadMeta(key uint32) attrs {
	return expression("meta", attrs{}.u32(unix.NFTA_META_DREG, register).u32(unix.NFTA_META_KEY, key))
}

// loadExthdr loads a part of an IPv6 extension header; with NFT_EXTHDR_F_PRESENT whether there is such a header.
func loadExthdr(header uint8, offset, size, flags uint32) attrs {
	return expression("exthdr", attrs{}.u32(unix.NFTA_EXTHDR_DREG, register).u8(unix.NFTA_EXTHDR_TYPE, header).
		u32(unix.NFTA_EXTHDR_OFFSET, offset).u32(unix.NFTA_EXTHDR_LEN, size).
		u32(unix.NFTA_EXTHDR_OP, unix.NFT_EXTHDR_OP_IPV6).u32(unix.NFTA_EXTHDR_FLAGS, flags))
}

func compare(op uint32, with []byte) attrs {
	return expression("cmp", attrs{}.u32(unix.NFTA_CMP_SREG, register).u32(unix.NFTA_CMP_OP, op).data(unix.NFTA_CMP_DATA, with))
}

func compareRange(op uint32, from, to []byte) attrs {
	return expression("range", attrs{}.u32(unix.NFTA_RANGE_SREG, register).u32(unix.NFTA_RANGE_OP, op).
		data(unix.NFTA_RANGE_FROM_DATA, from).data(unix.NFTA_RANGE_TO_DATA, to))
}

func mask(with []byte) attrs {
	return expression("bitwise", attrs{}.u32(unix.NFTA_BITWISE_SREG, register).u32(unix.NFTA_BITWISE_DREG, register).
		u32(unix.NFTA_BITWISE_LEN, uint32(len(with))).data(unix.NFTA_BITWISE_MASK, with).data(unix.NFTA_BITWISE_XOR, make([]byte, len(with))))
}

// checksums are those that go with a part of a frame.
type checksums struct {
	kind   uint32 // NFT_PAYLOAD_CSUM_*
	offset uint32 // where that one is, in the part's header
	pseudo bool   // the transport protocol's has the part in its pseudo header
}

var none checksums

// store puts what the register has into the frame, and its checksums right.
func store(base, offset, size uint32, sums checksums) attrs {
	a := attrs{}.u32(unix.NFTA_PAYLOAD_SREG, register).u32(unix.NFTA_PAYLOAD_BASE, base).u32(unix.NFTA_PAYLOAD_OFFSET, offset).
		u32(unix.NFTA_PAYLOAD_LEN, size).u32(unix.NFTA_PAYLOAD_CSUM_TYPE, sums.kind).u32(unix.NFTA_PAYLOAD_CSUM_OFFSET, sums.offset)
	if sums.pseudo {
		a = a.u32(unix.NFTA_PAYLOAD_CSUM_FLAGS, unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR)
	}
	return expression("payload", a)
}

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
