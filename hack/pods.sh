#!/usr/bin/env bash
# Runs the tests of pods with every containerd: those of Debian 12 and 13, and a new one, with which crictl and critest run
# as well; with "bench" in front of the arguments for `go test`, the comparison with runc alone. It fetches and builds what
# they need into the cache; the Makefile's part is as for hack/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "pods: these tests need root" >&2 && exit 1; }

export VIRTLET_BIN=${VIRTLET_BIN:-$PWD/bin/virtlet} VIRTLET_CNI_BIN=${VIRTLET_CNI_BIN:-$PWD/bin/cni}
# with runs the tests with one containerd; the arguments are a kind of hack/containerd.sh and those for `go test`.
with() {
	local dir
	dir=$(hack/containerd.sh "$1")
	VIRTLET_CONTAINERD=$dir go test -count=1 -timeout 30m -v ./test/pods "${@:2}"
}

if [ "${1-}" = bench ]; then
	VIRTLET_RUNC=$(hack/containerd.sh runc)
	export VIRTLET_RUNC
	with module -run '^$' -bench Pods -benchtime 1x "${@:2}"
	exit
fi
failed=0
with "" "$@" || failed=1
with trixie "$@" || failed=1
# critest asks the manager as much as the runtime: it is of the same age as the newest.
VIRTLET_CRITOOLS=$(CGO_ENABLED=0 hack/tools.sh test/pods/critools)
export VIRTLET_CRITOOLS
with module "$@" || failed=1
exit $failed
