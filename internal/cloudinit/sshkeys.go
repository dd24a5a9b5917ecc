package cloudinit

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxKeys bounds a file of SSH keys, in bytes.
const maxKeys = 64 << 10

// keyTypes are the public keys that sshd(8) knows in authorized_keys. DSA is left out: OpenSSH 7.0 and later refuse it.
var keyTypes = []string{
	"ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
	"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
}

// ParseSSHKeys reads an authorized_keys or .pub file of at most 64 KiB and gives its keys, one a line, with their
// options and comments. Blank and comment lines are left out. A line that is no key, and a file without a key, is an
// error that names the line.
func ParseSSHKeys(b []byte) ([]string, error) {
	if len(b) > maxKeys {
		return nil, fmt.Errorf("SSH keys: %d bytes: use at most %d", len(b), maxKeys)
	}
	var keys []string
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.Trim(line, " \t\r\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := checkKey(line); err != nil {
			return nil, fmt.Errorf("SSH keys: line %d: %w", n, err)
		}
		keys = append(keys, line)
	}
	if len(keys) == 0 {
		return nil, errors.New("SSH keys: there is none in it: give a .pub or authorized_keys file")
	}
	return keys, nil
}

// checkKey says what is wrong with one line of authorized_keys (sshd(8), AUTHORIZED_KEYS FILE FORMAT).
func checkKey(line string) error {
	if strings.Contains(line, "PRIVATE KEY") {
		return errors.New("it is a private key, which stays where it is: give the .pub file") // and never shown
	}
	if !utf8.ValidString(line) {
		return fmt.Errorf("%s is no UTF-8 text: give a .pub or authorized_keys file", quote(line))
	}
	// YAML refuses most of what cannot be printed, and a line end would begin another key.
	if i := strings.IndexFunc(line, func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) }); i >= 0 {
		return fmt.Errorf("%s has a control character at byte %d: take it out", quote(line), i+1)
	}
	kind, rest := cutField(line)
	if !slices.Contains(keyTypes, kind) {
		options := optionsLength(line)
		if options == len(line) {
			return fmt.Errorf("%s is no key: use TYPE BASE64 COMMENT with one of the types %s", quote(line), strings.Join(keyTypes, ", "))
		}
		if kind, rest = cutField(strings.TrimLeft(line[options:], " \t")); !slices.Contains(keyTypes, kind) {
			return fmt.Errorf("%s has no known type: use one of %s", quote(line), strings.Join(keyTypes, ", "))
		}
	}
	encoded, _ := cutField(rest)
	blob, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return fmt.Errorf("%s: bad base64: %w: copy the whole line again", quote(line), err)
	}
	return checkBlob(line, kind, blob)
}

// checkBlob looks into the key itself, which is a list of strings with their lengths before them (RFC 4251, section 5),
// the first one its type (RFC 4253, section 6.6).
func checkBlob(line, kind string, blob []byte) error {
	fields := 0
	for ; len(blob) > 0; fields++ {
		if len(blob) < 4 || uint64(binary.BigEndian.Uint32(blob)) > uint64(len(blob)-4) {
			return fmt.Errorf("%s: the key is cut short: copy the whole line again", quote(line))
		}
		n := binary.BigEndian.Uint32(blob)
		field := blob[4 : 4+n]
		if fields == 0 && string(field) != kind {
			return fmt.Errorf("%s: the key inside is of type %s: copy the whole line again", quote(line), quote(string(field)))
		}
		blob = blob[4+n:]
	}
	if fields < 2 {
		return fmt.Errorf("%s: the key is cut short: copy the whole line again", quote(line))
	}
	return nil
}

func cutField(s string) (field, rest string) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimLeft(s[i:], " \t")
}

// optionsLength gives the length of the options that a line begins with: they end at a blank that is not in quotes.
func optionsLength(line string) int {
	quoted := false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && i+1 < len(line) && line[i+1] == '"':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ' ' || c == '\t'):
			return i
		}
	}
	return len(line)
}
