#!/usr/bin/env bash
# Fetches what the lab of SR-IOV needs and Debian 12 does not have, into the cache if it is not there, and prints the
# directory: a QEMU with an emulated SR-IOV card (igb) and IOMMU, and the full kernel of Debian 13 with an initramfs.
# Nothing is installed and no setting of this machine's apt is changed. It is complete or not there at all.
#
#	qemu       starts QEMU with its own libraries
#	vmlinuz    kernel
#	modules    the kernel's modules, as below /lib/modules
#	guest      initramfs of the guest in it: a shell on the serial console, with the prompt "guest# "
#	system     initramfs of a guest with a whole system on its first disk's first partition, whose own kernel may lack the
#	           driver of the card: it brings what that system needs, and goes on to it
#	initrd     loads the modules, joins the host's root (9p, read-only) and an overlay in memory, runs /share/run
set -euo pipefail
self=$(sha256sum <"$0" | cut -c1-12)
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/sriov
mkdir -p "$cache"
cache=$(realpath "$cache")
out=$cache/$self
if [ -d "$out" ]; then
	echo "$out"
	exit
fi
[ "$(dpkg --print-architecture)" = amd64 ] || { echo "sriov: the lab needs an amd64 machine" >&2 && exit 1; }
echo "sriov: fetching QEMU and a kernel of Debian 13 (150 MB)" >&2
new=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 0755 "$new"
cd "$new"
mkdir -p apt/lists/partial apt/cache/archives/partial kernel root

# The mirror of this machine's own sources, in either form, with the suite of Debian 13. (-security and -updates are of
# no use: their URIs may differ, and the lab needs no fixes.)
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
	sed -nE 's#^(URIs:|deb (\[[^]]*\] )?) *([^ ]+/debian/?)( .*)?$#\3#p' | head -n 1)
[ -n "$mirror" ] || { echo "sriov: apt's sources of this machine name no Debian mirror" >&2 && exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >apt/sources.list
: >apt/status # nothing is installed there
get() {
	apt-get -q -o Dir::Etc::sourcelist="$PWD/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
		-o Dir::State::Lists="$PWD/apt/lists" -o Dir::State::status="$PWD/apt/status" -o Dir::Cache="$PWD/apt/cache" \
		-o APT::Sandbox::User= -o Acquire::Languages=none -o Debug::NoLocking=1 "$@" </dev/null >apt/log 2>&1 ||
		{ cat apt/log >&2 && echo "sriov: apt-get $* failed" >&2 && exit 1; }
}
get update
get -y --no-install-recommends --download-only install qemu-system-x86 kmod
for deb in apt/cache/archives/*.deb; do dpkg-deb -x "$deb" root; done
rm -f apt/cache/archives/*.deb
get -y --no-install-recommends --download-only install linux-image-amd64
dpkg-deb -x apt/cache/archives/linux-image-[0-9]*.deb kernel
rm -rf apt

cat >qemu <<'END'
#!/bin/sh
# Its libraries and its firmware are beside it.
here=$(dirname "$(readlink -f "$0")")/root
exec "$here/usr/lib64/ld-linux-x86-64.so.2" --library-path "$here/usr/lib/x86_64-linux-gnu" \
	"$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/seabios" -L "$here/usr/share/qemu" "$@"
END
chmod 0755 qemu
./qemu --version >/dev/null
cp kernel/boot/vmlinuz-* vmlinuz

# The modules that are wanted in level 1, with what they need, in the order of loading.
modules=$(echo kernel/usr/lib/modules/*)
wanted=(virtio_pci virtio_net 9pnet_virtio 9p overlay igb igbvf e1000e vfio_pci vfio_iommu_type1 8021q veth bridge tun
	nf_tables nft_fwd_netdev cls_bpf sch_ingress vhost_net macvlan ipvlan dummy af_packet kvm_amd loop xt_comment
	xt_MASQUERADE nft_masq nft_ct nft_nat nft_compat nft_chain_nat iptable_nat iptable_filter xt_conntrack xt_addrtype)
mkdir -p init/bin init/modules guest-init/bin guest-init/modules system-init/bin system-init/modules
kmod() { root/usr/lib64/ld-linux-x86-64.so.2 --library-path root/usr/lib/x86_64-linux-gnu --argv0 "$1" root/usr/bin/kmod "${@:2}"; }
kmod depmod -b "$PWD/kernel/usr" "$(basename "$modules")"
gather() { # directory, modules
	local m
	for m in "${@:2}"; do
		kmod modprobe -d "$PWD/kernel/usr" -S "$(basename "$modules")" --show-depends "$m" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
	done | awk '!seen[$0]++' | while read -r file; do
		name=$(basename "$file" | sed 's/\.xz$//')
		xz -dc "$file" >"$1/modules/$name"
		echo "$name" >>"$1/modules/order"
	done
	cp "$(command -v busybox)" "$1/bin/busybox"
}
pack() { (cd "$1" && find . | busybox cpio -o -H newc 2>/dev/null) >"$2"; }
gather init "${wanted[@]}"
gather guest-init virtio_pci virtio_net igbvf e1000e af_packet button
# isofs, sr_mod and the controllers are for the seed.
gather system-init virtio_pci virtio_blk virtio_scsi ahci sr_mod isofs ext4 virtio_net igbvf af_packet button
cat >init/init <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /host /share /tmp/up /new
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo "level 1: modules"
while read -r m; do insmod "/modules/$m" || echo "level 1: cannot load $m"; done </modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host || exec sh
mount -t tmpfs -o size=512m up /tmp/up
mkdir -p /tmp/up/upper /tmp/up/work
mount -t overlay -o lowerdir=/host,upperdir=/tmp/up/upper,workdir=/tmp/up/work root /new || exec sh
for d in dev proc sys; do mkdir -p /new/$d; mount --move /$d /new/$d; done
mkdir -p /new/run /new/tmp /new/share /new/dev/pts
mount -t tmpfs run /new/run
mount -t devpts pts /new/dev/pts
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288 share /new/share || exec sh
echo "level 1: root"
exec switch_root /new /share/run
END
cat >guest-init/init <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r m; do insmod "/modules/$m"; done </modules/order
export PS1='guest# '
while true; do setsid cttyhack sh; done
END
cat >system-init/init <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys /new
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r m; do insmod "/modules/$m"; done </modules/order
for i in $(seq 100); do [ -b /dev/vda1 ] && break; sleep 0.1; done
mount -t ext4 -o rw /dev/vda1 /new || exec sh
for d in dev proc sys; do mount --move /$d /new/$d; done
exec switch_root /new /sbin/init
END
chmod 0755 init/init guest-init/init system-init/init
pack init initrd
pack guest-init guest
pack system-init system
mv kernel/usr/lib/modules modules
rm -rf init guest-init system-init kernel

mv -T "$new" "$out" 2>/dev/null || [ -d "$out" ] # somebody else was faster
trap - EXIT
[ ! -d "$new" ] || rm -rf "$new"
echo "$out"
