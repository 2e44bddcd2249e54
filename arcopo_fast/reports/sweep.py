"""A merge sweep shown: tables, a page that needs nothing else, and the adapter of the chosen scale."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from arcopo_fast.config.reading import resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.adapters import Pair, scale_text
from arcopo_fast.evaluation.changes import Change
from arcopo_fast.evaluation.sweep import ADAPTER, HELD_OUT, MERGE, Point, Summaries, Sweep
from arcopo_fast.model.lora import write_adapter
from arcopo_fast.reports.charts import Spread, line_chart
from arcopo_fast.reports.html import page, section, table
from arcopo_fast.reports.model_card import merged_card
from arcopo_fast.reports.table import markdown_table, plain, plus_minus, signed
from arcopo_fast.storage.atomic import atomic_write, remove_directory
from arcopo_fast.storage.metrics import TOTAL

_LABELS = {TOTAL: "in-domain", HELD_OUT: "out-of-domain"}

Row = Sequence[tuple[str, str]]
"""Cells of a table, as text: a value, and its change if there is one."""


def write_sweep(out: Path, config: Config, found: Sweep) -> str:
    """Write what comes of a sweep: sweep.md, sweep.html, sweep.json and, if a scale was chosen, the adapter. Returns the Markdown."""
    markdown = as_markdown(found)
    if found.chosen:
        write_merged(out / ADAPTER, found.pair, found.chosen.scale, results=markdown)
    elif (out / ADAPTER / MERGE).is_file():  # of other scales or metrics
        remove_directory(out / ADAPTER)
    document = {
        "adapters": _merged(found.pair),
        "in_domain": TOTAL,
        "out_of_domain": found.names,
        "baseline": found.evaluations[None],
        "scales": [as_json(point, found.evaluations[point.scale]) for point in found.points],
        "chosen": found.chosen.scale if found.chosen else None,
    }
    atomic_write(out / "sweep.md", f"# Merge sweep\n\n{markdown}")
    atomic_write(out / "sweep.html", as_page(config, found))
    atomic_write(out / "sweep.json", json.dumps(document, indent=2) + "\n")
    return markdown


def write_merged(directory: Path, pair: Pair, scale: float, *, results: str = "") -> None:
    """Write the adapter in both forms, its model card and `merge.json`, in the place of what `directory` held. results: for the card."""
    base_model = pair.base_models[0] if len(pair.base_models) == 1 else None
    record = {name: source.summary() for name, source in pair._asdict().items()} | {"scale": scale}
    more = {MERGE: json.dumps(record, indent=2) + "\n", "README.md": merged_card(pair, scale, base_model, results)}
    write_adapter(directory, pair.merged(scale), base_model=base_model, more=more)


def _merged(pair: Pair) -> dict[str, dict[str, Any]]:
    return {"semi-on-policy": pair.semi.summary(), "on-policy": pair.on.summary()}


def as_json(point: Point, scores: Summaries) -> dict[str, Any]:
    """An entry of sweep.json. change, error: against the base model; null where no video, or for the error only one, has both scores."""

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    compared = {
        name: {"change": known(change.change), "error": known(change.error)} | dict(scores[name]) for name, change in point.scores.items()
    }
    return {"scale": point.scale, "both_above": point.both_above, "scores": compared}


# Showing ---------------------------------------------------------------------------------------------------------------------------


def result_line(chosen: Point | None) -> str:
    """Return what the criterion chose, and how sure that is."""
    if chosen is None:
        return "No scale has both scores above the base model's, so no adapter is written."
    unsure = [label for name, label in _LABELS.items() if not chosen.scores[name].direction]
    caution = f" {' and '.join(unsure).capitalize()}, the change is within two standard errors." if unsure else ""
    return f"Scale {scale_text(chosen.scale)} is the largest with both scores above the base model's.{caution}"


def note(names: Sequence[str]) -> str:
    """Return how the tables are to be read."""
    return (
        f"In-domain is the weighted sum of the rewards, out-of-domain the mean of {', '.join(names)}, each in standard deviations of the "
        "base model's videos. Every row has the same prompts and noises; changes are against the base model, ± one standard error of the "
        "videos' differences, and ≈ marks those within two of them. Scale 0 is the semi-on-policy adapter alone."
    )


def as_markdown(found: Sweep) -> str:
    """The result and two tables: the criterion's two scores, then every reward and metric."""
    parts = [f"{result_line(found.chosen)}\n"]
    for head, cells in _tables(found.points):
        parts.append(markdown_table(head, ([f"{value} ({change})" if change else value for value, change in row] for row in cells)))
    return "\n".join([*parts, f"{note(found.names)}\n"])


