package podnet

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// table is the one nftables table of a namespace that has an attached guest.
var table = &nftables.Table{Name: "virtlet", Family: nftables.TableFamilyNetdev}

// hasTable says whether joins have rules of nftables.
func (r *Record) hasTable() bool {
	return len(localAddrs(r.Joins)) > 0 || slices.ContainsFunc(r.Joins, func(j Join) bool { return j.engine() == Nftables })
}

// removeFilters deletes all that filter made.
func (k *kernel) removeFilters() error {
	k.nft.DelTable(table)
	if err := k.nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove filters: %w", err)
	}
	return nil
}

// hook is where frames of a device meet rules.
type hook struct {
	device string
	role   string                       // whose frames: cluster, guest, stack
	egress bool                         // those that go out by it, and not those that come in
	rules  func(nic.NIC, Policy) []rule // for them
	to     string                       // where those go that pass, by redirect; "": on, as without rules
	marks  bool                         // and they get our mark before
	local  from                         // its rules are those of localhost.go, which see a frame first
}

// hooks gives those of a join: first toward the guest, then from it. They are netdev ingress ones: packet sockets, and so
// our responders on the TAP, hear a frame before they do, and what is written to the TAP for the guest does not pass
// them. Where the TAP is the link, what comes for the guest meets no other device of ours: there is a hook at its egress,
// which lets pass what has our mark.
func (j Join) hooks() []hook {
	switch j.datapath() {
	case AsItIs:
		return []hook{{device: j.Tap, role: "cluster", egress: true, rules: marked(clusterRules)}, {device: j.Tap, role: "guest", rules: guestRules}}
	case Redirected:
		all := []hook{
			{device: j.Link, role: "cluster", rules: clusterRules, to: j.Tap},
			{device: j.Tap, role: "guest", rules: guestRules, to: j.Link, marks: j.KeepsAddrs},
		}
		if j.KeepsAddrs { // its stack would speak
			all = append(all, hook{device: j.Link, role: "stack", egress: true, rules: marked(stackRules)})
		}
		return all
	}
	return []hook{{device: j.Link, role: "cluster", rules: clusterRules}, {device: j.Tap, role: "guest", rules: guestRules}}
}

// hooksAt gives those of them that are at a device.
func (j Join) hooksAt(device string) []hook {
	return slices.DeleteFunc(j.hooks(), func(h hook) bool { return h.device != device })
}

// filters gives the rules of nftables at the ends of every join that has them, but for the forwards; nil: none has.
func filters(joins []Join, nics []nic.NIC, policies map[string]Policy) *batch {
	if rec := (Record{Joins: joins}); !rec.hasTable() {
		return nil
	}
	b := newBatch()
	b.addTable()
	for i, j := range joins {
		if j.engine() != Nftables {
			continue
		}
		for _, h := range j.hooks() {
			b.addHook(h)
			pass := passes
			if h.to != "" {
				b.addChain(h.forward())
				pass = verdict(follow, h.forward())
			}
			b.addRules(h.chain(), h.rules(nics[i], policies[j.Link]), pass)
			if h.to != "" {
				b.addRule(h.chain(), pass, nil)
			}
		}
	}
	return b
}

// addForwards adds what filters could not: the kernel wants the numbers of devices.
func (b *batch) addForwards(j *joint) {
	if j.Join.engine() != Nftables {
		return
	}
	index := map[string]int{j.Join.Link: j.link.Index, j.Join.Tap: j.tapIndex}
	for _, h := range j.Join.hooks() {
		if h.to == "" {
			continue
		}
		exprs := forward(index[h.to])
		if h.marks {
			exprs = join(setMeta(unix.NFT_META_MARK, ourMark), exprs)
		}
		b.addForward(h.forward(), exprs)
	}
}

// filterConfigs names what the kernel needs for the filters of the joins.
func filterConfigs(joins []Join) []string {
	needs := []string{"CONFIG_NF_TABLES_NETDEV", "CONFIG_NETFILTER_INGRESS"}
	if len(localAddrs(joins)) > 0 {
		needs = append(needs, "CONFIG_NFT_FWD_NETDEV")
	}
	for _, j := range joins {
		if j.engine() != Nftables {
			continue
		}
		for _, h := range j.hooks() {
			if h.to != "" && !slices.Contains(needs, "CONFIG_NFT_FWD_NETDEV") {
				needs = append(needs, "CONFIG_NFT_FWD_NETDEV")
			}
			if h.egress && !slices.Contains(needs, "CONFIG_NETFILTER_EGRESS") {
				needs = append(needs, "CONFIG_NETFILTER_EGRESS")
			}
		}
	}
	return needs
}

// chain names the chain of the hook.
func (h hook) chain() string {
	name := "from-" + h.device
	if h.egress {
		name = "to-" + h.device
	}
	if h.local != "" {
		name = "localhost-" + name
	}
	return name
}

// forward names the chain of the rule that redirects.
func (h hook) forward() string { return h.chain() + "-forward" }

// String is the hook in nft's words.
func (h hook) String() string {
	if h.egress {
		return "egress " + h.device
	}
	return "ingress " + h.device
}

// addRules adds rules to a chain. Those in a row that begin alike go to a chain of their own, with one jump there: their
// beginning is compared once, and each expression takes the kernel time to lay. pass is how a rule ends that drops nothing.
func (b *batch) addRules(chain string, rules []rule, pass attrs) {
	in, under := chain, (*group)(nil)
	for _, r := range rules {
		if r.under != under {
			if in, under = chain, r.under; under != nil {
				in = chain + "-" + under.name
				b.addChain(in)
				b.addRule(chain, join(under.match.exprs(), verdict(jump, in)), nil)
			}
		}
		end := dropped
		if r.reason == "" {
			end = pass
		}
		b.addRule(in, join(r.match.exprs(), end), r.words(""))
	}
}

// typeMatch is a rule's match in words among its user data, beside nft's comment, and typeTo the device that frames go to by
// it. nft passes over what it does not know.
const typeMatch, typeTo userdata.Type = 64, 65

// words give the user data of a rule: the reason in a comment, for those who look with nft too, the match, and the device that
// frames go to, if the hook does not say so.
func (r rule) words(to string) (data []byte) {
	if r.reason != "" {
		data = userdata.AppendString(data, userdata.TypeComment, string(r.reason)+": "+because[r.reason])
	}
	if to != "" {
		data = userdata.AppendString(data, typeTo, to)
	}
	const most, head, more = 256, 3, " ..." // NFT_USERDATA_MAXLEN; type, length and final NUL
	text := r.whole().text
	if room := most - len(data) - head; len(text) > room {
		text = text[:room-len(more)] + more
	}
	return userdata.AppendString(data, typeMatch, text)
}
