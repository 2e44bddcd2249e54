"""The paper's claims, each as a rule over the numbers of finished runs. Knows nothing of how the runs were made.

Changes are after minus before on the same prompts and noises, in standard deviations of a video's value before training, and have an
error that covers both seeds and videos. "Rises" and "falls" mean by more than two of these errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["reproduced", "not reproduced", "opposite"]
Scores = Mapping[str, Mapping[str, Any]]
"""One side of an evaluation.json: name -> {"mean", "std", "values"}."""


@dataclass(frozen=True)
class Claim:
    """title: in a few words. paper: what it says, and where. found: what came out, with numbers. verdict: how the two compare."""

    title: str
    paper: str
    found: str
    verdict: Verdict


@dataclass(frozen=True)
class Shift:
    """A change, averaged over seeds (and over several measures, if there are several). by_seed: each seed's own."""

    mean: float
    error: float
    by_seed: tuple[float, ...]

    @property
    def direction(self) -> int:
        """1: rises, -1: falls, 0: neither is sure."""
        return (self.mean > 2 * self.error) - (self.mean < -2 * self.error)

    def __str__(self) -> str:
        seeds = ", ".join(f"{value:+.2f}" for value in self.by_seed)
        return f"{self.mean:+.2f} ± {self.error:.2f} ({seeds})"


def shift(evaluations: Sequence[tuple[Scores, Scores]], names: Sequence[str]) -> Shift:
    """The mean change of some measures, each in its own standard deviations before.

    evaluations: (before, after) of each seed, all of the same videos.
    """
    return _shift([_changes(before, after, names, before) for before, after in evaluations])


def difference(first: Sequence[tuple[Scores, Scores]], second: Sequence[tuple[Scores, Scores]], names: Sequence[str]) -> Shift:
    """How much more `first` changed than `second`, seed by seed and video by video."""
    pairs = zip(first, second, strict=True)
    return _shift([_changes(after_second, after_first, names, before) for (before, after_first), (_, after_second) in pairs])


def _shift(videos: Sequence[Sequence[float]]) -> Shift:
    """videos: changes [seeds][videos]."""
    by_seed = [_mean(values) for values in videos]
    by_video = [_mean(column) for column in zip(*videos, strict=True)]
    return Shift(_mean(by_seed), math.hypot(_error(by_seed), _error(by_video)), tuple(by_seed))