def as_page(config: Config, found: Sweep) -> str:
    """sweep.html: one file that needs nothing else."""
    points, chosen, names = found.points, found.chosen, found.names
    videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
    facts = f"generator {config.generator.checkpoint} · {videos} videos of {config.evaluation.prompts} prompts a scale"
    header = (
        f'<header><h1>Merge sweep</h1><p class="result"><span class="number">{scale_text(chosen.scale) if chosen else "none"}</span> '
        f'{escape(result_line(chosen))}</p><p class="facts">{escape(facts)}</p></header>'
    )
    charts = "".join(
        f"<figure><figcaption><b>{_LABELS[name].capitalize()}</b> {explained}</figcaption>{_chart(points, name)}</figure>"
        for name, explained in (
            (TOTAL, "Weighted sum of the rewards."),
            (HELD_OUT, f"Mean of {escape(', '.join(names))}, in standard deviations."),
        )
    )
    merged = [
        f'<tr><th scope="row">{escape(name)}</th><td>{about["rank"]}</td><td>{about["alpha"]:g}</td>'
        f"<td><code>{about['sha256'][:16]}</code></td><td>{escape(about['file'])}</td></tr>"
        for name, about in _merged(found.pair).items()
    ]
    criterion, others = (_html_table(*tables, chosen=points.index(chosen) if chosen else None) for tables in _tables(points))
    band = "The band is two standard errors of the change: where the base model's line runs inside, the two cannot be told apart."
    recipe = f"<details><summary>config.yaml</summary><pre>{escape(resolved_yaml(config))}</pre></details>"
    parts = [
        header,
        section("Both scores against the scale", f'<div class="charts">{charts}</div>', band),
        section("The criterion", criterion, escape(note(names))),
        section("Every reward and metric", others),
        section("What was merged", table(["", "rank", "alpha", "SHA-256", "file"], merged)),
        section("Settings", recipe),
    ]
    return page("Merge sweep - arcopo_fast", parts)


def _tables(points: Sequence[Point]) -> list[tuple[list[str], list[Row]]]:
    """Heads and rows, the base model's first: the criterion's scores with its verdict, then every reward and metric."""

    def rows(names: Sequence[str]) -> Iterator[Row]:
        yield [("base model", ""), *((plain(points[0].scores[name].before), "") for name in names)]
        for point in points:
            found = [point.scores[name] for name in names]
            yield [(scale_text(point.scale), ""), *((plain(change.after), _change(change)) for change in found)]

    verdicts = [("", ""), *((_verdict(point), "") for point in points)]
    criterion: list[Row] = [[*row, verdict] for row, verdict in zip(rows(list(_LABELS)), verdicts, strict=True)]
    others = [name for name in points[0].scores if name not in _LABELS]
    return [(["scale", *_LABELS.values(), ""], criterion), (["scale", *others], list(rows(others)))]


def _verdict(point: Point) -> str:
    missed = [label for name, label in _LABELS.items() if not point.scores[name].change > 0]
    return "both above" if not missed else f"{missed[0]} not above" if len(missed) == 1 else "neither above"


def _html_table(head: list[str], rows: Sequence[Row], *, chosen: int | None) -> str:
    """chosen: the number of the point whose row is emphasised."""
    lines = []
    for index, ((name, _), *cells) in enumerate(rows, start=-1):
        style = ' class="sum"' if index == chosen else ""
        data = "".join(f"<td>{escape(value)}{f'<br><small>{escape(change)}</small>' if change else ''}</td>" for value, change in cells)
        lines.append(f'<tr{style}><th scope="row" style="overflow-wrap: normal">{name}</th>{data}</tr>')
    return table(head, lines)


def _chart(points: Sequence[Point], name: str) -> str:
    """A score against the scale with a band of two standard errors of its change, and the base model's as a level."""
    compared = [(point.scale, point.scores[name]) for point in points]
    means = [(scale, change.after) for scale, change in compared]
    reach = [2 * change.error if math.isfinite(change.error) else 0.0 for _, change in compared]
    band = [(x, y - error, y + error) for (x, y), error in zip(means, reach)]
    spread = Spread(band, [[(x, low) for x, low, _ in band], [(x, high) for x, _, high in band]])
    level = [(scale, change.before) for scale, change in compared]
    return line_chart({"merged": means, "base model": level}, title=_LABELS[name], spreads={"merged": spread}, x_label="scale")


def _change(change: Change) -> str:
    return f"{signed(change.change)}{plus_minus(change.error)}{'' if change.direction else ' ≈'}"
