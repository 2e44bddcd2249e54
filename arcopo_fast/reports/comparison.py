"""The page of several runs: one HTML file that sets series beside each other, a series being runs that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from arcopo_fast.evaluation.changes import Change
from arcopo_fast.evaluation.scores import KINDS
from arcopo_fast.reports.charts import line_chart, moving_mean
from arcopo_fast.reports.curves import REWARD, curve, health, reward_statistics
from arcopo_fast.reports.hacking import scatter_charts, verdict
from arcopo_fast.reports.html import change_cells, chip, figures, give_or_take, legend, page, section, table, video
from arcopo_fast.reports.results import Run, read_run, stage_seconds
from arcopo_fast.reports.run import left_out
from arcopo_fast.reports.series import Series, differences, group, mean_and_deviation, over_seeds
from arcopo_fast.reports.table import plain, signed
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.metrics import Chart, number

_MOST_PROMPTS = 4
_MOST_VIDEO_BYTES = 48 << 20  # a page above 64 MB, which base64 makes of it, is no longer one to send

_RESULT_NOTE = (
    "Change from before to after training, on fixed prompts and noise, in standard deviations of a single video before training: the mean "
    "over seeds, ± the standard deviation over seeds."
)
_EVERY_NOTE = "Of one run, ± is the standard error of its change over videos; of a mean over seeds, the standard deviation over seeds."
_HELD_OUT_NOTE = (
    "Each point is a run, its bars two standard errors over videos, both axes in standard deviations of a video before training. Where a "
    "run lies in the shaded corner and its bars cross neither line of no change, the reward is being exploited."
)
_TRAINING_NOTE = (
    "The line is the mean over seeds, as far as all of them went; each seed is a thin line, and the shade goes from the smallest to the "
    "largest. What is measured in every update is shown for the last update of an iteration."
)
_VIDEO_NOTE = "The same prompt and the same noise: before training, then after it in the first seed of each series."
_SETTINGS_NOTE = "What differs between the series; below it, what all of them share, as overrides of the command line."


def write_comparison(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Write the page of several runs; stages that a run did not reach are left out, and listed. Returns its path.

    Raises:
        UserError: a directory is not a run, or a file of it is broken.
    """
    series = group([read_run(directory) for directory in directories])
    by_label = {item.label: item.runs for item in series}
    parts = [
        _headline(series),
        verdict(by_label) if _measured(series) else "",
        section("Before and after", _result_table(series) + _every_change(series), _RESULT_NOTE) if _measured(series) else "",
        section("In-domain against held-out", scattered, _HELD_OUT_NOTE) if (scattered := scatter_charts(by_label)) else "",
        section("Training", _legend(series) + _charts(series), _TRAINING_NOTE) if any(run.records for run in _runs(series)) else "",
        _video_section(series),
        section("Where the time went", _timing_table(series), "Seconds of an iteration.") if any(map(_seconds, series)) else "",
        section("Settings", _settings(series), _SETTINGS_NOTE),
        section("Runs", _run_table(series)),
    ]
    path = Path(path)
    atomic_write(path, page("Comparison of runs - arcopo_fast", parts))
    return path


def _runs(series: Sequence[Series]) -> list[Run]:
    return [run for item in series for run in item.runs]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1 and noun != 'series')}"


def _headline(series: Sequence[Series]) -> str:
    runs = _runs(series)
    stopped = [f"{run.directory} ({run.iterations} of {run.config.train.iterations} iterations)" for run in runs if not run.ended]
    notes = []
    if stopped:
        notes.append(f"Unfinished: {', '.join(stopped)}. Stages that they did not reach are left out.")
    if len({item.settings["rewards"] for item in series}) > 1:
        notes.append("The series weigh rewards differently, so their total rewards cannot be compared with each other.")
    if len({_start(item) for item in series}) > 1:
        notes.append("The series do not start from the same videos: compare their changes, not their values.")
    text = "".join(f"<p>{escape(note)}</p>" for note in notes) + "".join(map(left_out, runs))
    names = ", ".join(dict.fromkeys(run.config.generator.checkpoint for run in runs))
    facts = escape(f"{_count(len(series), 'series')} · {_count(len(runs), 'run')} · generator {names}")
    return f'<header><h1>Comparison of runs</h1><p class="facts">{facts}</p>{text}</header>'


def _legend(series: Sequence[Series]) -> str:
    return legend(item.label for item in series)


# Before and after ------------------------------------------------------------------------------------------------------------------


