package cloudinit

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// The volume is written here and not by a library, as the ones at hand keep the files, which may hold secrets, in a
// temporary directory meanwhile, put the clock into the image, and leave out the path tables, which Windows reads.
//
// Section numbers are those of ECMA-119, 2nd edition, the free text of ISO 9660.

const sectorSize = 2048 // 6.1.2

// Layout of the volume in sectors. The system area before it is empty (6.2.1); the files follow the root directory.
const (
	sectorDescriptor = 16 + iota // primary volume descriptor
	sectorTerminator
	sectorPathsLE // path table with little-endian numbers, and then big-endian
	sectorPathsBE
	sectorRoot // and the other directories, one sector each

	sectorFiles = 24 // and not at once: libarchive (bsdtar) knows no volume that has fewer sectors
)

// Numbers of the format.
const (
	typePrimary    = 1   // 8.4.1
	typeTerminator = 255 // 8.3.1
	flagDirectory  = 2   // 9.1.6

	selfID   = "\x00" // 6.8.2.2: how a directory names itself and its parent
	parentID = "\x01"

	// A file's name has a dot, and ends in a version (7.5.1); no system shows a dot at the end and the version. The name
	// itself is lower-case and has a dash: not the letters that 7.4.1 asks for, but those which Linux, BSD and Windows
	// then show, without an extension (Rock Ridge, Joliet) in the volume.
	version = ";1"

	// timeUnset in a volume descriptor stands for "not specified" (8.4.26.1).
	timeUnset = "0000000000000000\x00"
)

// timeZero is the start of 1970 in a directory record (9.1.5): years since 1900, month, day, time, time zone.
var timeZero = []byte{70, 1, 1, 0, 0, 0, 0}

// directory is one directory of the volume.
type directory struct {
	path   string // "" is the root
	number int    // in the path table, from 1
	parent *directory
	b      []byte
}

func (d *directory) sector() int { return sectorRoot + d.number - 1 }

// directories gives the directories that the files are in, in the order of the path table (6.9.1): those nearer to the
// root first. A directory's first two records are itself and its parent.
func directories(files map[string][]byte) []*directory {
	root := &directory{number: 1}
	root.parent = root
	byPath := map[string]*directory{".": root}
	all := []*directory{root}
	for name := range files {
		for dir := path.Dir(name); byPath[dir] == nil; dir = path.Dir(dir) {
			byPath[dir] = &directory{path: dir}
			all = append(all, byPath[dir])
		}
	}
	slices.SortFunc(all[1:], func(a, b *directory) int {
		return cmp.Or(cmp.Compare(strings.Count(a.path, "/"), strings.Count(b.path, "/")), strings.Compare(a.path, b.path))
	})
	for i, d := range all {
		d.number, d.parent = i+1, byPath[path.Dir(d.path)]
		d.b = slices.Concat(record(selfID, d.sector(), sectorSize, flagDirectory), record(parentID, d.parent.sector(), sectorSize, flagDirectory))
	}
	return all
}

// volume gives the ISO 9660 volume with the files, whose names are paths from its root.
func volume(label string, files map[string][]byte) ([]byte, error) {
	dirs := directories(files)
	if len(dirs) > sectorFiles-sectorRoot {
		return nil, fmt.Errorf("write ISO image: %d directories are too many", len(dirs))
	}
	entries := map[string][]byte{} // by path
	for _, d := range dirs[1:] {
		entries[d.path] = record(path.Base(d.path), d.sector(), sectorSize, flagDirectory)
	}
	var data []byte
	for _, name := range slices.Sorted(maps.Keys(files)) {
		id := path.Base(name)
		if !strings.Contains(id, ".") {
			id += "."
		}
		entries[name] = record(id+version, sectorFiles+len(data)/sectorSize, len(files[name]), 0)
		data = append(data, pad(files[name])...)
	}
	var tree []byte
	for _, d := range dirs {
		for _, name := range slices.Sorted(maps.Keys(entries)) { // 9.3: records are in the order of their names
			if path.Dir(name) == path.Join(".", d.path) {
				d.b = append(d.b, entries[name]...)
			}
		}
		if len(d.b) > sectorSize {
			return nil, fmt.Errorf("write ISO image: directory %q: %d bytes of entries are too many", d.path, len(d.b))
		}
		tree = append(tree, pad(d.b)...)
	}
	tree = append(tree, make([]byte, (sectorFiles-sectorRoot)*sectorSize-len(tree))...)
	return slices.Concat(
		make([]byte, sectorDescriptor*sectorSize),
		pad(primary(label, layout{
			paths: len(pathTable(binary.LittleEndian, dirs)), pathsLE: sectorPathsLE, pathsBE: sectorPathsBE,
			root: sectorRoot, rootSize: sectorSize, sectors: sectorFiles + len(data)/sectorSize,
		})),
		pad(descriptor(typeTerminator)),
		pad(pathTable(binary.LittleEndian, dirs)),
		pad(pathTable(binary.BigEndian, dirs)),
		tree, data,
	), nil
}

