#!/usr/bin/env bash
# Unpacks Debian's cloud-init, and what its renderers write for (netplan, ifupdown), into the cache, if they are not
# there, and prints the directory. Nothing is installed: cloud-init on a test machine would take it for a new instance at
# the next boot. What is unpacked is complete or not there at all, so two at once do no harm.
set -euo pipefail

packages=(
	cloud-init python3-attr python3-certifi python3-chardet python3-charset-normalizer python3-configobj python3-idna
	python3-jinja2 python3-json-pointer python3-jsonpatch python3-jsonschema python3-markupsafe python3-netifaces
	python3-oauthlib python3-pyrsistent python3-requests python3-serial python3-six python3-urllib3 python3-yaml
	netplan.io libnetplan0 libglib2.0-0 libffi8 ifupdown net-tools
)

cache=${VIRTLET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtlet}/cloudinit
mkdir -p "$cache"
cache=$(realpath "$cache")
key=$(sha256sum "$0" | cut -c1-12)
if [ ! -d "$cache/$key" ]; then
	echo "cloudinit: unpacking ${#packages[@]} Debian packages" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	chmod 0755 "$new"
	mkdir "$new/debs" "$new/root"
	get() { (cd "$new/debs" && apt-get download -q -o APT::Sandbox::User=root "${packages[@]}" >"$new/log" 2>&1); }
	# Package lists that are missing or out of date are the usual reason why it does not work the first time.
	if ! get && ! { apt-get update -q >"$new/log" 2>&1 && get; }; then
		cat "$new/log" >&2
		echo "cloudinit: could not get Debian's packages" >&2
		exit 1
	fi
	for deb in "$new"/debs/*.deb; do dpkg-deb -x "$deb" "$new/root"; done
	mv -T "$new/root" "$cache/$key" 2>/dev/null || [ -d "$cache/$key" ] # somebody else was faster
fi
echo "$cache/$key"
