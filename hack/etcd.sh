#!/usr/bin/env bash
# Prints the directory of the program etcd: of the one that is installed, or else of Debian's in the cache. There the package
# is unpacked, not installed, for that would start a server on the machine. It is complete or not there at all.
set -euo pipefail

if installed=$(command -v etcd); then
	dirname "$installed"
	exit
fi
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/etcd
mkdir -p "$cache"
cache=$(realpath "$cache")
if [ ! -d "$cache/bin" ]; then
	if ! command -v apt-get >/dev/null; then
		echo "etcd: missing; install it with this system's package manager" >&2
		exit 1
	fi
	echo "etcd: fetching Debian's package" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	cd "$new"
	# Lists of our own, where the machine's are missing or out of date, need no privilege; apt's own user may not come here.
	mkdir -p lists/partial
	own=(-o "Dir::State::Lists=$new/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
	get() { apt-get -q -o APT::Sandbox::User= "$@" >log 2>&1; }
	if ! get download etcd-server && ! { get "${own[@]}" update && get "${own[@]}" download etcd-server; }; then
		cat log >&2
		echo "etcd: could not fetch the package etcd-server" >&2
		exit 1
	fi
	dpkg-deb -x etcd-server_*.deb tree
	mv -T tree/usr/bin "$cache/bin" 2>/dev/null || [ -d "$cache/bin" ] # somebody else was faster
fi
echo "$cache/bin"
