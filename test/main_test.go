// Package test holds the tests of the real binary: boots of a real guest, and scripts of what a user types, which are
// in script/*.txtar. A line of those that starts with exec runs a program; the documentation of package testscript has
// the rest of the language, and commands in script_test.go what is added to it.
//
// Every script has a node to itself: a network namespace, a /run and an /opt that are new and empty, and go with it.
// On PATH are
//
//	virtlet ARGUMENTS...          the binary on that node, with $WORK/run and $WORK/data as its directories
//	node PROGRAM ARGUMENTS...     any program on that node, such as ip
//	exits CODE PROGRAM...         a program that must end with this exit code
//	withoutbpf PROGRAM...         a program whose every bpf(2) fails, and that of all that it starts
//
// The network plugins are where virtlet looks by default; without --cni-conf-dir the embedded network is used. Disks:
// $IDLE is a guest that does nothing, not even obey its power button; $ECHO says "ready", echoes what is typed on
// the serial console, and powers off at its power button or at the letter q. After a script, passed or failed, its VMs
// are removed, and it fails if anything is left on its node.
package test

import (
	"fmt"
	"os"
	"testing"

	"github.com/virtlet/virtlet/internal/testnet"
)

func TestMain(m *testing.M) {
	if os.Getenv(withoutBPF) != "" {
		fmt.Fprintln(os.Stderr, becomeWithoutBPF(os.Args[1:]))
		os.Exit(1)
	}
	testnet.Isolate(m)
}
