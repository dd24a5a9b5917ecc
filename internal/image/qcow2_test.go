package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
)

const (
	testCluster = 64 << 10
	testDisk    = 1 << 30
)

// Where the parts of the image that build makes are.
const (
	atRefcountTable = 1 * testCluster
	atL1            = 2 * testCluster
	atL2            = 3 * testCluster
	atData          = 4 * testCluster
	atEnd           = 5 * testCluster
)

// edit changes one part of an image.
type edit func(b []byte)

func put32(at int, v uint32) edit { return func(b []byte) { binary.BigEndian.PutUint32(b[at:], v) } }

func put64(at int, v uint64) edit { return func(b []byte) { binary.BigEndian.PutUint64(b[at:], v) } }

func put(at int, s string) edit { return func(b []byte) { copy(b[at:], s) } }

// build makes a version 3 image of 1 GiB with one allocated cluster, byte by byte.
func build(edits ...edit) []byte {
	b := make([]byte, atEnd)
	for _, e := range append([]edit{
		put(0, qcow2Magic),
		put32(4, 3),
		put32(20, 16), // cluster bits
		put64(24, testDisk),
		put32(36, 2), // L1 entries: 512 MiB each
		put64(40, atL1),
		put64(48, atRefcountTable),
		put32(56, 1),
		put32(96, 4), // refcount order
		put32(100, headerSizeV3),
		put64(atL1, 1<<63|atL2), // bit 63: refcount is one
		put64(atL2, 1<<63|atData),
	}, edits...) {
		e(b)
	}
	return b
}

func v2(b []byte) {
	put32(4, 2)(b)
	clear(b[headerSizeV2:headerSizeV3])
}

func TestQCOW2Accepts(t *testing.T) {
	tests := map[string][]byte{
		"version 3":                      build(),
		"version 2":                      build(v2),
		"dirty":                          build(put64(72, featureDirty)),
		"zstd":                           build(put64(72, featureCompression), put32(100, 112), put(104, "\x01")),
		"unknown compatible feature":     build(put64(80, 1<<40), put64(88, 1<<41)),
		"unknown header extension":       build(put32(104, 0x12345678), put32(108, 5), put32(120, extensionEnd)),
		"extensions without an end mark": build(put32(104, 0x12345678), put32(108, testCluster-112)),
		"data file in the data":          build(put32(atData, extensionDataFile), put32(atData+4, 4)),
		"snapshot":                       build(put32(60, 1), put64(64, atData)),
		"unused L2 entries":              build(put64(atL2, 0)),
		"zero cluster behind the end":    build(put64(atL2, 1<<63|atEnd|entryZero)),
		"last cluster is cut":            build()[:atData+1],
		"compressed":                     build(put64(atL2, entryCompressed|atData+5)),
		"extended L2":                    build(put64(72, featureExtendedL2), put32(36, 4), put64(atL2+8, 1)),
		"extended L2, allocated nothing": build(put64(72, featureExtendedL2), put32(36, 4), put64(atL2, 1<<63|atEnd), put64(atL2+8, 1<<32)),
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			f, size, err := check(bytes.NewReader(b), int64(len(b)), "")
			if err != nil || f != QCOW2 || size != testDisk {
				t.Errorf("got %s, %d, %v", f, size, err)
			}
		})
	}
}

