// Package cloudinit makes the seed that a guest's cloud-init takes its identity from: a NoCloud data source, which is a
// small ISO 9660 volume labelled "cidata".
//
// A [Seed] is plain data. [Seed.Files] gives what the guest will read and [Seed.WriteISO] the volume; both only
// calculate, the caller owns the writer. The user's text reaches the guest byte by byte as it was given. Everything of
// ours is in a file of its own and written as JSON, which cloud-init reads as YAML, so that no name and no key can
// become another setting.
package cloudinit

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strings"
)

// Seed is a NoCloud data source: https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html.
type Seed struct {
	InstanceID string   // of the guest's installation: with a new one cloud-init runs again
	Hostname   string   // RFC 1123; the first label is the host's name
	SSHKeys    []string // authorized_keys lines for the image's default user
	UserData   []byte   // as the user gave it; nil: an empty cloud-config
}

// metaData is the file meta-data. The keys are those of cloud-init's NoCloud source.
type metaData struct {
	InstanceID string   `json:"instance-id"`
	Hostname   string   `json:"local-hostname"`
	PublicKeys []string `json:"public-keys,omitempty"`
}

// Names of the files, which cloud-init looks for.
const (
	metaDataFile = "meta-data"
	userDataFile = "user-data"
)

// emptyUserData is a cloud-config that changes nothing. Without the braces cloud-init warns of an empty document.
const emptyUserData = "#cloud-config\n{}\n"

// Files gives the seed's files by name. An error says which part of the seed cannot be used.
func (s Seed) Files() (map[string][]byte, error) {
	if err := checkInstanceID(s.InstanceID); err != nil {
		return nil, err
	}
	if err := CheckHostname(s.Hostname); err != nil {
		return nil, err
	}
	for i, key := range s.SSHKeys {
		if err := checkKey(key); err != nil {
			return nil, fmt.Errorf("SSH key %d: %w", i+1, err)
		}
	}
	user := s.UserData
	if user == nil {
		user = []byte(emptyUserData)
	}
	if err := CheckUserData(user); err != nil {
		return nil, err
	}
	meta, err := json.MarshalIndent(metaData{InstanceID: s.InstanceID, Hostname: s.Hostname, PublicKeys: s.SSHKeys}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", metaDataFile, err)
	}
	return map[string][]byte{metaDataFile: append(meta, '\n'), userDataFile: user}, nil
}

// WriteISO writes the ISO 9660 volume to w. The same Seed gives the same bytes.
func (s Seed) WriteISO(w io.Writer) error {
	files, err := s.Files()
	if err != nil {
		return fmt.Errorf("make cloud-init seed: %w", err)
	}
	b, err := volume(files)
	if err != nil {
		return fmt.Errorf("make cloud-init seed: %w", err)
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("write cloud-init seed: %w", err)
	}
	return nil
}

// instanceIDForm keeps an ID usable as the name of a directory: cloud-init makes /var/lib/cloud/instances/ID.
var instanceIDForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func checkInstanceID(id string) error {
	if !instanceIDForm.MatchString(id) {
		return fmt.Errorf("bad instance ID %s: use at most 128 letters, digits, dots, dashes and underscores, a letter or digit first", quote(id))
	}
	return nil
}

// Limits of host names: RFC 1123, section 2.1, and RFC 1035, section 2.3.4.
const maxHostname = 253

var hostnameForm = regexp.MustCompile(`^` + label + `(\.` + label + `)*$`)

const label = `[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?`

// CheckHostname says what is wrong with a host name: RFC 1123 labels of at most 63 letters, digits and inner dashes,
// joined by dots, at most 253 bytes. The form of an IPv4 address is none.
func CheckHostname(s string) error {
	_, notIP := netip.ParseAddr(s)
	if len(s) > maxHostname || !hostnameForm.MatchString(s) || notIP == nil {
		return fmt.Errorf("bad host name %s: use labels of at most 63 letters, digits and inner dashes, joined by dots, at most %d bytes (RFC 1123)",
			quote(s), maxHostname)
	}
	return nil
}

// quote makes a text from outside fit for an error.
func quote(s string) string {
	const longest = 60
	s, _, _ = strings.Cut(s, "\n")
	if len(s) > longest {
		return fmt.Sprintf("%q...", s[:longest])
	}
	return fmt.Sprintf("%q", s)
}
