package testnet

import (
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Transfer sends random bytes over TCP from one namespace to an address in the other, and compares what arrives.
func Transfer(t testing.TB, from, to *Namespace, addr netip.Addr, size int64) {
	t.Helper()
	TransferBy(t, from, to, netip.AddrPortFrom(addr, 0), netip.AddrPort{}, size)
}

// TransferBy is Transfer to whoever listens at an address and port of the other namespace, by another address and port
// that is to lead there; the zero AddrPort stands for the same.
func TransferBy(t testing.TB, from, to *Namespace, listen, by netip.AddrPort, size int64) {
	t.Helper()
	var l *net.TCPListener
	var c *net.TCPConn
	to.Must(func() (err error) {
		// A program that is being started has a copy of a listener that was closed here, for a moment: until it is executed.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(listen))
			if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
				return err
			}
		}
	})
	defer l.Close()
	if !by.IsValid() {
		by = l.Addr().(*net.TCPAddr).AddrPort()
	}
	from.Must(func() error {
		d := net.Dialer{Timeout: 30 * time.Second} // opens the socket on this thread, as the address is no name
		conn, err := d.Dial("tcp", by.String())
		if err == nil {
			c = conn.(*net.TCPConn)
		}
		return err
	})
	defer c.Close()
	end := time.Now().Add(60 * time.Second)
	got, sent := sha256.New(), sha256.New()
	done := make(chan error, 1)
	go func() {
		in, err := l.Accept()
		if err == nil {
			defer in.Close()
			in.SetDeadline(end)
			_, err = io.Copy(got, in)
		}
		done <- err
	}()
	c.SetDeadline(end)
	random := rand.NewChaCha8([32]byte{byte(size)})
	if n, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(random, size)); err != nil {
		t.Fatalf("sent %d of %d bytes: %v", n, size, err)
	}
	c.CloseWrite()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if string(got.Sum(nil)) != string(sent.Sum(nil)) {
		t.Error("other bytes arrived than were sent")
	}
}
