package podnet

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// tableName is the one nftables table of a namespace that has an attached guest.
const tableName = "virtlet"

// UDP ports of DHCP (RFC 2131, section 4.1).
const (
	dhcpServerPort = 67
	dhcpClientPort = 68
)

// filter drops, at the two ends of every join and before the bridge sees them, the frames that must not pass. The hooks
// are netdev ingress ones: packet sockets, and so our DHCP responder on the TAP, hear a frame before they do.
func (k *kernel) filter(joins []Join, nics []nic.NIC) error {
	if len(joins) == 0 {
		return nil
	}
	t := k.nft.AddTable(&nftables.Table{Name: tableName, Family: nftables.TableFamilyNetdev})
	for i, j := range joins {
		link := k.chain(t, j.Link)
		// A frame from outside with the guest's own source is its own, reflected by a hairpin port. It would make the
		// guest see its IPv6 address as taken (RFC 4862, section 5.4.4).
		k.drop(t, link, sourceMAC(nics[i].MAC))
		// The guest's only DHCP server is ours.
		k.drop(t, link, udpTo(dhcpClientPort))
		// And nobody else sees it ask.
		k.drop(t, k.chain(t, j.Tap), udpTo(dhcpServerPort))
	}
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
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: m.HardwareAddr()},
	}
}

// udpTo matches `meta protocol ip udp dport port`.
func udpTo(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP)},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}
