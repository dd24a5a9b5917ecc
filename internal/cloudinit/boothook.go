package cloudinit

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/virtlet/virtlet/internal/nic"
)

// bootHook gives a program that configures the guest's interfaces with the kernel's own means, for images whose
// cloud-init takes no network configuration from its data source. cloud-init runs it at every boot, before sshd and before
// any other part of user-data. What comes by DHCP is left to the image. Every word in it is a number, an address or a
// name of [nameForm] or [domainForm], so nothing needs quotes.
func (n Network) bootHook() []byte {
	var b bytes.Buffer
	b.WriteString(bootHookStart)
	for _, l := range n.links {
		fmt.Fprintf(&b, "\nnic %s %s %d\n", l.mac, l.name, l.mtu)
		for _, a := range l.addrs {
			fmt.Fprintf(&b, "addr %s\n", a)
		}
		for _, r := range l.routes {
			fmt.Fprintf(&b, "route %s\n", strings.Join(l.routeWords(r), " "))
		}
		if len(l.servers)+len(l.search) > 0 {
			fmt.Fprintf(&b, "servers=\"$servers %s\" search=\"$search %s\"\n", strings.Join(strs(l.servers), " "), strings.Join(l.search, " "))
		}
	}
	b.WriteString(bootHookEnd)
	return b.Bytes()
}

// routeWords gives a route in the words of `ip route`.
func (l *link) routeWords(r nic.Route) []string {
	words := []string{r.Dst.String()}
	if !r.OnLink() {
		words = append(words, "via", r.Gw.String())
		if l.onLink(r) {
			words = append(words, "onlink")
		}
	}
	if r.Src.IsValid() {
		words = append(words, "src", r.Src.String())
	}
	if r.Metric != 0 {
		words = append(words, "metric", fmt.Sprint(r.Metric))
	}
	if r.MTU != 0 {
		words = append(words, "mtu", fmt.Sprint(r.MTU))
	}
	return words
}

// bootHookStart looks for interfaces by their MACs, and takes VLANs and bridges on them, which have the same, for none.
// A name stays where another interface has it, or where the interface is up already, which forbids renaming.
const bootHookStart = `#cloud-boothook
#!/bin/sh
# Written by virtlet: the network configuration of this boot.
servers= search=

nic() { # MAC NAME MTU
	dev=
	for d in /sys/class/net/*; do
		[ -e "$d/device" ] && [ "$(cat "$d/address")" = "$1" ] && dev=${d##*/}
	done
	[ -n "$dev" ] || { echo "virtlet: no interface has the MAC $1" >&2; return; }
	if [ "$dev" != "$2" ] && ! [ -e "/sys/class/net/$2" ] && ip link set dev "$dev" name "$2" 2>/dev/null; then dev=$2; fi
	ip link set dev "$dev" mtu "$3" up
}
addr() { [ -z "$dev" ] || ip addr replace "$1" dev "$dev"; }
route() { [ -z "$dev" ] || ip route replace "$@" dev "$dev"; }
`

// bootHookEnd names the resolvers. systemd-resolved keeps its own list; else resolv.conf is written, which a DHCP client
// may write again.
const bootHookEnd = `
[ -n "$servers$search" ] || exit 0
if [ -e /run/systemd/resolve/resolv.conf ] && [ -n "$dev" ]; then
	[ -z "${servers# }" ] || resolvectl dns "$dev" $servers
	[ -z "${search# }" ] || resolvectl domain "$dev" $search
	exit 0
fi
{
	for s in $servers; do echo "nameserver $s"; done
	set -- $search
	[ $# = 0 ] || echo "search $*"
} >/etc/resolv.conf
`

// withBootHook puts a boot hook in front of the user's user-data. The user's part is inside as it was, unless it was
// packed: cloud-init knows a part's kind by its first line, and a MIME message in a message by its header.
func withBootHook(hook, user []byte) ([]byte, error) {
	if strings.HasPrefix(string(user), gzipMagic) {
		var err error
		if user, err = unpack(user); err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n", boundary)
	part := func(text []byte) {
		fmt.Fprintf(&b, "\n--%s\n", boundary)
		if isMIME(text) {
			b.Write(text) // a message of its own, whose header is the part's
			return
		}
		b.WriteString("Content-Type: text/plain; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\n")
		b.WriteString(lines(base64.StdEncoding.EncodeToString(text)))
	}
	part(hook)
	part(user)
	fmt.Fprintf(&b, "\n--%s--\n", boundary)
	if isMIME(user) && bytes.Contains(user, []byte("--"+boundary)) {
		return nil, fmt.Errorf("user-data: it contains %q, which separates it from the network configuration: take that out", boundary)
	}
	return b.Bytes(), nil
}

const boundary = "virtlet-network-configuration-7d0f2c1b"

// lines breaks a text into lines of 76 bytes, as RFC 2045, section 6.8, wants.
func lines(s string) string {
	var b strings.Builder
	for ; len(s) > 76; s = s[76:] {
		b.WriteString(s[:76] + "\n")
	}
	b.WriteString(s + "\n")
	return b.String()
}
