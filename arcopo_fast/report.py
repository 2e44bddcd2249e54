"""Write the report of a run again, or one page that compares several runs.

    python -m arcopo_fast.report RUN [RUN ...] [--out FILE]

Runs that differ in their seed alone are one series, drawn as a mean with its spread; other differences make series of their own. The page
is one HTML file with everything in it: no network, no scripts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arcopo_fast.cli import Parser, run_command
from arcopo_fast.reports.comparison import write_comparison
from arcopo_fast.reports.run import write_report


def html_file(text: str) -> Path:
    """Convert an option (`type=`): a page that can be written; never a file of another kind."""
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"expected the name of a .html file; given {text!r}")
    if path.is_dir() or not path.parent.is_dir():
        problem = f"{path} is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {problem}")
    return path


def command_line() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "python -m arcopo_fast.report", "Write the report of a run again, or one page that compares several runs.", one_process=True
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="the directory of a run, as in runs/toy; with several, the page compares them"
    )
    parser.add_argument(
        "--out",
        type=html_file,
        metavar="FILE",
        help="the .html file to write (default: report.html in the run's directory; of several runs, report.html here)",
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    options = command_line().read(argv)
    if options is None:
        return
    runs = list({Path(run).resolve(): Path(run) for run in options.runs}.values())  # a run that is given twice counts once
    path = write_report(runs[0], options.out) if len(runs) == 1 else write_comparison(runs, options.out or Path("report.html"))
    print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
