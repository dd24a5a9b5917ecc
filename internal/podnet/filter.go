package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// table is the one nftables table of a namespace that has an attached guest.
var table = &nftables.Table{Name: "virtlet", Family: nftables.TableFamilyNetdev}

// UDP ports of DHCP (RFC 2131, section 4.1).
const (
	dhcpServerPort = 67
	dhcpClientPort = 68
)

// linkLocalServer is the server identifier that package dhcp gives on a NIC without an IPv4 gateway (its
// linkLocalServer). It answers ARP for it on the TAP, so the question must not reach the cluster.
var linkLocalServer = netip.MustParseAddr("169.254.0.67")

// removeFilters deletes all that filter made.
func (k *kernel) removeFilters() error {
	k.nft.DelTable(table)
	if err := k.nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove filters: %w", err)
	}
	return nil
}

// filterLinks and filterTaps drop, at the two ends of every join and before the bridge sees them, the frames that must
// not pass. The hooks are netdev ingress ones: packet sockets, and so our DHCP responder on the TAP, hear a frame before
// they do. The kernel has taken the outer VLAN tag off by then, so the rules see through it. Of an IPv4 datagram in
// fragments they drop the first, without which the others come to nothing.
func (k *kernel) filterLinks(joins []Join, nics []nic.NIC) error {
	t := k.nft.AddTable(table)
	for i, j := range joins {
		link := k.chain(t, j.Link)
		// A frame from outside with the guest's own source is its own, reflected by a hairpin port. It would make the
		// guest see its IPv6 address as taken (RFC 4862, section 5.4.4).
		k.drop(t, link, sourceMAC(nics[i].MAC))
		// The guest's only DHCP server is ours.
		k.drop(t, link, udpTo(dhcpClientPort))
		// A tag of VLAN 0 is a priority alone (IEEE 802.1Q, clause 6.9): a guest takes it off and receives what is
		// inside. The rules see through one tag; nobody sends two in earnest. Other VLANs are the guest's business.
		k.drop(t, link, stackedOnPriority(unix.ETH_P_8021Q))
		k.drop(t, link, stackedOnPriority(unix.ETH_P_8021AD))
	}
	return k.lay()
}

func (k *kernel) filterTaps(joins []Join, nics []nic.NIC) error {
	for i, j := range joins {
		tap := k.chain(table, j.Tap)
		// The guest asks our DHCP server; nobody else hears it.
		k.drop(table, tap, udpTo(dhcpServerPort))
		if !nics[i].HasGateway(4) {
			k.drop(table, tap, arpFor(linkLocalServer))
		}
	}
	return k.lay()
}

// lay puts the rules into force that were added since the last time: all of them, or none.
func (k *kernel) lay() error {
	if err := k.nft.Flush(); err != nil {
		return fmt.Errorf("add filters: %w (needs CONFIG_NF_TABLES_NETDEV and CONFIG_NETFILTER_INGRESS)", err)
	}
	return nil
}

func (k *kernel) chain(t *nftables.Table, device string) *nftables.Chain {
	return k.nft.AddChain(&nftables.Chain{
		Table: t, Name: "from-" + device, Device: device,
		Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter,
	})
}

func (k *kernel) drop(t *nftables.Table, c *nftables.Chain, match []expr.Any) {
	k.nft.AddRule(&nftables.Rule{
		Table: t, Chain: c,
		Exprs: append(match, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}),
	})
}

// sourceMAC matches `ether saddr m`.
func sourceMAC(m nic.MAC) []expr.Any {
	return payload(expr.PayloadBaseLLHeader, 6, m.HardwareAddr())
}

// udpTo matches `meta protocol ip ip frag-off & 0x1fff == 0 udp dport port`. Later fragments have data where the ports
// would be, and the kernel does not look.
func udpTo(port uint16) []expr.Any {
	match := append(protocol(unix.ETH_P_IP), zero(expr.PayloadBaseNetworkHeader, 6, 0x1fff)...)
	match = append(match,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
	)
	return append(match, payload(expr.PayloadBaseTransportHeader, 2, binary.BigEndian.AppendUint16(nil, port))...)
}

// arpFor matches `arp daddr ip a`: the target address is at byte 24 of the message (RFC 826).
func arpFor(a netip.Addr) []expr.Any {
	return append(protocol(unix.ETH_P_ARP), payload(expr.PayloadBaseNetworkHeader, 24, a.AsSlice())...)
}

// stackedOnPriority matches a tag of that kind below one of VLAN 0. The outer tag's control information (TCI) is at
// byte 14 of the frame; its lower twelve bits are the VLAN.
func stackedOnPriority(kind uint16) []expr.Any {
	return append(protocol(kind), zero(expr.PayloadBaseLLHeader, 14, 0x0fff)...)
}

// protocol matches `meta protocol p`: the EtherType, that of a tagged frame below its tag.
func protocol(p uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, p)},
	}
}

// payload matches the bytes at an offset of a header.
func payload(base expr.PayloadBase, offset uint32, data []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(data))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}
}

// zero matches where the masked bits of the two bytes at an offset of a header are not set.
func zero(base expr.PayloadBase, offset uint32, mask uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: 2},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 2,
			Mask: binary.BigEndian.AppendUint16(nil, mask), Xor: []byte{0, 0},
		},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 0}},
	}
}
