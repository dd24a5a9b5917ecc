package test

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// withoutBPF is in the environment of this binary where it is to become another program, on a machine that refuses bpf(2), as
// container managers and locked-down kernels do.
const withoutBPF = "VIRTLET_TEST_WITHOUT_BPF"

// becomeWithoutBPF has a filter of seccomp answer bpf(2) with EPERM, for the program that this process becomes and all that it
// starts.
func becomeWithoutBPF(args []string) error {
	runtime.LockOSThread() // the filter is the thread's, which is the only one that execve leaves
	if err := os.Unsetenv(withoutBPF); err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	const number = 0 // where struct seccomp_data has the system call's (linux/seccomp.h)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return fmt.Errorf("refuse bpf(2): %w", err)
	}
	return syscall.Exec(path, args, os.Environ())
}