func TestQCOW2Refuses(t *testing.T) {
	tests := []struct {
		name string
		b    []byte
		want error
		text string // in the message
	}{
		{"version 1", build(put32(4, 1)), ErrUnsupported, "qcow version 1"},
		{"version 4", build(put32(4, 4)), ErrUnsupported, "qcow version 4"},
		{"short header length", build(put32(100, 72)), ErrDamaged, "header length is 72"},
		{"odd header length", build(put32(100, 109)), ErrDamaged, "header length is 109"},
		{"long header", build(put32(100, 2*testCluster)), ErrDamaged, "longer than a cluster"},
		{"huge header", build(put32(100, 0xffff_fff8)), ErrDamaged, "longer than a cluster"},

		{"backing file", build(put64(8, 200), put32(16, 11), put(200, "/etc/shadow")), ErrOtherFile, `"/etc/shadow": make a self-contained copy`},
		{"backing file, version 2", build(v2, put64(8, 200), put32(16, 11), put(200, "/etc/shadow")), ErrOtherFile, `"/etc/shadow"`},
		{"backing file with control characters", build(put64(8, 200), put32(16, 6), put(200, "\x1b[31m\n")), ErrOtherFile, `"\x1b[31m\n"`},
		{"long backing name", build(put64(8, 200), put32(16, 1<<31), put(200, strings.Repeat("x", 900))), ErrOtherFile, strings.Repeat("x", 100) + `"...`},
		{"backing name outside", build(put64(8, 1<<62), put32(16, 7)), ErrOtherFile, `""`},
		{"backing offset alone", build(put64(8, 200)), ErrOtherFile, "backing"},
		{"backing size alone", build(put32(16, 7)), ErrOtherFile, "backing"},

		{"data file", build(put64(72, featureDataFile), put32(104, extensionDataFile), put32(108, 8), put(112, "/etc/foo")), ErrOtherFile, `data file "/etc/foo"`},
		{"data file without its bit", build(put32(104, extensionDataFile), put32(108, 8), put(112, "/etc/foo")), ErrOtherFile, `"/etc/foo"`},
		{"data file in version 2", build(v2, put32(72, extensionDataFile), put32(76, 8), put(80, "/etc/foo")), ErrOtherFile, `"/etc/foo"`},
		{"data file bit alone", build(put64(72, featureDataFile)), ErrOtherFile, "does not name"},
		{"data file behind another extension", build(put32(104, 7), put32(108, 1), put32(120, extensionDataFile), put32(124, 1), put(128, "x")), ErrOtherFile, `"x"`},
		{"extension leaves the cluster", build(put32(104, 7), put32(108, testCluster)), ErrDamaged, "header extension 0x7"},
		{"extension of 4 GiB", build(put32(104, 7), put32(108, 0xffff_ffff)), ErrDamaged, "header extension 0x7"},

		{"encrypted, AES", build(put32(32, 1)), ErrUnsupported, "encrypted (method 1)"},
		{"encrypted, LUKS", build(put32(32, 2)), ErrUnsupported, "encrypted (method 2)"},
		{"corrupt", build(put64(72, featureCorrupt)), ErrDamaged, "qemu-img check -r all"},
		{"unknown features", build(put64(72, 1<<5|1<<63|featureDirty)), ErrUnsupported, "bits 5, 63)"},

		{"cluster bits 8", build(put32(20, 8)), ErrDamaged, "2^8"},
		{"cluster bits 22", build(put32(20, 22)), ErrDamaged, "2^22"},
		{"cluster bits 2^32-1", build(put32(20, 0xffff_ffff)), ErrDamaged, "2^4294967295"},
		{"refcount order", build(put32(96, 7)), ErrDamaged, "refcounts of 2^7 bits"},
		{"no disk", build(put64(24, 0)), ErrDamaged, "disk of 0 bytes"},
		{"odd disk", build(put64(24, testDisk+1)), ErrDamaged, "multiple of 512"},
		{"negative disk", build(put64(24, 1<<63)), ErrDamaged, "disk of 9223372036854775808"},
		{"disk larger than the L1 table", build(put64(24, testDisk+512)), ErrDamaged, "needs 3"},
		{"largest disk", build(put64(24, 1<<63-512)), ErrDamaged, "needs 17179869184"},
		{"extended L2 needs more entries", build(put64(72, featureExtendedL2)), ErrDamaged, "needs 4"},
		{"L1 table too large", build(put32(36, 4<<20+1)), ErrDamaged, "L1 table of 4194305"},
		{"no refcount table", build(put32(56, 0)), ErrDamaged, "refcount table of 0"},
		{"refcount table too large", build(put32(56, 129)), ErrDamaged, "refcount table of 129"},
		{"too many snapshots", build(put32(60, 65537)), ErrDamaged, "65537 snapshots"},

		{"L1 table unaligned", build(put64(40, atL1+8)), ErrDamaged, "L1 table is at byte 131080"},
		{"L1 table on the header", build(put64(40, 0)), ErrDamaged, "L1 table is at byte 0"},
		{"L1 table outside", build(put64(40, atEnd)), ErrTruncated, "L1 table"},
		{"L1 table at the end of numbers", build(put64(40, 1<<64-testCluster)), ErrTruncated, "L1 table"},
		{"L1 table reaches out", build(put32(36, 4<<20)), ErrTruncated, "L1 table"},
		{"refcount table outside", build(put64(48, atEnd)), ErrTruncated, "refcount table"},
		{"refcount table reaches out", build(put32(56, 5)), ErrTruncated, "refcount table"},
		{"snapshot table outside", build(put32(60, 1), put64(64, atEnd)), ErrTruncated, "snapshot table"},
		{"snapshot table reaches out", build(put32(60, 1639), put64(64, atData)), ErrTruncated, "snapshot table"},
		{"L2 table outside", build(put64(atL1+8, 1<<63|atEnd)), ErrTruncated, "L2 table"},
		{"L2 table unaligned", build(put64(atL1+8, 1<<63|atL2+512)), ErrDamaged, "L2 table"},
		{"data outside", build(put64(atL2+8, 1<<63|atEnd)), ErrTruncated, "data"},
		{"data outside, last entry", build(put64(atL2+testCluster-8, 1<<63|atEnd)), ErrTruncated, "data"},
		{"compressed data outside", build(put64(atL2, entryCompressed|atEnd)), ErrTruncated, "data"},
		{"compressed data with the zero bit", build(put64(atL2, entryCompressed|atEnd+1)), ErrTruncated, "data"},
		{"extended L2, data outside", build(put64(72, featureExtendedL2), put32(36, 4), put64(atL2, 1<<63|atEnd), put64(atL2+8, 1)), ErrTruncated, "data"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := check(bytes.NewReader(tt.b), int64(len(tt.b)), "")
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v\nwant %v with %q", err, tt.want, tt.text)
			}
		})
	}
}

