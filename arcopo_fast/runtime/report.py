"""The report of a run: one HTML file that needs nothing else, and the model card of its adapter.

Both read what the run directory holds: config.yaml, metrics.jsonl, samples/*.mp4 and evaluation.json, which is

    {"before": {name: {"mean": m, "std": s, "values": [...]}}, "after": {...},
     "videos": [{"prompt": text, "seed": n, "before": "samples/before-00.mp4", "after": ..., "reward_before": r, "reward_after": r}]}

with "reward" among the names for the weighted sum that is trained on, and the values of one video at the same place before and after.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from arcopo_fast.config import Config, load_config, resolved_yaml
from arcopo_fast.runtime.charts import line_chart
from arcopo_fast.runtime.metrics import FILE, read_metrics
from arcopo_fast.runtime.page import page, section, table, video
from arcopo_fast.runtime.run_dir import atomic_write

TOTAL = "reward"  # the weighted sum of the rewards, in metrics.jsonl and evaluation.json
Record = Mapping[str, Any]


def write_report(directory: str | Path) -> Path:
    """Write report.html from what the run directory holds; what a run did not come to is left out. Returns its path.

    Raises:
        UserError: the directory holds no readable config.yaml.
    """
    directory = Path(directory)
    config = load_config(str(directory / "config.yaml"))
    records = read_metrics(directory) if (directory / FILE).is_file() else []
    document = directory / "evaluation.json"
    evaluation = json.loads(document.read_text(encoding="utf-8")) if document.is_file() else {}
    comparisons = compare(config, evaluation)
    parts = [
        _headline(config, records, comparisons),
        section("Before and after", _comparison_table(comparisons), _COMPARISON_NOTE) if comparisons else "",
        section("Videos", _videos(directory, evaluation.get("videos", [])), _VIDEO_NOTE) if evaluation.get("videos") else "",
        section("Training", _charts(config, records)) if records else "",
        section("Where the time went", _timing_table(records)) if any(record.get("time") for record in records) else "",
        section(
            "Settings", f"<details><summary>config.yaml</summary><pre>{escape(resolved_yaml(config))}</pre></details>", _SETTINGS_NOTE
        ),
    ]
    path = directory / "report.html"
    atomic_write(path, page(f"{config.name} - arcopo_fast", parts))
    return path


# Before and after ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One reward or metric over the same videos before and after.

    kind: "total", "trained" or "held out". error: the standard error of the change, over videos. spread: the standard deviation of one
    video's value before. better: what share of the videos has a higher value after; None where single values are not known.
    """

    name: str
    kind: str
    before: float
    after: float
    error: float
    spread: float
    better: float | None

    @property
    def change(self) -> float:
        return self.after - self.before


def compare(config: Config, evaluation: Mapping[str, Any]) -> list[Comparison]:
    """Every reward and metric that was measured before and after: the total, the rewards, then what is held out."""
    found = []
    for name, before in evaluation.get("before", {}).items():
        after = evaluation.get("after", {}).get(name)
        if after is None:
            continue
        kind = "total" if name == TOTAL else "trained" if config.rewards.get(name) else "held out"
        pairs = list(zip(before.get("values") or [], after.get("values") or []))
        error, better = math.nan, None
        if len(pairs) > 1:  # the same prompt and noise: only the differences vary
            differences = [second - first for first, second in pairs]
            error = _deviation(differences) / math.sqrt(len(pairs))
            better = sum(difference > 0 for difference in differences) / len(pairs)
        found.append(Comparison(name, kind, before["mean"], after["mean"], error, before.get("std") or 0.0, better))
    return sorted(found, key=lambda one: ["total", "trained", "held out"].index(one.kind))


def _deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _in_spreads(one: Comparison) -> str:
    return _signed(one.change / one.spread, 2) if one.spread > 0 else "-"


def _number(value: float) -> str:
    """Three digits, with a true minus."""
    return f"{value:.3f}".replace("-", "−")


