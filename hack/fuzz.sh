#!/usr/bin/env bash
# Runs every fuzz target of the module, or of the packages that are named, FUZZTIME (60s) each: one worker per target, as
# many targets at once as there are processors. What fails is printed, and its input is kept below testdata/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- ./...

targets() {
	local package
	for package in $(go list "$@"); do
		go test -list '^Fuzz' "$package" | sed -n "s|^Fuzz|$package &|p"
	done
}

# A target that runs out of time now and then fails by the deadline alone, having found nothing: a race in Go's fuzzer up
# to Go 1.26 (go.dev/issue/75804). Whatever it does find is named, so a failure that names nothing but the deadline is none.
deadline_alone() {
	[ "$(sed -n '/^--- FAIL/,/^FAIL$/p' <<<"$1" | sed '1d;$d' | tr -d ' ')" = contextdeadlineexceeded ]
}

one() {
	local out
	if ! out=$(go test -run '^$' -fuzz "^$2\$" -fuzztime "${FUZZTIME:-60s}" -parallel 1 "$1" 2>&1) && ! deadline_alone "$out"; then
		printf 'fuzz: %s %s\n%s\n' "$1" "$2" "$out" >&2
		return 1
	fi
	printf 'fuzz: %s %s: %s\n' "$1" "$2" "$(sed -n 's/.* \(execs: [0-9]*\).*/\1/p' <<<"$out" | tail -n 1)"
}

export -f one deadline_alone
targets "$@" | xargs -r -L 1 -P "$(nproc)" bash -c 'one "$@"' fuzz
