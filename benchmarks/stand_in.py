"""A stand-in for compute-sanitizer, for a dry run: it takes the same command line, runs the program, and finds what was planted.

python -m benchmarks.stand_in --tool memcheck --error-exitcode 86 PYTHON -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stand_in", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), required=True)
    parser.add_argument("--error-exitcode", type=int, required=True)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    errors = int("--plant" in arguments.program)
    status: object = 0
    if not errors:  # in Triton's interpreter it would write where it must not
        sys.argv = arguments.program[2:]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    print(f"========= ERROR SUMMARY: {errors} errors")
    return arguments.error_exitcode if errors else int(bool(status))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
