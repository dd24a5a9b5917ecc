package shim

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/virtlet/virtlet/internal/vm"
)

// prefix is that of this project's annotations. One under it that is not in the table is refused: a mistyped
// spoof-check must not pass in silence.
const prefix = "virtlet.cloud/"

// wishes are what annotations say of a VM.
type wishes struct {
	cfg    vm.Config // what they have set of it
	image  string    // paths inside the container's image; "": by convention
	kernel string
	initrd string
	append *string
}

// annotations is the table of docs/kubernetes.md.
var annotations = map[string]func(w *wishes, value string) error{
	"cpus": func(w *wishes, v string) (err error) {
		w.cfg.CPUs, err = strconv.Atoi(v)
		return err
	},
	"memory": func(w *wishes, v string) (err error) {
		w.cfg.Memory, err = vm.ParseMemory(v)
		return err
	},
	"accel":          func(w *wishes, v string) error { w.cfg.Accel = v; return nil },
	"user-data":      func(w *wishes, v string) error { w.cfg.UserData = []byte(v); return nil },
	"ssh-keys":       func(w *wishes, v string) error { w.cfg.SSHKeys = []string{v}; return nil },
	"seed":           func(w *wishes, v string) error { w.cfg.Seed = v; return nil },
	"network-config": func(w *wishes, v string) error { w.cfg.NetworkConfig = v; return nil },
	"guest-network":  func(w *wishes, v string) error { w.cfg.GuestNetwork = v; return nil },
	"instance-id":    func(w *wishes, v string) error { w.cfg.InstanceID = v; return nil },
	"ntp": func(w *wishes, v string) error {
		w.cfg.NTP = strings.Fields(strings.ReplaceAll(v, ",", " "))
		return nil
	},
	"disk-bus": func(w *wishes, v string) error { w.cfg.DiskBus = v; return nil },
	"image":    func(w *wishes, v string) error { w.image = v; return nil },
	"image-format": func(w *wishes, v string) error {
		w.cfg.Image = &vm.Disk{Format: v}
		return nil
	},
	"kernel":              func(w *wishes, v string) error { w.kernel = v; return nil },
	"initrd":              func(w *wishes, v string) error { w.initrd = v; return nil },
	"cmdline":             func(w *wishes, v string) error { w.append = &v; return nil },
	"spoof-check":         func(w *wishes, v string) error { return yes(v, &w.cfg.NoSpoofCheck, false) },
	"allow-physical":      func(w *wishes, v string) error { return yes(v, &w.cfg.AllowPhysical, true) },
	"datapath":            func(w *wishes, v string) error { w.cfg.Datapath = v; return nil },
	"allow-external-dhcp": func(w *wishes, v string) error { return yes(v, &w.cfg.ExternalDHCP, true) },
	"allow-external-ra":   func(w *wishes, v string) error { return yes(v, &w.cfg.ExternalRA, true) },
}

// yes reads true or false and sets what true means.
func yes(value string, set *bool, means bool) error {
	switch value {
	case "true":
		*set = means
	case "false":
		*set = !means
	default:
		return errors.New(`use "true" or "false"`)
	}
	return nil
}

// readWishes reads the annotations of this project among those of a pod, and later sources overrule earlier ones.
func readWishes(sources ...map[string]string) (wishes, error) {
	all := map[string]string{}
	for _, s := range sources {
		maps.Copy(all, s)
	}
	var w wishes
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(all)) {
		name, mine := strings.CutPrefix(key, prefix)
		if !mine {
			continue
		}
		set, known := annotations[name]
		if !known {
			errs = append(errs, fmt.Errorf("annotation %s: there is none of that name; there are: %s", key, strings.Join(slices.Sorted(maps.Keys(annotations)), ", ")))
			continue
		}
		if err := set(&w, all[key]); err != nil {
			errs = append(errs, fmt.Errorf("annotation %s: %w", key, err))
		}
	}
	// What others tell the guest to use is not known here.
	w.cfg.NoSpoofCheck = w.cfg.NoSpoofCheck || w.cfg.ExternalDHCP || w.cfg.ExternalRA
	return w, errors.Join(errs...)
}
