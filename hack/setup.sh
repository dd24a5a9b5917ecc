#!/usr/bin/env bash
# Installs the Debian packages that virtlet, its build and its tests need, the missing ones only, and looks for Go.
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
		ip                       iproute2         tests and demo
		ping                     iputils-ping     tests and demo
		curl                     curl             demo
		nsenter                  util-linux       tests and demo
		busybox                  busybox-static   tests: a DHCP client
		dhclient                 isc-dhcp-client  tests: another DHCP client
		xz                       xz-utils         the test guest: packed kernel modules
		git                      git              the version of the build
		gcc                      gcc              tests: the race detector is C
		/usr/include/stdlib.h    libc6-dev        the same
		/etc/ssl/certs/ca-certificates.crt  ca-certificates  Go's modules come by HTTPS
	END
}

missing=()
while read -r program package _; do
	[ -e "$program" ] || command -v "$program" >/dev/null || missing+=("$package")
done < <(needed)

if [ ${#missing[@]} -gt 0 ]; then
	if ! command -v apt-get >/dev/null; then
		echo "setup: missing: ${missing[*]} (names of Debian packages); install them with this system's package manager" >&2
		exit 1
	fi
	sudo=()
	if [ "$(id -u)" != 0 ]; then
		if ! command -v sudo >/dev/null; then
			echo "setup: missing: ${missing[*]}; as root: apt-get install --no-install-recommends ${missing[*]}" >&2
			exit 1
		fi
		sudo=(sudo)
	fi
	echo "setup: installing ${missing[*]}" >&2
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	install() {
		"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" \
			</dev/null >"$log" 2>&1
	}
	# Package lists that are missing or out of date are the usual reason why it does not work the first time.
	if ! install && ! { "${sudo[@]}" apt-get update -q </dev/null >"$log" 2>&1 && install; }; then
		cat "$log" >&2
		echo "setup: could not install ${missing[*]}" >&2
		exit 1
	fi
fi

# Go 1.21 and later fetch the version that go.mod asks for by themselves; older ones do not understand go.mod.
want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' "$(dirname "$0")/../go.mod")
if ! command -v go >/dev/null; then
	echo "setup: Go is missing: virtlet is built with Go $want or newer (https://go.dev/doc/install)." >&2
	echo "setup: Debian 12's own package golang-go is 1.19, which is too old." >&2
	exit 1
fi
if ! found=$(cd "$(dirname "$0")/.." && go env GOVERSION 2>&1) ||
	! printf 'go%s\n%s\n' "$want" "$found" | sort -CV; then
	echo "setup: $(command -v go) is too old: virtlet needs Go $want or newer (https://go.dev/doc/install)." >&2
	echo "setup: go says: $found" >&2
	exit 1
fi
