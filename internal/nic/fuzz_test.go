package nic

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// FuzzPlan gives Plan what no plugin and no kernel should say. What it plans must be fit for a guest all the same.
func FuzzPlan(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, text, links string) {
		r, err := parse(text)
		if err != nil {
			return
		}
		var s Snapshot
		if json.Unmarshal([]byte(links), &s) != nil {
			return
		}
		holds(t, []Attachment{{Network: "a", IfName: "eth0", Result: r}, {Network: "b", IfName: "net1", Result: r}}, s)
	})
}

// holds checks what is true of every plan, and says whether there is one.
func holds(t *testing.T, as []Attachment, s Snapshot) (planned bool) {
	t.Helper()
	before, _ := json.Marshal([]any{as, s})
	nics, notes, err := Plan(as, s)
	if after, _ := json.Marshal([]any{as, s}); string(before) != string(after) {
		t.Errorf("Plan changed its input\n%s\n%s", before, after)
	}
	again, notesAgain, _ := Plan(as, s)
	if !reflect.DeepEqual(nics, again) || !slices.Equal(notes, notesAgain) {
		t.Errorf("Plan differs from call to call:\n%+v %q\n%+v %q", nics, notes, again, notesAgain)
	}
	if (len(nics) == 0) == (err == nil) {
		t.Errorf("%d NICs and error %v", len(nics), err)
	}
	for _, s := range append(notes, fmt.Sprint(err)) {
		if len(s) > 4096 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("unfit to be shown: %q", s)
		}
	}
	for _, n := range nics {
		fit(t, n)
	}
	return err == nil
}

func seed(f *testing.F) {
	for _, file := range glob(f) {
		r, _ := load(f, file)
		b, err := json.Marshal(r.Snapshot)
		if err != nil {
			f.Fatal(err)
		}
		for _, a := range r.Attachments {
			f.Add(string(a.Result), string(b))
		}
	}
	f.Add(`{"cniVersion":"0.4.0","interfaces":[null],"ips":[null]}`, `{}`)
	f.Add(`{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5/32","gateway":"10.9.0.1"}],"routes":[{"dst":"::/0"},{"dst":"10.9.0.1/32","gw":"10.9.0.1"}]}`,
		`{"links":[{"name":"eth0","kind":"veth","mac":"02:00:00:00:00:01","mtu":70000,"routes":[{"dst":"0.0.0.0/0"},{"dst":"::ffff:10.0.0.0/104","gw":"fe80::1%x"}]}]}`)
}

