"""The public operator: checks at the boundary, then the implementation."""

from __future__ import annotations

from typing import Literal

import torch
from arcopo_kernels.surrogate import reference
from arcopo_kernels.surrogate.reference import SurrogateOutput
from torch import Tensor


def copo_surrogate(
    pred: Tensor,
    old_pred: Tensor,
    candidates: Tensor,
    advantages: Tensor,
    step_index: Tensor | None = None,
    *,
    tau: float = 1.0,
    clip: float | None = 1e-4,
    reduction: Literal["mean", "sum"] = "mean",
) -> SurrogateOutput:
    """The clipped surrogate objective of N anchors against the G candidates of their group (AR-CoPO, arXiv 2603.17461, section 3).

    Args:
        pred: anchors' predictions under the policy, [N, ...], with gradient.
        old_pred: the same anchors' predictions under the old policy, [N, ...].
        candidates: the group's predictions for each denoising step, [T, G, ...].
        advantages: [G].
        step_index: which of the T steps each anchor belongs to, [N] integers; 0 for all when None.
        tau: temperature of the distance softmax, in units of the reduced squared distance.
        clip: radius of the ratio's clip interval; None switches clipping off.
        reduction: "mean" or "sum" over the elements of the squared distance.

    Returns:
        SurrogateOutput(loss [N] float64, ratio_minus_one [N, G] float64, live [N, G] bool); `loss` is minus the objective.

    Raises:
        ValueError: shapes that do not fit, tau <= 0, or an unknown reduction.
    """
    if pred.shape != old_pred.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)}, old_pred {tuple(old_pred.shape)}; they must be equal")
    if candidates.dim() != pred.dim() + 1 or candidates.shape[2:] != pred.shape[1:]:
        raise ValueError(f"candidates have shape {tuple(candidates.shape)}; expected [T, G, {', '.join(map(str, pred.shape[1:]))}]")
    if advantages.shape != candidates.shape[1:2]:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}; expected [{candidates.shape[1]}], one for each candidate")
    if step_index is None:
        step_index = torch.zeros(pred.shape[0], dtype=torch.long, device=pred.device)
    if step_index.shape != pred.shape[:1]:
        raise ValueError(f"step_index has shape {tuple(step_index.shape)}; expected [{pred.shape[0]}], one for each anchor")
    if tau <= 0:
        raise ValueError(f"tau is {tau}; expected a positive temperature")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    return reference.copo_surrogate(
        pred.flatten(1), old_pred.flatten(1), candidates.flatten(2), advantages, step_index, tau, clip, mean=reduction == "mean"
    )
