"""Runs that differ in their seed alone are one series; series are named by the settings in which they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.changes import deviation
from arcopo_fast.reports.charts import Points, Spread
from arcopo_fast.reports.results import Run
from arcopo_fast.storage.identity import leaves

# And of no series: what a run is called, where it goes, what repeats it, and where its buffer lies, which is collected with a seed too.
_OF_THE_RUN = ("name", "seed", "run", "train.buffer")
_MOST_IN_A_LABEL = 3


@dataclass(frozen=True)
class Series:
    """Runs by seed. label: the settings that tell this series from the others; settings: all of them, as `settings` gives them."""

    label: str
    settings: dict[str, str]
    runs: Sequence[Run]


def settings(config: Config) -> dict[str, str]:
    """Every setting that two runs of one series share: dotted key -> its value, as an override would write it."""
    return {
        key: yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
        for key, value in leaves(config)
        if key not in _OF_THE_RUN and key.split(".")[0] not in _OF_THE_RUN
    }


def group(runs: Sequence[Run]) -> list[Series]:
    """The series that runs belong to, in the order in which they are given; inside a series, by seed."""
    found: list[tuple[dict[str, str], list[Run]]] = []
    for run in runs:
        own = settings(run.config)
        existing = next((members for known, members in found if known == own), None)
        if existing is None:
            found.append((own, [run]))
        else:
            existing.append(run)
    labels = _labels([own for own, _ in found]) if len(found) > 1 else [run.config.name for run in runs[:1]]
    return [Series(label, own, sorted(members, key=lambda run: run.config.seed)) for label, (own, members) in zip(labels, found)]


def differences(series: Sequence[dict[str, str]]) -> list[str]:
    """Keys whose value is not the same in all, or that some do not have; first those that choose between methods."""
    keys = dict.fromkeys(key for own in series for key in own)
    differing = [key for key in keys if len({own.get(key) for own in series}) > 1]
    return sorted(differing, key=lambda key: not key.endswith((".kind", ".mode")))  # these say the most


def _labels(series: Sequence[dict[str, str]]) -> list[str]:
    """Return what differs, as overrides; where that is too much to read, the first settings that tell all series apart."""
    keys = differences(series)
    if len(keys) > _MOST_IN_A_LABEL:
        telling: list[str] = []
        for key in keys:
            if _kinds(series, [*telling, key]) > _kinds(series, telling):
                telling.append(key)
        keys = telling
    return [", ".join(f"{key}={own[key]}" for key in keys if key in own) or f"without {keys[0]}" for own in series]


def _kinds(series: Sequence[dict[str, str]], keys: Sequence[str]) -> int:
    """Return the number of series that these keys tell apart."""
    return len({tuple(own.get(key) for key in keys) for own in series})


def over_seeds(curves: Sequence[Points]) -> tuple[Points, Spread]:
    """The mean of several runs' curves, as far as all of them have a value, and from the smallest to the largest around it."""
    known = [dict(curve) for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    values = {x: [curve[x] for curve in known] for x in shared}
    mean = [(x, sum(ys) / len(ys)) for x, ys in values.items()]
    return mean, Spread([(x, min(ys), max(ys)) for x, ys in values.items()], curves)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds; NaN where there is nothing, or one value, to tell it by."""
    return sum(values) / len(values) if values else math.nan, deviation(values)
