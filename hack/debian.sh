#!/usr/bin/env bash
# Makes a Debian 12 cloud image, if it is not there, and prints the path of its directory: disk.qcow2, which boots by itself,
# and vmlinuz and initrd.img out of it for --kernel. It has cloud-init, netplan, systemd-networkd, systemd-resolved and an
# SSH server, as Debian's own genericcloud image has.
#
# It is made of Debian packages alone, which apt verifies, from the sources that this machine's apt has. It needs root, for
# the files' owners, and neither KVM nor a loop device. The directory is in the folder debian of VIRTLET_CACHE, named after
# this recipe: complete or not there at all, and two builds at once are one. -refresh makes it anew, of the newest packages.
set -euo pipefail

fail() {
	echo "debian: $*" >&2
	exit 1
}

disk=$((2 << 30)) # bytes that the guest sees
start=2048        # first sector of the file system; GRUB lies before it

packages=(
	linux-image-cloud-amd64 initramfs-tools grub-pc-bin grub-common
	systemd-sysv udev dbus libpam-systemd systemd-resolved netplan.io
	cloud-init cloud-guest-utils fdisk sudo openssh-server
	iproute2 iputils-ping ca-certificates qemu-guest-agent
)

# put writes a file of the guest below the directory given; the contents are on standard input.
put() { install -D -m "${3-0644}" /dev/stdin "$1$2"; }

# before prepares what the installation of packages looks at.
before() {
	# The drivers of a virtio guest and nothing else: a small ramdisk boots faster.
	put "$1" /etc/initramfs-tools/conf.d/virtlet <<-END
		MODULES=list
	END
	put "$1" /usr/share/initramfs-tools/modules.d/virtlet <<-END
		virtio_pci
		virtio_blk
		ext4
	END
}

# after configures the system.
after() {
	put "$1" /etc/fstab <<-END
		LABEL=debian / ext4 rw,discard 0 1
	END
	put "$1" /etc/cloud/cloud.cfg.d/90-virtlet.cfg <<-END
		datasource_list: [NoCloud, ConfigDrive, None]
		# An RSA key takes long to make without KVM.
		ssh_genkeytypes: [ed25519]
		locale: C.UTF-8
		manage_etc_hosts: true
		apt: {preserve_sources_list: true}
	END
	# NICs that cloud-init says nothing of. Its own files and netplan's come first.
	put "$1" /etc/systemd/network/zz-default.network <<-END
		[Match]
		Type=ether
		[Network]
		DHCP=yes
		[DHCPv4]
		UseDomains=yes
		[DHCPv6]
		UseDomains=yes
		[IPv6AcceptRA]
		UseDomains=yes
	END
	put "$1" /etc/ssh/sshd_config.d/virtlet.conf <<-END
		PasswordAuthentication no
	END
	# A port that answers is one at which users may log in: before, they are refused. Without a seed cloud-init does not
	# run, and makes no key for the host.
	put "$1" /etc/systemd/system/ssh.service.d/virtlet.conf <<-'END'
		[Unit]
		After=systemd-user-sessions.service
		[Service]
		ExecStartPre=
		ExecStartPre=/bin/sh -c '[ -e /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key'
		ExecStartPre=/usr/sbin/sshd -t
	END
	put "$1" /boot/grub/grub.cfg <<-'END'
		linux /vmlinuz root=LABEL=debian ro console=ttyS0,115200
		initrd /initrd.img
		boot
	END
	chroot "$1" systemctl --quiet enable systemd-networkd
	# Nothing that works by itself while a test looks on.
	chroot "$1" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
		e2scrub_reap.service fstrim.timer
	# cloud-init makes them for each guest, and the names of this machine's sources are no one else's.
	rm -rf "$1"/etc/ssh/ssh_host_* "$1"/etc/machine-id "$1"/var/lib/dbus/machine-id "$1"/etc/hostname "$1"/etc/apt/sources.list*
	: >"$1/etc/machine-id"
	cp "$1/usr/lib/grub/i386-pc/boot.img" "$new/boot.img"
	chroot "$1" grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /core.img \
		biosdisk part_msdos ext2 configfile normal linux serial terminal
	mv "$1/core.img" "$new/core.img"
}

case ${1-} in
before | after)
	"$@"
	exit
	;;
esac

[ "$(uname -m)" = x86_64 ] || fail "the image is for x86_64 alone: virtlet boots others by --kernel only"
key=amd64-$(sha256sum "$0" | cut -c1-12)
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/debian
image=$cache/$key
if [ "${1-}" != -refresh ] && [ -e "$image" ]; then
	realpath "$image"
	exit
fi
[ "$(id -u)" = 0 ] || fail "making the image needs root"
PATH=$PATH:/usr/sbin:/sbin
for program in mmdebstrap mke2fs qemu-img; do
	command -v $program >/dev/null || fail "$program is missing: run make setup"
done
mkdir -p "$cache"
cache=$(realpath "$cache") image=$cache/$key
exec 9>"$cache/lock"
flock 9
if [ "${1-}" != -refresh ] && [ -e "$image" ]; then # made while this one waited for the lock
	echo "$image"
	exit
fi
. /etc/os-release
[ "$ID ${VERSION_ID-}" = "debian 12" ] || fail "make the image on Debian 12, of whose sources it is made, and set VIRTLET_DEBIAN to a copy"
echo "debian: making a cloud image, which takes a minute or two" >&2
rm -rf "$cache"/new.* # of a build that was killed: the lock is ours
new=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 0755 "$new"

# mmdebstrap's hooks are this script again, with the name of the function and the guest's root.
self=$(realpath "$0")
export self new

# What this machine's apt knows of its sources, and how it reaches them.
sources=()
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
	! grep -qsE '^(deb|Types:)' "$list" || sources+=("$list")
done
apt-config dump | grep -E '^Acquire::(http|https|Retries|Check)' >"$new/apt.conf" || true

mmdebstrap --quiet --mode=root --variant=apt --components=main \
	--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
	--aptopt="$new/apt.conf" --include="$(IFS=,; echo "${packages[*]}")" \
	--setup-hook='"$self" before "$1"' --customize-hook='"$self" after "$1"' \
	bookworm "$new/root" "${sources[@]}"

rm "$new"/root/etc/apt/apt.conf.d/99mmdebstrap # nothing of them stays in the image

# GRUB's first sector reads on from the second one, and finds its files on the first partition: as it comes, without the
# addresses that an installer would put in.
raw=$new/disk.raw
at() { dd of="$raw" bs=512 oflag=seek_bytes seek="$1" conv=notrunc status=none; }
truncate -s $disk "$raw"
at 0 <"$new/boot.img"
at 512 <"$new/core.img"
# A table of one partition: bootable, Linux (0x83), by sector numbers alone.
perl -e 'print pack "C8 V2 x48", 0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff, @ARGV' $start $((disk / 512 - start)) | at 446
mke2fs -q -t ext4 -L debian -E offset=$((start * 512)),lazy_itable_init=0,lazy_journal_init=0 -d "$new/root" "$raw" $((disk / 1024 - start / 2))k
mkdir "$new/image"
qemu-img convert -O qcow2 -c "$raw" "$new/image/disk.qcow2"
cp -L "$new/root/vmlinuz" "$new/root/initrd.img" "$new/image"
chmod -R u=rwX,go=rX "$new/image"
rm -rf "$image" # by -refresh; a guest that runs has its files open
mv -T "$new/image" "$image"
echo "$image"
