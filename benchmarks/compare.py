"""Compare two files of results of one device.

    python -m benchmarks.compare OLD NEW [--noise 0.05]

Exit status 1 if a case became slower beyond noise or fails now, 2 if a file cannot be read or the two cannot be compared. Noise is the
larger of --noise and of half of both interquartile ranges together, relative to the old median: two medians differ when the boxes of their
quartiles, centered on them, do not touch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import OURS, case_name, duration


class Unreadable(Exception):
    """A file of results that cannot be read or compared; the message is one line."""


def read(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list) or not isinstance(report.get("environment"), dict):
        raise Unreadable(f"{path}: holds no results of benchmarks; expected an object with 'environment' and 'cases'")
    return report


def compare(old: Mapping[str, Any], new: Mapping[str, Any], noise: float) -> tuple[list[str], int]:
    """The lines of a table, and how many cases became slower beyond noise or fail now.

    Raises:
        Unreadable: the two were measured on different devices, share no case, or lack a figure.
    """
    devices = [report["environment"].get("device") for report in (old, new)]
    if devices[0] != devices[1]:
        raise Unreadable(f"measured on {devices[0]} and on {devices[1]}: only results of one device can be compared")
    try:
        before, after = ({case_name(case): case for case in report["cases"]} for report in (old, new))
        if not before.keys() & after.keys():
            raise Unreadable("the two files share no case")
        rows = [(name, *_judge(before.get(name), after.get(name), noise)) for name in {**before, **after}]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise Unreadable(f"a case lacks a figure: {type(error).__name__} {error}") from None
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}s} {'old':>10s} {'new':>10s} {'change':>8s} {'noise':>7s}"]
    lines += [f"{name:{width}s} {figures}  {verdict}".rstrip() for name, figures, verdict, _ in rows]
    return lines, sum(worse for *_, worse in rows)


def _judge(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, noise: float) -> tuple[str, str, bool]:
    """Figures of one case, a word on them, and whether the new ones are worse."""
    if old is None or new is None:
        return f"{'':38s}", "only in the new file" if old is None else "only in the old file", False
    if "failed" in old or "failed" in new:
        word = "fails in both" if "failed" in old and "failed" in new else "fails now" if "failed" in new else "failed before"
        return f"{'':38s}", word, word == "fails now"
    a, b = old["variants"][OURS], new["variants"][OURS]
    change = b["median"] / a["median"] - 1
    allowed = max(noise, ((a["q3"] - a["q1"]) + (b["q3"] - b["q1"])) / 2 / a["median"])
    word = "SLOWER" if change > allowed else "faster" if change < -allowed else ""
    return f"{duration(a['median']):>10s} {duration(b['median']):>10s} {change:+8.1%} {allowed:7.1%}", word, word == "SLOWER"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare two files of results of one device.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=0.05, help="least relative change that counts (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        lines, worse = compare(read(arguments.old), read(arguments.new), arguments.noise)
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    if worse:
        print(f"{worse} of the cases are worse by more than noise", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
