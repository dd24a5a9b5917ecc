package cloudinit

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Keys by ssh-keygen; nobody has the private halves.
const (
	ed25519Key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIIy6kgb6nlOSHN/ck0rT2Pc/iHJ70TH2vPE9/vD5Op+"
	ecdsaKey   = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBD6DYyLrj3wnkJymVyWr5cL2NfjNWWBF4vb7wwaM" +
		"hfVt3PsOFWcHaZjawULlPB+VljHXXlfM7NXltho68xe2Id4="
	rsaKey = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC5h3y45VMe62iLn3kfNxQpOOHrMZYecjeRm92yvRAz72louft7+pr6v7FWXg6sbXEBlj271WqxVh73" +
		"Hhex4XmorBQMFLFhPTaYjcqVAMLBVbkRw0D2Jbo+CyBRAWnWaIYf2bv7wZtVMzwvoGX8Wi4X3PpXKjRoqWC+8Kj/OS2vn4Srr29aFvf4M6Q75a8pxcVtbz8C8TPi" +
		"M+57GpmZizxFOjBih35ySjoiDvjQIQtox4O5Sq6hzajs/5J6Qjk5feDDnq50fwfU8vA6A9tilQKAV6L47J4ClCCMHIvfS2I6P7wDZVb/kMiFDfxQLPQj5VyVBPpJ" +
		"AggRYbWh4z/a83ST"
)

// key makes a line of any type and any strings.
func key(kind string, fields ...string) string {
	var b []byte
	for _, f := range fields {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
	}
	return kind + " " + base64.StdEncoding.EncodeToString(b)
}

func TestParseSSHKeys(t *testing.T) {
	options := `from="192.0.2.0/24",command="echo \"hello world\" # no comment",no-pty ` + ed25519Key + " with options"
	tests := []struct {
		name, in string
		want     []string
	}{
		{"one", ed25519Key, []string{ed25519Key}},
		{"several", ed25519Key + "\n" + rsaKey + " me\n" + ecdsaKey + "\n", []string{ed25519Key, rsaKey + " me", ecdsaKey}},
		{"comments, blanks, CRLF", "# mine\r\n\r\n \t\r\n  " + ed25519Key + " a b  c \t\r\n  # more", []string{ed25519Key + " a b  c"}},
		{"tabs", strings.ReplaceAll(ed25519Key, " ", "\t \t") + "\tme", []string{strings.ReplaceAll(ed25519Key, " ", "\t \t") + "\tme"}},
		{"options", options, []string{options}},
		{"option without a value", "no-pty " + rsaKey, []string{"no-pty " + rsaKey}},
		{"evil comment", ed25519Key + ` "]}, "runcmd": [reboot] #{{ x }} 日本`, []string{ed25519Key + ` "]}, "runcmd": [reboot] #{{ x }} 日本`}},
		{
			"security key",
			key("sk-ssh-ed25519@openssh.com", "sk-ssh-ed25519@openssh.com", strings.Repeat("k", 32), "ssh:"),
			[]string{key("sk-ssh-ed25519@openssh.com", "sk-ssh-ed25519@openssh.com", strings.Repeat("k", 32), "ssh:")},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSSHKeys([]byte(tt.in))
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v\nwant %q", got, err, tt.want)
			}
		})
	}
}

