#!/usr/bin/env bash
# The main job, to be looked at: a VM on the embedded default network gets its address by DHCP and is reached over that
# network. It runs in a network namespace that stands for the node, with directories of its own, and leaves nothing.
# Needs: bin/virtlet and bin/cni, and the test guest (directory in $1).
set -euo pipefail
cd "$(dirname "$0")/.."

guest=${1:?usage: test/demo.sh GUEST-DIRECTORY}
node=demo-node-$$
name=demo-$$
dir=$(mktemp -d /tmp/virtlet-demo.XXXXXX)
virtlet() { nsenter --net="/run/netns/$node" bin/virtlet --run-dir "$dir/run" --data-dir "$dir/data" "$@"; }
on_node() { nsenter --net="/run/netns/$node" "$@"; }

end() {
	code=$?
	trap - EXIT
	virtlet rm -f "$name" 2>/dev/null || true
	ip netns del "$node" 2>/dev/null || true
	rm -rf "$dir"
	exit $code
}
trap end EXIT
trap 'exit 130' INT TERM

ip netns add "$node"
on_node ip link set lo up

echo "== virtlet run: a VM on the embedded network"
virtlet run -d --name "$name" --memory 256M -p 8080:80 --cni-conf-dir "$dir/none" \
	--kernel "$guest/vmlinuz" --initrd "$guest/initrd" --append "$(cat "$guest/cmdline")" >/dev/null

echo "== the guest boots (without KVM that takes some seconds)"
report=
for _ in $(seq 600); do
	report=$(virtlet logs "$name" | tr -d '\r' | grep -a '^{"hostname"' | tail -n 1 || true)
	[ -z "$report" ] || break
	sleep 0.2
done
[ -n "$report" ] || { virtlet logs "$name" | tail -n 30 >&2; echo "the guest did not report its network within 120 s" >&2; exit 1; }

# The first address of the plan is what the CNI plugins gave; the guest must have got the same by DHCP.
planned=$(virtlet inspect --json "$name" | grep -Eo '"addr": "[0-9.]+/[0-9]+"' | head -n 1 | grep -Eo '[0-9.]+/[0-9]+')
case $report in
*"\"$planned\""*) echo "== the guest has $planned, as its CNI result says" ;;
*) echo "the guest has not got $planned: $report" >&2; exit 1 ;;
esac
virtlet ps

address=${planned%/*}
echo "== from the node: ping and HTTP to $address, and to the published port"
on_node ping -c 3 -i 0.2 -W 2 "$address"
on_node curl -sSf --max-time 20 "http://$address/"
gateway=$(on_node ip -4 -o addr show virtlet0 | grep -Eo 'inet [0-9.]+' | cut -d' ' -f2)
on_node curl -sSf --max-time 20 "http://$gateway:8080/"

echo "== virtlet stop: the guest powers down"
virtlet stop -t 60s "$name"
virtlet ps
virtlet rm "$name"
echo "== done: the VM was seen to get its address and to be reached"
