"""Which numbers of metrics.jsonl are worth a chart, and what they tell about a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arcopo_fast.config.schema import Config
from arcopo_fast.reports.results import Record, points
from arcopo_fast.storage.metrics import TOTAL


@dataclass(frozen=True)
class Statistic:
    """A number of each iteration, or of each update of an iteration.

    name: its key in metrics.jsonl; with `each_update`, after "update<n>/". smooth: its moving mean is drawn, since single iterations
    scatter. if_any: no chart where it is always 0.
    """

    title: str
    note: str
    name: str
    each_update: bool = False
    smooth: bool = False
    if_any: bool = False


REWARD = Statistic("Reward", "Moving mean. Prompts and pivots change, so single iterations scatter.", TOTAL, smooth=True)
CLIPPED = Statistic("Ratios outside the clip", "Share of |ratio − 1| above the clip.", "outside_clip", each_update=True)
HEALTH = (
    Statistic(
        "Spread in a group",
        "Standard deviation of the reward over candidates. At 0 there is nothing to learn from.",
        f"{TOTAL}_std",
        smooth=True,
    ),
    Statistic(
        "Live fraction",
        "Share of candidates whose gradient the clip lets through. 0: the update has stopped learning.",
        "live",
        each_update=True,
    ),
    CLIPPED,
    Statistic(
        "Largest |ratio − 1|",
        "How far an update moved the policy. On-policy, it is exactly 0 in the first update.",
        "ratio_max",
        each_update=True,
    ),
    Statistic("Spread of the ratios", "Standard deviation of ratio − 1 over anchors, steps and candidates.", "ratio_std", each_update=True),
    Statistic("Gradient norm", "Before it is clipped.", "gradient_norm"),
    Statistic(
        "Gradient below 10 eps",
        "Share of the elements that are not zero. There Adam's step is shortened: lower optimizer.eps.",
        "below_eps",
        if_any=True,
    ),
    Statistic("Groups without variance", "Groups whose candidates all had the same reward.", "zero_variance_groups", if_any=True),
)


def reward_statistics(names: Iterable[str]) -> list[Statistic]:
    """One for each reward."""
    return [Statistic(name, "Moving mean.", f"{TOTAL}/{name}", smooth=True) for name in names]


def logs(config: Config, statistic: Statistic) -> bool:
    """Whether a number means something in a run: without a clip nothing lies outside it."""
    return statistic is not CLIPPED or config.objective.clip is not None


def updates(records: Sequence[Record]) -> list[int]:
    """The numbers of the updates that were logged."""
    return sorted({int(match[1]) for record in records for name in record if (match := re.match(r"update(\d{1,9})/", name))})


def curve(records: Sequence[Record], statistic: Statistic) -> list[tuple[float, float]]:
    """One value for each iteration, of its last update: there the policy has moved furthest."""
    if not statistic.each_update:
        return points(records, statistic.name)
    last: dict[float, float] = {}
    for update in updates(records):
        last |= points(records, f"update{update}/{statistic.name}")
    return sorted(last.items())
