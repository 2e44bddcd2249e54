"""The report of a run: one HTML file that needs nothing else, made from what the run directory holds (`reports.results`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from arcopo_fast.config.reading import resolved_yaml
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.baselines import baselines
from arcopo_fast.evaluation.changes import Change
from arcopo_fast.reports.baselines import baseline_section, filter_warning
from arcopo_fast.reports.charts import line_chart
from arcopo_fast.reports.curves import REWARD, health, reward_statistics, updates
from arcopo_fast.reports.few_steps import few_steps_section, few_steps_warning
from arcopo_fast.reports.hacking import verdict
from arcopo_fast.reports.html import change_cells, figures, page, section, table, video, warning
from arcopo_fast.reports.results import Record, Run, points, read_run, stage_floors, stage_seconds
from arcopo_fast.reports.stall import notice, stalled_since
from arcopo_fast.reports.table import plain, plus_minus, signed
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.metrics import Chart, number

_CHANGE_NOTE = (
    "The same prompts and the same noise before and after. The interval is one standard error over videos; the last column is the change "
    "in standard deviations of a single video before training. Held-out metrics are never trained on: if they fall while the rewards "
    "rise, the rewards are being exploited."
)
_STAGES = {"wait": "wait for other ranks", "reduce": "reduce: sum over ranks"}
"""Stages whose name alone does not say what they are, and what the timing table calls them."""
_VIDEO_NOTE = "Left before, right after, from the same prompt and the same noise."
_SETTINGS_NOTE = "Everything the run was told. Saved as a file, it repeats the run: <code>python -m arcopo_fast.train config.yaml</code>"


def write_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Write the page; what a run did not come to is left out, and said. Returns its path, by default report.html of the directory.

    Raises:
        UserError: the directory is not a run, or a file of it is broken.
    """
    run = read_run(directory)
    videos = _videos(run.directory, run.evaluation.get("videos") or [])
    seconds, floors = stage_seconds(run.records), stage_floors(run.records, run.device)
    found = baselines(run.config, run.evaluation) if run.changes else []
    settings = f"<details><summary>config.yaml</summary><pre>{escape(resolved_yaml(run.config))}</pre></details>"
    parts = [
        _headline(run, bool(videos)),
        _stall(run),
        verdict({"": [run]}) if run.changes else "",
        filter_warning(run.changes, found),
        few_steps_warning(run.evaluation),
        section("Before and after", _change_table(run.changes), _CHANGE_NOTE) if run.changes else "",
        baseline_section(run.changes, found),
        few_steps_section(run.evaluation),
        section("Videos", videos, _VIDEO_NOTE) if videos else "",
        section("Training", _charts(run.config, run.records)) if run.records else "",
        section("Where the time went", _timing_table(seconds, floors), _floor_note(run.device) if floors else "") if seconds else "",
        section("Settings", settings, _SETTINGS_NOTE),
    ]
    path = run.directory / "report.html" if path is None else Path(path)
    atomic_write(path, page(f"{run.config.name} - arcopo_fast", parts))
    return path


def _headline(run: Run, videos: bool) -> str:
    config = run.config
    total = next((change for change in run.changes if change.kind == "total"), None)
    facts = [
        f"generator {config.generator.checkpoint}",
        f"{run.iterations} of {config.train.iterations} iterations",
        f"groups of {config.rollout.group_size}",
        f"{config.video.count} chunks of {config.video.chunk_frames} latent frames",
        f"LoRA rank {config.lora.rank}",
        f"learning rate {config.optimizer.lr:g}",
        f"seed {config.seed}",
    ]
    result = ""
    if total:
        better = "" if total.better is None else f", higher in {100 * total.better:.0f} % of the videos"
        result = (
            f'<p class="result"><span class="number">{plain(total.before)} → {plain(total.after)}</span> '
            "reward on fixed prompts and noise: "
            f"{signed(total.change)}{plus_minus(total.error)}, {signed(total.in_spreads, 2)} standard deviations of a video{better}</p>"
        )
    absent = [
        name
        for name, present in (
            ("iterations", run.iterations),
            ("before and after", run.changes),
            ("videos", videos or not config.evaluation.sample_videos),
        )
        if not present
    ]
    missing = f"<p>The run has not come to its end. Not here yet: {', '.join(absent)}.</p>" if absent else ""
    missing += left_out(run)
    weights = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards.items())
    windows = f"<br>windows: {escape(seen)}" if (seen := config.judge.described()) else ""
    return (
        f"<header><h1>{escape(config.name)}</h1>{result}"
        f'<p class="facts">{escape(" · ".join(facts))}<br>rewards: {escape(weights)}{windows}</p>{missing}</header>'
    )


