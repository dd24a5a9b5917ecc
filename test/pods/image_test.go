package pods

import (
	"testing"

	"github.com/virtlet/virtlet/test/guest"
)

// file is a file of an image, or of a bundle.
type file struct {
	name string
	data []byte
}

// writeImage makes an image with a command, which Kubernetes insists on and no VM runs.
func writeImage(t testing.TB, ref string, files ...file) string {
	t.Helper()
	return writeProgram(t, ref, []string{"vm"}, files...)
}

// writeProgram is writeImage with a command that is run.
func writeProgram(t testing.TB, ref string, command []string, files ...file) string {
	t.Helper()
	all := map[string][]byte{}
	for _, f := range files {
		all[f.name] = f.data
	}
	return guest.WriteImage(t, ref, command, all)
}
