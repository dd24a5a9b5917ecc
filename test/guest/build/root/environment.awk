# The variables that a DHCP client gave, as a JSON object: those whose names match the pattern "only", without "prefix".
BEGIN {
	for (k in ENVIRON)
		if (k ~ only && k !~ /^(PATH|HOME|PWD|OLDPWD|SHLVL|TERM|_)$/) {
			name = k
			if (prefix != "")
				sub(prefix, "", name)
			out = join(out, field(name, quote(ENVIRON[k])))
		}
	print "{" out "}"
}
