"""The results of an evaluation, as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence

from arcopo_fast.evaluation.compare import Result, as_json, compare
from arcopo_fast.evaluation.drift import as_json as segments_as_json
from arcopo_fast.evaluation.drift import courses
from arcopo_fast.evaluation.scores import ScoreDirectory, Scores
from arcopo_fast.reports.segments import segment_page, segment_tables
from arcopo_fast.reports.table import brackets, interval_change, markdown_table, plain
from arcopo_fast.storage.atomic import atomic_write

REPORT = "report.html"
NOTE = (
    "All generators have the same prompts and noises. Brackets are 95 % intervals, clustered by prompt, with Student's t; the difference "
    "is to the base model, video by video, and ≈ marks one whose interval contains 0 or has no width: no gain and no loss was shown. "
    "Better is the share of videos that score higher than the base model's. Each interval stands for itself: of 20 differences that are "
    "none, one is expected to look like one."
)


def write_results(directory: ScoreDirectory, scores: Scores, generators: Sequence[str] | None = None) -> str:
    """Write results.json and table.md, and of long videos report.html; returns the table. generators: those shown, in order; None: all."""
    weights = {key.removeprefix("rewards."): value for key, value in directory.settings.items() if key.startswith("rewards.")}
    results = compare(scores, weights, generators)
    shown = list(dict.fromkeys(result.generator for result in results))
    document = {
        "settings": directory.settings,
        "prompts": len(scores.prompts),
        "adapters": {name: scores.adapters[name] for name in shown},
        "results": as_json(results),
    }
    table = as_markdown(results)
    if scores.segments:
        found = courses(scores, directory.settings, generators)
        document["segments"] = segments_as_json(found)
        table = f"{segment_tables(found)}\nMeans over the segments:\n\n{table}"
        atomic_write(directory.path / REPORT, segment_page(found, directory.settings, len(scores.prompts)))
    atomic_write(directory.path / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
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
            f"{plain(result.interval.mean)} {brackets(result.interval, plain)}".strip(),
            interval_change(result.difference.interval) if result.difference else "",
            f"{result.difference.improved:.0%} of {result.difference.pairs}" if result.difference else "",
        ]
        for result in results
    ]
    incomplete = [result for result in results if result.failed and result.kind != "total"]
    failed = [f"{result.name} of {result.generator}: {result.failed} of {result.videos}" for result in incomplete]
    lost = f"Scores that failed, left out together with the pairs that they belong to: {'; '.join(failed)}." if failed else ""
    return "\n\n".join(filter(None, [markdown_table(head, rows).rstrip(), lost, NOTE])) + "\n"
