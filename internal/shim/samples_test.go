package shim

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"gopkg.in/yaml.v3"
)

// Every annotation of the sample pods is one that this program takes, with such a value.
func TestSamples(t *testing.T) {
	files, err := filepath.Glob("../../deploy/samples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples: %v", err)
	}
	type meta struct {
		Annotations map[string]string `yaml:"annotations"`
	}
	seen := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for docs := yaml.NewDecoder(bytes.NewReader(text)); ; {
			var o struct {
				Metadata meta `yaml:"metadata"`
				Spec     struct {
					Template struct {
						Metadata meta `yaml:"metadata"`
					} `yaml:"template"`
				} `yaml:"spec"`
			}
			if err := docs.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			for _, m := range []meta{o.Metadata, o.Spec.Template.Metadata} {
				seen += len(m.Annotations)
				if _, err := readWishes(m.Annotations); err != nil {
					t.Errorf("%s: %v", file, err)
				}
			}
		}
	}
	if seen < 4 {
		t.Errorf("the samples have only %d annotations", seen)
	}
}
