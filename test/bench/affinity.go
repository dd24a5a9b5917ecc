package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// confine lets all threads of a process run on some CPUs only, and so those that they will make.
func confine(pid int, cpus unix.CPUSet) error {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	for before := -1; ; { // until there are no more: a thread may have been made before the one that makes it was pinned
		threads, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		if len(threads) == before {
			return nil
		}
		before = len(threads)
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err == nil {
				err = unix.SchedSetaffinity(id, &cpus)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // that is one that has just ended
				return fmt.Errorf("pin thread %s of process %d: %w", t.Name(), pid, err)
			}
		}
	}
}

// apart gives QEMUs a CPU of their own and this process the others, until undo is called. With one CPU it does nothing.
func apart(qemus []int) (undo func() error, err error) {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getpid(), &all); err != nil {
		return nil, err
	}
	undo = func() error { return confine(os.Getpid(), all) }
	if all.Count() < 2 {
		return undo, nil
	}
	last := len(all)*strconv.IntSize - 1
	for !all.IsSet(last) {
		last--
	}
	theirs, ours := unix.CPUSet{}, all
	theirs.Set(last)
	ours.Clear(last)
	errs := []error{confine(os.Getpid(), ours)}
	for _, pid := range qemus {
		errs = append(errs, confine(pid, theirs))
	}
	return undo, errors.Join(errs...)
}

// cpuTimeOf gives how long the threads of a process have run.
func cpuTimeOf(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED, of the kernel: in nanoseconds (clock_getcpuclockid(3) makes the same number)
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
