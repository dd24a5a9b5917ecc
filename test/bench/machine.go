package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where the figures are from.
type machine struct {
	CPU    string    `json:"cpu"`
	CPUs   int       `json:"cpus"`
	Memory uint64    `json:"memory"` // bytes
	Kernel string    `json:"kernel"`
	Go     string    `json:"go"`
	Time   time.Time `json:"time"`
	Load   []float64 `json:"load"` // how many others wanted a CPU, before and after the run: see others
	Commit string    `json:"commit,omitempty"`
}

func thisMachine() machine {
	m := machine{CPU: "unknown", CPUs: runtime.NumCPU(), Go: runtime.Version(), Time: time.Now().UTC(), Load: []float64{others()}}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if key, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		m.Memory = s.Totalram * uint64(s.Unit)
	}
	return m
}

// others gives the load average of the last minute: of a quiet machine, before a run, it is near 0.
func others() (load float64) {
	b, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, _ = fmt.Sscan(string(b), &load)
	}
	return load
}

// text is the machine in words.
func (m machine) text() string {
	return fmt.Sprintf("%s, %d CPUs, %.0f GiB of memory, Linux %s, %s, %s. Load average before the run %.2f: on a quiet machine it is near 0.",
		m.CPU, m.CPUs, float64(m.Memory)/(1<<30), m.Kernel, m.Go, m.Time.Format("2006-01-02"), m.Load[0])
}