def _measured(series: Sequence[Series]) -> list[tuple[str, str]]:
    """(kind, name) of everything that some run measured before and after: the total, the rewards, then what is held out.

    What one series trains on and another holds out stands once, as what the first series calls it.
    """
    kinds: dict[str, str] = {}
    for run in _runs(series):
        for change in run.changes:
            kinds.setdefault(change.name, change.kind)
    return sorted(((kind, name) for name, kind in kinds.items()), key=lambda item: KINDS.index(item[0]))


def _changes(item: Series, name: str) -> list[tuple[Run, Change]]:
    return [(run, change) for run in item.runs for change in run.changes if change.name == name]


def _row_head(index: int, text: str) -> str:
    return f'<th scope="row">{chip(index)}{escape(text)}</th>'


def _over_seeds(values: Iterable[float], digits: int = 3, *, sign: bool = False) -> str:
    mean, spread = mean_and_deviation([value for value in values if math.isfinite(value)])
    return (signed(mean, digits) if sign else plain(mean)) + give_or_take(spread, digits)


def _result_table(series: Sequence[Series]) -> str:
    measured = _measured(series)
    rows = []
    for index, item in enumerate(series):
        cells = [f"<td>{_over_seeds((change.in_spreads for _, change in _changes(item, name)), 2, sign=True)}</td>" for _, name in measured]
        evaluated = sum(bool(run.changes) for run in item.runs)
        rows.append(f"<tr>{_row_head(index, item.label)}<td>{evaluated}</td>{''.join(cells)}</tr>")
    heads = [f"{name} (held out)" if kind == "held out" else name for kind, name in measured]
    return table(["", "seeds", *heads], rows, style="series")


