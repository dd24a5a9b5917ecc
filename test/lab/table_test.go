package lab

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/podnet"
	"github.com/virtlet/virtlet/internal/testnet"
)

// The columns of the table: what is tried on a plugin's network.
const (
	ping      = "ping"
	tcp       = "TCP"
	wholeMTU  = "DF at MTU"
	hostPort  = "hostPort"
	secondNIC = "second NIC"
	crossNode = "cross-node"
)

var columns = []string{ping, tcp, wholeMTU, hostPort, secondNIC, crossNode}

// How a plugin was there.
const (
	real     = "real"
	replayed = "replayed"
)

// row is what was seen on the networks of one plugin.
type row struct {
	key
	datapath podnet.Datapath // of the guest's veth, if it has one
	seen     map[string]bool
	failed   bool
}

// key is what rows have in common that differ in their datapaths: they are one row of the documentation.
type key struct{ plugin, how, families string }

// results are the rows of a run.
type results struct {
	mu      sync.Mutex
	rows    []*row
	skipped bool
}

var table results

// tested gives the row for a plugin, "v4", "v6" or "dual", and a datapath. Tests may share one; a failed or skipped one spoils it.
func tested(t *testing.T, plugin, how, families string, d podnet.Datapath) *row {
	t.Helper()
	table.mu.Lock()
	defer table.mu.Unlock()
	of := key{plugin, how, families}
	i := slices.IndexFunc(table.rows, func(r *row) bool { return r.key == of && r.datapath == d })
	if i < 0 {
		table.rows = append(table.rows, &row{key: of, datapath: d, seen: map[string]bool{}})
		i = len(table.rows) - 1
	}
	r := table.rows[i]
	t.Cleanup(func() {
		table.mu.Lock()
		defer table.mu.Unlock()
		r.failed = r.failed || t.Failed()
		table.skipped = table.skipped || t.Skipped()
	})
	return r
}

// mark says that something was seen to work. It has no effect in a test that has failed by then.
func (r *row) mark(t *testing.T, column string) {
	t.Helper()
	table.mu.Lock()
	defer table.mu.Unlock()
	r.seen[column] = r.seen[column] || !t.Failed()
}

// talk tries all that a guest and another machine of its network do with each other, in both directions. mtu is that of
// the way between them, in bytes; column is marked beside the common ones, if it is not empty.
func (r *row) talk(t *testing.T, guest *testnet.Namespace, own netip.Addr, peer *testnet.Namespace, to netip.Addr, mtu int, column string) {
	t.Helper()
	for _, way := range []struct {
		from, to *testnet.Namespace
		addr     netip.Addr
	}{{guest, peer, to}, {peer, guest, own}} {
		if !way.from.Ping(way.addr) {
			t.Fatalf("%s does not reach %s", way.from.Name, way.addr)
		}
		testnet.Transfer(t, way.from, way.to, way.addr, 300_000)
	}
	if !guest.Ping(to, "-M", "do", "-s", strconv.Itoa(mtu-headers(to))) {
		t.Errorf("a packet of the whole MTU of %d bytes does not reach %s", mtu, to)
	}
	tooLong(t, guest, to, mtu+1)
	for _, c := range []string{ping, tcp, wholeMTU, column} {
		if c != "" {
			r.mark(t, c)
		}
	}
}

// tooLong checks that a packet of that many bytes, with what carries it over IP, fits nowhere, and that its sender is told: by its
// own link, or by a router on the way.
func tooLong(t *testing.T, from *testnet.Namespace, to netip.Addr, size int) {
	t.Helper()
	var c net.Conn
	from.Must(func() (err error) {
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) {
				level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
				if to.Is6() {
					level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
				}
				failed = unix.SetsockoptInt(int(fd), level, option, unix.IP_PMTUDISC_DO) // the same number for IPv6
			})
			return errors.Join(err, failed)
		}}
		c, err = d.Dial("udp", netip.AddrPortFrom(to, 9).String()) // discard (RFC 863), where nobody listens: an arrival is refused
		return err
	})
	defer c.Close()
	datagram := make([]byte, size-headers(to)) // UDP's header is as long as that of an echo request
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		switch _, err := c.Write(datagram); {
		case errors.Is(err, unix.EMSGSIZE):
			return
		case err != nil:
			t.Errorf("a packet of %d bytes, more than the MTU, reaches %s: %v", size, to, err)
			return
		case time.Now().After(end):
			t.Errorf("nobody says that a packet of %d bytes is too long for the way to %s", size, to)
			return
		}
	}
}

// port80 publishes a VM's port 80 as 8080.
var port80 = []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}

