# Has the real cloud-init render network configurations: standard input is a list of jobs in JSON, each the arguments of
# `cloud-init devel net-convert`. One process for all: starting it takes longer than its work.
import contextlib
import io
import json
import sys
import traceback

from cloudinit.cmd.devel import net_convert

for args in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            net_convert.handle_args("net-convert", net_convert.get_parser().parse_args(args))
        except Exception:
            traceback.print_exc()
    # What it reads and writes is no news.
    for line in said.getvalue().splitlines():
        if line and not line.startswith(("Read input format", "Wrote output format")):
            print(*args, line)
