"""The results of an evaluation, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from arcopo_fast.evaluation.compare import Interval, Result, as_json, compare
from arcopo_fast.evaluation.scores import ScoreDirectory, Scores
from arcopo_fast.reports.table import markdown_table, plain, signed
from arcopo_fast.storage.atomic import atomic_write

NOTE = (
    "All generators have the same prompts and noises. Brackets are 95 % intervals, clustered by prompt, with Student's t; the difference "
    "is to the base model, video by video, and ≈ marks one whose interval contains 0 or has no width: no gain and no loss was shown. "
    "Better is the share of videos that score higher than the base model's. Each interval stands for itself: of 20 differences that are "
    "none, one is expected to look like one."
)


def write_results(directory: ScoreDirectory, scores: Scores, generators: Sequence[str] | None = None) -> str:
    """Write results.json and table.md; returns the table. generators: those shown, in this order; None: all."""
    weights = {key.removeprefix("rewards."): value for key, value in directory.settings.items() if key.startswith("rewards.")}
    results = compare(scores, weights, generators)
    shown = list(dict.fromkeys(result.generator for result in results))
    document = {
        "settings": directory.settings,
        "prompts": len(scores.prompts),
        "adapters": {name: scores.adapters[name] for name in shown},
        "results": as_json(results),
    }
    atomic_write(directory.path / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    table = as_markdown(results)
    atomic_write(directory.path / "table.md", f"# Evaluation\n\n{table}")
    return table


def as_markdown(results: Sequence[Result]) -> str:
    """Return a table of all results, what failed, and how to read it."""
    head = ["score", "", "generator", "videos", "mean", "difference", "better"]
    rows = [
        [
            result.name,
            result.kind,
            result.generator,
            str(result.videos - result.failed),
            f"{plain(result.interval.mean)} {_brackets(result.interval, plain)}".strip(),
            _change(result.difference.interval) if result.difference else "",
            f"{result.difference.improved:.0%} of {result.difference.pairs}" if result.difference else "",
        ]
        for result in results
    ]
    incomplete = [result for result in results if result.failed and result.kind != "total"]
    failed = [f"{result.name} of {result.generator}: {result.failed} of {result.videos}" for result in incomplete]
    lost = f"Scores that failed, left out together with the pairs that they belong to: {'; '.join(failed)}." if failed else ""
    return "\n\n".join(filter(None, [markdown_table(head, rows).rstrip(), lost, NOTE])) + "\n"


def _change(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{signed(interval.mean)} (one prompt: no interval)"
    # As many digits as tell the interval from 0: three, or more where all of it is smaller than that shows.
    largest = max(abs(interval.low), abs(interval.high))
    digits = 3 if largest == 0 else min(9, max(3, 1 - math.floor(math.log10(largest))))
    shown = partial(signed, digits=digits)
    return f"{shown(interval.mean)} {_brackets(interval, shown)}{'' if interval.direction else ' ≈'}"


def _brackets(interval: Interval, shown: Any) -> str:
    return f"[{shown(interval.low)}, {shown(interval.high)}]" if math.isfinite(interval.low) else ""
