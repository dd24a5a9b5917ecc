package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/qemu"
	"github.com/virtlet/virtlet/internal/ssh"
)

// DefaultSSHUser is the user that Debian's cloud images give the SSH keys to.
const DefaultSSHUser = "debian"

// SSHRequest is a login to a guest. What is not given is known of the VM or has a default.
type SSHRequest struct {
	User       string        // "": what the VM was started with
	Address    string        // "": those that the VM's networks gave, the first that answers
	Port       int           // 0: 22
	Identities []string      // files of private keys; none: those beside the public keys that the VM was started with
	Options    []string      // of ssh_config(5)
	NetNS      string        // path of the namespace to connect from; "": the supervisor's, which is the node's
	Timeout    time.Duration // for the port to answer
	Command    []string
}

const (
	sshPort        = 22
	knownHostsFile = "known_hosts"
)

// SSH replaces this process by an SSH client that is connected to the VM's guest, once the guest's port answers. It
// returns with an error alone. The host key that the guest shows first is kept with the VM.
func (s Store) SSH(ctx context.Context, name string, r SSHRequest, progress func(string)) error {
	if err := r.check(); err != nil {
		return &ConfigError{err}
	}
	for _, i := range r.Identities {
		if _, err := os.Stat(i); err != nil {
			return fmt.Errorf("identity: %w", err)
		}
	}
	st, err := s.Get(name)
	if err != nil {
		return err
	}
	program, err := ssh.Find()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	w := waiter{store: s, name: name, request: r, begin: time.Now(), progress: progress}
	ns, host, err := w.wait(ctx)
	if err != nil {
		return fmt.Errorf("SSH to VM %q: %w", name, err)
	}
	defer ns.Close()
	if st, err = s.Get(name); err != nil { // what it was started with, if it was starting
		return err
	}
	l := ssh.Login{
		Host: host, Port: r.Port, User: r.User, Identities: r.Identities, KnownHosts: s.data(name, knownHostsFile),
		Alias: name, Options: r.Options, Command: r.Command,
	}
	if l.User == "" {
		l.User = st.Config.SSHUser
	}
	if len(l.Identities) == 0 {
		l.Identities = present(st.Config.Identities)
	}
	return ns.Do(func() error { return ssh.Become(program, l) })
}

// check fills in defaults and finds what can be found wrong without touching the machine.
func (r *SSHRequest) check() error {
	var errs []error
	if r.User != "" {
		errs = append(errs, ssh.CheckUser(r.User))
	}
	if r.Address != "" {
		if _, err := netip.ParseAddr(r.Address); err != nil {
			errs = append(errs, fmt.Errorf("address %q: use an IP address", r.Address))
		}
	}
	if r.Port == 0 {
		r.Port = sshPort
	}
	if r.Port < 1 || r.Port > 65535 {
		errs = append(errs, fmt.Errorf("port %d: use 1 to 65535", r.Port))
	}
	return errors.Join(errs...)
}

// present gives the files that are there.
func present(paths []string) (there []string) {
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			there = append(there, p)
		}
	}
	return there
}

// waiter waits for a guest's port.
type waiter struct {
	store    Store
	name     string
	request  SSHRequest
	begin    time.Time
	told     time.Time // when progress last heard something
	progress func(string)
}

// wait gives the namespace and the address from and at which the port answers. The caller closes the namespace.
func (w *waiter) wait(ctx context.Context) (*netns.NS, netip.Addr, error) {
	var ns *netns.NS
	last := errors.New("it is starting")
	var at string
	for {
		st, err := w.running()
		if err == nil && st.Status == Running {
			var addrs []netip.Addr
			if addrs, err = w.addresses(st); err == nil && ns == nil {
				ns, err = w.open(st)
			}
			if err == nil {
				host, why := dial(ctx, ns, addrs, w.request.Port)
				if why == nil {
					if !w.told.IsZero() {
						w.progress(fmt.Sprintf("%s answers after %s", host, time.Since(w.begin).Round(time.Second)))
					}
					return ns, host, nil
				}
				if ctx.Err() == nil || at == "" { // an attempt that was cut short says less than the one before
					last = why
				}
				at = fmt.Sprintf(" at %s port %d", join(addrs), w.request.Port)
			}
		}
		if err == nil && ctx.Err() != nil {
			err = fmt.Errorf("no answer%s within %s: %w; does the guest have an SSH server? virtlet logs %s", at, w.request.Timeout, last, w.name)
		}
		if err != nil {
			if ns != nil {
				ns.Close()
			}
			return nil, netip.Addr{}, err
		}
		w.tell(fmt.Sprintf("waiting for an answer%s: %v", at, last))
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// tell says why it takes so long: at first after two seconds, then every ten.
func (w *waiter) tell(text string) {
	const first, next = 2 * time.Second, 10 * time.Second
	if now := time.Now(); now.Sub(w.begin) > first && now.Sub(w.told) > next {
		w.told = now
		w.progress(text)
	}
}

// running gives the state of a VM that runs or is about to.
func (w *waiter) running() (State, error) {
	st, err := w.store.Get(w.name)
	if err == nil && st.Status != Running && st.Status != Starting {
		err = fmt.Errorf("%w: it is %s", ErrStopped, st.Status)
	}
	return st, err
}

// addresses gives where the guest may be reached, in the order of its NICs, IPv4 first.
func (w *waiter) addresses(st State) ([]netip.Addr, error) {
	if w.request.Address != "" {
		a, err := netip.ParseAddr(w.request.Address)
		return []netip.Addr{a}, err
	}
	var all []netip.Addr
	for _, n := range st.NICs {
		for _, family := range []bool{true, false} {
			for _, p := range n.Addrs {
				if p.Addr().Is4() == family && !p.Addr().IsLinkLocalUnicast() {
					all = append(all, p.Addr())
				}
			}
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no address is known: its networks gave none; use --address with the one that the guest has")
	}
	return all, nil
}

// open enters the namespace to connect from. A guest is reached like a pod, from the node: its own namespace has no
// address.
func (w *waiter) open(st State) (*netns.NS, error) {
	if w.request.NetNS != "" {
		return netns.Open(w.request.NetNS)
	}
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", st.Supervisor.PID))
	if err == nil && qemu.StartTime(st.Supervisor.PID) != st.Supervisor.Start {
		ns.Close()
		err = ErrStopped
	}
	return ns, err
}

// dial gives the first address at which the port is open, or why there is none.
func dial(ctx context.Context, ns *netns.NS, addrs []netip.Addr, port int) (netip.Addr, error) {
	const each = 2 * time.Second
	var errs []error
	for _, a := range addrs {
		d := net.Dialer{Timeout: each}
		err := ns.Do(func() error {
			c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(a, uint16(port)).String())
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err == nil {
			return a, nil
		}
		if op := new(net.OpError); errors.As(err, &op) {
			err = op.Err // the rest is said by the caller
		}
		errs = append(errs, err)
	}
	return netip.Addr{}, errs[0]
}

func join(addrs []netip.Addr) string {
	var all []string
	for _, a := range addrs {
		all = append(all, a.String())
	}
	return strings.Join(all, ", ")
}
