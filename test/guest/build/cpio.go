package main

import (
	"fmt"
	"io"
	"io/fs"
)

// archive writes an initramfs: a cpio archive in the format "newc" (Linux, Documentation/driver-api/early-userspace/
// buffer-format.rst). The same files give the same bytes: no times, no owners but root.
type archive struct {
	w     io.Writer
	inode int
	size  int
	err   error
}

// File types of the mode field (POSIX, <sys/stat.h>).
const (
	typeDir     = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

// dir, file and symlink add an entry; a directory comes before what is in it. The first error is kept for close.
func (a *archive) dir(name string) { a.entry(name, typeDir|0o755, nil) }

func (a *archive) file(name string, perm fs.FileMode, b []byte) { a.entry(name, typeFile|int(perm), b) }

func (a *archive) symlink(name, target string) { a.entry(name, typeSymlink|0o777, []byte(target)) }

// close ends the archive and gives the first error of all.
func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, nil)
	return a.err
}

func (a *archive) entry(name string, mode int, data []byte) {
	a.inode++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
	a.write([]byte(fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)))
	a.write(data)
}

// write writes and pads to four bytes, as both the header with the name and the contents are.
func (a *archive) write(b []byte) {
	if a.err != nil {
		return
	}
	b = append(b, make([]byte, -(a.size+len(b))&3)...)
	n, err := a.w.Write(b)
	a.size, a.err = a.size+n, err
}
