package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/virtlet/virtlet/internal/vm"
)

// runFlags are the flags of `virtlet run`.
type runFlags struct {
	cfg       vm.Config
	nets      vm.NetworkRequest
	detach    bool
	memory    string
	image     string
	format    string
	disks     []string
	publish   []string
	bandwidth string
	userData  string
	sshKeys   []string
	plugins   []string

	spoofCheck bool
}

func (a *app) runCmd() *cobra.Command {
	var f runFlags
	cmd := a.withJSON(&cobra.Command{
		Use:   "run [flags] [IMAGE]",
		Short: "Run a VM on CNI networks",
		Long: `Makes a network namespace, lets CNI plugins configure it, starts a QEMU guest that takes over what they configured, and
follows its console until it ends. IMAGE is a qcow2 or raw disk image; it is never written. With --kernel it may be
absent. With --root the guest boots from the first --disk instead, an image or a block device, and what it writes stays.

Ctrl-C presses the guest's power button; a second Ctrl-C kills it.

` + exitHelp,
		Example: `  virtlet run --ssh-key ~/.ssh/id_ed25519.pub debian.qcow2
  virtlet run -d --name web --cpus 2 --memory 2G -p 8080:80 web.qcow2
  virtlet run --disk /dev/vg0/db --root --name db --ssh-key ~/.ssh/id_ed25519.pub
  virtlet run --guest-network static --network-config v2 debian.qcow2
  virtlet run --network blue --network red --ip 10.1.0.5/24 router.qcow2
  virtlet run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  virtlet run --netns /run/netns/pod1 disk.raw`,
		Args:              args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
		RunE: func(cmd *cobra.Command, images []string) error {
			if len(images) > 0 {
				f.image = images[0]
			}
			cfg, err := f.config(a.store)
			if err != nil {
				return err
			}
			if f.detach {
				return a.runDetached(cfg)
			}
			return a.runAttached(cfg)
		},
	})
	f.register(cmd.Flags())
	complete := func(flag string, values func() []string) {
		err := cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return values(), cobra.ShellCompDirectiveNoFileComp
		})
		if err != nil {
			panic(err) // no such flag
		}
	}
	complete("network", func() []string { return a.store.NetworkNames(f.nets.ConfDir) })
	complete("accel", func() []string { return []string{"auto", "kvm", "tcg"} })
	complete("disk-bus", func() []string { return []string{"virtio", "scsi", "sata"} })
	complete("seed", func() []string { return []string{"nocloud", "configdrive", "none"} })
	complete("network-config", func() []string { return []string{"v1", "v2", "user-data", "none"} })
	complete("guest-network", func() []string { return []string{"dhcp", "static"} })
	complete("image-format", func() []string { return []string{"qcow2", "raw"} })
	return cmd
}

