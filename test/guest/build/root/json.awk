# JSON (RFC 8259) from awk.

function quote(s,    i, c) {
	gsub(/\\/, "&&", s)
	gsub(/"/, "\\\\&", s)
	gsub(/\n/, "\\n", s)
	gsub(/\t/, "\\t", s)
	gsub(/\r/, "\\r", s)
	if (s ~ /[\001-\037\177]/)
		for (i = 1; i < 32; i++) {
			c = sprintf("%c", i)
			gsub(c, sprintf("\\u%04x", i), s)
		}
	return "\"" s "\""
}

function field(name, value) { return quote(name) ":" value }

# join adds a JSON value to a list of them.
function join(list, value) { return list == "" ? value : list "," value }

# line gives the first line of a file, "" if there is none.
function line(file,    s) {
	s = ""
	getline s <file
	close(file)
	return s
}
