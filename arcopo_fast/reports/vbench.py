"""VBench's results, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from arcopo_fast.evaluation.vbench.data import DIMENSIONS, VBenchScores
from arcopo_fast.reports.table import markdown_table
from arcopo_fast.storage.atomic import atomic_write


def write_total(out: Path, results: Mapping[str, VBenchScores]) -> str:
    """Write vbench.json and vbench.md to the directory `out`; returns the table."""
    table = vbench_table(results)
    atomic_write(out / "vbench.json", json.dumps({name: scores.summary() for name, scores in results.items()}, indent=2) + "\n")
    atomic_write(out / "vbench.md", table)
    return table


def vbench_table(results: Mapping[str, VBenchScores]) -> str:
    """Return results in per cent, as a Markdown table: of one generator, or of two with the raw scores of both and their change."""
    if len(results) == 1:
        (scores,) = results.values()
        columns = ["", "raw", "normalised", "videos"]
        rows = [
            [name, _percent(scores.raw[name]), _percent(scores.normalized(name)), str(scores.videos[name] or "")] for name in DIMENSIONS
        ]
        rows += [[f"**{name}**", "", _percent(mean), ""] for name, mean in scores.means().items()]
    else:
        columns = ["", *results, "change"]
        before, after = results.values()
        rows = [[name, *_pair(before.raw[name], after.raw[name])] for name in DIMENSIONS]
        rows += [[f"**{name}**", *_pair(mean, after.means()[name])] for name, mean in before.means().items()]
    return markdown_table(columns, rows, numbers=True)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _pair(first: float, second: float) -> list[str]:
    return [_percent(first), _percent(second), f"{100 * (second - first):+.2f}"]
