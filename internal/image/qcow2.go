package image

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/bits"
	"strings"
)

// Numbers of the qcow2 format: docs/interop/qcow2.txt of QEMU, and for the limits block/qcow2.h.
const (
	qcow2Magic = "QFI\xfb"

	headerSizeV2 = 72
	headerSizeV3 = 104

	minClusterBits  = 9
	maxClusterBits  = 21
	maxL1Bytes      = 32 << 20 // QCOW_MAX_L1_SIZE
	maxRefcounts    = 8 << 20  // QCOW_MAX_REFTABLE_SIZE, bytes
	maxSnapshots    = 65536    // QCOW_MAX_SNAPSHOTS
	minSnapshot     = 40       // bytes of a snapshot table entry without its strings
	maxRefcountBits = 6        // refcount_order: 1 << 6 bits
	maxBackingName  = 1023

	entryOffset     = 0x00ff_ffff_ffff_fe00 // of an L1 or L2 entry
	entryCompressed = 1 << 62
	entryZero       = 1 // the cluster reads as zeros, whatever is stored at its offset

	extensionEnd      = 0
	extensionDataFile = 0x44415441
)

// Incompatible feature bits.
const (
	featureDirty = 1 << iota
	featureCorrupt
	featureDataFile
	featureCompression
	featureExtendedL2

	featuresKnown = featureDirty | featureCorrupt | featureDataFile | featureCompression | featureExtendedL2
)

// maxWalk bounds how much of an image's L2 tables is read, in bytes. It covers 256 GiB of data in clusters of 64 KiB.
const maxWalk = 32 << 20

// headerV2 is the header that versions 2 and 3 share, big-endian and without gaps.
type headerV2 struct {
	Magic            [4]byte
	Version          uint32
	BackingOffset    uint64
	BackingSize      uint32
	ClusterBits      uint32
	Size             uint64
	Crypt            uint32
	L1Size           uint32
	L1Offset         uint64
	RefcountOffset   uint64
	RefcountClusters uint32
	Snapshots        uint32
	SnapshotsOffset  uint64
}

// headerV3 is what version 3 adds.
type headerV3 struct {
	Incompatible  uint64
	Compatible    uint64
	AutoClear     uint64
	RefcountOrder uint32
	HeaderLength  uint32
}

type qcow2 struct {
	headerV2
	headerV3
	r    io.ReaderAt
	size uint64 // of the file
}

// checkQCOW2 verifies an image of size bytes and gives the size of its disk. The image may have its dirty bit set (a
// writer with lazy refcounts was killed): the data is sound, and QEMU rebuilds the counts when it opens it for writing.
func checkQCOW2(r io.ReaderAt, size int64) (virtual int64, err error) {
	q := &qcow2{r: r, size: uint64(size)}
	for _, check := range []func() error{q.read, q.features, q.backing, q.geometry, q.tables, q.extensions, q.walk} {
		if err := check(); err != nil {
			return 0, err
		}
	}
	return int64(q.Size), nil
}

// read reads the header and verifies its form.
func (q *qcow2) read() error {
	b, err := readUpTo(q.r, 0, int64(q.size), headerSizeV3)
	if err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	if len(b) < headerSizeV2 {
		return q.truncated("header", headerSizeV2)
	}
	if _, err := binary.Decode(b, binary.BigEndian, &q.headerV2); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	switch q.Version {
	case 2:
		q.HeaderLength, q.RefcountOrder = headerSizeV2, 4
	case 3:
		if len(b) < headerSizeV3 {
			return q.truncated("header", headerSizeV3)
		}
		if _, err := binary.Decode(b[headerSizeV2:], binary.BigEndian, &q.headerV3); err != nil {
			return fmt.Errorf("read header: %w", err)
		}
		if q.HeaderLength < headerSizeV3 || q.HeaderLength%8 != 0 {
			return fmt.Errorf("%w: its header length is %d: make a new one: %s", ErrDamaged, q.HeaderLength, convert)
		}
	default:
		return fmt.Errorf("%w: it is qcow version %d, not 2 or 3: %s", ErrUnsupported, q.Version, convert)
	}
	return nil
}

