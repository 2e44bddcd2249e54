"""Aligns streaming autoregressive video generators with rewards."""

import sys

# python -m arcopo_fast.<command> is starting: its imports take seconds, in which Ctrl-C would be a traceback. Others are left alone.
if sys.argv[:1] == ["-m"] and any(word.removeprefix("-m").partition(".")[0] == "arcopo_fast" for word in sys.orig_argv):
    from arcopo_fast.runtime.console import Handler as _Handler
    from arcopo_fast.runtime.console import end as _end

    _Handler(_end).__enter__()