def _changes(before: Scores, after: Scores, names: Sequence[str], baseline: Scores) -> list[float]:
    """Of each video, averaged over the measures in standard deviations of the baseline, or plainly where that does not vary."""
    columns = []
    for name in names:
        spread = baseline[name]["std"] or 1.0
        columns.append([(b - a) / spread for a, b in zip(before[name]["values"], after[name]["values"], strict=True)])
    return [_mean(column) for column in zip(*columns, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 of a single value, whose spread nobody knows."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


# The claims ------------------------------------------------------------------------------------------------------------------------


def learns_where_frozen_noise_does_not(copo: Shift, shared: Shift, more: Shift) -> Claim:
    """more: by how much AR-CoPO gained more than SDE-GRPO with shared initial noise."""
    if copo.direction > 0 and shared.direction <= 0:
        verdict: Verdict = "reproduced"
    elif copo.direction <= 0 and shared.direction > 0:
        verdict = "opposite"
    else:
        verdict = "not reproduced"
    return Claim(
        "AR-CoPO learns where SDE-GRPO with frozen initial noise does not",
        "The reward of AR-CoPO rises; that of SDE-GRPO, whose members share the initial noise, does not (AR-CoPO, Figures 2 and 7).",
        f"Reward of AR-CoPO {copo}, of SDE-GRPO with shared initial noise {shared}; the former minus the latter: {more}.",
        verdict,
    )


def fresh_noise_helps(fresh: Shift, shared: Shift, more: Shift) -> Claim:
    """more: by how much SDE-GRPO gained more with fresh initial noise than with shared."""
    verdict: Verdict = "opposite" if more.direction < 0 else "not reproduced"
    if fresh.direction > 0 and more.direction > 0:
        verdict = "reproduced"
    return Claim(
        "SDE-GRPO learns once each member starts from noise of its own",
        "GRPO over the re-noise kernel raises the reward when every member draws fresh initial noise (CM-GRPO of RAVEN).",
        f"Reward with fresh initial noise {fresh}, with shared {shared}; the former minus the latter: {more}.",
        verdict,
    )


def initial_noise_dominates(ratios: Sequence[tuple[float, float]]) -> Claim:
    """ratios: of each pivot chunk, the initial noise's change of the frames over the largest re-noise's, and its standard error."""
    sure = [value - 2 * error > 1 for value, error in ratios]
    against = [value + 2 * error < 1 for value, error in ratios]
    verdict: Verdict = "reproduced" if all(sure) else "opposite" if all(against) else "not reproduced"
    listed = ", ".join(f"{value:.1f} ± {error:.1f}" for value, error in ratios)
    return Claim(
        "A chunk's initial noise decides what it shows",
        "Replacing the initial noise changes the video far more than replacing the noise of any later step (AR-CoPO, Figure 6).",
        f"By pivot chunk it changes the frames {listed} times as much (mean square) as the largest re-noise.",
        verdict,
    )


def semi_on_policy_does_not_hack(on: tuple[Shift, Shift], semi: tuple[Shift, Shift], better: Shift) -> Claim:
    """on, semi: (the trained reward, everything it was not trained on). better: semi over on, in the latter."""
    if on[1].direction < 0 and semi[1].direction >= 0:
        verdict: Verdict = "reproduced"
    elif on[1].direction >= 0 and semi[1].direction < 0:
        verdict = "opposite"
    else:
        verdict = "not reproduced"
    return Claim(
        "On the caption reward alone, on-policy training hacks and semi-on-policy training does not",
        "On-policy training on text alignment alone raises it and ruins the rest; semi-on-policy training keeps the rest (Table 2).",
        f"On-policy: caption reward {on[0]}, the rest {on[1]}. Semi-on-policy: caption reward {semi[0]}, the rest {semi[1]}; "
        f"its rest minus that of on-policy training: {better}.",
        verdict,
    )


def off_policy_collapses(off: tuple[Shift, Shift], semi: tuple[Shift, Shift], worse: Shift) -> Claim:
    """off, semi: (the trained reward, everything it was not trained on). worse: off over semi, in the latter."""
    if off[0].direction < 0 and off[1].direction < 0:
        verdict: Verdict = "reproduced"
    elif off[1].direction > 0 and worse.direction > 0:
        verdict = "opposite"
    else:
        verdict = "not reproduced"
    return Claim(
        "Without the clip, training on stored rollouts collapses",
        "Off-policy training without ratio clipping loses both the trained reward and the rest (Table 2).",
        f"Off-policy: caption reward {off[0]}, the rest {off[1]}; its rest minus that of semi-on-policy training: {worse}.",
        verdict,
    )


def scale_trades(scales: Sequence[float], in_domain: Sequence[Sequence[float]], out_of_domain: Sequence[Sequence[float]]) -> Claim:
    """in_domain, out_of_domain: [seeds][scales], scores of the merged adapter at each scale."""
    inside = [rank_correlation(scales, values) for values in in_domain]
    outside = [rank_correlation(scales, values) for values in out_of_domain]
    rises, falls = _mean(inside) > 0.8, _mean(outside) < -0.8
    verdict: Verdict = "reproduced" if rises and falls else "opposite" if _mean(inside) < -0.8 or _mean(outside) > 0.8 else "not reproduced"
    listed = [", ".join(f"{value:+.2f}" for value in values) for values in (inside, outside)]
    return Claim(
        "The scale of a merge trades in-domain against out-of-domain scores",
        "With the on-policy adapter's scale the in-domain score rises and the out-of-domain score falls, monotonically (Table 3).",
        f"Rank correlation with the scale, by seed: in-domain {listed[0]}; out-of-domain {listed[1]}.",
        verdict,
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: of the ranks, ties sharing theirs; 0 where one of them does not vary."""


    def ranks(values: Sequence[float]) -> list[float]:
        return [(sum(other < value for other in values) + sum(other <= value for other in values)) / 2 for value in values]

    a, b = ([rank - _mean(column) for rank in column] for column in map(ranks, (first, second)))
    scale = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0