def _every_change(series: Sequence[Series]) -> str:
    rows = []
    for kind, name in _measured(series):
        rows.append(f'<tr class="group"><th colspan="5" scope="rowgroup">{escape(name)}, {kind}</th></tr>')
        for index, item in enumerate(series):
            found = _changes(item, name)
            for run, change in found:
                rows.append(f"<tr>{_row_head(index, f'seed {run.config.seed}')}{change_cells(change)}</tr>")
            if len(found) > 1:
                over = [change for _, change in found]
                cells = [
                    _over_seeds(change.before for change in over),
                    _over_seeds(change.after for change in over),
                    _over_seeds((change.change for change in over), sign=True),
                    _over_seeds((change.in_spreads for change in over), 2, sign=True),
                ]
                rows.append(f'<tr class="sum">{_row_head(index, "mean")}{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    every_run = table(["", "before", "after", "change", "in std"], rows)
    return f"<details><summary>Every run and every measure</summary><p class=note>{_EVERY_NOTE}</p>{_legend(series)}{every_run}</details>"


# Training --------------------------------------------------------------------------------------------------------------------------


def _charts(series: Sequence[Series]) -> str:
    names = list(dict.fromkeys(name for item in series for name in item.runs[0].config.score_weights))
    charts, none = [], ""
    shown = dict.fromkeys(chart for item in series for chart in health(item.runs[0].config))
    for statistic in [REWARD, *(reward_statistics(names) if len(names) > 1 else []), *shown]:
        curves = {item.label: _curves(item, statistic) for item in series}
        drawn = [value for lines in curves.values() for points in lines for _, value in points]
        if statistic.if_any and drawn and not any(drawn):
            none += f"<p class=note>{escape(statistic.title)}: none.</p>"
        elif drawn:
            charts.append((statistic.title, statistic.note, _chart(statistic.title, curves)))
    return figures(charts) + none


def _curves(item: Series, statistic: Chart) -> list[list[tuple[float, float]]]:
    """A curve for each run that has one: of at least two points."""
    known = [REWARD, *reward_statistics(item.runs[0].config.score_weights), *health(item.runs[0].config)]
    found = [curve(run.records, statistic) for run in item.runs] if statistic in known else []
    return [moving_mean(points) if statistic.smooth else points for points in found if len(points) > 1]


def _chart(title: str, curves: Mapping[str, Sequence[list[tuple[float, float]]]]) -> str:
    """A line for each series; the series without one keep their colors."""
    found = {label: over_seeds(runs) for label, runs in curves.items()}
    spreads = {label: spread for label, (_, spread) in found.items() if len(spread.lines) > 1}
    return line_chart({label: mean for label, (mean, _) in found.items()}, title=title, spreads=spreads, legend=False)


# Videos ----------------------------------------------------------------------------------------------------------------------------


def _start(item: Series) -> tuple[object, ...]:
    """Return what decides how a video looks before training. Series with the same start can be set beside each other."""
    config = item.runs[0].config
    evaluation = config.evaluation
    generator = (config.generator.checkpoint, config.generator.dtype, config.generator.vae_dtype)
    parts = (config.prompts, evaluation.prompts, evaluation.videos_per_prompt, evaluation.seed, *generator)
    return *parts, *(section.model_dump_json() for section in (config.video, config.sampler, config.cache))


def _video_section(series: Sequence[Series]) -> str:
    """Return a row of videos for each prompt, for each start, as many as the page can carry."""
    starts: dict[tuple[object, ...], list[tuple[int, Series]]] = {}
    for index, item in enumerate(series):
        starts.setdefault(_start(item), []).append((index, item))
    cards: list[str] = []
    skipped = size = 0
    for members in starts.values():
        for place, ((_, prompt), row) in enumerate(_video_rows(members).items()):
            more = sum(path.stat().st_size for path, _, _ in row)
            if place >= _MOST_PROMPTS or (cards and size + more > _MOST_VIDEO_BYTES):
                skipped += 1
                continue
            size += more
            videos = "".join(video(path, label, mark) for path, label, mark in row)
            cards.append(f'<figure><figcaption>{escape(prompt)}</figcaption><div class="strip">{videos}</div></figure>')
    if not cards:
        return ""
    rest = f" Left out here: {_count(skipped, 'more video')} of this kind, in the directories of the runs." if skipped else ""
    return section("Videos", _legend(series) + f'<div class="rows">{"".join(cards)}</div>', _VIDEO_NOTE + rest)


def _video_rows(members: Sequence[tuple[int, Series]]) -> dict[tuple[Any, str], list[tuple[Path, str, str]]]:
    """(number, prompt) of a video -> (file, label, mark) before, then after in each series, of its first seed that has videos.

    The label says the reward, if all series weigh the rewards alike.
    """
    alike = len({item.settings["rewards"] for _, item in members}) == 1  # their rewards can be compared
    rows: dict[tuple[Any, str], list[tuple[Path, str, str]]] = {}
    for index, item in members:
        run = next((run for run in item.runs if run.evaluation.get("videos")), item.runs[0])
        for entry in run.evaluation.get("videos") or []:
            row = rows.setdefault((entry.get("seed"), str(entry.get("prompt"))), [])
            for side, mark in (("before", ""), ("after", chip(index))):
                path = run.directory / (entry[side] or "")
                if path.is_file() and (mark or not row):
                    row.append((path, f"{side}, {plain(number(entry.get(f'reward_{side}')))}" if alike else side, mark))
    return {key: row for key, row in rows.items() if row}


# Times, settings, runs -------------------------------------------------------------------------------------------------------------


def _seconds(item: Series) -> dict[str, float]:
    return stage_seconds([record for run in item.runs for record in run.records])


def _timing_table(series: Sequence[Series]) -> str:
    stages = sorted(
        {stage for item in series for stage in _seconds(item)}, key=lambda stage: -sum(_seconds(item).get(stage, 0) for item in series)
    )
    rows = []
    for index, item in enumerate(series):
        seconds = _seconds(item)
        cells = "".join(f"<td>{plain(seconds.get(stage, math.nan))}</td>" for stage in stages)
        rows.append(f"<tr>{_row_head(index, item.label)}<td>{plain(sum(seconds.values()) if seconds else math.nan)}</td>{cells}</tr>")
    return table(["", "an iteration", *stages], rows, style="series")


def _settings(series: Sequence[Series]) -> str:
    keys = differences([item.settings for item in series])
    rows = []
    for key in keys:
        cells = [f"<td>{escape(item.settings.get(key, '–'))}</td>" for item in series]
        rows.append(f'<tr><th scope="row">{escape(key)}</th>{"".join(cells)}</tr>')
    differing = (
        _legend(series) + table(["", *(str(index + 1) for index in range(len(series)))], rows, style="series settings") if rows else ""
    )
    shared = "\n".join(f"{key}={value}" for key, value in series[0].settings.items() if key not in keys)
    return f"{differing}<details><summary>What all share</summary><pre>{escape(shared)}</pre></details>"


def _run_table(series: Sequence[Series]) -> str:
    rows = []
    for index, item in enumerate(series):
        for run in item.runs:
            cells = (run.config.seed, f"{run.iterations} of {run.config.train.iterations}", "yes" if run.changes else "no")
            rows.append(f"<tr>{_row_head(index, str(run.directory))}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return table(["", "seed", "iterations", "evaluated"], rows, style="series")
