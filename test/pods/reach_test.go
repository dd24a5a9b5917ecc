package pods

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/moby/spdystream"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/testnet"
)

// Who reaches a guest that serves a page, and how: by port-forward, as a probe, at a port of the node, as a Service, and not
// where a policy forbids it.
func TestReach(t *testing.T) {
	for _, datapath := range []string{"bridge", "redirect"} {
		t.Run(datapath, func(t *testing.T) { testReach(t, datapath) })
	}
}

func testReach(t *testing.T, datapath string) {
	n := newNode(t)
	n.images()
	client := n.client()
	before := n.state()
	const hostPort = 8080
	p, err := n.runPodWith("virtlet", "web", func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: hostPort}}
		c.Annotations = map[string]string{"virtlet.cloud/datapath": datapath}
	})
	if err != nil {
		t.Fatal(err)
	}
	p.start("vm")
	p.report()
	ip, here := p.ip(), n.netns()
	guest := netip.AddrPortFrom(ip, 80)
	for want, flag := range map[string]string{
		", " + datapath + " ":                                         "--rules", // of the TAP
		"in order: the guest is joined as it was":                     "--check",
		"localhost of the namespace leads to " + ip.String():          "--rules",
		"ip saddr 127.0.0.1 ip daddr 127.0.0.1: forward to vlttap0\n": "--rules",
	} {
		if out, err := n.virtlet("inspect", flag, n.vm(t).Config.Name); err != nil || !strings.Contains(out, want) {
			t.Errorf("inspect %s: %v, without %q: %s", flag, err, want, out)
		}
	}

	t.Run("port-forward", func(t *testing.T) {
		conn := p.portForward(t, 80)
		var all errgroup.Group
		for i := range 4 {
			all.Go(func() error {
				answer, failed, err := forward(conn, 80, i, ask)
				if err != nil || failed != "" || !strings.HasPrefix(answer, "HTTP/1.") {
					return fmt.Errorf("the guest's server says %q, containerd %q, %v", answer, failed, err)
				}
				return nil
			})
		}
		if err := all.Wait(); err != nil {
			t.Error(err)
		}
		answer, failed, err := forward(p.portForward(t, 81), 81, 0, ask)
		if err != nil || answer != "" || !strings.Contains(failed, "127.0.0.1:81: connect: connection refused") {
			t.Errorf("a closed port says %q, containerd %q, %v", answer, failed, err)
		}
	})
	t.Run("probes", func(t *testing.T) { // by httpGet and by tcpSocket: from the node, to the pod's address
		if err := page(here, guest); err != nil {
			t.Error(err)
		}
		conn, err := dial(here, guest)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if _, err := dial(here, netip.AddrPortFrom(ip, 81)); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("a closed port: %v", err)
		}
	})
	t.Run("hostPort", func(t *testing.T) {
		for who, from := range map[string]*netns.NS{"a host beside the node": client.NS, "the node": here} {
			if err := page(from, netip.AddrPortFrom(clientGateway.Addr(), hostPort)); err != nil {
				t.Errorf("%s: %v", who, err)
			}
		}
	})
	t.Run("Service", func(t *testing.T) { // in the form that kube-proxy's nftables mode has
		service := netip.MustParseAddrPort("203.0.113.10:8000")
		const rules = `table ip service {
			map services { type ipv4_addr . inet_service : verdict; elements = { %[1]s . %[2]d : goto svc }; }
			chain svc { numgen random mod 1 vmap { 0 : goto endpoint }; }
			chain endpoint { meta l4proto tcp dnat to %[3]s; }
			chain prerouting { type nat hook prerouting priority -100; ip daddr . tcp dport vmap @services; }
			chain output { type nat hook output priority -100; ip daddr . tcp dport vmap @services; }
		}`
		n.nft(t, fmt.Sprintf(rules, service.Addr(), service.Port(), guest), "table ip service")
		for who, from := range map[string]*netns.NS{"a host beside the node": client.NS, "the node": here} {
			if err := page(from, service); err != nil {
				t.Errorf("%s: %v", who, err)
			}
		}
	})
	for name, rules := range map[string]string{ // as plugins apply them
		"NetworkPolicy on the node's end of the pod's link": `table netdev forbid { chain pod { type filter hook egress device "` + p.hostLink() + `" priority 0;
			ip saddr ` + clientAddr.Addr().String() + ` tcp dport 80 counter drop; }; }`,
		"NetworkPolicy for what is forwarded": `table inet forbid { chain forward { type filter hook forward priority 0;
			ip saddr ` + clientAddr.Addr().String() + ` ip daddr ` + ip.String() + ` tcp dport 80 counter drop; }; }`,
		"NetworkPolicy for what the pod sends": `table netdev forbid { chain pod { type filter hook ingress device "` + p.hostLink() + `" priority 0;
			ip daddr ` + clientAddr.Addr().String() + ` counter drop; }; }`,
	} {
		t.Run(name, func(t *testing.T) {
			if err := page(client.NS, guest); err != nil {
				t.Fatalf("without a policy: %v", err)
			}
			table := strings.Join(strings.Fields(rules)[:3], " ")
			remove := n.nft(t, rules, table)
			conn, err := dialFor(client.NS, guest, time.Second)
			if err == nil {
				conn.Close()
				t.Error("a forbidden host has a connection")
			}
			listed, err := n.run("nft", "list", table)
			if m := dropped.FindStringSubmatch(listed); err != nil || m == nil || m[1] == "0" {
				t.Errorf("the policy has dropped nothing: %v: %s", err, listed)
			}
			if err := page(here, guest); err != nil {
				t.Errorf("the node, which is not meant: %v", err)
			}
			remove()
			if err := page(client.NS, guest); err != nil {
				t.Errorf("without the policy again: %v", err)
			}
		})
	}
	p.remove(before)
}

