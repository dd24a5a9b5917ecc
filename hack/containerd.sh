#!/usr/bin/env bash
# Puts a containerd, or runc, into the cache if it is not there, and prints the directory of its programs. Nothing is
# installed, no service starts and no setting of this machine's apt is changed. It is complete or not there at all, so two
# runs at once do no harm.
#
#	hack/containerd.sh          containerd of this machine's Debian (12: 1.6)
#	hack/containerd.sh trixie   containerd of Debian 13 (1.7)
#	hack/containerd.sh module   containerd of its Go module, as test/pods/containerd pins it (2.4)
#	hack/containerd.sh runc     runc of this machine's Debian, to compare with
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1-}
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/containerd
package=containerd programs=usr/bin
case $which in
"" | trixie) ;;
runc) package=runc programs=usr/sbin cache=${cache%containerd}runc ;;
module) # without C: only the snapshotter of btrfs, which has no use here, is written in it
	CGO_ENABLED=0 exec hack/tools.sh test/pods/containerd
	;;
*) echo "containerd: \"$which\": want trixie, module, runc, or nothing" >&2 && exit 1 ;;
esac
mkdir -p "$cache"
cache=$(realpath "$cache")

if [ "$which" = trixie ]; then
	found=("$cache"/trixie-*/"$programs")
	if [ -d "${found[-1]}" ]; then
		echo "${found[-1]}"
		exit
	fi
fi

options=(-q -o APT::Sandbox::User=root)
# fetch downloads the package into the directory where it is called.
fetch() { apt-get "${options[@]}" download "$package" >log 2>&1; }
candidate() { apt-cache "${options[@]}" policy "$package" | sed -n 's/^  Candidate: \([0-9].*\)/\1/p'; }

# debian13 makes an apt of its own in this directory, which knows Debian 13 alone, from the mirror of the machine's sources.
debian13() {
	local mirror
	mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
		sed -nE 's#^(URIs:|deb (\[[^]]*\] )?) *([^ ]+/debian/?)( .*)?$#\3#p' | head -n 1)
	[ -n "$mirror" ] || { echo "containerd: apt's sources of this machine name no Debian mirror" >&2 && return 1; }
	mkdir -p apt/lists/partial apt/cache/archives/partial
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >apt/sources.list
	: >apt/status # nothing is installed there
	options+=(-o "Dir::Etc::sourcelist=$PWD/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
		-o "Dir::State::Lists=$PWD/apt/lists" -o "Dir::State::status=$PWD/apt/status" -o "Dir::Cache=$PWD/apt/cache"
		-o Acquire::Languages=none -o Debug::NoLocking=1)
	apt-get "${options[@]}" update >log 2>&1 </dev/null || { cat log >&2 && return 1; }
}

version=
[ "$which" = trixie ] || version=$(candidate)
if [ -z "$version" ] || [ ! -d "$cache/$version" ]; then
	echo "containerd: fetching Debian's package $package" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	cd "$new"
	[ "$which" != trixie ] || debian13
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
	version=${which:+$which-}$(candidate)
	version=${version#runc-}
	dpkg-deb -x ./*.deb root
	chmod 0755 root
	mv -T root "$cache/$version" 2>/dev/null || [ -d "$cache/$version" ] # somebody else was faster
fi
echo "$cache/$version/$programs"
