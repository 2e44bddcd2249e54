"""Gains without learning: of fixed filters on the untrained videos, and of the best of several untrained videos.

A gain is believed when these do not reach it. Changes are against the untrained videos, as the policy's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.changes import Change, changes
from arcopo_fast.storage.metrics import TOTAL, number

FILTERED = "filters"
"""The key of evaluation.json under which each filter's scores lie."""
SHARE = 0.5
"""Share of a policy's gain from which on a filter has earned too much of it."""


class Baseline(NamedTuple):
    """A way to a reward without learning.

    Attributes:
        name: in words.
        changes: of every score, against the untrained videos.
        filter: it is a fixed filter.
    """

    name: str
    changes: Sequence[Change]
    filter: bool

    @property
    def gain(self) -> Change | None:
        """Change of the weighted sum of the rewards."""
        return total_of(self.changes)


def total_of(found: Sequence[Change]) -> Change | None:
    """Return the change of the weighted sum of the rewards, if it was measured."""
    return next((change for change in found if change.kind == "total"), None)


def baselines(config: Config, evaluation: Mapping[str, Any]) -> list[Baseline]:
    """Return the baselines of a run's evaluation: the filters that were tried, and best-of-n where prompts have several videos."""
    before = evaluation.get("before", {})
    filtered = evaluation.get(FILTERED, {})
    found = [Baseline(name, changes(config, {"before": before, "after": scores}), True) for name, scores in filtered.items()]
    videos = config.evaluation.videos_per_prompt
    if videos > 1 and TOTAL in before:
        best = {name: _chosen(score, before[TOTAL], videos) for name, score in before.items()}
        found.append(Baseline(f"best of {videos} untrained videos", changes(config, {"before": before, "after": best}), False))
    return found


def _chosen(score: Mapping[str, Any], total: Mapping[str, Any], videos: int) -> dict[str, Any]:
    """Return a score as if every video were the one of its prompt that has the highest total."""
    values, totals = ([number(value) for value in each.get("values") or []] for each in (score, total))
    best = [
        max(range(start, min(start + videos, len(totals))), key=lambda video: (totals[video] == totals[video], totals[video]))
        for start in range(0, len(totals), videos)
    ]
    chosen = [values[best[video // videos]] for video in range(len(values))] if len(values) == len(totals) else []
    scored = [value for value in chosen if value == value]
    return {"mean": sum(scored) / len(scored) if scored else None, "values": [value if value == value else None for value in chosen]}


def bought(policy: Sequence[Change], found: Sequence[Baseline]) -> list[Baseline]:
    """Return the filters that earn at least `SHARE` of what the policy has gained, the dearest first."""
    total = total_of(policy)
    if total is None or not total.direction > 0:
        return []
    gains = [(each.gain.change, each) for each in found if each.filter and each.gain is not None and each.gain.known]
    return [each for gain, each in sorted(gains, key=lambda pair: -pair[0]) if gain >= SHARE * total.change]
