package cloudinit

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Volumes are files of the user's for the guest, such as the ConfigMaps and Secrets of a pod: an ISO 9660 volume whose names,
// modes and owners are in the Rock Ridge extension (IEEE P1282, RRIP 1.10, over SUSP 1.10), which every Linux reads.

// File is a file or, by its mode, a directory of a volume.
type File struct {
	Path     string // from the volume's root, clean, without a slash at the start
	Mode     fs.FileMode
	UID, GID int
	Data     []byte
}

// VolumesLabel is the label of the volume, and the disk's serial number: a guest finds it by either.
const VolumesLabel = "virtlet-volumes"

// maxName is the longest name that fits, with all else, into a directory's record of 255 bytes. It is more than Kubernetes
// makes of the keys of ConfigMaps (DNS subdomains and file names) in practice.
const maxName = 160

// node is a directory or file while the volume is made.
type node struct {
	File
	name     string
	children []*node
	parent   *node
	number   int // of a directory in the path table, from 1
	sector   int
	size     int // bytes
}

func (n *node) dir() bool { return n.Mode.IsDir() }

// Volumes gives the ISO 9660 volume with files. Directories that are not named are made, for everybody to read. The same
// files give the same bytes.
func Volumes(files []File) ([]byte, error) {
	root, err := tree(files)
	if err != nil {
		return nil, fmt.Errorf("make a disk of volumes: %w", err)
	}
	dirs := []*node{root} // by levels, as the path table has them (6.9.1)
	var data []*node
	for i := 0; i < len(dirs); i++ {
		d := dirs[i]
		d.number = i + 1
		slices.SortFunc(d.children, func(a, b *node) int { return strings.Compare(a.name, b.name) })
		for _, c := range d.children {
			if c.dir() {
				dirs = append(dirs, c)
			} else {
				data = append(data, c)
			}
		}
	}
	l := layout{pathsLE: sectorPathsLE, paths: len(paths(binary.LittleEndian, dirs))}
	l.pathsBE = l.pathsLE + sectors(l.paths)
	at := l.pathsBE + sectors(l.paths)
	for _, d := range dirs {
		d.sector, d.size = at, len(d.records()) // whose length does not depend on what is not known yet
		at += sectors(d.size)
	}
	for _, f := range data {
		f.sector, f.size = at, len(f.Data)
		at += sectors(f.size)
	}
	l.root, l.rootSize, l.sectors = root.sector, root.size, max(at, sectorFiles+1)
	out := make([]byte, 0, l.sectors*sectorSize)
	add := func(b []byte) { out = append(out, pad(b)...) }
	out = append(out, make([]byte, sectorDescriptor*sectorSize)...)
	add(primary(VolumesLabel, l))
	add(descriptor(typeTerminator))
	add(paths(binary.LittleEndian, dirs))
	add(paths(binary.BigEndian, dirs))
	for _, d := range dirs {
		add(d.records())
	}
	for _, f := range data {
		add(f.Data)
	}
	return append(out, make([]byte, l.sectors*sectorSize-len(out))...), nil
}

func sectors(bytes int) int { return (bytes + sectorSize - 1) / sectorSize }

// tree makes nodes of the files.
func tree(files []File) (*node, error) {
	root := &node{File: File{Mode: fs.ModeDir | 0o755}}
	root.parent = root
	known := map[string]*node{".": root}
	var find func(p string) (*node, error)
	find = func(p string) (*node, error) {
		if n := known[p]; n != nil {
			return n, nil
		}
		parent, err := find(path.Dir(p))
		if err != nil {
			return nil, err
		}
		n := &node{File: File{Path: p, Mode: fs.ModeDir | 0o755}, name: path.Base(p), parent: parent}
		if !parent.dir() {
			return nil, fmt.Errorf("%s is in %s, which is a file", p, parent.Path)
		}
		if len(n.name) > maxName {
			return nil, fmt.Errorf("%s: a name of more than %d bytes", p, maxName)
		}
		parent.children = append(parent.children, n)
		known[p] = n
		return n, nil
	}
	for _, f := range slices.SortedStableFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Path, b.Path) }) {
		if !fs.ValidPath(f.Path) || !f.Mode.IsDir() && !f.Mode.IsRegular() || f.Path == "." && !f.Mode.IsDir() {
			return nil, fmt.Errorf("%q (%v): only files and directories have a place in it", f.Path, f.Mode)
		}
		n, err := find(f.Path)
		if err != nil {
			return nil, err
		}
		if len(n.children) > 0 && !f.Mode.IsDir() || !n.dir() {
			return nil, fmt.Errorf("%s is there twice", f.Path)
		}
		n.File = f
	}
	return root, nil
}