func (q *qcow2) features() error {
	if unknown := q.Incompatible &^ featuresKnown; unknown != 0 {
		var list []string
		for ; unknown != 0; unknown &= unknown - 1 {
			list = append(list, fmt.Sprint(bits.TrailingZeros64(unknown)))
		}
		return fmt.Errorf("%w: it needs unknown qcow2 features (incompatible bits %s): with the program that made it: %s",
			ErrUnsupported, strings.Join(list, ", "), convert)
	}
	if q.Incompatible&featureCorrupt != 0 {
		return fmt.Errorf("%w: it is marked as corrupt: repair it: qemu-img check -r all FILE", ErrDamaged)
	}
	if q.Crypt != 0 {
		return fmt.Errorf("%w: it is encrypted (method %d): decrypt it: qemu-img convert --object secret,id=s,file=KEYFILE "+
			"--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=IN -O qcow2 OUT", ErrUnsupported, q.Crypt)
	}
	return nil
}

func (q *qcow2) backing() error {
	if q.BackingOffset == 0 && q.BackingSize == 0 {
		return nil
	}
	var name []byte
	if q.BackingOffset < q.size {
		var err error
		if name, err = readUpTo(q.r, int64(q.BackingOffset), int64(q.size), int64(min(q.BackingSize, maxBackingName))); err != nil {
			return fmt.Errorf("read backing file name: %w", err)
		}
	}
	return fmt.Errorf("%w: backing file %s: %s", ErrOtherFile, quote(name), selfContained)
}

const selfContained = "make a self-contained copy where both are: qemu-img convert -O qcow2 IN OUT"

// geometry verifies the numbers that all other checks calculate with.
func (q *qcow2) geometry() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s: copy it again, or make a new one: %s", ErrDamaged, fmt.Sprintf(format, a...), convert)
	}
	if q.ClusterBits < minClusterBits || q.ClusterBits > maxClusterBits {
		return bad("clusters of 2^%d bytes (%d to %d can be)", q.ClusterBits, minClusterBits, maxClusterBits)
	}
	if uint64(q.HeaderLength) > q.cluster() {
		return bad("its header of %d bytes is longer than a cluster", q.HeaderLength)
	}
	if q.RefcountOrder > maxRefcountBits {
		return bad("refcounts of 2^%d bits", q.RefcountOrder)
	}
	if q.Size == 0 || q.Size > math.MaxInt64 || q.Size%sector != 0 {
		return bad("a disk of %d bytes (a positive multiple of %d can be)", q.Size, sector)
	}
	if uint64(q.L1Size)*8 > maxL1Bytes {
		return bad("an L1 table of %d entries (at most %d can be)", q.L1Size, maxL1Bytes/8)
	}
	perEntry := q.cluster() * (q.cluster() / q.entrySize())
	if need := (q.Size-1)/perEntry + 1; uint64(q.L1Size) < need {
		return bad("an L1 table of %d entries, where a disk of %d bytes needs %d", q.L1Size, q.Size, need)
	}
	if q.RefcountClusters == 0 || uint64(q.RefcountClusters)*q.cluster() > maxRefcounts {
		return bad("a refcount table of %d clusters", q.RefcountClusters)
	}
	if q.Snapshots > maxSnapshots {
		return bad("%d snapshots (at most %d can be)", q.Snapshots, maxSnapshots)
	}
	return nil
}

// tables verifies that the tables which the header names lie in the file.
func (q *qcow2) tables() error {
	if err := q.inside("L1 table", q.L1Offset, uint64(q.L1Size)*8); err != nil {
		return err
	}
	if err := q.inside("refcount table", q.RefcountOffset, uint64(q.RefcountClusters)*q.cluster()); err != nil {
		return err
	}
	if q.Snapshots == 0 {
		return nil
	}
	return q.inside("snapshot table", q.SnapshotsOffset, uint64(q.Snapshots)*minSnapshot)
}

