package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/virtlet/virtlet/internal/vm"
)

// runAttached supervises a VM from this process and shows its console.
func (a *app) runAttached(cfg vm.Config) error {
	report := a.printProgress()
	return a.supervise(cfg, report, func(v *vm.VM) error {
		report(message{Name: v.Name(), Notes: v.Notes(), Ready: true})
		return v.Console(a.out)
	})
}

// supervise runs a VM from start to end. started is called when QEMU runs and returns when the console has nothing
// more to say; signals are obeyed all the while.
func (a *app) supervise(cfg vm.Config, report func(message), started func(*vm.VM) error) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGHUP, vm.PowerSignal, vm.KillSignal)
	// Written to no end of a pipe, a process that is not asked about SIGPIPE would die and leave its VM behind.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var v *vm.VM
	var err error
	begun := make(chan struct{})
	go func() {
		defer close(begun)
		v, err = vm.Start(ctx, a.store, cfg, func(step, result string, took time.Duration, done bool) {
			report(message{Step: step, Result: result, Took: took, Done: done})
		})
	}()
	for waiting := true; waiting; {
		select {
		case <-begun:
			waiting = false
		case s := <-signals:
			report(message{Text: fmt.Sprintf("%s: giving up the start and undoing it", s)})
			cancel()
		}
	}
	if err != nil {
		return err
	}
	if ctx.Err() != nil { // given up a moment too late for Start: its guest has hardly begun
		_ = v.Kill() // of a guest that has ended
		end, err := v.Wait()
		return errors.Join(end.Err(), err)
	}
	vm.Rest()
	go obey(v, signals, report)
	shown := started(v)
	end, err := v.Wait()
	if errors.Is(shown, unix.EPIPE) {
		shown = nil // whoever looked on has left
	}
	return errors.Join(end.Err(), err, shown)
}

// obey turns signals into what the guest gets: a second Ctrl-C kills it, while [vm.PowerSignal] may come from any number
// of `virtlet stop`. It ends with the process.
func obey(v *vm.VM, signals <-chan os.Signal, report func(message)) {
	interrupted := false
	for s := range signals {
		switch {
		case s == vm.KillSignal, s == unix.SIGINT && interrupted:
			report(message{Text: "killing the guest"})
			_ = v.Kill() // of a guest that has ended
			continue
		case s == unix.SIGINT:
			interrupted = true
			report(message{Text: "asked the guest to power down; once more to kill it"})
		default:
			report(message{Text: "asked the guest to power down"})
		}
		v.Powerdown()
	}
}

// message is what a supervisor tells whoever started it. On a pipe it is a line of JSON.
type message struct {
	Step   string        `json:"step,omitempty"`
	Result string        `json:"result,omitempty"`
	Took   time.Duration `json:"took,omitempty"` // nanoseconds
	Done   bool          `json:"done,omitempty"` // of the step
	Text   string        `json:"text,omitempty"`
	Name   string        `json:"name,omitempty"`
	Notes  []string      `json:"notes,omitempty"`
	Ready  bool          `json:"ready,omitempty"` // QEMU runs
	Error  string        `json:"error,omitempty"`
	Code   int           `json:"code,omitempty"` // exit code of the error
}

// printProgress prints messages for people, or as JSON lines, on standard error. A step that takes long is announced.
func (a *app) printProgress() func(message) {
	const long = 2 * time.Second
	var mu sync.Mutex
	waiting := map[string]*time.Timer{}
	return func(m message) {
		mu.Lock()
		defer mu.Unlock()
		if a.json {
			_ = json.NewEncoder(a.err).Encode(m)
			return
		}
		switch {
		case m.Step != "" && !m.Done:
			waiting[m.Step] = time.AfterFunc(long, func() {
				mu.Lock()
				defer mu.Unlock()
				fmt.Fprintf(a.err, "  %-14s ...\n", m.Step)
			})
		case m.Step != "":
			waiting[m.Step].Stop()
			fmt.Fprintf(a.err, "  %-14s %5d ms  %s\n", m.Step, m.Took.Milliseconds(), m.Result)
		case m.Text != "":
			fmt.Fprintln(a.err, "virtlet:", m.Text)
		}
		if m.Ready {
			for _, n := range m.Notes {
				fmt.Fprintln(a.err, "note:", n)
			}
		}
	}
}

// runDetached starts a supervisor of its own session for the VM, shows its progress, and returns when QEMU runs.
func (a *app) runDetached(cfg vm.Config) error {
	up, err := detach([]string{"supervise", "--run-dir", a.store.Run, "--data-dir", a.store.Data}, cfg)
	if err != nil {
		return err
	}
	defer up.Close()
	print := a.printProgress()
	for d := json.NewDecoder(up.messages); ; {
		var m message
		if err := d.Decode(&m); err != nil {
			return fmt.Errorf("run VM %s: its supervisor ended without a word (%w): virtlet gc cleans up", cfg.Name, err)
		}
		if m.Error != "" {
			return &supervisorError{m.Error, m.Code}
		}
		print(m)
		if !m.Ready {
			continue
		}
		if a.json {
			return a.printJSON(map[string]string{"name": m.Name})
		}
		_, err := fmt.Fprintln(a.out, m.Name)
		return err
	}
}

// supervisorError is an error of a start that happened in another process.
type supervisorError struct {
	text string
	code int
}

func (e *supervisorError) Error() string { return e.text }

// superviseCmd is the supervisor that runDetached starts: configuration on standard input, messages on standard output.
func (a *app) superviseCmd() *cobra.Command {
	return &cobra.Command{
		Use: "supervise", Short: "Supervise one VM (used by run -d)", Hidden: true, Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			var cfg vm.Config
			if err := json.NewDecoder(os.Stdin).Decode(&cfg); err != nil {
				return fmt.Errorf("read the configuration: %w", err)
			}
			var mu sync.Mutex
			var out io.Writer = os.Stdout
			report := func(m message) {
				mu.Lock()
				defer mu.Unlock()
				_ = json.NewEncoder(out).Encode(m) // whoever started us may have gone
			}
			cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			ready := false
			err := a.supervise(cfg, report, func(v *vm.VM) error {
				ready = true
				report(message{Name: v.Name(), Notes: v.Notes(), Ready: true})
				// From here on nobody listens: standard output and error go to the VM's own log.
				if err := a.store.RedirectLog(v.Name()); err != nil {
					report(message{Text: err.Error()})
				}
				return nil
			})
			if err != nil && !ready {
				report(message{Error: strings.TrimSpace(err.Error()), Code: exitCode(err)})
				os.Exit(exitCode(err))
			}
			return err
		},
	}
}
