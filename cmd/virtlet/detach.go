package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// detached is a supervisor that was started in a session of its own, so that it outlives us and our terminal.
type detached struct {
	messages *os.File // what it says until it is ready; the caller closes it
	signals  chan os.Signal
}

// detach starts this program again with args and hands it the configuration.
func detach(args []string, cfg vm.Config) (*detached, error) {
	fail := func(err error) (*detached, error) { return nil, fmt.Errorf("start the supervisor: %w", err) }
	self, err := os.Executable()
	if err != nil {
		return fail(err)
	}
	stdin, config, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer stdin.Close()
	defer config.Close()
	messages, stdout, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer stdout.Close()
	// The supervisor outlives us: what we have inherited, such as somebody's lock or the end of his pipe, is not for it.
	// A kernel before 5.11 does not know how, and lets it inherit.
	_ = unix.CloseRange(uint(unix.Stderr+1), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	// Ctrl-C while it starts: it is in another session, so it is told.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGHUP, vm.PowerSignal, vm.KillSignal)
	p, err := os.StartProcess(self, append([]string{self}, args...), &os.ProcAttr{
		Files: []*os.File{stdin, stdout, os.Stderr},
		Sys:   &unix.SysProcAttr{Setsid: true},
	})
	if err != nil {
		signal.Stop(signals)
		messages.Close()
		return fail(err)
	}
	d := &detached{messages: messages, signals: signals}
	go func() {
		for s := range signals {
			_ = p.Signal(s) // it may have ended
		}
	}()
	if err := json.NewEncoder(config).Encode(cfg); err != nil {
		d.Close()
		return fail(err)
	}
	return d, nil
}

// Close lets the supervisor go its own way.
func (d *detached) Close() error {
	signal.Stop(d.signals)
	close(d.signals)
	return d.messages.Close()
}