// published tries port80 at an address of the node, from somewhere else, and from the guest itself: who is led to by a port
// or a Service does not know that he is.
func (r *row) published(t *testing.T, v *vm, from *testnet.Namespace, at netip.Addr) {
	t.Helper()
	family := 6
	if at.Is4() {
		family = 4
	}
	listen, by := netip.AddrPortFrom(v.addr(t, 0, family), 80), netip.AddrPortFrom(at, 8080)
	testnet.TransferBy(t, from, v.guest, listen, by, 300_000)
	testnet.TransferBy(t, v.guest, v.guest, listen, by, 300_000)
	r.mark(t, hostPort)
}

// headers are what an echo request has in front of its data: 20 bytes of IPv4 or 40 of IPv6, and 8 of ICMP.
func headers(to netip.Addr) int {
	if to.Is4() {
		return 28
	}
	return 48
}

const (
	docs       = "../../docs/networking.md"
	tableBegin = "<!-- what follows is written by `make lab-table` -->\n"
	tableEnd   = "<!-- end -->\n"
)

// markdown gives the table. A cell is empty where the plugin has no such thing or it was not tried, and names the datapaths
// where it was not seen on all that the row has.
func (t *results) markdown() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := slices.DeleteFunc(slices.Clone(t.rows), func(r *row) bool { return r.failed || len(r.seen) == 0 })
	slices.SortFunc(rows, func(a, b *row) int {
		return cmp.Or(cmp.Compare(a.how, b.how), cmp.Compare(a.plugin, b.plugin), cmp.Compare(order(a.families), order(b.families)),
			cmp.Compare(a.datapath, b.datapath))
	})
	var s strings.Builder
	fmt.Fprintf(&s, "| plugin | | | datapath | %s |\n|---|---|---|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	for len(rows) > 0 {
		n := 1
		for n < len(rows) && rows[n].key == rows[0].key {
			n++
		}
		same := rows[:n]
		rows = rows[n:]
		all := strings.Join(seenOn(same, ""), ", ")
		fmt.Fprintf(&s, "| %s | %s | %s | %s |", same[0].plugin, same[0].how, same[0].families, all)
		for _, c := range columns {
			switch on := strings.Join(seenOn(same, c), ", "); on {
			case "":
				s.WriteString(" |")
			case all:
				s.WriteString(" yes |")
			default:
				s.WriteString(" " + on + " |")
			}
		}
		s.WriteString("\n")
	}
	return s.String()
}

// seenOn gives the datapaths on which a column was seen, of some rows; all of them for "".
func seenOn(rows []*row, column string) (all []string) {
	for _, r := range rows {
		if column == "" || r.seen[column] {
			all = append(all, string(r.datapath))
		}
	}
	return all
}

func order(families string) int { return slices.Index([]string{"v4", "v6", "dual"}, families) }

// compare says whether the table in the documentation is that of this run, and writes it there if it is told to.
func (t *results) compare(write bool) error {
	if t.skipped || len(t.rows) == 0 {
		return nil // said by the tests; what they would have seen is not known
	}
	b, err := os.ReadFile(docs)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), tableBegin)
	old, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the table: it is between %q and %q", docs, tableBegin, tableEnd)
	}
	now := t.markdown()
	switch {
	case old == now:
		return nil
	case write:
		return os.WriteFile(docs, []byte(before+tableBegin+now+tableEnd+after), 0o644)
	}
	return errors.New("the table in docs/networking.md is not that of this run (`make lab-table` writes it); the run's:\n" + now)
}

// each gives the families of a row.
func each(families string) []int {
	return map[string][]int{"v4": {4}, "v6": {6}, "dual": {4, 6}}[families]
}

// A row says on which datapaths it was seen, and a cell where that is not all of them; a test that failed shows nothing.
func TestTable(t *testing.T) {
	var some results
	for _, d := range datapaths {
		some.rows = append(some.rows,
			&row{key: key{"both", real, "v4"}, datapath: d, seen: map[string]bool{ping: true, tcp: d == podnet.Bridged}},
			&row{key: key{"one", real, "v4"}, datapath: d, seen: map[string]bool{ping: true}, failed: d == podnet.Bridged})
	}
	some.rows = append(some.rows, &row{key: key{"nothing", real, "v4"}, datapath: podnet.Bridged})
	const want = `| plugin | | | datapath | ping | TCP | DF at MTU | hostPort | second NIC | cross-node |
|---|---|---|---|---|---|---|---|---|---|
| both | real | v4 | bridge, redirect | yes | bridge | | | | |
| one | real | v4 | redirect | yes | | | | | |
`
	if got := some.markdown(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
