# The state of the guest as one line of JSON. /run/nics and /run/disks are what init found.

function words(file,    s, out) {
	while ((getline s <file) > 0)
		out = join(out, quote(s))
	close(file)
	return "[" out "]"
}

# names gives the lines of what DHCPv4, DHCPv6 and the routers say, in this order and without doubles.
function names(file,    cmd, s, seen, out) {
	cmd = "cat " file " " file "6 " file "ra 2>/dev/null"
	while ((cmd | getline s) > 0)
		if (!seen[s]++)
			out = join(out, quote(s))
	close(cmd)
	return "[" out "]"
}

# object gives the JSON object in a file, null if there is none.
function object(file,    s) {
	s = line(file)
	return s == "" ? "null" : s
}

function addresses(nic,    cmd, out, f) {
	cmd = "ip -o addr show dev " nic
	while ((cmd | getline) > 0)
		if ($3 ~ /^inet6?$/)
			out = join(out, quote($4))
	close(cmd)
	return "[" out "]"
}

# route turns a line of `ip route` into an object, "" for one that is no unicast route.
function route(v6,    dst, i, out) {
	dst = $1
	if (dst == "default")
		dst = v6 ? "::/0" : "0.0.0.0/0"
	else if (dst !~ /^[0-9a-f:.\/]+$/)
		return ""
	else if (dst !~ /\//)
		dst = dst (v6 ? "/128" : "/32")
	out = field("dst", quote(dst))
	for (i = 2; i < NF; i++)
		if ($i == "via")
			out = out "," field("gw", quote($(++i)))
		else if ($i == "metric" || $i == "mtu")
			out = out "," field($i, $(++i) + 0)
		else if ($i == "scope" || $i == "src")
			out = out "," field($i, quote($(++i)))
	return "{" out "}"
}

function routes(nic,    cmd, out, r) {
	cmd = "ip route show dev " nic
	while ((cmd | getline) > 0)
		if ((r = route(0)) != "")
			out = join(out, r)
	close(cmd)
	cmd = "ip -6 route show dev " nic
	while ((cmd | getline) > 0)
		if ((r = route(1)) != "")
			out = join(out, r)
	close(cmd)
	return "[" out "]"
}

function nic(name, pci, driver,    sys, run) {
	sys = "/sys/class/net/" name "/"
	run = "/run/nic/" name "."
	return "{" field("name", quote(name)) "," field("mac", quote(line(sys "address"))) \
		"," field("mtu", line(sys "mtu") + 0) "," field("pci", quote(pci)) "," field("driver", quote(driver)) \
		"," field("carrier", line(sys "carrier") == 1 ? "true" : "false") \
		"," field("addrs", addresses(name)) "," field("routes", routes(name)) \
		"," field("dns", names(run "dns")) "," field("search", names(run "search")) \
		"," field("domain", quote(line(run "domain"))) "," field("lease", line(run "lease") + 0) \
		"," field("events", words(run "events")) "," field("dhcp", object(run "dhcp")) \
		"," field("dhcp6", object(run "dhcp6")) "," field("ra", object(run "ra")) "}"
}

function nics(    s, f, out) {
	while ((getline s <"/run/nics") > 0) {
		split(s, f, " ")
		out = join(out, nic(f[1], f[2], f[3]))
	}
	return "[" out "]"
}

function disks(    s, f, out) {
	while ((getline s <"/run/disks") > 0) {
		split(s, f, "\t")
		out = join(out, "{" field("name", quote(f[1])) "," field("size", f[2] * 512) \
			"," field("readOnly", f[3] == 1 ? "true" : "false") "," field("label", quote(f[4])) "}")
	}
	return "[" out "]"
}

# slurp gives a whole text file.
function slurp(file,    s, rs) {
	rs = RS
	RS = "\001"
	s = ""
	getline s <file
	close(file)
	RS = rs
	return s
}

function seed(    cmd, s, out) {
	cmd = "find /run/seed -type f -size -65 | sort" # in KiB: what a console can carry
	while ((cmd | getline s) > 0)
		out = join(out, field(substr(s, length("/run/seed/") + 1), quote(slurp(s))))
	close(cmd)
	return "{" out "}"
}

BEGIN {
	print "{" field("hostname", quote(line("/proc/sys/kernel/hostname"))) \
		"," field("kernel", quote(line("/proc/sys/kernel/osrelease"))) \
		"," field("uptime", line("/proc/uptime") + 0) "," field("cmdline", quote(line("/proc/cmdline"))) \
		"," field("resolvConf", quote(slurp("/run/resolv.conf"))) "," field("nics", nics()) \
		"," field("disks", disks()) "," field("seed", seed()) "}"
}
