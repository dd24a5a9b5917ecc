package keep

import (
	_ "github.com/containernetworking/cni/libcni"
	_ "github.com/diskfs/go-diskfs"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/google/nftables"
	_ "github.com/gopacket/gopacket"
	_ "github.com/insomniacslk/dhcp/dhcpv4"
	_ "github.com/kdomanski/iso9660"
	_ "github.com/mdlayher/packet"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spf13/cobra"
	_ "github.com/vishvananda/netlink"
	_ "golang.org/x/net/bpf"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
)
