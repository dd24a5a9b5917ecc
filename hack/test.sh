#!/usr/bin/env bash
# Runs the checks, the tests and every fuzz target for FUZZTIME (60s), or what the arguments for `go test` say; with "lab" in
# front of them in the labs of CNI plugins alone, with "guest" the tests that boot a whole Debian alone. The tests find what
# the Makefile built by VIRTLET_BIN, VIRTLET_CNI_BIN, VIRTLET_GUEST, VIRTLET_DEBIAN and VIRTLET_CLOUDINIT.
set -euo pipefail
cd "$(dirname "$0")/.."

export VIRTLET_BIN=${VIRTLET_BIN:-$PWD/bin/virtlet} VIRTLET_CNI_BIN=${VIRTLET_CNI_BIN:-$PWD/bin/cni}

if [ "$(id -u)" = 0 ]; then # others skip the tests of pods
	VIRTLET_CONTAINERD=${VIRTLET_CONTAINERD:-$(hack/containerd.sh)}
	export VIRTLET_CONTAINERD
fi

if [ "${1-}" = lab ]; then
	exec go test -count=1 -timeout 30m ./test/lab "${@:2}"
fi
if [ "${1-}" = guest ]; then
	exec go test -count=1 -p 1 -timeout 30m ./test ./test/pods -v -run '^TestDebian' "${@:2}"
fi
if [ $# -gt 0 ]; then
	exec go test -p 1 -timeout 30m "$@" ./...
fi
hack/lint.sh
if [ "$(id -u)" != 0 ]; then
	echo "test: not root: tests that make network namespaces are skipped" >&2
fi
# Ratios of times say something without the race detector only, and while nothing else runs.
go test -count=1 -run Cost ./internal/podnet
# The labs' programs are built before, for the same reason.
for module in test/lab/*/go.mod; do
	hack/tools.sh "$(dirname "$module")" >/dev/null
done
hack/etcd.sh >/dev/null
# Two packages at once: the tests boot guests and measure time-outs on real kernels, which a crowd would disturb.
go test -race -count=1 -p 2 -timeout 30m ./...
exec hack/fuzz.sh
