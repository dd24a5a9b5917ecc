package testnet

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ChecksumsOff is `ethtool -K link tx off` in the namespace of the calling thread: the link leaves no checksum to hardware.
func ChecksumsOff(link string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_STXCSUM} // struct ethtool_value
	req := struct {                                                // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(req.name[:unix.IFNAMSIZ-1], link)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("tx-checksumming of %s off: %w", link, errno)
	}
	return nil
}
