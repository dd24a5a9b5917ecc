#!/usr/bin/env bash
# The checks that need no machine: formatting, go vet, staticcheck, and the syntax of the scripts.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t dirs < <(go list -f '{{.Dir}}' ./...)
unformatted=$(go tool gofumpt -l "${dirs[@]}")
if [ -n "$unformatted" ]; then
	echo "lint: not formatted; run: go tool gofumpt -w" $unformatted >&2
	exit 1
fi
go vet ./...
go tool staticcheck ./...
for script in hack/*.sh .ci/run test/*.sh; do
	bash -n "$script"
done
for script in test/guest/build/root/*; do
	case $script in *.awk) ;; *) sh -n "$script" ;; esac
done