// Every cut but one in the last cluster takes something away that the guest needs.
func TestQCOW2TruncatedAnywhere(t *testing.T) {
	whole := build()
	cuts := []int{4, 5, 71, 72, 103, 104, 111}
	for at := 512; at <= atData; at += 512 {
		cuts = append(cuts, at)
	}
	for _, n := range cuts {
		b := whole[:n:n]
		if _, _, err := check(bytes.NewReader(b), int64(n), ""); !errors.Is(err, ErrTruncated) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
}

// All L1 entries of a small file may name the same L2 table: the work must stay bounded.
func TestQCOW2WalkIsBounded(t *testing.T) {
	const entries = maxL1Bytes / 8
	b := append(build(put32(36, entries), put64(40, atEnd)), make([]byte, maxL1Bytes)...)
	for i := range entries {
		put64(atEnd+8*i, atL2)(b)
	}
	r := &countingReader{r: bytes.NewReader(b)}
	if _, err := checkQCOW2(r, int64(len(b))); err != nil {
		t.Fatal(err)
	}
	if most := int64(maxWalk + maxL1Bytes + 4*testCluster); r.n > most {
		t.Errorf("read %d bytes, want at most %d", r.n, most)
	}
}

type countingReader struct {
	r *bytes.Reader
	n int64
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.r.ReadAt(p, off)
}

func FuzzHeader(f *testing.F) {
	for _, b := range [][]byte{
		build(), build(v2), build(put64(72, featureExtendedL2), put32(36, 4)),
		build(put64(8, 200), put32(16, 11), put(200, "/etc/shadow")),
		build(put32(104, extensionDataFile), put32(108, 8), put(112, "/etc/foo")),
	} {
		f.Add(b[:headerSizeV3+64], uint8(16))
	}
	for _, s := range signatures {
		f.Add(append(make([]byte, max(0, s.offset)), s.magic...), uint8(0))
	}
	f.Fuzz(func(t *testing.T, head []byte, clusters uint8) {
		// A short input stands for a larger, mostly empty file, as a sparse one is.
		b := slices.Concat(head, make([]byte, int(clusters%32)*testCluster))
		format, size, err := check(bytes.NewReader(b), int64(len(b)), "")
		if err != nil {
			return
		}
		if size <= 0 || size%sector != 0 {
			t.Fatalf("a disk of %d bytes", size)
		}
		if format == QCOW2 && binary.BigEndian.Uint64(b[8:]) != 0 {
			t.Fatal("accepted an image with a backing file")
		}
		for _, arch := range []string{"amd64", "arm64"} {
			_ = checkKernel(bytes.NewReader(b), int64(len(b)), arch)
		}
	})
}
