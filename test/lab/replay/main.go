// Command replay is a CNI plugin for tests. It makes again what another plugin was recorded to make: the links of a pod with
// their addresses, routes and settings, the node's side of them, and the answers, failures included. It knows nothing of
// any real plugin; all it does is in the recording, a file as [nic.Recording] with [answers].
//
// Its configuration names the recording:
//
//	{"type": "replay", "recording": "/path.json", "dataDir": "/dir", "first": 0}
//
// Several pods of one recording live on one node: each has a number, from first on, which is kept in dataDir, and what has to be
// the pod's own is moved by it: addresses and MACs of its links, wherever they occur, and names of the node's links.
// Bridges are made once and stay. Called by another name, it takes that configuration from the file of its own path with
// ".json" behind, so that a configuration as users have it runs it in another plugin's place.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/virtlet/virtlet/internal/netns"
	"github.com/virtlet/virtlet/internal/nic"
)

// recording is a file.
type recording struct {
	nic.Recording
	Answers answers `json:"answers"`
}

// answers are how the plugin answered beside the result. Each error is that of the verb, "" where it succeeds.
type answers struct {
	Add   answer `json:"ADD"`
	Del   answer `json:"DEL"`
	Check answer `json:"CHECK"`
}

type answer struct {
	About  string   `json:"about,omitempty"`
	Error  string   `json:"error,omitempty"`
	Leaves []string `json:"leaves,omitempty"` // DEL: links of the pod that stay, with the node's side of them
}

// config is what the plugin is told.
type config struct {
	Version   string `json:"cniVersion"`
	Recording string `json:"recording"`
	DataDir   string `json:"dataDir"`
	First     int    `json:"first"` // number of the first pod: two nodes of one network have different ones
}

func main() {
	runtime.LockOSThread() // the node is the namespace of this thread
	c, err := configure(os.Stdin, os.Args[0])
	if err == nil {
		err = c.run(os.Getenv("CNI_COMMAND"))
	}
	if err != nil {
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": c.Version, "code": 100, "msg": err.Error()})
		os.Exit(1)
	}
}

func configure(stdin io.Reader, self string) (config, error) {
	var c config
	if err := json.NewDecoder(stdin).Decode(&c); err != nil {
		return c, fmt.Errorf("read the configuration: %w", err)
	}
	if filepath.Base(self) == "replay" {
		return c, nil
	}
	version := c.Version
	b, err := os.ReadFile(self + ".json")
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	c.Version = version
	return c, err
}

// versions are what the plugin says it speaks: its answers are in whatever version was recorded.
var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

func (c config) run(verb string) error {
	if verb == "VERSION" {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": c.Version, "supportedVersions": versions})
	}
	r, err := read(c.Recording)
	if err != nil {
		return err
	}
	p, err := c.pod()
	if err != nil {
		return err
	}
	switch verb {
	case "ADD":
		if p.number, err = p.take(c.First); err != nil {
			return err
		}
		m := newMove(&r.Recording, p.number, p.ifName, p.netNS)
		if err := replay(m.recording(), p.netNS); err != nil {
			return err
		}
		if r.Answers.Add.Error != "" {
			return errors.New(r.Answers.Add.Error)
		}
		result, err := m.result(r.Attachments[0].Result)
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(result)
		return err
	case "DEL":
		if p.number, err = p.has(); errors.Is(err, os.ErrNotExist) {
			return failure(r.Answers.Del) // not added, or deleted already
		} else if err != nil {
			return err
		}
		m := newMove(&r.Recording, p.number, p.ifName, p.netNS)
		if err := remove(m.recording(), p.netNS, r.Answers.Del.Leaves); err != nil {
			return err
		}
		if err := p.free(); err != nil {
			return err
		}
		return failure(r.Answers.Del)
	case "CHECK":
		return failure(r.Answers.Check)
	}
	return nil // GC, STATUS: nothing is recorded of them
}

func failure(a answer) error {
	if a.Error == "" {
		return nil
	}
	return errors.New(a.Error)
}

func read(path string) (*recording, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r recording
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(r.Attachments) != 1 || r.Host == nil {
		return nil, fmt.Errorf("%s: a recording of one attachment, with the node's side, can be replayed; this has %d attachments", path, len(r.Attachments))
	}
	return &r, nil
}

// replay makes the node's side and the pod's of a recording.
func replay(r *nic.Recording, pod string) error {
	node, err := netns.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", threadID()))
	if err != nil {
		return err
	}
	defer node.Close()
	ns, err := netns.Open(pod)
	if err != nil {
		return err
	}
	defer ns.Close()
	return (&world{node: node, pod: ns}).make(r)
}
