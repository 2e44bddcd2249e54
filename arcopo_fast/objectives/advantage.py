"""The weighted total of rewards, which a run trains on and is compared by, and the advantages of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

Scores = TypeVar("Scores", float, Tensor)


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
    rewards: Tensor, std_floor: float = 0.0, std: Literal["population", "sample"] = "population", *, rounding: float | None = None
) -> Tensor:
    """Return (r - mean r) / max(std r, std_floor) over a group [G], in float64; zeros for a group without variance: it teaches nothing.

    A floor above 0 keeps a group whose members are as good as equal from getting full-size advantages out of noise.

    Args:
        std: "population" divides the sum of squares by G, "sample" by G - 1.
        rounding: a standard deviation of at most this is no variance; None: that of the rewards themselves, see `rounding_of`.
    """
    rewards = rewards.double()
    centered = rewards - rewards.mean()
    deviation = centered.square().mean().sqrt()
    if rewards.max() == rewards.min() or deviation <= (rounding_of(rewards) if rounding is None else rounding):
        return torch.zeros_like(centered)
    if std == "sample":
        deviation *= (len(rewards) / (len(rewards) - 1)) ** 0.5
    return centered / max(deviation.item(), std_floor)


def rounding_of(rewards: Tensor) -> float:
    """Return by how much scores [G] that were float32 may differ without meaning it: its epsilon times the largest; 0 if all are equal."""
    return torch.finfo(torch.float32).eps * rewards.abs().max().item() if rewards.max() > rewards.min() else 0.0


def quasi_norm(advantages: Tensor, p: float) -> Tensor:
    """Return A_i / (sum |A|^p)^(1/p), times sqrt(G) to keep the scale of a z-score for comparison (Neighbor GRPO, arXiv 2511.16955)."""
    norm = advantages.abs().pow(p).sum().pow(1 / p)
    return advantages / norm * len(advantages) ** 0.5 if norm > 0 else advantages


def group_advantages(
    components: dict[str, Tensor],
    weights: dict[str, float],
    *,
    combine: Literal["sum", "per_reward_zscore"] = "sum",
    kind: Literal["zscore", "quasi_norm"] = "zscore",
    p: float = 0.8,
    std_floor: float = 0.0,
    std: Literal["population", "sample"] = "population",
    largest: float | None = None,
) -> Tensor:
    """Return the advantages [G] float64 of one group.

    A member without a score, NaN in a reward that has a weight, gets 0, and the others' advantages are those of a group without it.

    Args:
        components: rewards [G] by name.
        weights: their weights.
        combine: "sum" z-scores the weighted sum; "per_reward_zscore" sums the z-scores, so that a reward's spread does not weigh.
        kind: "quasi_norm" normalizes the result as Neighbor GRPO does, with exponent p.
        std_floor, std: see `zscore`.
        largest: |A_i| is cut off there.
    """
    total = weighted_total(components, weights)
    scored = total.isfinite()
    everyone = torch.zeros_like(total)
    if not scored.any():
        return everyone
    if combine == "sum":
        # Of each reward, not of their sum: a large constant must not hide what a small reward says.
        roundings = {name: rounding_of(reward[scored]) for name, reward in components.items()}
        rounding = weighted_total(roundings, {name: abs(weight) for name, weight in weights.items()})
        advantages = zscore(total[scored], std_floor, std, rounding=rounding)
    else:
        advantages = weighted_total({name: zscore(reward[scored], std_floor, std) for name, reward in components.items()}, weights)
    advantages = quasi_norm(advantages, p) if kind == "quasi_norm" else advantages
    everyone[scored] = advantages if largest is None else advantages.clamp(-largest, largest)
    return everyone
