# The variables that udhcpc gave, as a JSON object.
BEGIN {
	for (k in ENVIRON)
		if (k !~ /^(PATH|HOME|PWD|OLDPWD|SHLVL|TERM|_)$/)
			out = join(out, field(k, quote(ENVIRON[k])))
	print "{" out "}"
}