// records gives a directory's records (9.1): of itself, of its parent, and of what is in it. None crosses sectors (6.8.1.1).
func (n *node) records() []byte {
	var b []byte
	put := func(id string, of *node, flags byte, more []byte) {
		r := append(record(id, of.sector, of.size, flags), more...)
		r[0] = byte(len(r)) // even, as both parts are
		if room := sectorSize - len(b)%sectorSize; len(r) > room {
			b = append(b, make([]byte, room)...)
		}
		b = append(b, r...)
	}
	self := n.attributes()
	if n.parent == n {
		// SP says that there are extensions (SUSP, 5.3), ER which (5.5).
		const rockRidge = "RRIP_1991A"
		self = slices.Concat([]byte{'S', 'P', 7, 1, 0xbe, 0xef, 0}, self,
			[]byte{'E', 'R', byte(8 + len(rockRidge)), 1, byte(len(rockRidge)), 0, 0, 1}, []byte(rockRidge))
	}
	put(selfID, n, flagDirectory, even(self))
	put(parentID, n.parent, flagDirectory, n.parent.attributes())
	for i, c := range n.children {
		id, flags := fmt.Sprintf("F%07d.%s", i, version), byte(0)
		if c.dir() {
			id, flags = fmt.Sprintf("F%07d", i), flagDirectory
		}
		name := append([]byte{'N', 'M', byte(5 + len(c.name)), 1, 0}, c.name...) // RRIP, 4.1.4
		put(id, c, flags, even(append(c.attributes(), name...)))
	}
	return append(b, make([]byte, (sectorSize-len(b)%sectorSize)%sectorSize)...)
}

func even(b []byte) []byte { return append(b, make([]byte, len(b)%2)...) }

// attributes gives mode, links and owners (RRIP, 4.1.1).
func (n *node) attributes() []byte {
	const dir, file = 0o040000, 0o100000 // POSIX, <sys/stat.h>
	kind, links := file, 1
	if n.dir() {
		kind, links = dir, 2
		for _, c := range n.children {
			if c.dir() {
				links++
			}
		}
	}
	b := []byte{'P', 'X', 36, 1}
	for _, v := range []int{kind | int(n.Mode.Perm()), links, n.UID, n.GID} {
		b = both32(b, v)
	}
	return b
}

// paths gives the path table (6.9, 9.4), by the names that ISO 9660 knows.
func paths(order binary.AppendByteOrder, dirs []*node) (b []byte) {
	for _, d := range dirs {
		id := selfID
		if d.parent != d {
			id = fmt.Sprintf("F%07d", slices.Index(d.parent.children, d))
		}
		b = append(b, byte(len(id)), 0)
		b = order.AppendUint32(b, uint32(d.sector))
		b = order.AppendUint16(b, uint16(d.parent.number))
		b = append(b, id...)
		if len(id)%2 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// mountHook gives a program that cloud-init runs at every boot, before what the user wants to be started: it mounts the disks
// that the guest may write, and of the disk of volumes each part where the guest is to have it. What is mounted already stays.
func (s Seed) mountHook() string {
	var b strings.Builder
	b.WriteString(mountHookStart)
	quoted := func(p string) string { return "'" + strings.ReplaceAll(p, "'", `'\''`) + "'" }
	for _, d := range s.Scratch {
		fmt.Fprintf(&b, "scratch '%s' %s\n", d.Serial, quoted(d.Path))
	}
	if len(s.Mounts) > 0 {
		b.WriteString(mountHookVolumes)
	}
	for _, m := range s.Mounts {
		fmt.Fprintf(&b, "volume %s\n", quoted(m))
	}
	return b.String()
}

// mountHookStart finds disks by udev's names, which end with the serial number on each bus. blkid(8) ends with 2 where it
// finds nothing on a disk; it has other codes for what it does not understand, which stays as it is.
const mountHookStart = `#cloud-boothook
#!/bin/sh
# Written by virtlet: the volumes of the pod.
at=/run/virtlet/volumes

scratch() { # SERIAL PATH
	! mountpoint -q "$2" || return 0
	udevadm settle 2>/dev/null
	for dev in /dev/disk/by-id/*"$1"; do :; done
	[ -b "$dev" ] || { echo "virtlet: no disk has the serial number $1" >&2; return; }
	new=
	blkid -p "$dev" >/dev/null
	if [ $? = 2 ]; then
		mkfs.ext4 -q "$dev" || return
		new=yes
	fi
	mkdir -p "$2" && mount -o nosuid,nodev "$dev" "$2" || return
	[ -z "$new" ] || chmod 0777 "$2"
}

volume() { # PATH
	! mountpoint -q "$1" || return 0
	if [ -d "$at$1" ]; then
		mkdir -p "$1"
	else
		mkdir -p "$(dirname "$1")" && [ -e "$1" ] || : >"$1"
	fi
	mount --bind "$at$1" "$1"
}

`

const mountHookVolumes = `mkdir -p -m 0755 "$at"
mountpoint -q "$at" || mount -t iso9660 -o ro,nosuid,nodev LABEL=` + VolumesLabel + ` "$at" || exit 1
`