func TestParseSSHKeysRefuses(t *testing.T) {
	tests := []struct{ name, in, text string }{
		{"nothing", "", "there is none in it"},
		{"comments only", "# a\n\n", "there is none in it"},
		{"too large", strings.Repeat("#", maxKeys+1), "65537 bytes"},
		{"text", "hello", `line 1: "hello" is no key`},
		{"second line", ed25519Key + "\nhello world\n", `line 2: "hello world" has no known type`},
		{"DSA", key("ssh-dss", "ssh-dss", "p", "q"), "no known type"},
		{"type alone", "ssh-ed25519", "cut short"},
		{"private key", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n", "line 1: it is a private key"},
		{"known_hosts", "192.0.2.1 hello " + ed25519Key, "no known type"},
		{"bad base64", "ssh-ed25519 AAAA!", "bad base64"},
		{"cut base64", ed25519Key[:len(ed25519Key)-1], "bad base64"},
		{"cut key", ed25519Key[:len(ed25519Key)-4], "cut short"},
		{"cut RSA key", rsaKey[:len(rsaKey)-40], "cut short"},
		{"another type inside", strings.Replace(ed25519Key, "ssh-ed25519", "ssh-rsa", 1), `of type "ssh-ed25519"`},
		{"type only inside", key("ssh-rsa", "ssh-rsa"), "cut short"},
		{"length of 4 GiB", "ssh-rsa " + base64.StdEncoding.EncodeToString([]byte("\xff\xff\xff\xffssh-rsa")), "cut short"},
		{"length cut", "ssh-rsa " + base64.StdEncoding.EncodeToString([]byte("\x00\x00")), "cut short"},
		{"control type inside", key("ssh-rsa", "\x1b[31m\n", "x"), `of type "\x1b[31m"`},
		{"open quote", `command="x ` + ed25519Key, "is no key"},
		{"escape", ed25519Key + " \x1b[31mred", "control character at byte"},
		{"NUL", ed25519Key + " a\x00b", "control character"},
		{"CR inside", ed25519Key + " a\r" + rsaKey, "control character"},
		{"DEL", ed25519Key + " a\x7f", "control character"},
		{"line separator", ed25519Key + " a\u2028b", "control character"},
		{"next line", ed25519Key + " a\u0085b", "control character"},
		{"byte order mark", "\ufeff" + ed25519Key, "control character at byte 1"},
		{"Latin 1", ed25519Key + " M\xfcller", "no UTF-8"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSSHKeys([]byte(tt.in))
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %q, %v, want %q", got, err, tt.text)
			}
			if strings.ContainsAny(err.Error(), "\x1b\x00\r\n") || strings.Contains(err.Error(), "b3BlbnNzaC1r") || len(err.Error()) > 500 {
				t.Errorf("bad message %q", err)
			}
		})
	}
}

// Every kind that ssh-keygen makes is taken as it is.
func TestSSHKeygen(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"-t", "ed25519"}, {"-t", "rsa", "-b", "2048"}, {"-t", "ecdsa", "-b", "256"}, {"-t", "ecdsa", "-b", "384"}, {"-t", "ecdsa", "-b", "521"}} {
		path := filepath.Join(dir, strings.Join(args, ""))
		out, err := exec.Command("ssh-keygen", append(args, "-q", "-N", "", "-C", "me@host", "-f", path)...).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("needs ssh-keygen")
		}
		if err != nil {
			t.Fatalf("ssh-keygen %q: %v\n%s", args, err, out)
		}
		b, err := os.ReadFile(path + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseSSHKeys(b); err != nil || !slices.Equal(got, []string{strings.TrimSpace(string(b))}) {
			t.Errorf("%q: got %q, %v", args, got, err)
		}
		if b, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSSHKeys(b); err == nil || !strings.Contains(err.Error(), "private key") {
			t.Errorf("%q: the private half: %v", args, err)
		}
	}
}

func FuzzParseSSHKeys(f *testing.F) {
	for _, s := range []string{ed25519Key, "no-pty " + rsaKey + " me", `command="a \" b" ` + ecdsaKey, "# x\n\n" + ed25519Key} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := ParseSSHKeys(b)
		if err != nil {
			return
		}
		// What is accepted goes through a seed as it is.
		if _, err := (Seed{Kind: NoCloud, InstanceID: "i", Hostname: "h", SSHKeys: keys}).Files(); err != nil {
			t.Fatalf("%q: %v", keys, err)
		}
		again, err := ParseSSHKeys([]byte(strings.Join(keys, "\n")))
		if err != nil || !slices.Equal(again, keys) {
			t.Fatalf("%q read again: %q, %v", keys, again, err)
		}
	})
}