func (f *runFlags) register(fs *pflag.FlagSet) {
	fs.SortFlags = false
	fs.StringVar(&f.cfg.Name, "name", "", "name of the VM and its host name (default: a made one)")
	fs.BoolVarP(&f.detach, "detach", "d", false, "run in the background and print the name")
	fs.BoolVar(&f.cfg.Remove, "rm", false, "remove the VM when it has ended")
	fs.IntVar(&f.cfg.CPUs, "cpus", 1, "virtual CPUs")
	fs.StringVar(&f.memory, "memory", "1G", "memory: 512M, 2G; a number alone is MiB")
	fs.StringVar(&f.format, "image-format", "", "raw or qcow2 (default: by the image's header)")
	fs.StringArrayVar(&f.disks, "disk", nil, "one more disk, written in place: PATH[,ro][,format=raw|qcow2]; repeatable")
	fs.StringVar(&f.cfg.DiskBus, "disk-bus", "virtio", "how the guest reaches its disks: virtio, scsi (virtio-scsi) or sata")
	fs.BoolVar(&f.cfg.Root, "root", false, "boot from the first --disk; IMAGE is absent then")

	fs.StringArrayVar(&f.nets.Names, "network", nil, "CNI network; repeatable: eth0, eth1, ... in that order (default: the first one configured)")
	fs.StringVar(&f.nets.ConfDir, "cni-conf-dir", vm.DefaultConfDir, "CNI configurations")
	fs.StringArrayVar(&f.plugins, "cni-bin-dir", nil, "CNI plugins; repeatable (default: /opt/cni/bin, /usr/lib/cni and virtlet's own)")
	fs.DurationVar(&f.cfg.CNITimeout, "cni-timeout", time.Minute, "time limit of one CNI ADD")
	fs.StringVar(&f.cfg.NetNS, "netns", "", "join the configured namespace at this path; no CNI calls then")
	fs.StringArrayVarP(&f.publish, "publish", "p", nil, "publish a port: [IP:]HOST:GUEST[/udp]; repeatable")
	fs.StringVar(&f.bandwidth, "bandwidth", "", "limit in bits per second: 100M, or in=100M,out=20M")
	fs.StringArrayVar(&f.nets.IPs, "ip", nil, "ask for this address; the n-th is for the n-th network")
	fs.StringArrayVar(&f.nets.MACs, "mac", nil, "ask for this MAC address; the n-th is for the n-th network")
	fs.StringVar(&f.cfg.Hostname, "hostname", "", "host name (default: the VM's name)")
	fs.StringArrayVar(&f.cfg.DNS, "dns", nil, "name server, after those of the networks (default: the node's); repeatable")
	fs.StringArrayVar(&f.cfg.Search, "dns-search", nil, "DNS search domain; repeatable")
	fs.StringArrayVar(&f.cfg.NTP, "ntp", nil, "time server that DHCP tells the guest; repeatable")
	fs.BoolVar(&f.spoofCheck, "spoof-check", true, "drop what the guest sends from addresses that are not its own; not on NICs without addresses")
	fs.StringVar(&f.cfg.Datapath, "datapath", "", "join NICs and TAPs by bridge, redirect (eBPF) or auto: a bridge, and redirect where none can serve (default auto)")
	fs.BoolVar(&f.cfg.AllowPhysical, "allow-physical", false, "give the guest also PCI network cards that are no SR-IOV virtual functions")
	fs.BoolVar(&f.cfg.ExternalDHCP, "allow-external-dhcp", false, "the guest asks the DHCP servers of its networks; ours is off, and so is --spoof-check")
	fs.BoolVar(&f.cfg.ExternalRA, "allow-external-ra", false, "the guest hears the IPv6 routers of its networks; ours is off, and so is --spoof-check")

	fs.StringVar(&f.cfg.Kernel, "kernel", "", "boot this kernel directly")
	fs.StringVar(&f.cfg.Initrd, "initrd", "", "with this initial ramdisk")
	fs.StringVar(&f.cfg.Append, "append", "", "and this kernel command line")
	fs.StringVar(&f.userData, "user-data", "", "cloud-init user-data file")
	fs.StringArrayVar(&f.sshKeys, "ssh-key", nil, "file of public SSH keys for cloud-init; repeatable")
	fs.StringVar(&f.cfg.SSHUser, "ssh-user", vm.DefaultSSHUser, "the image's default user, for virtlet ssh")

	fs.StringVar(&f.cfg.Seed, "seed", "", "cloud-init data source: nocloud, configdrive or none (default nocloud; none for --kernel alone)")
	fs.StringVar(&f.cfg.NetworkConfig, "network-config", "", "form of the network configuration in it: v1, v2, user-data or none (default v1)")
	fs.StringVar(&f.cfg.GuestNetwork, "guest-network", "", "what it says: dhcp, or static addresses, routes and DNS (default dhcp; VFs are static)")
	fs.StringVar(&f.cfg.InstanceID, "instance-id", "", "cloud-init's name of the installation; a new one is set up again (default: of this run; with --root of the disk's path)")

	fs.StringVar(&f.cfg.Accel, "accel", "auto", "auto, kvm or tcg")
	fs.StringVar(&f.cfg.QEMU, "qemu", "", "QEMU program; a wrapper must exec it (default: qemu-system-* of this machine)")
}

// config makes the VM's configuration of the flags.
func (f *runFlags) config(store vm.Store) (vm.Config, error) {
	cfg := f.cfg
	var errs, files []error
	note := func(err error) { errs = append(errs, err) }
	var err error
	if cfg.Name == "" {
		cfg.Name = vm.NewName()
	}
	// What others tell the guest to use is not known here.
	cfg.NoSpoofCheck = !f.spoofCheck || cfg.ExternalDHCP || cfg.ExternalRA
	cfg.Memory, err = parseMemory(f.memory)
	note(err)
	if f.image != "" {
		cfg.Image = &vm.Disk{Path: f.image, Format: f.format}
	}
	for _, d := range f.disks {
		disk, err := parseDisk(d)
		note(err)
		cfg.Disks = append(cfg.Disks, disk)
	}
	for _, p := range f.publish {
		m, err := parsePort(p)
		note(err)
		f.nets.Ports = append(f.nets.Ports, m)
	}
	if f.bandwidth != "" {
		f.nets.Bandwidth, err = parseBandwidth(f.bandwidth)
		note(err)
	}
	if f.userData != "" {
		cfg.UserData, err = readSmall(f.userData)
		files = append(files, wrap("user-data", err))
	}
	for _, path := range f.sshKeys {
		keys, err := readSmall(path)
		files = append(files, wrap("ssh-key", err))
		cfg.SSHKeys = append(cfg.SSHKeys, string(keys))
		if private, ok := strings.CutSuffix(path, ".pub"); ok {
			cfg.Identities = append(cfg.Identities, private)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return cfg, usageError{err}
	}
	if err := errors.Join(files...); err != nil {
		return cfg, err
	}
	cfg.Plugins = pluginDirs(f.plugins)
	if cfg.NetNS != "" {
		if len(f.nets.Names)+len(f.nets.Ports)+len(f.nets.IPs)+len(f.nets.MACs) > 0 || f.nets.Bandwidth != nil {
			return cfg, usageError{errors.New("--netns joins a namespace that somebody else configured: --network, --publish, --bandwidth, --ip and --mac are theirs to set")}
		}
		return cfg, nil
	}
	cfg.Networks, err = store.Attachments(f.nets)
	return cfg, err
}

// readSmall reads a file that is no image by mistake, nor a device without an end.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 1 << 20 // bytes: the limits of what it holds are lower
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(b) > most {
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return b, err
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