def _signed(value: float, digits: int = 3) -> str:
    """With a sign, a true minus, and no sign for what rounds to zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


_COMPARISON_NOTE = (
    "The same prompts and the same noise before and after. The interval is one standard error over videos; the last column is the change "
    "in standard deviations of a single video before training. Held-out metrics are never trained on: if they fall while the rewards "
    "rise, the rewards are being exploited."
)


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows, kind = [], ""
    for one in comparisons:
        if one.kind != kind:
            kind = one.kind
            label = {"total": "Weighted sum", "trained": "Rewards, trained on", "held out": "Held out"}[kind]
            rows.append(f'<tr class="group"><th colspan="5" scope="rowgroup">{label}</th></tr>')
        interval = f" <small>± {one.error:.3f}</small>" if math.isfinite(one.error) else ""
        rows.append(
            f'<tr><th scope="row">{escape(one.name)}</th><td>{_number(one.before)}</td><td>{_number(one.after)}</td>'
            f'<td class="{_direction(one)}">{_signed(one.change)}{interval}</td><td>{_in_spreads(one)}</td></tr>'
        )
    return table(["", "before", "after", "change", "in std"], rows)


def _direction(one: Comparison) -> str:
    """Coloured only where the change is more than two standard errors."""
    if not math.isfinite(one.error) or abs(one.change) <= 2 * one.error:
        return ""
    return "up" if one.change > 0 else "down"


# The page's other parts ------------------------------------------------------------------------------------------------------------


def _headline(config: Config, records: Sequence[Record], comparisons: Sequence[Comparison]) -> str:
    total = next((one for one in comparisons if one.kind == "total"), None)
    rollout, video = config.rollout, config.video
    facts = [
        f"generator {config.generator.checkpoint}",
        f"{len(records)} of {config.train.iterations} iterations",
        f"groups of {rollout.group_size}",
        f"{video.count} chunks of {video.chunk_frames} latent frames",
        f"LoRA rank {config.lora.rank}",
        f"learning rate {config.optimizer.lr:g}",
        f"seed {config.seed}",
    ]
    result = ""
    if total:
        interval = f" ± {total.error:.3f}" if math.isfinite(total.error) else ""
        better = "" if total.better is None else f", higher in {100 * total.better:.0f} % of the videos"
        result = (
            f'<p class="result"><span class="number">{_number(total.before)} → {_number(total.after)}</span> '
            "reward on fixed prompts and noise: "
            f"{_signed(total.change)}{interval}, {_in_spreads(total)} standard deviations of a video{better}</p>"
        )
    weights = ", ".join(f"{name} × {weight:g}" for name, weight in config.rewards.items())
    return (
        f"<header><h1>{escape(config.name)}</h1>{result}"
        f'<p class="facts">{escape(" · ".join(facts))}<br>rewards: {escape(weights)}</p></header>'
    )


_VIDEO_NOTE = "Left before, right after, from the same prompt and the same noise."
_SETTINGS_NOTE = "Everything the run was told. Saved as a file, it repeats the run: <code>python -m arcopo_fast.train config.yaml</code>"


def _videos(directory: Path, videos: Iterable[Mapping[str, Any]]) -> str:
    cards = []
    for entry in videos:
        sides = [video(directory / entry[side], side) for side in ("before", "after") if (directory / entry[side]).is_file()]
        rewards = ""
        if entry.get("reward_before") is not None and entry.get("reward_after") is not None:
            rewards = f"reward {_number(entry['reward_before'])} → {_number(entry['reward_after'])}"
        caption = f"{escape(str(entry['prompt']))}<br><small>{rewards}</small>"
        if sides:
            cards.append(f'<figure><div class="pair">{"".join(sides)}</div><figcaption>{caption}</figcaption></figure>')
    return f'<div class="videos">{"".join(cards)}</div>'


def _timing_table(records: Sequence[Record]) -> str:
    """Seconds per iteration and share of each stage, and a bar that shows the share."""
    stages: dict[str, list[float]] = {}
    for record in records:
        for name, seconds in (record.get("time") or {}).items():
            if isinstance(seconds, (int, float)):
                stages.setdefault(name, []).append(seconds)
    sums = {name: sum(seconds) for name, seconds in stages.items() if name != "total"}
    whole = sum(sums.values()) or 1.0
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{total / len(stages[name]):.3f}</td><td>{100 * total / whole:.0f} %</td>'
        f'<td class="bar"><i style="width:{100 * total / whole:.1f}%"></i></td></tr>'
        for name, total in sorted(sums.items(), key=lambda item: -item[1])
    ]
    rows.append(f'<tr class="sum"><th scope="row">an iteration</th><td>{whole / len(records):.3f}</td><td></td><td class="bar"></td></tr>')
    return table(["", "s / iteration", "share", ""], rows)


def _charts(config: Config, records: Sequence[Record]) -> str:
    """A chart for each thing that tells whether training is well; those whose numbers the run did not log are left out."""
    rewards = {name: f"{TOTAL}/{name}" for name in config.rewards}
    updates = sorted({match[1] for record in records for name in record if (match := re.match(r"update(\d+)/", name))}, key=int)

    def by_update(statistic: str) -> dict[str, str]:
        return {f"update {number}": f"update{number}/{statistic}" for number in updates}

    radius = config.objective.clip
    plans: list[tuple[str, str, dict[str, str], bool]] = [
        (
            "Reward",
            "Mean of the iteration's groups, and its moving mean. Prompts and pivots change, so single points scatter.",
            {"": TOTAL},
            True,
        ),
        ("Each reward", "Moving means.", rewards if len(rewards) > 1 else {}, True),
        (
            "Spread in a group",
            "Standard deviation of the reward over candidates. At 0 there is nothing to learn from.",
            {"": f"{TOTAL}_std"},
            True,
        ),
        (
            "Live fraction",
            "Share of candidates whose gradient the clip lets through. 0: the update has stopped learning.",
            by_update("live"),
            False,
        ),
        (
            "Ratios outside the clip",
            f"Share of |ratio − 1| above {radius:g}." if radius else "There is no clip in this run.",
            by_update("outside_clip") if radius else {},
            False,
        ),
        ("Largest |ratio − 1|", "How far an update moved the policy. In the first it must be exactly 0.", by_update("ratio_max"), False),
        ("Gradient norm", f"Before clipping to {config.optimizer.gradient_clip:g}.", {"": "gradient_norm"}, False),
        ("Groups without variance", "Groups whose candidates all had the same reward.", {"": "zero_variance_groups"}, False),
    ]
    charts = []
    for title, note, names, smooth in plans:
        series = {label: _points(records, name) for label, name in names.items()}
        series = {label: points for label, points in series.items() if len(points) > 1}
        if title == "Groups without variance" and not any(y for points in series.values() for _, y in points):
            continue
        if series:
            charts.append(
                f"<figure><figcaption><b>{title}</b> {note}</figcaption>{line_chart(series, title=title, smooth=smooth)}</figure>"
            )
    return f'<div class="charts">{"".join(charts)}</div>'


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]


# The model card --------------------------------------------------------------------------------------------------------------------


def config_hash(config: Config) -> str:
    """Twelve characters that change with any setting."""
    return hashlib.sha256(resolved_yaml(config).encode()).hexdigest()[:12]


def model_card(config: Config, evaluation: Mapping[str, Any]) -> str:
    """README.md of the adapter's directory: what it is, how it was made, what it changed and how to load it."""
    header = yaml.safe_dump(
        {"library_name": "peft", "base_model": config.generator.checkpoint, "tags": ["text-to-video", "lora", "ar-copo"]}, sort_keys=False
    )
    comparisons = compare(config, evaluation)
    rows = [
        f"| {one.name} | {one.kind} | {_number(one.before)} | {_number(one.after)} | {_signed(one.change)}"
        f"{f' ± {one.error:.3f}' if math.isfinite(one.error) else ''} |"
        for one in comparisons
    ]
    results = "\n".join(["| | | before | after | change |", "|---|---|---|---|---|", *rows]) if rows else "Not evaluated."
    weights = ", ".join(f"{name} x {weight:g}" for name, weight in config.rewards.items())
    videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
    return f"""---
{header}---

# {config.name}

A LoRA adapter for the streaming autoregressive video generator `{config.generator.checkpoint}`, aligned with AR-CoPO (arXiv 2603.17461) by
arcopo_fast.

| | |
|---|---|
| rewards | {weights} |
| prompts | {config.prompts} |
| iterations | {config.train.iterations}, groups of {config.rollout.group_size}, {config.objective.updates} updates each |
| adapter | rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {", ".join(config.lora.targets)} |
| optimizer | AdamW, learning rate {config.optimizer.lr:g} |
| seed | {config.seed} |
| configuration | {config_hash(config)} (SHA-256 of the run's config.yaml) |

## What it changed

{videos} videos of {config.evaluation.prompts} prompts that were not trained on, with the same noise before and after; intervals are one
standard error over videos. What is held out was never trained on.

{results}

## How to load it

`adapter_model.safetensors` with `adapter_config.json` is PEFT's form, `pytorch_lora_weights.safetensors` is diffusers':

```python
transformer.load_lora_adapter("adapter", weight_name="pytorch_lora_weights.safetensors", prefix="transformer")  # WanTransformer3DModel
model = peft.PeftModel.from_pretrained(model, "adapter")
```

The terms of use are those of the generator that it adapts.
"""
