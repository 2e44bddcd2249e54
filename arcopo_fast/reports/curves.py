"""The numbers of metrics.jsonl that are worth a chart, and what they tell about a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.reports.results import Record, points
from arcopo_fast.storage.metrics import ANCHOR, TOTAL, Chart

REWARD = Chart("Reward", "Moving mean. Prompts and pivots change, so single iterations scatter.", TOTAL, smooth=True)
SPREAD = Chart(
    "Spread in a group",
    "Standard deviation of the reward over candidates. At 0 there is nothing to learn from.",
    f"{TOTAL}_std",
    smooth=True,
)
BASELINE = (
    Chart("Reward of the anchor", "Of the branch with no noise of its own, which the candidates are compared with.", ANCHOR, smooth=True),
    Chart(
        "Anchor's scores that failed", "A window without its anchor's score teaches its group nothing.", "failed_anchor_scores", if_any=True
    ),
)
"""With `objective.advantage_baseline: anchor`."""
UPDATES = (
    Chart("Gradient norm", "Before it is clipped.", "gradient_norm"),
    Chart(
        "Gradient below 10 eps",
        "Share of the elements that are not zero. There Adam's step is shortened: lower optimizer.eps.",
        "below_eps",
        if_any=True,
    ),
    Chart("Groups without variance", "Groups whose candidates all had the same reward.", "zero_variance_groups", if_any=True),
)


def health(config: Config) -> list[Chart]:
    """Return the charts that tell whether a run learns: its objective's own among those of any run."""
    return [SPREAD, *(BASELINE if config.anchored else ()), *objective_class(config.objective.kind).charts(config.objective), *UPDATES]


def reward_statistics(names: Iterable[str]) -> list[Chart]:
    """One for each reward."""
    return [Chart(name, "Moving mean.", f"{TOTAL}/{name}", smooth=True) for name in names]


def updates(records: Sequence[Record]) -> list[int]:
    """The numbers of the updates that were logged."""
    return sorted({int(match[1]) for record in records for name in record if (match := re.match(r"update(\d{1,9})/", name))})


def curve(records: Sequence[Record], statistic: Chart) -> list[tuple[float, float]]:
    """One value for each iteration, of its last update: there the policy has moved furthest."""
    if not statistic.each_update:
        return points(records, statistic.name)
    last: dict[float, float] = {}
    for update in updates(records):
        last |= points(records, f"update{update}/{statistic.name}")
    return sorted(last.items())