// TestPlanOfRandomStates makes results and namespaces from few names and addresses, so that they collide.
func TestPlanOfRandomStates(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	several := func(most int, one func() string) string {
		all := make([]string, rnd.IntN(most+1))
		for i := range all {
			all[i] = one()
		}
		return strings.Join(all, ",")
	}
	name := func() string { return pick("eth0", "eth1", "net1", "lo") }
	addr := func() string {
		return pick("10.1.0.1", "10.1.0.2", "10.2.0.1", "169.254.1.1", "fe80::1", "2001:db8::1", "2001:db8::2", "0.0.0.0", "ff02::1")
	}
	prefix := func() string { return addr() + pick("/32", "/31", "/24", "/16", "/0") }
	planned := 0
	for range 1000 {
		text := func() string {
			return fmt.Sprintf(`{"interfaces":[%s],"ips":[%s],"routes":[%s]}`,
				several(3, func() string { return fmt.Sprintf(`{"name":%q,"sandbox":%q}`, name(), pick("", "x", "y")) }),
				several(3, func() string {
					return fmt.Sprintf(`{"address":%q,"gateway":%q,"interface":%s}`, prefix(), addr(), pick("null", "-1", "0", "1", "2"))
				}),
				several(3, func() string {
					return fmt.Sprintf(`{"dst":%q%s}`, prefix(), pick("", `,"scope":253`, fmt.Sprintf(`,"gw":%q`, addr())))
				}))
		}
		var links []string
		for i, n := range []string{"eth0", "eth1", "net1"} {
			links = append(links, fmt.Sprintf(`{"name":%q,"index":%d,"kind":%q,"mac":"02:00:00:00:00:01","mtu":%s,"up":true,"addrs":[%s],"routes":[%s]}`,
				n, rnd.IntN(9)-i, pick("veth", "veth", "veth", "veth", "sit"), pick("1500", "65535", "1000"),
				several(3, func() string { return fmt.Sprintf(`{"prefix":%q,"flags":%s}`, prefix(), pick("128", "640")) }),
				several(4, func() string {
					return fmt.Sprintf(`{"dst":%q,"protocol":%s,"table":%s,"mtu":%s%s}`, prefix(), pick("2", "3", "9"), pick("0", "254", "254", "100"), pick("0", "1400"), pick("", fmt.Sprintf(`,"gw":%q`, addr())))
				})))
		}
		var s Snapshot
		if err := json.Unmarshal([]byte(`{"links":[`+strings.Join(links[rnd.IntN(2):], ",")+`]}`), &s); err != nil {
			t.Fatal(err)
		}
		as := []Attachment{cni(t, "a", name(), text()), cni(t, "b", name(), text())}
		if holds(t, as[:rnd.IntN(3)], s) {
			planned++
		}
		if t.Failed() {
			b, _ := json.Marshal([]any{as, s})
			t.Fatalf("state: %s", b)
		}
	}
	if planned < 200 {
		t.Errorf("only %d states came to a plan: the test has lost its force", planned)
	}
}

// fit holds what every consumer of a plan relies on.
func fit(t *testing.T, n NIC) {
	t.Helper()
	if n.MAC.IsZero() || n.MAC[0]&1 != 0 || n.MTU < minMTU || n.VF == nil && n.MTU > MaxTapMTU {
		t.Errorf("MAC %s, MTU %d", n.MAC, n.MTU)
	}
	reached := func(gw netip.Addr, before []Route) bool {
		return linkLocal6(gw) || slices.ContainsFunc(n.Addrs, func(p netip.Prefix) bool { return p.Contains(gw) }) ||
			slices.ContainsFunc(before, func(r Route) bool { return r.OnLink() && r.Dst.Contains(gw) })
	}
	for i, a := range n.Addrs {
		if !a.IsValid() || a.Addr().Is4In6() || linkLocal6(a.Addr()) || a.Addr().IsMulticast() || slices.Contains(n.Addrs[:i], a) {
			t.Errorf("address %s of %s", a, n.Addrs)
		}
	}
	for i, r := range n.Routes {
		if !r.Dst.IsValid() || r.Dst != r.Dst.Masked() || r.Dst.Addr().Is4In6() || r.Metric < 0 || r.MTU < 0 || r.MTU > n.MTU {
			t.Errorf("route %+v", r)
		}
		if r.Gw.IsValid() && (r.Gw.Is4() != r.Dst.Addr().Is4() || r.Gw.Zone() != "" || !reached(r.Gw, n.Routes[:i])) {
			t.Errorf("gateway of route %d of %+v, addresses %s", i, n.Routes, n.Addrs)
		}
		if i > 0 && n.Routes[i-1].IsDefault() && !r.IsDefault() || slices.Contains(n.Routes[:i], r) {
			t.Errorf("route %d of %+v is out of order or there twice", i, n.Routes)
		}
	}
	for _, s := range slices.Concat(n.DNS.Search, n.DNS.Options, []string{n.DNS.Domain}) {
		if len(s) > 255 || strings.ContainsAny(s, "\n\r\x00") {
			t.Errorf("DNS text %q", s)
		}
	}
	for _, a := range n.DNS.Servers {
		if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() {
			t.Errorf("DNS server %s", a)
		}
	}
}
