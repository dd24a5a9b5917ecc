#!/usr/bin/env bash
# Unpacks Debian's containerd into the cache, if it is not there, and prints the directory of its programs. Nothing is
# installed and no service starts. It is complete or not there at all, so two runs at once do no harm.
set -euo pipefail

package=containerd
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/containerd
mkdir -p "$cache"
cache=$(realpath "$cache")

# fetch downloads the package into the directory where it is called.
fetch() { apt-get -q -o APT::Sandbox::User=root download "$package" >log 2>&1; }
candidate() { apt-cache policy "$package" | sed -n 's/^  Candidate: \([0-9].*\)/\1/p'; }

version=$(candidate)
if [ -z "$version" ] || [ ! -d "$cache/$version" ]; then
	echo "containerd: fetching Debian's package" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	cd "$new"
	# Package lists that are missing or out of date are the usual reason why it does not work the first time.
	if ! fetch; then
		sudo=()
		[ "$(id -u)" = 0 ] || sudo=(sudo)
		"${sudo[@]}" apt-get update -q >log 2>&1 </dev/null && fetch || {
			cat log >&2
			echo "containerd: could not download the package $package; the tests of pods need it" >&2
			exit 1
		}
	fi
	version=$(candidate)
	dpkg-deb -x ./*.deb root
	chmod 0755 root
	mv -T root "$cache/$version" 2>/dev/null || [ -d "$cache/$version" ] # somebody else was faster
fi
echo "$cache/$version/usr/bin"
