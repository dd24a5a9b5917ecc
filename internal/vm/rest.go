package vm

import (
	"bufio"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// GCPercent makes the collector of a supervisor run early (debug.SetGCPercent): there is one for each VM, it has hardly anything
// to do, and what it does not need others do. By Go's default it lets garbage grow to 4 MB.
const GCPercent = 20

// Rest gives back the memory that starting a VM took and the long wait for its end does not need: there is a process for
// each VM. It takes some milliseconds, and the program is a little slower until it has what it uses again. From then on the
// collector runs early.
func Rest() {
	debug.SetGCPercent(GCPercent)
	runtime.GC() // what pools hold is free after the second collection only
	debug.FreeOSMemory()
	forgetProgram()
}

// forgetProgram unmaps the pages of the program's code and constants. They are the file's, so what is needed again comes from
// the page cache (madvise(2), MADV_DONTNEED on a mapping of a file). What can be written is left alone.
func forgetProgram() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return // there is no need for any of this
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); { // proc(5): from-to permissions offset device inode path
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || strings.Join(fields[5:], " ") != exe || strings.Contains(fields[1], "w") {
			continue
		}
		first, last, _ := strings.Cut(fields[0], "-")
		from, err := strconv.ParseUint(first, 16, 64)
		to, err2 := strconv.ParseUint(last, 16, 64)
		if err == nil && err2 == nil && from < to {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(from), uintptr(to-from), unix.MADV_DONTNEED)
		}
	}
}
