package pods

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/testnet"
)

// Who reaches a guest that serves a page, and how: by port-forward, as a probe, at a port of the node, as a Service, and not
// where a policy forbids it.
func TestReach(t *testing.T) {
	n := newNode(t)
	n.images()
	client := n.client()
	before := n.state()
	const hostPort = 8080
	p, err := n.runPodWith("web", func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: hostPort}}
	})
	if err != nil {
		t.Fatal(err)
	}
	p.start("vm")
	p.report()
	ip, here := p.ip(), n.netns()
	guest := netip.AddrPortFrom(ip, 80)
	if st := n.vm(t); len(st.Ports) != 1 || fmt.Sprint(st.Ports[0].Localhost) != "["+ip.String()+"]" {
		t.Errorf("localhost leads to %+v", st.Ports)
	}

	t.Run("port-forward", func(t *testing.T) {
		var all errgroup.Group
		for range 4 {
			all.Go(func() error {
				conn, failed, err := p.portForward(80)
				if err != nil {
					return err
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, "GET /no-such-file HTTP/1.0\r\n\r\n"); err != nil {
					return err
				}
				answer := make([]byte, len(served))
				if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != served {
					return fmt.Errorf("the page is %q, %w; %s", answer, err, failed())
				}
				return nil
			})
		}
		if err := all.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("port-forward to a closed port", func(t *testing.T) {
		conn, failed, err := p.portForward(81)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, err := io.ReadAll(conn); len(got) > 0 || !strings.Contains(failed(), "connection refused") {
			t.Errorf("it says %q, %v, and for an error %q", got, err, failed())
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

const served = "HTTP/1.1 404 Not Found" // of busybox, whose guest has no such file

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
	if _, err := io.WriteString(conn, "GET /no-such-file HTTP/1.0\r\nUser-Agent: kube-probe/1.30\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	text, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(text), "HTTP/1.") {
		return fmt.Errorf("%s says %q, %w", to, text, err)
	}
	return nil
}

// portForward is `kubectl port-forward`, one connection of it. The streams of Kubernetes are messages of a WebSocket that
// begin with the number of the stream; the first of each has the port. failed gives what was said of errors so far.
func (p *pod) portForward(port int32) (conn net.Conn, failed func() string, err error) {
	r, err := p.runtime.PortForward(p.limit(), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{port}})
	if err != nil {
		return nil, nil, err
	}
	at, err := url.Parse(r.Url)
	if err != nil {
		return nil, nil, err
	}
	at.Scheme, at.RawQuery = "ws", fmt.Sprintf("port=%d", port)
	config, err := websocket.NewConfig(at.String(), "http://localhost")
	if err != nil {
		return nil, nil, err
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", p.holder.Process.Pid))
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	var tcp net.Conn
	if err := ns.Do(func() error { tcp, err = net.Dial("tcp", at.Host); return err }); err != nil {
		return nil, nil, err
	}
	_ = tcp.SetDeadline(time.Now().Add(patience))
	ws, err := websocket.NewClient(config, tcp)
	if err != nil {
		tcp.Close()
		return nil, nil, err
	}
	f := &forwarded{Conn: tcp, ws: ws}
	for range 2 {
		var first []byte
		if err := websocket.Message.Receive(ws, &first); err != nil || len(first) != 3 || binary.LittleEndian.Uint16(first[1:]) != uint16(port) {
			f.Close()
			return nil, nil, fmt.Errorf("a stream begins with % x, %w", first, err)
		}
	}
	return f, func() string { return f.failed }, nil
}

// forwarded is a connection through streams.
type forwarded struct {
	net.Conn
	ws     *websocket.Conn
	unread []byte
	failed string
}

const dataStream, errorStream = 0, 1

func (f *forwarded) Write(b []byte) (int, error) {
	return len(b), websocket.Message.Send(f.ws, append([]byte{dataStream}, b...))
}

func (f *forwarded) Read(b []byte) (int, error) {
	for len(f.unread) == 0 {
		var message []byte
		if err := websocket.Message.Receive(f.ws, &message); err != nil {
			return 0, err
		}
		switch {
		case len(message) == 0:
		case message[0] == dataStream:
			f.unread = message[1:]
		case message[0] == errorStream:
			f.failed += string(message[1:])
		}
	}
	n := copy(b, f.unread)
	f.unread = f.unread[n:]
	return n, nil
}
