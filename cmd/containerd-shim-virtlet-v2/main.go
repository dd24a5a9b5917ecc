// Command containerd-shim-virtlet-v2 runs pods of Kubernetes as VMs. containerd and CRI-O start it; it is glue around
// package shim.
package main

import (
	"fmt"
	"os"

	"github.com/virtlet/virtlet/internal/shim"
)

// version is set by the build.
var version = "dev"

func main() {
	if err := shim.Default(version).Run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "virtlet:", err)
		os.Exit(1)
	}
}