// ask is what a client of the guest's server says; whatever that answers will do.
const ask = "GET / HTTP/1.0\r\nUser-Agent: kube-probe/1.30\r\nConnection: close\r\n\r\n"

var dropped = regexp.MustCompile(`counter packets (\d+)`)

// The client's network, beside the node.
var clientGateway, clientAddr = netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")

// client is a host on another network of the node.
func (n *node) client() *testnet.Namespace {
	n.t.Helper()
	c := testnet.New(n.t, "client")
	for _, command := range []string{
		"ip link add net1 type veth peer name eth0 netns " + c.Name, "ip addr add " + clientGateway.String() + " dev net1", "ip link set net1 up",
		"ip route add default via " + clientAddr.Addr().String(), // a node has one
	} {
		if out, err := n.run(strings.Fields(command)...); err != nil {
			n.t.Fatalf("%s: %v: %s", command, err, out)
		}
	}
	c.MustRun("ip", "addr", "add", clientAddr.String(), "dev", "eth0")
	c.MustRun("ip", "link", "set", "eth0", "up")
	c.MustRun("ip", "route", "add", "default", "via", clientGateway.Addr().String())
	c.Ready("eth0")
	return c
}

// netns gives the node's network.
func (n *node) netns() *netns.NS {
	n.t.Helper()
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", n.holder.Process.Pid))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { ns.Close() })
	return ns
}

// nft adds rules on the node, and gives a way to remove their table before the test ends.
func (n *node) nft(t *testing.T, rules, table string) (remove func()) {
	t.Helper()
	if out, err := n.run("nft", rules); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	done := false
	remove = func() {
		if out, err := n.run("nft", "delete "+table); !done && err != nil {
			t.Errorf("%v: %s", err, out)
		}
		done = true
	}
	t.Cleanup(remove)
	return remove
}

// hostLink gives the node's end of the only pod's link.
func (n *node) hostLink() string {
	n.t.Helper()
	out, err := n.run("ip", "-o", "link", "show", "master", "cni0")
	name, _, ok := strings.Cut(strings.TrimPrefix(out[strings.Index(out, " ")+1:], " "), "@")
	if err != nil || !ok || strings.Count(out, "\n") != 1 {
		n.t.Fatalf("ports of cni0: %v: %q", err, out)
	}
	return name
}

func dial(from *netns.NS, to netip.AddrPort) (net.Conn, error) { return dialFor(from, to, patience) }

func dialFor(from *netns.NS, to netip.AddrPort, limit time.Duration) (conn net.Conn, err error) {
	err = from.Do(func() error {
		d := net.Dialer{Timeout: limit} // opens the socket on this thread, as the address is no name
		conn, err = d.Dial("tcp", to.String())
		return err
	})
	return conn, err
}

// page gets one from a server, as a probe by httpGet does.
func page(from *netns.NS, to netip.AddrPort) error {
	conn, err := dial(from, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, ask); err != nil {
		return err
	}
	text, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(text), "HTTP/1.") {
		return fmt.Errorf("%s says %q, %v", to, text, err)
	}
	return nil
}

// portForward is `kubectl port-forward`: a connection of SPDY, on which each connection of the user's is a pair of streams.
func (p *pod) portForward(t *testing.T, port int32) *spdystream.Connection {
	t.Helper()
	r, err := p.runtime.PortForward(p.limit(), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{port}})
	if err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequest(http.MethodPost, r.Url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": "portforward.k8s.io"} {
		request.Header.Set(key, value)
	}
	tcp, err := dial(p.netns(), netip.MustParseAddrPort(request.URL.Host))
	if err != nil {
		t.Fatal(err)
	}
	_ = tcp.SetDeadline(time.Now().Add(patience))
	if err := request.Write(tcp); err != nil {
		t.Fatal(err)
	}
	// Byte by byte: what comes behind the answer is SPDY's.
	answer, err := http.ReadResponse(bufio.NewReaderSize(iotest.OneByteReader(tcp), 1), request)
	if err != nil || answer.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", answer, err)
	}
	conn, err := spdystream.NewConnection(tcp, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); tcp.Close() })
	go conn.Serve(spdystream.NoOpStreamHandler)
	return conn
}

// forward is one connection: it sends a line and gives what comes back, and what containerd has to say of errors.
func forward(conn *spdystream.Connection, port int32, id int, line string) (answer, failed string, err error) {
	headers := http.Header{"Port": {fmt.Sprint(port)}, "Requestid": {fmt.Sprint(id)}}
	stream := func(kind string) *spdystream.Stream {
		if err != nil {
			return nil
		}
		headers.Set("Streamtype", kind)
		var s *spdystream.Stream
		if s, err = conn.CreateStream(headers.Clone(), nil, false); err == nil {
			err = s.WaitTimeout(patience)
		}
		return s
	}
	errs, data := stream("error"), stream("data")
	if err != nil {
		return "", "", err
	}
	err = errs.Close() // our half
	if err == nil {
		_, err = io.WriteString(data, line)
	}
	if err != nil {
		return "", "", err
	}
	got, err := io.ReadAll(data)
	why, more := io.ReadAll(errs)
	return string(got), string(why), errors.Join(err, more, data.Close())
}
