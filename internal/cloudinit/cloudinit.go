// Package cloudinit makes the seed that a guest's cloud-init takes its identity and its network configuration from: a
// small ISO 9660 volume, which is a NoCloud data source or a ConfigDrive.
//
// A [Seed] is plain data. [Seed.Files] gives what the guest will read and [Seed.WriteISO] the volume; both only
// calculate, the caller owns the writer. The user's text reaches the guest byte by byte as it was given. Everything of
// ours is in a file of its own and written as JSON, which cloud-init reads as YAML, so that no name and no key can
// become another setting. [InUserData] is the exception to both: there a boot hook of ours is put beside the user's text.
//
// [Volumes] makes a volume of another kind: files of the user's, which a seed can have mounted.
package cloudinit

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strings"
)

// Kind says which data source a seed is.
type Kind string

// The kinds: https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html and configdrive.html.
const (
	NoCloud     Kind = "nocloud"
	ConfigDrive Kind = "configdrive"
)

// Labels of the volumes, which cloud-init finds them by.
var labels = map[Kind]string{NoCloud: "cidata", ConfigDrive: "config-2"}

// Seed is a data source of cloud-init.
type Seed struct {
	Kind       Kind
	InstanceID string   // of the guest's installation: with a new one cloud-init runs again
	Hostname   string   // RFC 1123; the first label is the host's name
	SSHKeys    []string // authorized_keys lines for the image's default user
	UserData   []byte   // as the user gave it; nil: an empty cloud-config
	Network    Network  // made by NewNetwork; the zero value: none

	// EveryBoot makes cloud-init configure the network at every boot, and not only at the first of an installation: for
	// disks that outlive a VM, whose next boot has other addresses. It needs one boot with it to take effect.
	EveryBoot bool

	// Mounts are the paths of the guest at which it finds, at every boot, what a disk of [Volumes] has at the same paths.
	Mounts []string
	// Scratch are disks that are mounted at every boot. One that has nothing gets a file system first.
	Scratch []Scratch
}

// Scratch is a disk that the guest finds by its serial number, of letters, digits and dashes, and where it mounts that.
type Scratch struct{ Serial, Path string }

// metaData is NoCloud's meta-data.
type metaData struct {
	InstanceID string   `json:"instance-id"`
	Hostname   string   `json:"local-hostname"`
	PublicKeys []string `json:"public-keys,omitempty"`
}

// driveData is ConfigDrive's meta_data.json, in OpenStack's words.
type driveData struct {
	UUID       string            `json:"uuid"` // any text, to cloud-init
	Hostname   string            `json:"hostname"`
	Name       string            `json:"name"`
	PublicKeys map[string]string `json:"public_keys,omitempty"`
}

// emptyUserData is a cloud-config that changes nothing. Without the braces cloud-init warns of an empty document.
const emptyUserData = "#cloud-config\n{}\n"

// everyBoot is vendor-data, which stays apart from user-data of any kind and gives way to it: a cloud-config of the user
// with a list of his own here wins.
const everyBoot = "#cloud-config\n" + `{"updates": {"network": {"when": ["boot-new-instance", "boot"]}}}` + "\n"

// vendorData is what the guest is told beside the user's data, nil for nothing: it stays apart from that.
func (s Seed) vendorData() []byte {
	switch hooks := len(s.Mounts) + len(s.Scratch); {
	case hooks == 0 && !s.EveryBoot:
		return nil
	case hooks == 0:
		return []byte(everyBoot)
	}
	type part struct {
		Type    string `json:"type"`
		Content string `json:"content"`
	}
	parts := []part{{"text/cloud-boothook", s.mountHook()}}
	if s.EveryBoot {
		parts = append(parts, part{"text/cloud-config", everyBoot})
	}
	return append([]byte("#cloud-config-archive\n"), indent(parts)...)
}

// Files gives the seed's files by their paths in the volume. An error says which part of the seed cannot be used.
func (s Seed) Files() (map[string][]byte, error) {
	if err := CheckInstanceID(s.InstanceID); err != nil {
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
	if s.Network.version == InUserData {
		var err error
		if user, err = withBootHook(s.Network.bootHook(), user); err != nil {
			return nil, err
		}
	}
	switch s.Kind {
	case NoCloud:
		return s.noCloud(user), nil
	case ConfigDrive:
		if s.Network.version == V2 {
			return nil, fmt.Errorf("a ConfigDrive carries network_data.json alone, which cannot say what version 2 can: use a NoCloud seed for that")
		}
		return s.configDrive(user), nil
	}
	return nil, fmt.Errorf("seed %q: use %s or %s", s.Kind, NoCloud, ConfigDrive)
}

func (s Seed) noCloud(user []byte) map[string][]byte {
	files := map[string][]byte{
		"meta-data": indent(metaData{InstanceID: s.InstanceID, Hostname: s.Hostname, PublicKeys: s.SSHKeys}),
		"user-data": user,
	}
	switch s.Network.version {
	case V1:
		files["network-config"] = indent(s.Network.v1())
	case V2:
		files["network-config"] = indent(s.Network.v2())
	}
	if vendor := s.vendorData(); vendor != nil {
		files["vendor-data"] = vendor
	}
	return files
}

func (s Seed) configDrive(user []byte) map[string][]byte {
	meta := driveData{UUID: s.InstanceID, Hostname: s.Hostname, Name: s.Hostname, PublicKeys: map[string]string{}}
	for i, key := range s.SSHKeys {
		meta.PublicKeys[fmt.Sprintf("key%d", i)] = key
	}
	const dir = "openstack/latest/"
	files := map[string][]byte{dir + "meta_data.json": indent(meta), dir + "user_data": user}
	if s.Network.version == V1 {
		files[dir+"network_data.json"] = indent(s.Network.networkData())
	}
	if vendor := s.vendorData(); vendor != nil {
		files[dir+"vendor_data.json"] = indent(map[string]string{"cloud-init": string(vendor)})
	}
	return files
}

// indent gives v as JSON, one setting a line.
func indent(v any) []byte {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		panic("cloudinit: marshal: " + err.Error()) // texts, numbers and booleans: cannot fail
	}
	return append(b, '\n')
}

// WriteISO writes the ISO 9660 volume to w. The same Seed gives the same bytes.
func (s Seed) WriteISO(w io.Writer) error {
	files, err := s.Files()
	if err != nil {
		return fmt.Errorf("make cloud-init seed: %w", err)
	}
	b, err := volume(labels[s.Kind], files)
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

// CheckInstanceID says what is wrong with an instance ID.
func CheckInstanceID(id string) error {
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
