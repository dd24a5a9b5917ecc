package podnet

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/nic"
)

// table is the one nftables table of a namespace that has an attached guest.
var table = &nftables.Table{Name: "virtlet", Family: nftables.TableFamilyNetdev}

// removeFilters deletes all that filter made.
func (k *kernel) removeFilters() error {
	k.nft.DelTable(table)
	if err := k.nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove filters: %w", err)
	}
	return nil
}

// filters gives the rules at the two ends of every join, in front of the bridge. The hooks are netdev ingress ones: packet
// sockets, and so our responders on the TAP, hear a frame before they do, and what is written to the TAP for the guest
// does not pass them.
func filters(joins []Join, nics []nic.NIC, policies map[string]Policy) *batch {
	b := newBatch()
	b.addTable()
	for i, j := range joins {
		p := policies[j.Link]
		b.addHook(j.Link)
		b.addRules(hookChain(j.Link), clusterRules(nics[i], p))
		b.addHook(j.Tap)
		b.addRules(hookChain(j.Tap), guestRules(nics[i], p))
	}
	return b
}

// hookChain names the chain of the frames that come in by a device.
func hookChain(device string) string { return "from-" + device }

// addRules adds rules to a chain. Those in a row that begin alike go to a chain of their own, with one jump there: their
// beginning is compared once, and each expression takes the kernel time to lay.
func (b *batch) addRules(chain string, rules []rule) {
	in, under := chain, (*group)(nil)
	for _, r := range rules {
		if r.under != under {
			if in, under = chain, r.under; under != nil {
				in = chain + "-" + under.name
				b.addChain(in)
				b.addRule(chain, join(under.match.exprs, verdict(jump, in)), nil)
			}
		}
		end := dropped
		if r.reason == "" {
			end = passes
		}
		b.addRule(in, join(r.match.exprs, end), r.words())
	}
}

// typeMatch is a rule's match in words among its user data, beside nft's comment. nft passes over what it does not know.
const typeMatch userdata.Type = 64

// words give the user data of a rule: the reason in a comment, for those who look with nft too, and the match.
func (r rule) words() (data []byte) {
	if r.reason != "" {
		data = userdata.AppendString(data, userdata.TypeComment, string(r.reason)+": "+because[r.reason])
	}
	const most, head, more = 256, 3, " ..." // NFT_USERDATA_MAXLEN; type, length and final NUL
	text := r.whole().text
	if room := most - len(data) - head; len(text) > room {
		text = text[:room-len(more)] + more
	}
	return userdata.AppendString(data, typeMatch, text)
}