def _stall(run: Run) -> str:
    """A warning if the run's last iterations taught it nothing."""
    since = stalled_since(run.records)
    return "" if since is None else warning("The run stopped learning", f"<p>{escape(notice(since).capitalize())}.</p>")


def left_out(run: Run) -> str:
    """HTML: what is not shown, and why."""
    return "".join(f"<p>Left out: {escape(sentence)}</p>" for sentence in run.left_out)


def _change_table(changes: Sequence[Change]) -> str:
    rows, kind = [], ""
    for change in changes:
        if change.kind != kind:
            kind = change.kind
            label = {"total": "Weighted sum", "trained": "Rewards, trained on", "held out": "Held out"}[kind]
            rows.append(f'<tr class="group"><th colspan="5" scope="rowgroup">{label}</th></tr>')
        rows.append(f'<tr><th scope="row">{escape(change.name)}{_left_out(change)}</th>{change_cells(change)}</tr>')
    return table(["", "before", "after", "change", "in std"], rows)


def _left_out(change: Change) -> str:
    """Return how many videos a score does not count, if any: it failed there."""
    return f" <small>({change.failed} left out: no score)</small>" if change.failed else ""


def _videos(directory: Path, videos: Iterable[Mapping[str, Any]]) -> str:
    cards = []
    for entry in videos:
        files = {side: directory / entry[side] for side in ("before", "after") if entry[side] is not None}
        sides = [video(file, side) for side, file in files.items() if file.is_file()]
        rewards = f"reward {plain(number(entry.get('reward_before')))} → {plain(number(entry.get('reward_after')))}"
        caption = f"{escape(str(entry['prompt']))}<br><small>{rewards}</small>"
        if sides:
            cards.append(f'<figure><div class="pair">{"".join(sides)}</div><figcaption>{caption}</figcaption></figure>')
    return f'<div class="videos">{"".join(cards)}</div>' if cards else ""


def _timing_table(seconds: Mapping[str, float], floors: Mapping[str, float]) -> str:
    """Seconds per iteration, share and percent of the floor of each stage, and a bar that shows the share."""
    all_seconds = sum(seconds.values())

    def of_floor(floor: float | None, part: float) -> str:
        return f"<td>{100 * floor / part:.0f} %</td>" if floor and part else "<td></td>"

    rows = [
        f'<tr><th scope="row">{escape(_STAGES.get(name, name))}</th><td>{part:.3f}</td><td>{100 * part / (all_seconds or 1):.0f} %</td>'
        f'{of_floor(floors.get(name), part)}<td class="bar"><i style="width:{100 * part / (all_seconds or 1):.1f}%"></i></td></tr>'
        for name, part in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    total = of_floor(sum(floors.values()), all_seconds)
    rows.append(f'<tr class="sum"><th scope="row">an iteration</th><td>{all_seconds:.3f}</td><td></td>{total}<td class="bar"></td></tr>')
    return table(["", "s / iteration", "share", "of floor", ""], rows)


def _floor_note(device: Mapping[str, Any]) -> str:
    rates = f"a {device.get('dtype')} matrix product reaches {number(device.get('matmul')) / 1e12:.3g} TFLOP/s, "
    rates += f"a copy {number(device.get('bandwidth')) / 1e9:.3g} GB/s"
    backend = device.get("attention", {}).get("name")
    attention = f" Attention ran on the backend {backend}." if backend else ""
    return escape(
        f"Of floor: the time that a stage's arithmetic and traffic would take at the best rates of the device ({device.get('device')}: "
        f"{rates}), over the time it took. Rewards are not counted.{attention}"
    )


def _charts(config: Config, records: Sequence[Record]) -> str:
    """A chart for each thing that tells whether training is well; those whose numbers the run did not log are left out."""
    each = reward_statistics(config.score_weights)
    plans = [(REWARD, {"": REWARD.name})]
    if len(each) > 1:
        plans.append((Chart("Each reward", "Moving means.", "", smooth=True), {chart.title: chart.name for chart in each}))
    for chart in health(config):
        by_update = {f"update {update}": f"update{update}/{chart.name}" for update in updates(records)}
        plans.append((chart, by_update if chart.each_update else {"": chart.name}))
    charts, none = [], ""
    for statistic, names in plans:
        series = {label: values for label, name in names.items() if len(values := points(records, name)) > 1}
        if statistic.if_any and series and not any(value for values in series.values() for _, value in values):
            none += f"<p class=note>{escape(statistic.title)}: none.</p>"
        elif series:
            charts.append((statistic.title, statistic.note, line_chart(series, title=statistic.title, smooth=statistic.smooth)))
    return figures(charts) + none
