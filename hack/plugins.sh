#!/usr/bin/env bash
# Builds the reference CNI plugins that go.mod pins as tools into the cache, if they are not there, and links bin/cni to
# them. They are complete or not there at all, so two builds at once do no harm.
set -euo pipefail
cd "$(dirname "$0")/.."

module=github.com/containernetworking/plugins
version=$(go list -m -f '{{.Version}}' $module)
mapfile -t plugins < <(go list tool | grep "^$module/" | sort)
key=$version-$(printf '%s\n' "$(go env GOVERSION GOARCH)" "${plugins[@]}" "$(sha256sum "$0")" | sha256sum | cut -c1-12)
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/cni
mkdir -p "$cache" bin
cache=$(realpath "$cache")

if [ ! -d "$cache/$key" ]; then
	echo "plugins: building ${#plugins[@]} CNI plugins $version" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	chmod 0755 "$new"
	CGO_ENABLED=0 go build -trimpath -o "$new/" \
		-ldflags "-s -w -X $module/pkg/utils/buildversion.BuildVersion=$version" "${plugins[@]}"
	mv -T "$new" "$cache/$key" 2>/dev/null || [ -d "$cache/$key" ] # somebody else was faster
fi
[ ! -d bin/cni ] || [ -L bin/cni ] || rm -rf bin/cni
ln -sfn "$cache/$key" bin/cni
