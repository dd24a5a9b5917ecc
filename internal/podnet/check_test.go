package podnet

import (
	"strings"
	"testing"

	"github.com/virtlet/virtlet/internal/testnet"
)

func TestCheck(t *testing.T) {
	for name, broken := range map[string]struct {
		by   []string // a command in the pod
		want string   // part of the error
	}{
		"as it was":          {[]string{"true"}, ""},
		"port left":          {[]string{"ip", "link", "set", "eth0", "nomaster"}, `eth0 is a port of "", not of "vltbr0"`},
		"TAP left":           {[]string{"ip", "link", "set", "vlttap0", "nomaster"}, `vlttap0 is a port of "", not of "vltbr0"`},
		"bridge down":        {[]string{"ip", "link", "set", "vltbr0", "down"}, "vltbr0 is down"},
		"bridge gone":        {[]string{"ip", "link", "del", "vltbr0"}, "vltbr0 is gone"},
		"link gone":          {[]string{"ip", "link", "del", "eth0"}, "the link is gone, or another has its name"},
		"another MAC":        {[]string{"ip", "link", "set", "eth0", "address", mac.String()}, "its MAC is " + mac.String()},
		"an address again":   {[]string{"ip", "addr", "add", ip4.String(), "dev", "eth0"}, "it has addresses again"},
		"filters taken off":  {[]string{"nft", "flush", "ruleset"}, "its filters are gone"},
		"localhost's rules":  {[]string{"nft", "flush", "chain", "netdev", "virtlet", "localhost-from-lo"}, "its rules at ingress lo are gone"},
		"the answers' rules": {[]string{"nft", "flush", "chain", "netdev", "virtlet", "localhost-from-vlttap0"}, "its rules at ingress vlttap0 are gone"},
		"loopback's setting": {[]string{"sysctl", "-qw", "net.ipv4.conf.lo.accept_local=0"}, `net/ipv4/conf/lo/accept_local is "0", not "1"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := testnet.NewNode(t, gw4, gw6)
			pod, _ := addPod(t, node, dualStack())
			a := attach(t, pod, Options{Localhost: true})
			pod.MustRun(broken.by[0], broken.by[1:]...)
			err := Check(pod.NS, a.rec)
			if broken.want == "" && err != nil || broken.want != "" && (err == nil || !strings.Contains(err.Error(), broken.want)) {
				t.Errorf("error %v, want %q", err, broken.want)
			}
		})
	}
}
