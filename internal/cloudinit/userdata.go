package cloudinit

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxUserData bounds user-data, also after unpacking, in bytes. Clouds allow 16 to 64 KiB.
const maxUserData = 512 << 10

// starts are what cloud-init knows a kind of user-data by: INCLUSION_TYPES_MAP in its handlers/__init__.py. It ignores
// their case. #cloud-config-archive, #cloud-config-jsonp and #include-once begin with one of them.
var starts = []string{"#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template: jinja"}

const (
	// mimeHeader, anywhere in the first mimeWindow bytes, is all that makes cloud-init take a text as MIME.
	mimeHeader = "mime-version:"
	mimeWindow = 4096

	gzipMagic = "\x1f\x8b"
)

const accepted = "begin it with #cloud-config, #! (a script), #include, #cloud-boothook, #part-handler or " +
	"\"## template: jinja\", give a MIME message with a MIME-Version header, or pack one of these with gzip"

// CheckUserData says why cloud-init would ignore b, which it does without an error in the guest; nil if it would not.
// User-data is at most 512 KiB, packed and unpacked.
func CheckUserData(b []byte) error {
	if err := checkUserData(b); err != nil {
		return fmt.Errorf("user-data: %w", err)
	}
	return nil
}

func checkUserData(b []byte) error {
	if len(b) > maxUserData {
		return fmt.Errorf("%d bytes: use at most %d", len(b), maxUserData)
	}
	if strings.HasPrefix(string(b), gzipMagic) {
		var err error
		if b, err = unpack(b); err != nil {
			return err
		}
	}
	text := string(b)
	if strings.TrimSpace(text) == "" {
		return errors.New("it is empty: leave it out, or " + accepted)
	}
	if !utf8.ValidString(text) {
		return fmt.Errorf("it is no UTF-8 text (first line %s): %s", quote(text), accepted)
	}
	if isMIME(b) {
		return nil
	}
	if after, ok := strings.CutPrefix(text, "\ufeff"); ok {
		return fmt.Errorf("it begins with a byte order mark, which hides the first line %s from cloud-init: save it as UTF-8 without one", quote(after))
	}
	lower := strings.ToLower(strings.TrimLeft(text[:min(len(text), mimeWindow)], " \t\r\n\v\f"))
	if strings.HasPrefix(lower, "content-type:") {
		return fmt.Errorf("a MIME message (first line %s) without a MIME-Version header: add the line \"MIME-Version: 1.0\"", quote(text))
	}
	for _, s := range starts {
		if strings.HasPrefix(lower, s) {
			return nil
		}
	}
	return fmt.Errorf("cloud-init would ignore it (first line %s): %s", quote(text), accepted)
}

// isMIME says whether cloud-init takes a text as a MIME message.
func isMIME(b []byte) bool {
	return strings.Contains(strings.ToLower(string(b[:min(len(b), mimeWindow)])), mimeHeader)
}

// unpack gives what a gzip stream holds, at most maxUserData bytes of it.
func unpack(b []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("unpack it: %w: pack it again: gzip FILE", err)
	}
	text, err := io.ReadAll(io.LimitReader(z, maxUserData+1))
	if err != nil {
		return nil, fmt.Errorf("unpack it: %w: pack it again: gzip FILE", err)
	}
	if len(text) > maxUserData {
		return nil, fmt.Errorf("more than %d bytes when unpacked: use at most that", maxUserData)
	}
	return text, nil
}
