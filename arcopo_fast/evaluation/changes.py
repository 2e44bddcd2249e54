"""One score over the same videos before and after: how it changed, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.scores import KINDS
from arcopo_fast.storage.metrics import TOTAL, Number, number
from arcopo_fast.storage.textfiles import Document


class Summary(Document):
    """One score of an evaluation, over its videos; null where it failed."""

    model_config = ConfigDict(strict=True, extra="allow")
    mean: Number = None
    std: Number = None
    values: list[Number] = []


@dataclass(frozen=True)
class Change:
    """One reward or metric over the same videos before and after. A number that was not measured, or is not finite, is NaN.

    kind: of `KINDS`. error: the standard error of the change, over videos. spread: the standard deviation of one video's value before.
    better: what share of the videos has a higher value after; None where single values are not known. failed: videos that are left out,
    as they have no value before or none after.
    """

    name: str
    kind: str
    before: float
    after: float
    error: float
    spread: float
    better: float | None
    failed: int = 0

    @property
    def change(self) -> float:
        """Mean after minus mean before."""
        return self.after - self.before

    @property
    def in_spreads(self) -> float:
        """The change in standard deviations of a video before training."""
        return self.change / self.spread if self.spread > 0 else math.nan

    @property
    def direction(self) -> int:
        """1 or -1 if the change is more than two standard errors, else 0."""
        return (self.change > 2 * self.error) - (self.change < -2 * self.error)

    @property
    def known(self) -> bool:
        """There are a change and its error, so `direction` says something."""
        return math.isfinite(self.change) and math.isfinite(self.error)


def changes(config: Config, evaluation: Mapping[str, Any]) -> list[Change]:
    """Return the change of every reward and metric that was measured before and after: the total, the rewards, then what is held out."""
    found = []
    for name, before in evaluation.get("before", {}).items():
        after = evaluation.get("after", {}).get(name)
        if after is None:
            continue
        kind = "total" if name == TOTAL else "trained" if config.rewards.get(name) else "held out"
        first, second, spread = number(before.get("mean")), number(after.get("mean")), number(before.get("std"))
        # The same prompt and noise: only the differences vary.
        pairs = [(number(early), number(late)) for early, late in zip(before.get("values") or [], after.get("values") or [])]
        scored_pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if len(scored_pairs) < len(pairs):  # means over other videos before than after would show a change where there is none
            first, second, spread = math.nan, math.nan, math.nan
            if scored_pairs:
                early_scores, late_scores = zip(*scored_pairs)
                first, second = statistics.fmean(early_scores), statistics.fmean(late_scores)
                spread = statistics.pstdev(early_scores)
        error, better = math.nan, None
        differences = [late - early for early, late in scored_pairs]
        if len(differences) > 1:
            error = deviation(differences) / math.sqrt(len(differences))
            better = sum(difference > 0 for difference in differences) / len(differences)
        found.append(Change(name, kind, first, second, error, spread, better, len(pairs) - len(scored_pairs)))
    return sorted(found, key=lambda change: KINDS.index(change.kind))


def deviation(values: Sequence[float]) -> float:
    """Return the sample's standard deviation; NaN of a single value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
