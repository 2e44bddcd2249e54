"""Long videos by segment: how a score runs along a video, and how generators differ in that, on the same prompts and noises.

A figure is computed for each video by itself, so that a video is compared with itself (its last segment with its first) or with the same
video of another generator. Means over videos have the intervals of `evaluation.compare`. A video of which a segment has no score counts in
none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arcopo_fast.evaluation.compare import Interval, as_bounds, clustered, with_total
from arcopo_fast.evaluation.few_steps import ACUTANCE
from arcopo_fast.evaluation.looks import MOTION
from arcopo_fast.evaluation.scores import BASE, Scores, Video
from arcopo_fast.storage.metrics import TOTAL

LUMINANCE, CLIPPED, CHROMA, CONTRAST, SIMILARITY = "luminance", "clipped", "chroma", "contrast", "similarity"
MEASURES = {LUMINANCE: 0, CLIPPED: -1, CHROMA: 0, CONTRAST: 0, ACUTANCE: 1, MOTION: 1, SIMILARITY: 1}
"""Measures of drift, see `evaluation.segments`, each with the sign of what is better; 0: neither, a change is what matters."""
DRIFTING = "drift"
"""Kind of these measures, after those of `evaluation.scores.KINDS`."""

FIRST, LAST, DRIFT, SLOPE, WORST = FIGURES = "first", "last", "drift", "slope", "worst"
"""Figures of a video: first and last segment, the last less the first, the slope per minute, the worst segment."""


@dataclass(frozen=True)
class Along:
    """Means over videos.

    segments: of each segment. figures: by the names in `FIGURES`.
    """

    segments: list[Interval]
    figures: dict[str, Interval]


@dataclass(frozen=True)
class Course:
    """One score along the videos of one generator.

    Attributes:
        kind: of `KINDS`, or `DRIFTING`.
        values: of its own videos.
        videos: those that were judged; failed: those of which a segment has no score.
        worst: the segment of the worst mean, counted from 0.
        difference: of its videos to the same ones of the generator that all are compared with; None for that one.
        pairs: how many both have.
    """

    generator: str
    name: str
    kind: str
    values: Along
    videos: int
    failed: int
    worst: int
    difference: Along | None
    pairs: int


@dataclass(frozen=True)
class Courses:
    """compared_with: the generator without an adapter, or the first one. seconds: where each segment begins and ends."""

    found: list[Course]
    compared_with: str
    seconds: list[tuple[float, float]]


def courses(scores: Scores, settings: Mapping[str, Any], generators: Iterable[str] | None = None) -> Courses:
    """Return every score of every generator along its videos, score by score: the total, the rewards, what is held out, what drifts.

    Args:
        settings: of the evaluation: rewards' weights, frames per second, and the frames of each segment.
        generators: which, in this order; None: all, the base model first.
    """
    weights = {key.removeprefix("rewards."): value for key, value in settings.items() if key.startswith("rewards.")}
    seconds, frame = [], 0
    for frames in settings["segments.frames"]:
        seconds.append((frame / settings["video.fps"], (frame + frames) / settings["video.fps"]))
        frame += frames
    names = list(generators or sorted(scores.adapters, key=lambda name: (name != BASE, name)))
    reference = BASE if BASE in scores.adapters else names[0]
    judged = {name: _with_totals(scores, name, weights) for name in {*names, reference}}
    found = []
    for score in _ordered(judged[reference], weights):
        base = _complete(judged[reference], score, seconds)
        for name in names:
            own = _complete(judged[name], score, seconds)
            pairs = {video: base[video] for video in own if video in base and name != reference}
            changes = {video: [value - before for value, before in zip(own[video], row)] for video, row in pairs.items()}
            values = _along(own, len(seconds))
            worst = _worst([interval.mean for interval in values.segments], score)
            failed, difference = len(judged[name]) - len(own), _along(changes, len(seconds)) if pairs else None
            found.append(Course(name, score, _kind(score, weights), values, len(judged[name]), failed, worst, difference, len(pairs)))
    return Courses(found, reference, seconds)


def _with_totals(scores: Scores, generator: str, weights: Mapping[str, float]) -> dict[Video, dict[str, list[float]]]:
    """Return the scores of each video by segment, the total before the others. The videos are all called those of the base model."""
    found = {}
    for video in scores.of(generator):
        segments = scores.segments[video]
        totals = [with_total(dict(zip(segments, column)), weights)[TOTAL] for column in zip(*segments.values())]
        found[video._replace(generator=BASE)] = {TOTAL: totals} | segments
    return found


def _ordered(judged: Mapping[Video, Mapping[str, Sequence[float]]], weights: Mapping[str, float]) -> list[str]:
    names = dict.fromkeys(name for parts in judged.values() for name in parts)
    kinds = ("total", "trained", "held out", DRIFTING)
    return sorted(names, key=lambda name: kinds.index(_kind(name, weights)))


def _kind(name: str, weights: Mapping[str, float]) -> str:
    if name == TOTAL:
        return "total"
    return DRIFTING if name in MEASURES else "trained" if weights.get(name) else "held out"


def _complete(
    judged: Mapping[Video, Mapping[str, Sequence[float]]], name: str, seconds: Sequence[tuple[float, float]]
) -> dict[Video, list[float]]:
    """Return a score's segments and then its figures, of the videos that have it in all segments."""
    values = {video: parts[name] for video, parts in judged.items() if name in parts and all(map(math.isfinite, parts[name]))}
    return {video: [*parts, *figures(parts, name, seconds).values()] for video, parts in values.items()}


def _along(videos: Mapping[Video, Sequence[float]], segments: int) -> Along:
    """Return the means over videos of so many segments and the figures behind them."""
    means = [clustered({video: row[place] for video, row in videos.items()}) for place in range(segments + len(FIGURES))]
    return Along(means[:segments], dict(zip(FIGURES, means[segments:])))


def figures(values: Sequence[float], name: str, seconds: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the figures of one video, by the names in `FIGURES`.

    The slope is that of least squares over the middles of the segments, per minute of video; NaN for a single segment.

    Args:
        values: a finite one of each segment.
        name: of the score.
        seconds: where each segment begins and ends.
    """
    minutes = [(begin + end) / 120 for begin, end in seconds]
    slope = statistics.linear_regression(minutes, values).slope if len(values) > 1 else math.nan
    return dict(zip(FIGURES, (values[0], values[-1], values[-1] - values[0], slope, values[_worst(values, name)])))


def _worst(values: Sequence[float], name: str) -> int:
    """Return the place of the lowest value, of the highest where less is better, or of the farthest from the first where neither is."""
    sign = MEASURES.get(name, 1)
    return max(range(len(values)), key=lambda place: -sign * values[place] if sign else abs(values[place] - values[0]))


def as_json(found: Courses) -> dict[str, Any]:
    """Return what results.json says of segments; what is not known is null."""
    return {
        "seconds": [list(span) for span in found.seconds],
        "compared_with": found.compared_with,
        "scores": [
            {
                "generator": course.generator,
                "score": course.name,
                "kind": course.kind,
                **_bounds(course.values),
                "worst_segment": course.worst + 1,
                "videos": course.videos,
                "failed": course.failed,
                "difference": course.difference and _bounds(course.difference) | {"pairs": course.pairs},
            }
            for course in found.found
        ],
    }


def _bounds(values: Along) -> dict[str, Any]:
    return {"segments": [as_bounds(interval) for interval in values.segments]} | {
        figure: as_bounds(interval) for figure, interval in values.figures.items()
    }
