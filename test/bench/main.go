// Command bench measures the ways to join a guest's TAP to a pod's link side by side, in one run and on one machine: the
// product's datapaths, those of other projects, and the least that the kernel allows.
//
// It is a command of its own, and no part of virtlet: what it needs beside the product - eBPF programs, other projects'
// settings, root on a quiet machine - is of no use to somebody who runs VMs. `make bench-network` runs it for some minutes
// and writes docs/performance.md. The guest is this program, at the TAP's descriptors, but for the last part, which boots
// one. All is done in namespaces that end with the process.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// options are the flags.
type options struct {
	traffic time.Duration
	json    string
	docs    string
	guest   string
	virtlet string
	plugins string
	only    string
	quiet   bool
}

// does says whether a part is measured.
func (o options) does(part string) bool { return o.only == "" || o.only == part }

// lacks says why a part that boots guests cannot be measured, "" if it can be.
func (o options) lacks(part string) string {
	switch {
	case !o.does(part):
		return "another part alone was measured"
	case o.guest == "":
		return "no guest was named (-guest)"
	case runtime.GOARCH != "amd64":
		return "the test guest is for amd64"
	case part == "supervisor" && (o.virtlet == "" || o.plugins == ""):
		return "no virtlet and no plugins were named (-virtlet, -cni)"
	}
	return ""
}

func run() (int, error) {
	var o options
	flag.DurationVar(&o.traffic, "traffic", 120*time.Second, "how long traffic is measured; everything else takes three minutes more")
	flag.StringVar(&o.json, "json", "", "write all figures to `FILE`")
	flag.StringVar(&o.docs, "docs", "", "write tables and plots into performance.md in `DIR`")
	flag.StringVar(&o.guest, "guest", "", "boot the test guest in `DIR` (make guest)")
	flag.StringVar(&o.virtlet, "virtlet", "", "read the memory of supervisors of the virtlet in `FILE` (make build); needs -guest and -cni")
	flag.StringVar(&o.plugins, "cni", "", "CNI's reference plugins in `DIR` (make plugins)")
	flag.StringVar(&o.only, "only", "", "no more than one part: traffic, attach, scale, supervisor or guest")
	flag.BoolVar(&o.quiet, "quiet", false, "tell nothing of the progress")
	flag.Parse()
	if flag.NArg() > 0 {
		return 2, fmt.Errorf("what is %q? see -help", flag.Args())
	}
	if o.only != "" && o.docs != "" {
		return 2, errors.New("-docs wants all parts: leave -only away")
	}
	if done, code, err := isolate(); done {
		return code, err
	}
	r, err := measure(o)
	if err != nil {
		return 1, err
	}
	fmt.Print(r.text())
	if o.json != "" {
		err = r.writeJSON(o.json)
	}
	if o.docs != "" {
		err = errors.Join(err, r.write(o.docs))
	}
	return 0, err
}

func measure(o options) (*report, error) {
	begin := time.Now()
	say := func(format string, args ...any) {
		if !o.quiet {
			fmt.Fprintf(os.Stderr, "%5.0fs  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
		}
	}
	r := &report{Machine: thisMachine()}
	all, s, err := joins(), samples{}, error(nil)
	if o.does("traffic") {
		if s, r.Rounds, err = measureDatapaths(all, o.traffic, say); err != nil {
			return nil, err
		}
		r.addJoins(all, s)
	}
	if o.does("attach") {
		if r.Attach, err = measureAttach(timedWays(), say); err != nil {
			return nil, err
		}
	}
	if o.does("scale") {
		if r.Scale, err = measureScale(timedWays(), sizes, leastSamples, say); err != nil {
			return nil, err
		}
	}
	if r.NoSupervisor = o.lacks("supervisor"); r.NoSupervisor == "" {
		if r.Supervisor, err = measureSupervisors(o, say); err != nil {
			return nil, err
		}
	}
	if r.NoGuest = o.lacks("guest"); r.NoGuest == "" {
		if r.Guest, err = measureGuests(o.guest, say); err != nil {
			return nil, err
		}
	}
	r.addBars(s)
	r.Machine.Load = append(r.Machine.Load, others())
	return r, nil
}
