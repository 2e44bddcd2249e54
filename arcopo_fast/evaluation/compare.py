"""Generators compared on the same prompts and noises: means, paired differences, and intervals that know that videos of a prompt are alike.

An interval is that of a mean with standard errors that are robust to clusters, the prompts, and Student's t with a degree of freedom less
than there are prompts: for G prompts with residual sums u_g over n videos, mean ± t sqrt(G / (G - 1) sum u_g^2) / n. With one video a
prompt this is the ordinary t interval; with equally many of each, that of the prompts' means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from arcopo_fast.evaluation.scores import BASE, KINDS, Scores, Video
from arcopo_fast.objectives.advantage import weighted_total
from arcopo_fast.storage.metrics import TOTAL

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the interval around it. What is not known is NaN: the interval of a single prompt, the mean of nothing."""

    mean: float
    low: float
    high: float

    @property
    def direction(self) -> int:
        """1 or -1 if the interval lies above or below 0, else 0.

        One without width lies nowhere: where scores come in steps, a few prompts may all change by the same, which is no measure of chance.
        """
        if self.high - self.low <= 1e-9 * abs(self.mean):
            return 0
        return (self.low > 0) - (self.high < 0)


class Difference(NamedTuple):
    """To the base model, over the videos that both have. improved: what share of them is higher than the base model's."""

    interval: Interval
    pairs: int
    improved: float


class Result(NamedTuple):
    """One score of one generator. kind: of `KINDS`. videos: those that were scored; failed: those of which the score is not finite."""

    generator: str
    name: str
    kind: str
    interval: Interval
    videos: int
    failed: int
    difference: Difference | None


def clustered(values: Mapping[Video, float]) -> Interval:
    """Return the mean of finite values, and its interval at `LEVEL`; a cluster is a prompt."""
    sums: dict[int, float] = {}
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = math.fsum(values.values()) / len(values)
    for video, value in values.items():
        sums[video.prompt] = sums.get(video.prompt, 0.0) + value - mean
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan)
    error = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(u * u for u in sums.values())) / len(values)
    reach = t_quantile(len(sums) - 1) * error
    return Interval(mean, mean - reach, mean + reach)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return t with P(|T| <= t) = level, by bisection of the distribution's finite sums (Abramowitz and Stegun 26.7.3 and 26.7.4)."""

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        term, total = 1.0, 0.0
        for k in range(freedom % 2, freedom - 1, 2):  # cos^k, with the product of (k - 1) / k before it
            term *= 1 if k < 2 else (k - 1) / k * cosine**2
            total += term
        return 2 / math.pi * (angle + sine * cosine * total) if freedom % 2 else sine * total

    low, high = 0.0, 1.0
    while inside(high) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return high


def with_total(scores: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return a video's scores behind their weighted sum, which is not finite if one of its parts is not."""
    return {TOTAL: weighted_total(scores, weights)} | dict(scores)


def compare(scores: Scores, weights: Mapping[str, float], generators: Iterable[str] | None = None) -> list[Result]:
    """Return every score of every generator, score by score: the total, the rewards, then what is held out.

    Args:
        weights: of the rewards; one of weight 0, or without weight, is held out.
        generators: which, in this order; None: all, the base model first.
    """
    generators = list(generators or sorted(scores.adapters, key=lambda name: (name != BASE, name)))
    values = {name: {video: with_total(judged, weights) for video, judged in scores.of(name).items()} for name in {*generators, BASE}}
    base = {(video.prompt, video.number): judged for video, judged in values[BASE].items()}
    results = []
    for generator in generators:
        videos = values[generator]
        for name in dict.fromkeys(name for judged in videos.values() for name in judged):
            given = {video: judged[name] for video, judged in videos.items() if name in judged}
            finite = {video: value for video, value in given.items() if math.isfinite(value)}
            kind = "total" if name == TOTAL else "trained" if weights.get(name) else "held out"
            changes = {
                video: value - before
                for video, value in finite.items()
                if math.isfinite(before := base.get((video.prompt, video.number), {}).get(name, math.nan))
            }
            difference = None
            if generator != BASE and changes:
                improved = sum(change > 0 for change in changes.values()) / len(changes)
                difference = Difference(clustered(changes), len(changes), improved)
            results.append(Result(generator, name, kind, clustered(finite), len(given), len(given) - len(finite), difference))
    order = {name: place for place, name in enumerate(dict.fromkeys(result.name for result in results))}
    return sorted(results, key=lambda result: (KINDS.index(result.kind), order[result.name]))


# Showing ---------------------------------------------------------------------------------------------------------------------------


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the entries of results.json; what is not known is null."""
    return [
        {
            "generator": result.generator,
            "score": result.name,
            "kind": result.kind,
            **as_bounds(result.interval),
            "videos": result.videos,
            "failed": result.failed,
            "difference": result.difference
            and {
                **as_bounds(result.difference.interval),
                "pairs": result.difference.pairs,
                "improved": result.difference.improved,
                "verdict": _verdict(result.difference.interval),
            },
        }
        for result in results
    ]


def _verdict(interval: Interval) -> str | None:
    """Return what an interval shows; None where there is none."""
    return ("loss", "none shown", "gain")[interval.direction + 1] if math.isfinite(interval.low) else None


def as_bounds(interval: Interval) -> dict[str, float | None]:
    """Return an interval as JSON has it; what is not known is null."""
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}
