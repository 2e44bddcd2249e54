"""The public operator: checks at the boundary, then the implementation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.nft import reference
from arcopo_kernels.nft.reference import NFTOutput
from torch import Tensor


def nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    target: Tensor,
    reward: Tensor,
    *,
    beta: float,
    reduction: Literal["mean", "sum"] = "mean",
) -> NFTOutput:
    """Return the negative-aware forward-process loss (Astrolabe, arXiv 2603.17051, section 3.3), from one pass with its gradient.

        p_plus = p_old + beta (p - p_old)        p_minus = p_old - beta (p - p_old)
        L      = r ||p_plus - y||^2 + (1 - r) ||p_minus - y||^2
        dL/dp  = 2 beta (beta (p - p_old) + (2 r - 1) (p_old - y))

    in float32, whatever the type of the predictions: near the old policy the two mixtures differ by less than bfloat16 resolves.

    Args:
        pred: predictions p under the policy, [B, ...]; the only argument that gets a gradient.
        old_pred: predictions p_old under the old policy, [B, ...].
        target: what they should have predicted, [B, ...]: the clean latent (or the velocity, where the predictions are velocities).
        reward: normalized reward of each sample, [B], in [0, 1]: (1 + advantage / A_max) / 2, clamped.
        beta: weight of the policy in the mixtures. The smaller, the further the optimum lies from the old policy.
        reduction: "mean" or "sum" over the elements of a sample.

    Returns:
        NFTOutput(loss, l_plus, l_minus, drift), each [B] float32 (float64 if a prediction or the target is).

    Raises:
        ValueError: shapes or devices that do not fit, beta <= 0, or an unknown reduction.
    """
    if pred.dim() < 2 or not pred.numel():
        raise ValueError(f"pred has shape {tuple(pred.shape)}; expected [B, ...], not empty")
    for name, tensor, shape in (("old_pred", old_pred, pred.shape), ("target", target, pred.shape), ("reward", reward, pred.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, as pred has {tuple(pred.shape)}")
        if tensor.device != pred.device:
            raise ValueError(f"{name} is on {tensor.device}, pred on {pred.device}; expected one device")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; expected a positive weight")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    wide = [name for name, tensor in (("pred", pred), ("old_pred", old_pred), ("target", target)) if tensor.dtype == torch.float64]
    pred, old_pred, target, mean = pred.flatten(1), old_pred.flatten(1), target.flatten(1), reduction == "mean"
    if dispatch.choose("nft_loss", pred.device, f"{wide[0]} is torch.float64" if wide else None) == "reference":
        return reference.nft_loss(pred, old_pred, target, reward, beta, mean)
    with_gradient = pred.requires_grad and torch.is_grad_enabled()
    loss, parts, _ = _nft_loss(pred, old_pred.detach(), target.detach(), reward.detach(), beta, mean, with_gradient)
    return NFTOutput(loss, *parts.unbind())


@dispatch.operator("nft_loss")
def _nft_loss(
    pred: Tensor, old_pred: Tensor, target: Tensor, reward: Tensor, beta: float, mean: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [B]; l_plus, l_minus and drift, [3, B]; the gradient of each loss, [B, D] float32, empty unless asked for."""
    from arcopo_kernels.nft import triton

    return triton.nft_loss(pred, old_pred, target, reward, beta, mean, with_gradient)


@_nft_loss.registered.register_fake
def _(
    pred: Tensor, old_pred: Tensor, target: Tensor, reward: Tensor, beta: float, mean: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    samples, size = pred.shape
    loss, parts = pred.new_empty(samples, dtype=torch.float32), pred.new_empty(3, samples, dtype=torch.float32)
    return loss, parts, pred.new_empty(samples if with_gradient else 0, size, dtype=torch.float32)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradient(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss[:, None]).to(ctx.dtype), *[None] * 6


_nft_loss.registered.register_autograd(_scale_gradient, setup_context=_keep_gradient)
