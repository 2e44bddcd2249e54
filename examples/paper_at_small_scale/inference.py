"""The certainty of a mean change that was measured for several seeds on the same prompts. Knows nothing of videos, methods or claims.

Every run is judged on the same prompts, so seeds and prompts are crossed, and the videos of one prompt or of one run are not independent.
A cell, the mean change of one seed's videos of one prompt, is thought of as

    y[s, p] = mean + seed[s] + prompt[p] + rest[s, p]

with random seeds and prompts: the interval is for another seed *and* other prompts. With the mean squares of a two-way table, the variance
of the mean over S seeds and P prompts is estimated by

    (M_seed + M_prompt - M_rest) / (S P),   at least M_rest / (S P),

which in such a balanced table is the error that is robust to clusters both ways (Cameron, Gelbach and Miller 2011): the first term is that
of a t interval over the seeds' means, the second that of an error clustered by prompt, the third is what both have counted. The quantile is
Student's t with Satterthwaite's degrees of freedom, which are S - 1 where seeds decide and many where prompts do. Simulated coverage of the
95 % interval is 95 to 97 % where seeds or prompts matter, and 98 % where neither does (the lower bound then acts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEWEST = 4
"""Seeds (or prompts, where nothing is trained) from which on there is a verdict."""

Verdict = Literal["rises", "falls", "equivalent", "no difference shown", "too few"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom; NaN where they are not known. by_unit: each seed's own mean (or prompt's)."""

    mean: float
    error: float
    freedom: float
    by_unit: tuple[float, ...]

    @property
    def p(self) -> float:
        """Probability of a mean at least as far from 0 if the true one is 0, two-sided."""
        if not math.isfinite(self.error):
            return math.nan
        if not self.error:
            return 0.0 if self.mean else 1.0
        return outside(abs(self.mean) / self.error, self.freedom)

    @property
    def interval(self) -> tuple[float, float]:
        """At `LEVEL`, of this mean alone."""
        reach = quantile(self.freedom) * self.error if math.isfinite(self.error) else math.nan
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Tested:
    """An estimate among the tests of a family. p: corrected. margin: see `verdict`."""

    estimate: Estimate
    p: float
    margin: float

    @property
    def verdict(self) -> Verdict:
        """Return what is shown: a change by the corrected p; else that there is none beyond the margin, if the interval lies within it."""
        if len(self.estimate.by_unit) < FEWEST or not math.isfinite(self.p):
            return "too few"
        if self.p < 1 - LEVEL:
            return "rises" if self.estimate.mean > 0 else "falls"
        low, high = self.estimate.interval
        return "equivalent" if -self.margin < low and high < self.margin else "no difference shown"


def crossed(cells: NDArray[np.float64]) -> Estimate:
    """Return the mean of cells [seeds, prompts], see above. A prompt with a cell that is not finite is left out.

    With one seed there is a mean and no error.
    """
    cells = cells[:, np.isfinite(cells).all(axis=0)]
    seeds, prompts = cells.shape
    if not cells.size:
        return Estimate(math.nan, math.nan, math.nan, ())
    mean, of_seed, of_prompt = cells.mean(), cells.mean(axis=1), cells.mean(axis=0)
    by_unit = tuple(of_seed.tolist())
    if seeds < 2 or prompts < 2:
        return Estimate(float(mean), math.nan, math.nan, by_unit)
    rest = cells - of_seed[:, None] - of_prompt + mean
    freedoms = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    sums = [prompts * np.square(of_seed - mean).sum(), seeds * np.square(of_prompt - mean).sum(), np.square(rest).sum()]
    squares = np.array(sums) / freedoms
    variance = max(squares[0] + squares[1] - squares[2], squares[2])
    known = np.square(squares) / freedoms
    freedom = max(1.0, variance**2 / known.sum()) if known.any() else 1.0
    return Estimate(float(mean), math.sqrt(variance / cells.size), float(freedom), by_unit)


def independent(values: NDArray[np.float64]) -> Estimate:
    """Return the mean of independent values [n], with the ordinary t interval."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error, len(values) - 1.0, tuple(values.tolist()))


def family(estimates: Mapping[str, Estimate], margin: float) -> dict[str, Tested]:
    """Return every test with its p corrected for all of them, by Holm. Estimates without a p are no tests.

    margin: a mean whose interval lies within it of 0 is called equivalent, if it does not differ from 0 anyway.
    """
    plain = {name: estimate.p for name, estimate in estimates.items()}
    corrected = holm({name: p for name, p in plain.items() if math.isfinite(p)})
    return {name: Tested(estimate, corrected.get(name, math.nan), margin) for name, estimate in estimates.items()}


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p corrected by Holm's method: the smallest times n, the next times n - 1, ..., none below the one before it."""
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = corrected[name] = max(least, min(1.0, (len(p) - place) * p[name]))
    return corrected


# Student's t -----------------------------------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def outside(t: float, freedom: float) -> float:
    """Return P(|T| > t) for t >= 0 and any real degrees of freedom from 1 on: the density over an angle, T = sqrt(freedom) tan(angle)."""
    first, last = math.atan(t / math.sqrt(freedom)), math.pi / 2
    angles = (last - first) / 2 * _NODES + (last + first) / 2
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(1.0, float(constant * (last - first) * (_WEIGHTS @ np.cos(angles) ** (freedom - 1))))


def quantile(freedom: float, level: float = LEVEL) -> float:
    """Return t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1.0
    while outside(high, freedom) > 1 - level:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle, freedom) > 1 - level else (low, middle)
    return high
