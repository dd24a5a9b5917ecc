package dhcp

import (
	"encoding/binary"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/testnet"
)

// asker is a client that is nothing but fast: it allocates no memory and sends what it has prepared.
type asker struct {
	fd                    int
	discover, request, in []byte
	xid                   uint32
}

// Offsets in a frame without IP options.
const (
	frameMessage = etherHdrLen + ipUDPLen
	frameXID     = frameMessage + offXID
	frameKind    = frameMessage + headerLen + cookieLen + 2 // the message type comes first
)

// newAsker opens a packet socket on the link "guest" of the namespace.
func newAsker(b *testing.B, ns *testnet.Namespace) *asker {
	list := opt{optRequestList, "\x01\x1c\x02\x03\x0f\x06\x77\x0c\x1a\x79"}
	a := &asker{
		discover: broadcast(b, request(dhcpv4.MessageTypeDiscover, list)),
		request:  broadcast(b, request(dhcpv4.MessageTypeRequest, list, opt{optServerID, ip("198.51.100.1")}, opt{optRequestedIP, ip("198.51.100.2")})),
		in:       make([]byte, 2048),
	}
	for _, f := range [][]byte{a.discover, a.request} {
		f[40], f[41] = 0, 0 // no UDP checksum, so that the transaction's number may change
	}
	ns.Must(func() error {
		ifi, err := net.InterfaceByName("guest")
		if err != nil {
			return err
		}
		if a.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		ipv4 := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
		return unix.Bind(a.fd, &unix.SockaddrLinklayer{Protocol: ipv4, Ifindex: ifi.Index})
	})
	b.Cleanup(func() { unix.Close(a.fd) })
	timeout := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(a.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		b.Fatal(err)
	}
	return a
}

func (a *asker) send(b *testing.B, frame []byte, xid uint32) {
	binary.BigEndian.PutUint32(frame[frameXID:], xid)
	if _, err := unix.Write(a.fd, frame); err != nil {
		b.Fatal(err)
	}
}

// run goes through n transactions, DISCOVER to ACK, with so many at a time, and says how long it took.
func (a *asker) run(b *testing.B, n, inFlight int) time.Duration {
	begin := time.Now()
	started, done := 0, 0
	for ; started < min(n, inFlight); started++ {
		a.xid++
		a.send(b, a.discover, a.xid)
	}
	for done < n {
		k, err := unix.Read(a.fd, a.in)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			b.Fatalf("%v after %d transactions of %d", err, done, n)
		}
		if k <= frameKind || binary.BigEndian.Uint16(a.in[36:]) != clientPort {
			continue // ours on its way out
		}
		switch xid := binary.BigEndian.Uint32(a.in[frameXID:]); a.in[frameKind] {
		case byte(dhcpv4.MessageTypeOffer):
			a.send(b, a.request, xid)
		case byte(dhcpv4.MessageTypeAck):
			if done++; started < n {
				started++
				a.xid++
				a.send(b, a.discover, a.xid)
			}
		}
	}
	return time.Since(begin)
}

// cable makes two namespaces with a veth between them: "server" in one, with the server's address, and "guest" in the
// other.
func cable(b *testing.B) (server, guest *testnet.Namespace) {
	server, guest = testnet.New(b, "server"), testnet.New(b, "client")
	server.MustRun("ip", "link", "add", "server", "type", "veth", "peer", "name", "guest", "address", mac.String(), "netns", guest.Name)
	server.MustRun("ip", "addr", "add", "198.51.100.1/24", "dev", "server")
	server.MustRun("ip", "link", "set", "server", "up")
	guest.MustRun("ip", "link", "set", "guest", "up")
	return server, guest
}

// ours starts the responder on a cable.
func ours(b *testing.B, ns *testnet.Namespace) *Server {
	var conn net.PacketConn
	ns.Must(func() error {
		ifi, err := net.InterfaceByName("server")
		if err != nil {
			return err
		}
		conn, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: Filter()})
		return err
	})
	s := &Server{Lease: full(), Conn: conn}
	start(b, s)
	return s
}

// dnsmasq starts dnsmasq on a cable, with the same address for the same guest and as many options, nothing to log and
// no lease file.
func dnsmasq(b *testing.B, ns *testnet.Namespace) {
	path, err := exec.LookPath("dnsmasq")
	if err != nil {
		b.Skip("needs dnsmasq to compare with (Debian: dnsmasq-base)")
	}
	cmd := exec.Command(path, "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=server", "--bind-interfaces", "--pid-file=",
		"--leasefile-ro", "--no-ping", "--quiet-dhcp", "--dhcp-authoritative", "--user=root",
		"--dhcp-range=198.51.100.2,static,24h", "--dhcp-host="+mac.String()+",198.51.100.2,vm-1",
		"--dhcp-option=option:dns-server,198.51.100.53,192.0.2.53", "--dhcp-option=option:mtu,1450",
		"--dhcp-option=option:domain-search,lab.example,example", "--domain=lab.example",
		"--dhcp-option=option:classless-static-route,203.0.113.0/28,0.0.0.0,192.0.2.0/25,198.51.100.9,0.0.0.0/0,198.51.100.1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ns.Must(cmd.Start)
	b.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if out := ns.MustRun("ss", "-lun", "sport = :67"); len(out) > 0 && slices.Contains([]byte(out), '6') {
			return
		}
	}
	b.Fatal("dnsmasq does not start")
}

// BenchmarkBesideDnsmasq runs the responder and dnsmasq by turns, each on its own veth, so that what else the machine
// does disturbs both.
func BenchmarkBesideDnsmasq(b *testing.B) {
	testnet.NeedRoot(b)
	serverNS, guestNS := cable(b)
	dnsmasq(b, serverNS)
	theirs := newAsker(b, guestNS)
	serverNS, guestNS = cable(b)
	ours(b, serverNS)
	own := newAsker(b, guestNS)
	for _, c := range []struct {
		name     string
		inFlight int
	}{{"one in flight", 1}, {"sixteen in flight", 16}} {
		b.Run(c.name, func(b *testing.B) {
			const round = 500
			var took [2]time.Duration
			var before, after runtime.MemStats
			var allocs uint64
			theirs.run(b, round, c.inFlight)
			own.run(b, round, c.inFlight)
			rounds := 0
			for b.Loop() {
				took[0] += theirs.run(b, round, c.inFlight)
				runtime.ReadMemStats(&before)
				took[1] += own.run(b, round, c.inFlight)
				runtime.ReadMemStats(&after)
				allocs += after.Mallocs - before.Mallocs
				rounds++
			}
			n := float64(rounds * round)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(n/took[0].Seconds(), "dnsmasq/s")
			b.ReportMetric(n/took[1].Seconds(), "ours/s")
			b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "ratio")
			b.ReportMetric(float64(allocs)/n, "allocs/transaction")
		})
	}
}

// BenchmarkMemoryPerNIC measures what one NIC's server holds in the process, once it has answered.
func BenchmarkMemoryPerNIC(b *testing.B) {
	testnet.NeedRoot(b)
	serverNS, guestNS := cable(b)
	asker := newAsker(b, guestNS)
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	const nics = 100
	before := held()
	var servers []*Server
	for range nics {
		servers = append(servers, ours(b, serverNS))
	}
	asker.send(b, asker.discover, 1)
	for _, s := range servers {
		for s.Stats().Offers == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	grown := held() - before
	for b.Loop() { // it was measured already
	}
	b.ReportMetric(float64(grown)/nics, "B/NIC")
	b.ReportMetric(0, "ns/op")
}
