"""The one number that a run trains on, and is compared by: the weighted sum of its rewards. Needs neither rewards nor PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Scores = TypeVar("Scores", float, "Tensor")


def weighted_total(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Return the sum of weight * score in fp64; NaN where a reward that has a weight has no score.

    A reward of weight 0 is only watched, and has no part in it: 0 times a score that failed would be NaN.

    Args:
        scores: by the reward's name, a number or a tensor [N] each; more than `weights` names may be there.
        weights: by the reward's name; at least one of them is not 0.
    """
    parts = [weight * _double(scores[name]) for name, weight in weights.items() if weight]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _double(score: Scores) -> Scores:
    return score if isinstance(score, float | int) else score.double()
