#!/usr/bin/env bash
# Builds the programs that the go.mod in a directory pins by its `tool` lines into the cache, if they are not there, and
# prints the directory they are in: hack/tools.sh test/lab/flanneld. They are complete or not there at all, so two
# builds at once do no harm.
set -euo pipefail
self=$(sha256sum <"$0")
cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/tools
mkdir -p "$cache"
cache=$(realpath "$cache")

cd "$1"
key=$(basename "$PWD")-$(printf '%s\n' "$(go env GOVERSION GOARCH)" "$(cat go.mod go.sum)" "$self" | sha256sum | cut -c1-12)
if [ ! -d "$cache/$key" ]; then
	mapfile -t tools < <(go list tool)
	if [ ${#tools[@]} = 0 ]; then
		echo "tools: $PWD/go.mod has no tool line" >&2
		exit 1
	fi
	echo "tools: building ${tools[*]}" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	chmod 0755 "$new"
	# A tool that consists of tests alone is a test's program.
	mapfile -t programs < <(go list -f '{{if .GoFiles}}{{.ImportPath}}{{end}}' tool | sed '/^$/d')
	mapfile -t tests < <(go list -f '{{if not .GoFiles}}{{.ImportPath}}{{end}}' tool | sed '/^$/d')
	[ ${#programs[@]} = 0 ] || go build -trimpath -buildvcs=false -ldflags "-s -w" -o "$new/" "${programs[@]}"
	for t in "${tests[@]}"; do
		go test -c -trimpath -buildvcs=false -ldflags "-s -w" -o "$new/$(basename "$t")" "$t"
	done
	mv -T "$new" "$cache/$key" 2>/dev/null || [ -d "$cache/$key" ] # somebody else was faster
fi
echo "$cache/$key"