// descriptor gives the start that all volume descriptors share (8.1).
func descriptor(kind byte) []byte { return append([]byte{kind}, "CD001\x01"...) }

// layout says where in a volume things are, in sectors; lengths are in bytes.
type layout struct {
	paths            int // length of a path table
	pathsLE, pathsBE int
	root, rootSize   int
	sectors          int // of the volume
}

// primary gives the primary volume descriptor (8.4).
func primary(label string, l layout) []byte {
	b := append(descriptor(typePrimary), 0)
	b = append(b, text("LINUX", 32)...) // system: it may use the system area, which is empty
	b = append(b, text(label, 32)...)
	b = append(b, make([]byte, 8)...)
	b = both32(b, l.sectors)
	b = append(b, make([]byte, 32)...)
	b = both16(b, 1) // volumes in the set
	b = both16(b, 1) // number of this one
	b = both16(b, sectorSize)
	b = both32(b, l.paths)
	b = binary.LittleEndian.AppendUint32(b, uint32(l.pathsLE))
	b = binary.LittleEndian.AppendUint32(b, 0) // no second copy
	b = binary.BigEndian.AppendUint32(b, uint32(l.pathsBE))
	b = binary.BigEndian.AppendUint32(b, 0)
	b = append(b, record(selfID, l.root, l.rootSize, flagDirectory)...)
	b = append(b, text("", 4*128+3*37)...) // volume set, publisher, preparer, application; three files with notices
	for range 4 {                          // created, modified, expires, effective
		b = append(b, timeUnset...)
	}
	return append(b, 1) // version of the file structure; the rest is free for applications
}

// record gives a directory record (9.1).
func record(id string, sector, size int, flags byte) []byte {
	b := []byte{0, 0}
	b = both32(b, sector)
	b = both32(b, size)
	b = append(b, timeZero...)
	b = append(b, flags, 0, 0) // not interleaved
	b = both16(b, 1)           // volume in the set
	b = append(b, byte(len(id)))
	b = append(b, id...)
	if len(b)%2 != 0 {
		b = append(b, 0)
	}
	b[0] = byte(len(b))
	return b
}

// pathTable gives the path table (6.9, 9.4).
func pathTable(order binary.AppendByteOrder, dirs []*directory) (b []byte) {
	for _, d := range dirs {
		id := selfID
		if d.path != "" {
			id = path.Base(d.path)
		}
		b = append(b, byte(len(id)), 0)
		b = order.AppendUint32(b, uint32(d.sector()))
		b = order.AppendUint16(b, uint16(d.parent.number))
		b = append(b, id...)
		if len(id)%2 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// both32 adds a number in both byte orders (7.3.3).
func both32(b []byte, n int) []byte {
	return binary.BigEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, uint32(n)), uint32(n))
}

// both16 adds a number in both byte orders (7.2.3).
func both16(b []byte, n int) []byte {
	return binary.BigEndian.AppendUint16(binary.LittleEndian.AppendUint16(b, uint16(n)), uint16(n))
}

// text fills a field of n bytes with blanks behind s (7.4.3).
func text(s string, n int) []byte { return fmt.Appendf(nil, "%-*s", n, s) }

// pad fills the last sector with zeros.
func pad(b []byte) []byte {
	return append(b[:len(b):len(b)], make([]byte, (sectorSize-len(b)%sectorSize)%sectorSize)...)
}
