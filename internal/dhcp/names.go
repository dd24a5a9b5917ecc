package dhcp

import "strings"

// Limits of domain names (RFC 1035, section 2.3.4). 253 characters of text are 255 bytes on the wire.
const (
	maxLabel = 63
	maxName  = 253
)

// validName says whether s is a name of letters, digits and inner hyphens (RFC 1123, section 2.1), and underscores where
// a domain may have them. Anything else has harmed clients: their scripts put names into files and shell variables.
func validName(s string, underscore bool) bool {
	if len(s) == 0 || len(s) > maxName {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) == 0 || len(label) > maxLabel || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			switch {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-':
			case c == '_' && underscore:
			default:
				return false
			}
		}
	}
	return true
}

func trimDot(s string) string { return strings.TrimSuffix(s, ".") }

// maxPointer is the farthest offset that a compression pointer reaches (RFC 1035, section 4.1.4).
const maxPointer = 0x3fff

// appendNames encodes a search list as RFC 3397 wants it: names one after the other, each closed by a zero byte or by a
// pointer to the same tail in a name before, counted from the start of the option. A pointer never leads to a name
// that has one itself, as some decoders follow only the first. The names are valid ones.
func appendNames(b []byte, names []string) []byte {
	start, tails := len(b), map[string]int{}
	for _, name := range names {
		literal := map[string]int{}
		for name != "" {
			if off, ok := tails[name]; ok {
				b = append(b, 0xc0|byte(off>>8), byte(off))
				clear(literal)
				break
			}
			if off := len(b) - start; off <= maxPointer {
				literal[name] = off
			}
			var label string
			label, name, _ = strings.Cut(name, ".")
			b = append(append(b, byte(len(label))), label...)
		}
		if name == "" {
			b = append(b, 0)
		}
		for tail, off := range literal {
			tails[tail] = off
		}
	}
	return b
}

// appendName encodes one name without compression, as DHCPv6 (RFC 8415, section 10) and router advertisements (RFC 8106,
// section 5.2) want it. The name is a valid one.
func appendName(b []byte, name string) []byte {
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}
