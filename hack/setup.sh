#!/usr/bin/env bash
# Installs the Debian packages that virtlet, its build and its tests need, the missing ones only, and Go.
# A machine that has all of them is not touched and nothing is printed.
set -euo pipefail

# One line for each: the program (or file) that shows that it is there, its package, what it is for.
needed() {
	case $(uname -m) in
	x86_64) echo "qemu-system-x86_64      qemu-system-x86  runs the guests" ;;
	aarch64) echo "qemu-system-aarch64    qemu-system-arm  runs the guests" ;;
	*) echo "setup: virtlet runs on x86_64 and aarch64, not on $(uname -m)" >&2 && exit 1 ;;
	esac
	cat <<-END
		qemu-img                 qemu-utils       makes overlays of disks
		iptables                 iptables         the CNI plugins portmap and firewall
		nft                      nftables         the same, and the tests
		dbus-daemon              dbus-daemon      tests: a bus, to ask for the restart of containerd
		ip                       iproute2         tests and demo
		ping                     iputils-ping     tests and demo
		curl                     curl             demo
		nsenter                  util-linux       tests and demo
		busybox                  busybox-static   tests: a DHCP client
		dhclient                 isc-dhcp-client  tests: another DHCP client
		dhcpcd                   dhcpcd-base      tests: a third, which reads router advertisements too
		/lib/systemd/systemd-networkd  systemd    tests: a fourth
		dnsmasq                  dnsmasq-base     tests: a router for the guest, and a DHCP server to compare with
		python3                  python3          tests: runs cloud-init, which hack/cloudinit.sh unpacks
		xz                       xz-utils         the test guest: packed kernel modules
		mmdebstrap               mmdebstrap       the Debian image of the tests
		mke2fs                   e2fsprogs        the same
		ssh                      openssh-client   virtlet ssh, and its tests
		dpkg-deb                 dpkg             tests of pods: Debian's containerd, which is not installed
		git                      git              the version of the build
		gcc                      gcc              tests: the race detector is C
		/usr/include/stdlib.h    libc6-dev        the same
		/etc/ssl/certs/ca-certificates.crt  ca-certificates  Go's modules come by HTTPS
	END
}

# add installs the Debian packages that are named.
add() {
	if ! command -v apt-get >/dev/null; then
		echo "setup: missing: $* (names of Debian packages); install them with this system's package manager" >&2
		exit 1
	fi
	local sudo=() log
	if [ "$(id -u)" != 0 ]; then
		if ! command -v sudo >/dev/null; then
			echo "setup: missing: $*; as root: apt-get install --no-install-recommends $*" >&2
			exit 1
		fi
		sudo=(sudo)
	fi
	echo "setup: installing $*" >&2
	log=$(mktemp)
	install() {
		"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null >"$log" 2>&1
	}
	# Package lists that are missing or out of date are the usual reason why it does not work the first time.
	if ! install "$@" && ! { "${sudo[@]}" apt-get update -q </dev/null >"$log" 2>&1 && install "$@"; }; then
		cat "$log" >&2
		echo "setup: could not install $*" >&2
		exit 1
	fi
	rm -f "$log"
}

missing=()
while read -r program package _; do
	[ -e "$program" ] || command -v "$program" >/dev/null || missing+=("$package")
done < <(needed)
[ ${#missing[@]} = 0 ] || add "${missing[@]}"

# Go 1.21 and later fetch the version that go.mod asks for by themselves; older ones do not understand go.mod.
want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' "$(dirname "$0")/../go.mod")
new_enough() {
	command -v go >/dev/null && found=$(cd "$(dirname "$0")/.." && go env GOVERSION 2>&1) && printf 'go%s\n%s\n' "$want" "$found" | sort -CV
}
new_enough && exit

# Any Go can fetch another as a module, checked against the checksum database; Debian 12's own is 1.19.
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/go
command -v go >/dev/null || add golang-go
echo "setup: fetching Go $want for this project into $cache" >&2
mkdir -p "$cache"
new=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
case $(uname -m) in x86_64) arch=amd64 ;; *) arch=arm64 ;; esac
toolchain=golang.org/toolchain@v0.0.1-go$want.linux-$arch
(cd "$new" && GOMODCACHE=$new/mod GOFLAGS=-modcacherw go mod download "$toolchain") || {
	echo "setup: could not fetch it; install Go $want or newer yourself: https://go.dev/doc/install" >&2
	exit 1
}
# Modules have no executable files.
chmod +x "$new/mod/$toolchain"/bin/* "$new/mod/$toolchain"/pkg/tool/*/*
rm -rf "${cache:?}/$want"
mv "$new/mod/$toolchain" "$cache/$want"
hash -r
PATH=$cache/$want/bin:$PATH
new_enough || {
	echo "setup: the fetched Go does not work: $found" >&2
	exit 1
}
