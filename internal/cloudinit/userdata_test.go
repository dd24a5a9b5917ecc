package cloudinit

import (
	"bytes"
	"compress/gzip"
	"strings"
	"testing"
)

func pack(t *testing.T, s string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestCheckUserData(t *testing.T) {
	for name, s := range map[string]string{
		"cloud-config":         "#cloud-config\npackages: [nginx]\n",
		"cloud-config alone":   "#cloud-config",
		"CRLF":                 "#cloud-config\r\n{}\r\n",
		"capitals":             "#Cloud-Config\n{}\n",
		"leading blank lines":  "\n \t\n#cloud-config\n{}\n",
		"script":               "#!/bin/sh\nreboot\n",
		"jinja":                "## template: jinja\n#cloud-config\n{}\n",
		"include":              "#include\nhttps://example.org/x\n",
		"include once":         "#include-once\nhttps://example.org/x\n",
		"boothook":             "#cloud-boothook\nx\n",
		"archive":              "#cloud-config-archive\n[]\n",
		"part handler":         "#part-handler\n",
		"MIME":                 "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n--x--\n",
		"MIME, version first":  "mime-version: 1.0\ncontent-type: multipart/mixed; boundary=x\n\n--x--\n",
		"MIME, another header": "From nobody Mon Jan  1 00:00:00 2024\nMIME-Version: 1.0\n",
		"gzip":                 pack(t, "#cloud-config\n{}\n"),
		"gzip of MIME":         pack(t, "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n--x--\n"),
		"largest":              "#!/bin/sh\n" + strings.Repeat("x", maxUserData-10),
	} {
		if err := CheckUserData([]byte(s)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	tests := []struct{ name, in, text string }{
		{"nothing", "", "it is empty"},
		{"blanks", " \n\t\n", "it is empty"},
		{"text", "hello\nworld", `(first line "hello"): begin it with #cloud-config`},
		{"YAML", "packages: [nginx]\n#cloud-config\n", `(first line "packages: [nginx]")`},
		{"blank after #", "# cloud-config\n", "would ignore it"},
		{"cloud_config", "#cloud_config\n", "would ignore it"},
		{"jinja without blank", "##template: jinja\n", "would ignore it"},
		{"Ignition", `{"ignition": {"version": "3.4.0"}}`, "would ignore it"},
		{"byte order mark", "\ufeff#cloud-config\n{}\n", `byte order mark, which hides the first line "#cloud-config"`},
		{"UTF-16", "#\x00c\x00l\x00\xff\xfe", "no UTF-8"},
		{"Latin 1 later", "#cloud-config\n# M\xfcller\n", "no UTF-8"},
		{"MIME without version", "Content-Type: multipart/mixed; boundary=x\n\n--x--\n", "add the line \"MIME-Version: 1.0\""},
		{"MIME-Version too late", "X: " + strings.Repeat("x", 4096) + "\nMIME-Version: 1.0\n", "would ignore it"},
		{"long line", strings.Repeat("x", 1<<16), `"...): begin`},
		{"control characters", "\x1b[31m\x07\n", `"\x1b[31m\a"`},
		{"too large", "#!/bin/sh\n" + strings.Repeat("x", maxUserData-9), "524289 bytes: use at most 524288"},
		{"broken gzip", "\x1f\x8b\x08\x00", "pack it again"},
		{"cut gzip", pack(t, "#cloud-config\n{}\n")[:20], "pack it again"},
		{"gzip of text", pack(t, "hello"), `(first line "hello")`},
		{"gzip of nothing", pack(t, ""), "it is empty"},
		{"gzip of too much", pack(t, "#!"+strings.Repeat("x", maxUserData)), "more than 524288 bytes when unpacked"},
		{"gzip of gzip", pack(t, pack(t, "#cloud-config\n")), "no UTF-8"},
	}
	for _, tt := range tests {
		err := CheckUserData([]byte(tt.in))
		if err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.text)
		} else if len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\x1b\a\n") {
			t.Errorf("%s: bad message %q", tt.name, err)
		}
	}
}
