package podnet

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// batch is a transaction of nftables in the making, as it goes over the wire (linux/netfilter/nfnetlink.h): all of it
// takes effect, or nothing. It does not use package nftables, which asks the kernel for two answers to each rule and
// allocates for each attribute: that took longer than all the rest of Attach.
type batch struct {
	buf  []byte
	last int // where the latest message begins
	seq  uint32

	forwards []uint32 // the messages that needForward is for
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
	if h.egress {
		b.forwards = append(b.forwards, b.seq)
	}
}

// addRule appends a rule to a chain; exprs are attributes NFTA_LIST_ELEM.
func (b *batch) addRule(chain string, exprs attrs, userData []byte) {
	a := attrs{}.text(unix.NFTA_RULE_TABLE, table.Name).text(unix.NFTA_RULE_CHAIN, chain).nest(unix.NFTA_RULE_EXPRESSIONS, exprs)
	if len(userData) > 0 {
		a = a.raw(unix.NFTA_RULE_USERDATA, userData)
	}
	b.add(unix.NFT_MSG_NEWRULE, a)
}

// addForward appends a rule that forwards.
func (b *batch) addForward(chain string, exprs attrs) {
	b.addRule(chain, exprs, nil)
	b.forwards = append(b.forwards, b.seq)
}

// send puts the batch into force by a socket of NETLINK_NETFILTER. What the kernel refuses is for a lack. After an error the socket is
// of no more use.
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
			l := &lack{needNftables, unix.Errno(-code)}
			if slices.Contains(b.forwards, binary.NativeEndian.Uint32(answer[seqAt:])) {
				l.of = needForward
			}
			return l
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
