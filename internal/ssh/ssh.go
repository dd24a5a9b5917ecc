// Package ssh is the system's SSH client as data: a [Login] says who goes where, [Login.Args] is the command line for it,
// and [Become] puts the client in this process's place. Nothing here waits or connects.
package ssh

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// Login is one use of the client.
type Login struct {
	Host       netip.Addr
	Port       int
	User       string
	Identities []string // files of private keys; none: those that the client tries by itself
	// KnownHosts is the only file of host keys that counts. The first key that a host shows under the name of Alias is
	// kept there, and no other is accepted afterwards.
	KnownHosts string
	Alias      string
	Options    []string // more of ssh_config(5), which come before ours: the first one counts
	Command    []string // joined by spaces for the guest's shell, as ssh does; none: a login shell
}

// Args gives the arguments of the client, its own name first.
func (l Login) Args() []string {
	args := []string{"ssh", "-l", l.User, "-p", strconv.Itoa(l.Port)}
	for _, o := range l.Options {
		args = append(args, "-o", o)
	}
	for _, i := range l.Identities {
		args = append(args, "-i", i)
	}
	for _, o := range []string{
		"UserKnownHostsFile=" + quote(l.KnownHosts),
		"GlobalKnownHostsFile=none", // guests get the addresses of others that have gone
		"HostKeyAlias=" + l.Alias,
		"StrictHostKeyChecking=accept-new",
	} {
		args = append(args, "-o", o)
	}
	return append(append(args, "--", l.Host.String()), l.Command...)
}

// quote makes one word of a path for ssh_config(5), where % begins a token.
func quote(path string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(path) + `"`
}

// CheckUser says what is wrong with a user's name. Whether the guest has the user it alone knows.
func CheckUser(name string) error {
	odd := func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r) || strings.ContainsRune(`'"\;&<>|(){}$`+"`", r)
	}
	if name == "" || name[0] == '-' || len(name) > 255 || strings.ContainsFunc(name, odd) {
		return fmt.Errorf("bad user name %q: use a name without spaces and signs of a shell, no dash first", name)
	}
	return nil
}

// Find gives the path of the client.
func Find() (string, error) {
	path, err := exec.LookPath("ssh")
	if err != nil {
		return "", errors.New("no ssh program is on PATH: install it (Debian: openssh-client)")
	}
	return path, nil
}

// Become replaces this process by the client, in the network namespace of the calling thread. It returns when that
// fails alone.
func Become(path string, l Login) error {
	return fmt.Errorf("run %s: %w", path, unix.Exec(path, l.Args(), os.Environ()))
}