// extensions looks for an external data file in the header extensions, which end with the first cluster.
func (q *qcow2) extensions() error {
	b, err := readUpTo(q.r, 0, int64(q.size), int64(q.cluster()))
	if err != nil {
		return fmt.Errorf("read header extensions: %w", err)
	}
	for b = b[min(int(q.HeaderLength), len(b)):]; len(b) >= 8; {
		kind, n := binary.BigEndian.Uint32(b), uint64(binary.BigEndian.Uint32(b[4:]))
		b = b[8:]
		if kind == extensionEnd {
			break
		}
		if n > uint64(len(b)) {
			return fmt.Errorf("%w: header extension %#x of %d bytes leaves the first cluster: copy it again, or make a new one: %s",
				ErrDamaged, kind, n, convert)
		}
		if kind == extensionDataFile {
			return fmt.Errorf("%w: data file %s: %s", ErrOtherFile, quote(b[:n]), selfContained)
		}
		b = b[min((n+7)&^7, uint64(len(b))):] // padded to a multiple of 8
	}
	if q.Incompatible&featureDataFile != 0 {
		return fmt.Errorf("%w: a data file that the header does not name: %s", ErrOtherFile, selfContained)
	}
	return nil
}

// walk verifies that what the L1 and L2 tables point to is in the file. QEMU itself gives zeros for what is not.
func (q *qcow2) walk() error {
	const chunk = 64 << 10
	left := int64(q.L1Size) * 8
	budget := int64(maxWalk)
	l1, l2 := make([]byte, min(left, chunk)), make([]byte, q.cluster())
	for at := int64(q.L1Offset); left > 0; {
		part := l1[:min(left, chunk)]
		if _, err := q.r.ReadAt(part, at); err != nil && err != io.EOF {
			return fmt.Errorf("read L1 table: %w", err)
		}
		for i := 0; i < len(part); i += 8 {
			table := binary.BigEndian.Uint64(part[i:]) & entryOffset
			if table == 0 {
				continue
			}
			if err := q.inside("L2 table", table, q.cluster()); err != nil {
				return err
			}
			if budget -= int64(len(l2)); budget < 0 {
				continue
			}
			if _, err := q.r.ReadAt(l2, int64(table)); err != nil && err != io.EOF {
				return fmt.Errorf("read L2 table: %w", err)
			}
			if err := q.data(l2); err != nil {
				return err
			}
		}
		at, left = at+int64(len(part)), left-int64(len(part))
	}
	return nil
}

// data verifies that the clusters of an L2 table begin inside the file. The last one may end behind it.
func (q *qcow2) data(l2 []byte) error {
	// A compressed cluster's offset has fewer bits the larger clusters are: the rest is its length.
	compressed := uint64(1)<<(62-(q.ClusterBits-8)) - 1
	for step := int(q.entrySize()); len(l2) > 0; l2 = l2[step:] {
		e := binary.BigEndian.Uint64(l2)
		at, used := e&entryOffset, e&entryZero == 0
		switch {
		case e&entryCompressed != 0:
			at, used = e&compressed, true
		case q.Incompatible&featureExtendedL2 != 0:
			used = binary.BigEndian.Uint32(l2[12:]) != 0 // the allocated subclusters
		}
		if used && at >= q.size {
			return q.truncated("data", at+1)
		}
	}
	return nil
}

func (q *qcow2) cluster() uint64 { return 1 << q.ClusterBits }

// entrySize gives the bytes of an L2 entry.
func (q *qcow2) entrySize() uint64 {
	if q.Incompatible&featureExtendedL2 != 0 {
		return 16
	}
	return 8
}

// inside says what is wrong with a table of n bytes at offset off.
func (q *qcow2) inside(what string, off, n uint64) error {
	if off == 0 || off%q.cluster() != 0 {
		return fmt.Errorf("%w: its %s is at byte %d, where no cluster begins: copy it again, or repair it: qemu-img check -r all FILE",
			ErrDamaged, what, off)
	}
	if off > q.size || n > q.size-off {
		return q.truncated(what, max(off, off+n))
	}
	return nil
}

func (q *qcow2) truncated(what string, end uint64) error {
	return fmt.Errorf("%w: its %s reaches to byte %d at least, but the file has %d: copy or download it again", ErrTruncated, what, end, q.size)
}

// quote makes a name that an image gives fit for an error.
func quote(name []byte) string {
	const longest = 100
	if len(name) > longest {
		return fmt.Sprintf("%q...", name[:longest])
	}
	return fmt.Sprintf("%q", name)
}
