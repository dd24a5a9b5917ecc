package dhcp

import (
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/virtlet/virtlet/internal/nic"
)

const htypeEthernet = iana.HWTypeEthernet

// silence says why a message gets no answer; empty where it gets one.
type silence string

// Reasons for silence.
const (
	noLease     silence = "the lease has no IPv4 address"
	notRequest  silence = "not a client's message"
	notEthernet silence = "hardware address is not an Ethernet one"
	otherMAC    silence = "hardware address is not this NIC's"
	relayed     silence = "came through a relay"
	otherServer silence = "meant for another server"
	noAddress   silence = "request names no address"
	badOption   silence = "option of a wrong length"
	nothingToDo silence = "needs no answer"
	unknownType silence = "message type unknown or missing"
	tooBig      silence = "the reply does not fit into what the client accepts"
)

// Reply gives the answer to req, or nil for silence (RFC 2131, section 4.3). It reads nothing but its arguments. The
// reply may share memory with req.
func (l *Lease) Reply(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	resp, _ := l.answer(req)
	return resp
}

// answer is Reply with the reason for silence.
func (l *Lease) answer(req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, silence) {
	switch {
	case req == nil || req.OpCode != dhcpv4.OpcodeBootRequest:
		return nil, notRequest
	case !l.Addr.IsValid() || !l.Addr.Addr().Is4() || !l.Server.Is4():
		return nil, noLease
	case req.HWType != htypeEthernet || len(req.ClientHWAddr) != len(l.MAC):
		return nil, notEthernet
	case nic.MAC(req.ClientHWAddr) != l.MAC:
		return nil, otherMAC
	case !addr(req.GatewayIPAddr).IsUnspecified():
		return nil, relayed
	}
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return l.give(req, dhcpv4.MessageTypeOffer)
	case dhcpv4.MessageTypeRequest:
		return l.request(req)
	case dhcpv4.MessageTypeInform:
		return l.inform(req)
	case dhcpv4.MessageTypeDecline, dhcpv4.MessageTypeRelease:
		return nil, nothingToDo // the address stays the pod's, and so the guest's
	}
	return nil, unknownType
}

// request answers a REQUEST of any state of the client (RFC 2131, section 4.3.2): with a server identifier it selects
// an offer, with a requested address it reboots, with ciaddr it renews or rebinds. Every address that it names has to be
// the guest's. A NAK for a wrong one is safe in every state, as no other server is there for this guest: it makes the
// client start over at once instead of keeping an address that the pod network does not carry.
func (l *Lease) request(req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, silence) {
	server, requested := req.Options[optServerID], req.Options[optRequestedIP]
	if server != nil && len(server) != net.IPv4len || requested != nil && len(requested) != net.IPv4len {
		return nil, badOption
	}
	if server != nil && addr(server) != l.Server {
		return nil, otherServer
	}
	ciaddr, own := addr(req.ClientIPAddr), l.Addr.Addr()
	switch {
	case requested == nil && ciaddr.IsUnspecified():
		return nil, noAddress
	case requested != nil && addr(requested) != own, !ciaddr.IsUnspecified() && ciaddr != own:
		return l.nak(req)
	}
	return l.give(req, dhcpv4.MessageTypeAck)
}

// give makes an OFFER or an ACK.
func (l *Lease) give(req *dhcpv4.DHCPv4, t dhcpv4.MessageType) (*dhcpv4.DHCPv4, silence) {
	resp := l.reply(req, t)
	resp.YourIPAddr = l.Addr.Addr().AsSlice()
	if t == dhcpv4.MessageTypeAck {
		resp.ClientIPAddr = req.ClientIPAddr // RFC 2131, table 3
	}
	for _, c := range leaseSet {
		if v := l.value(c); len(v) > 0 {
			resp.Options[c] = v
		}
	}
	return l.fill(resp, req)
}

// inform makes the ACK for a client that has an address by other means: parameters alone, nothing about a lease.
func (l *Lease) inform(req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, silence) {
	resp := l.reply(req, dhcpv4.MessageTypeAck)
	resp.ClientIPAddr = req.ClientIPAddr
	return l.fill(resp, req)
}

func (l *Lease) nak(req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, silence) {
	resp := l.reply(req, dhcpv4.MessageTypeNak)
	resp.Options[optMessage] = []byte("address is not of this network")
	return resp, ""
}

// reply is what all replies have in common. The client identifier comes back (RFC 6842).
func (l *Lease) reply(req *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	resp := &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        req.HWType,
		TransactionID: req.TransactionID,
		Flags:         req.Flags,
		ClientIPAddr:  net.IPv4zero.To4(),
		YourIPAddr:    net.IPv4zero.To4(),
		ServerIPAddr:  net.IPv4zero.To4(), // the next server of a network boot: none
		GatewayIPAddr: net.IPv4zero.To4(),
		ClientHWAddr:  l.MAC.HardwareAddr(),
		Options:       dhcpv4.Options{optMessageType: {byte(t)}, optServerID: l.Server.AsSlice()},
	}
	if id, ok := req.Options[optClientID]; ok {
		resp.Options[optClientID] = id
	}
	return resp
}

// addr gives an IPv4 address of a message; anything else is 0.0.0.0.
func addr(ip net.IP) netip.Addr {
	if a, ok := netip.AddrFromSlice(ip.To4()); ok {
		return a
	}
	return netip.IPv4Unspecified()
}
