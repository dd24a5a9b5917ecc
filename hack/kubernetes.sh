#!/usr/bin/env bash
# Builds Kubernetes and etcd of the versions that test/kubernetes/cluster/go.mod pins into the cache, if they are not there,
# and prints the directory of the programs: etcd, kube-apiserver, kube-controller-manager, kube-proxy, kube-scheduler,
# kubelet, kubectl, which are links to one. It takes a quarter of an hour the first time, and 160 MB. They are complete or
# not there at all, so two builds at once do no harm.
#
# For another version 1.X.Y: write it into that go.mod, with `replace k8s.io/NAME => k8s.io/NAME v0.X.Y` for each line of
# Kubernetes' own go.mod that replaces by ./staging (but its samples), with the etcd that it requires, and `go mod tidy`.
set -euo pipefail
self=$(sha256sum <"$0")
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/kubernetes
mkdir -p "$cache"
cache=$(realpath "$cache")

cd "$(dirname "$0")/../test/kubernetes/cluster"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
key=$version-$(printf '%s\n' "$(go env GOVERSION GOARCH)" "$(cat go.mod go.sum main.go)" "$self" | sha256sum | cut -c1-12)
if [ ! -d "$cache/$key" ]; then
	echo "kubernetes: building $version and etcd, which takes a quarter of an hour" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	chmod 0755 "$new"
	stamp=k8s.io/component-base/version
	IFS=. read -r major minor _ <<<"${version#v}"
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$new/cluster" -ldflags \
		"-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor" .
	for name in etcd kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubelet kubectl; do
		ln -s cluster "$new/$name"
	done
	mv -T "$new" "$cache/$key" 2>/dev/null || [ -d "$cache/$key" ] # somebody else was faster
fi
echo "$cache/$key"
