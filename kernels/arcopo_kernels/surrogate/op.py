"""The public operators: checks at the boundary, then the implementation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.surrogate import reference
from arcopo_kernels.surrogate.reference import SurrogateOutput
from torch import Tensor

Reduction = Literal["mean", "sum"]

MAX_GROUP = 64
"""Candidates that the Triton kernels take; one program holds the statistics of all."""


def copo_surrogate(
    pred: Tensor,
    old_pred: Tensor,
    candidates: Tensor,
    advantages: Tensor,
    step_index: Tensor | None = None,
    *,
    tau: float = 1.0,
    clip: float | None = 1e-4,
    reduction: Reduction = "mean",
) -> SurrogateOutput:
    """Return the clipped surrogate objective of N anchors against the G candidates of their group (AR-CoPO, arXiv 2603.17461, section 3).

    For an anchor with prediction x, old prediction x_old and candidates x_i (`reference.py` has the form in which it is computed):

        pi(i) = softmax_i(-||x_i - x||^2 / tau)        rho_i = pi(i) / pi_old(i)
        J     = 1/G sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

    Everything that enters rho is computed in float64. Where `pred` equals `old_pred`, rho is exactly 1. On a GPU the loss and its gradient
    take two launches, bitwise equal from run to run.

    Args:
        pred: anchors' predictions under the policy, [N, ...]; the only argument that gets a gradient.
        old_pred: the same anchors' predictions under the old policy, [N, ...].
        candidates: the group's predictions for each denoising step, [T, G, ...].
        advantages: [G].
        step_index: which of the T steps each anchor belongs to, [N] integers in [0, T); 0 for all when None. A value outside is an error
            on a CPU; on a GPU, where looking would cost a synchronization, it makes the anchor's loss NaN.
        tau: temperature of the distance softmax, in units of the reduced squared distance.
        clip: radius of the ratio's clip interval; None switches clipping off.
        reduction: "mean" or "sum" over the elements of the squared distance.

    Returns:
        SurrogateOutput(loss [N] float64, ratio_minus_one [N, G] float64, live [N, G] bool); `loss` is minus the objective.

    Raises:
        ValueError: shapes, devices or types that do not fit, tau <= 0, a negative clip, or an unknown reduction.
    """
    pred, old_pred, candidates = _flat(pred, old_pred, candidates, step_index, tau, reduction)
    if advantages.shape != candidates.shape[1:2]:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}; expected [{candidates.shape[1]}], one for each candidate")
    if advantages.device != pred.device:
        raise ValueError(f"advantages are on {advantages.device}, pred on {pred.device}; expected one device")
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}; expected a radius of at least 0, or None")
    size = pred.shape[1] if reduction == "mean" else 1
    if dispatch.choose("copo_surrogate", pred.device, _unsupported(pred, old_pred, candidates)) == "reference":
        sums = reference.projections(pred, old_pred, candidates, step_index)
        return reference.surrogate(reference.log_ratio(*sums, tau, size), advantages, clip)
    with_gradient = pred.requires_grad and torch.is_grad_enabled()
    outputs = _copo_surrogate(
        pred, old_pred.detach(), candidates.detach(), advantages.detach(), step_index, tau * size, clip, with_gradient
    )
    return SurrogateOutput(*outputs[:3])


def _flat(
    pred: Tensor, old_pred: Tensor, candidates: Tensor, step_index: Tensor | None, tau: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pred and old_pred [N, D], candidates [T, G, D], once they and the other arguments have been checked."""
    if pred.dim() < 2 or not pred.numel():
        raise ValueError(f"pred has shape {tuple(pred.shape)}; expected [N, ...], not empty")
    if pred.shape != old_pred.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)}, old_pred {tuple(old_pred.shape)}; they must be equal")
    if candidates.dim() != pred.dim() + 1 or candidates.shape[2:] != pred.shape[1:] or not candidates.numel():
        expected = ", ".join(map(str, pred.shape[1:]))
        raise ValueError(f"candidates have shape {tuple(candidates.shape)}; expected [T, G, {expected}], not empty")
    if step_index is not None and (step_index.shape != pred.shape[:1] or step_index.is_floating_point() or step_index.dtype == torch.bool):
        description = f"shape {tuple(step_index.shape)} and type {step_index.dtype}"
        raise ValueError(f"step_index has {description}; expected [{pred.shape[0]}] integers, one for each anchor")
    for argument, tensor in (("old_pred", old_pred), ("candidates", candidates), ("step_index", step_index)):
        if tensor is not None and tensor.device != pred.device:
            raise ValueError(f"{argument} is on {tensor.device}, pred on {pred.device}; expected one device")
    if not tau > 0:
        raise ValueError(f"tau is {tau}; expected a positive temperature")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    return pred.flatten(1), old_pred.flatten(1), candidates.flatten(2)


def _unsupported(pred: Tensor, old_pred: Tensor, candidates: Tensor) -> str | None:
    """Return why the Triton kernels cannot take these arguments; None if they can."""
    for argument, tensor in (("pred", pred), ("old_pred", old_pred), ("candidates", candidates)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{argument} is {tensor.dtype}"
    if candidates.shape[1] > MAX_GROUP:
        return f"the group has {candidates.shape[1]} candidates, more than {MAX_GROUP}"
    return None


@dispatch.operator("copo_surrogate")
def _copo_surrogate(
    pred: Tensor,
    old_pred: Tensor,
    candidates: Tensor,
    advantages: Tensor,
    step_index: Tensor | None,
    tau: float,
    clip: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, ratio - 1, live, and the gradient of each loss, [N, D] float32, empty unless asked for; tau is that of the summed
    distance."""
    from arcopo_kernels.surrogate import triton

    return triton.copo_surrogate(pred, old_pred, candidates, advantages, step_index, tau, clip, with_gradient)


@_copo_surrogate.registered.register_fake
def _(pred: Tensor, old_pred: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (anchors, size), group, with_gradient = pred.shape, candidates.shape[1], rest[-1]
    return (
        pred.new_empty(anchors, dtype=torch.float64),
        pred.new_empty(anchors, group, dtype=torch.float64),
        pred.new_empty(anchors, group, dtype=torch.bool),
        pred.new_empty(anchors if with_gradient else 0, size, dtype=torch.float32),
    )


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ratio_minus_one, live, gradient = output
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(ratio_minus_one, live, gradient)


def _scale_gradient(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss.float()[:, None]).to(ctx.dtype), *[None] * 7


_copo_surrogate.registered.register_autograd(_scale_gradient, setup_context=_keep_gradient)
