"""The weighted total of rewards, which a run trains on and is compared by, and the advantages of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Scores = TypeVar("Scores", float, Tensor)
SMALLEST_STD = 1e-8
"""A standard deviation of advantages that nothing is divided by."""


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


def zscore(
    rewards: Tensor,
    std_floor: float = 0.0,
    std: Literal["population", "sample"] = "population",
    *,
    rounding: float | None = None,
    anchor: float | None = None,
) -> Tensor:
    """Return (r - mean r) / max(std r, std_floor) over a group [G], in float64; zeros for a group without variance: it teaches nothing.

    A floor above 0 keeps a group whose members are as good as equal from getting full-size advantages out of noise.

    Args:
        std: "population" divides the sum of squares by G, "sample" by G - 1.
        rounding: a standard deviation of at most this is no variance; None: that of the rewards themselves, see `rounding_of`.
        anchor: the reward of a video that is no member. It is subtracted in place of the mean, and one more in the standard deviation.
    """
    rewards = rewards.double()
    compared = rewards if anchor is None else torch.cat([rewards, rewards.new_tensor([anchor])])
    centered = rewards - (rewards.mean() if anchor is None else anchor)
    deviation = (compared - compared.mean()).square().mean().sqrt()
    if rewards.max() == rewards.min() or deviation <= (rounding_of(rewards) if rounding is None else rounding):
        return torch.zeros_like(centered)
    if std == "sample":
        deviation *= (len(compared) / (len(compared) - 1)) ** 0.5
    return centered / max(deviation.item(), std_floor)


def rounding_of(rewards: Tensor) -> float:
    """Return by how much scores [G] that were float32 may differ without meaning it: its epsilon times the largest; 0 if all are equal."""
    return torch.finfo(torch.float32).eps * rewards.abs().max().item() if rewards.max() > rewards.min() else 0.0


def quasi_norm(advantages: Tensor, p: float) -> Tensor:
    """Return A_i / (sum |A|^p)^(1/p), times sqrt(G) to keep the scale of a z-score for comparison (Neighbor GRPO, arXiv 2511.16955)."""
    norm = advantages.abs().pow(p).sum().pow(1 / p)
    return advantages / norm * len(advantages) ** 0.5 if norm > 0 else advantages


def group_advantages(
    components: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    combine: Literal["sum", "per_reward_zscore"] = "sum",
    kind: Literal["zscore", "quasi_norm"] = "zscore",
    p: float = 0.8,
    std_floor: float = 0.0,
    std: Literal["population", "sample"] = "population",
    anchor: Mapping[str, float] | None = None,
) -> Tensor:
    """Return the advantages [G] float64 of one group, as far as one window of its videos tells.

    A member without a score, NaN in a reward that has a weight, gets 0, and the others' advantages are those of a group without it.

    Args:
        components: rewards [G] by name.
        weights: their weights.
        combine: "sum" z-scores the weighted sum; "per_reward_zscore" sums the z-scores, so that a reward's spread does not weigh.
        kind: "quasi_norm" normalizes the result as Neighbor GRPO does, with exponent p.
        std_floor, std: see `zscore`.
        anchor: rewards by name of a video that is no member, the baseline in place of the group's mean, see `zscore`. Then advantages are
            divided by their standard deviation, so that those of several windows add up at one scale. Without a score of it there are none.
    """
    total = weighted_total(components, weights)
    scored = total.isfinite()
    everyone = torch.zeros_like(total)
    baseline = None if anchor is None else weighted_total(anchor, weights)
    if not scored.any() or (baseline is not None and not math.isfinite(baseline)):
        return everyone
    if combine == "sum":
        # Of each reward, not of their sum: a large constant must not hide what a small reward says.
        roundings = {name: rounding_of(reward[scored]) for name, reward in components.items()}
        rounding = weighted_total(roundings, {name: abs(weight) for name, weight in weights.items()})
        advantages = zscore(total[scored], std_floor, std, rounding=rounding, anchor=baseline)
    else:
        each = {
            name: zscore(reward[scored], std_floor, std, anchor=None if anchor is None else anchor[name])
            for name, reward in components.items()
        }
        advantages = weighted_total(each, weights)
    advantages = quasi_norm(advantages, p) if kind == "quasi_norm" else advantages
    if anchor is not None and (deviation := advantages.std(correction=0)) > SMALLEST_STD:
        advantages = advantages / deviation
    everyone[scored] = advantages
    return everyone


def window_advantages(
    scores: Mapping[str, Tensor],
    windows: Sequence[tuple[float, Mapping[str, float]]],
    *,
    anchor: Mapping[str, float] | None = None,
    largest: float | None = None,
    **settings: Any,
) -> Tensor:
    """Return A_i = sum over windows of weight * A_i^u, [G] float64: the advantages of videos of which several windows are judged.

    A member without a score in one window keeps what the others give it.

    Args:
        scores: of all windows, [G] by name; there is at least one.
        windows: each one's weight, and the rewards' weights by the names of its scores.
        anchor: scores by name of a video that is no member, see `group_advantages`.
        largest: |A_i| is cut off there.
        settings: of `group_advantages`.
    """
    total = torch.zeros(len(next(iter(scores.values()))), dtype=torch.float64)
    for weight, weights in windows:
        own = {name: scores[name] for name in weights if weights[name]}
        if weight and own:
            total += weight * group_advantages(own, weights, anchor=anchor, **settings)
    return total if largest is None else total.clamp(-largest, largest)
