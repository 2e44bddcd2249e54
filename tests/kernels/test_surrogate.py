"""The surrogate against its definition in float64: two full distance softmaxes, their ratio, min and clip, through autograd."""

from __future__ import annotations

import pytest
import torch
from arcopo_kernels import copo_surrogate
from torch import Tensor


def definition(
    pred: Tensor, old: Tensor, candidates: Tensor, advantages: Tensor, tau: float, clip: float | None, mean: bool
) -> tuple[Tensor, Tensor]:
    """-J and rho of one anchor from squared distances; pred, old [D], candidates [G, D]."""
    reduce = torch.mean if mean else torch.sum
    log_pi, log_pi_old = (torch.log_softmax(-reduce((candidates - x) ** 2, dim=1) / tau, dim=0) for x in (pred, old))
    rho = (log_pi - log_pi_old).exp()
    bounded = rho if clip is None else rho.clamp(1 - clip, 1 + clip)
    return -torch.minimum(rho * advantages, bounded * advantages).mean(), rho


def draw(items: int, steps: int, group: int, shape: tuple[int, ...], update: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    candidates = torch.randn(steps, group, *shape, dtype=torch.float64)
    step_index = torch.randint(steps, (items,))
    old = candidates[step_index, torch.randint(group, (items,))] + 0.01 * torch.randn(items, *shape, dtype=torch.float64)
    advantages = torch.randn(group, dtype=torch.float64)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return old + update * torch.randn_like(old), old, candidates, advantages, step_index


@pytest.mark.parametrize("clip", [None, 1e-2, 1e-4])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("update", [1e-3, 1e-1])
def test_loss_ratio_and_gradient(clip: float | None, mean: bool, update: float) -> None:
    pred, old, candidates, advantages, step_index = draw(5, 3, 12, (3, 7, 5), update)
    tau = 0.7 if mean else 70.0
    pred.requires_grad_()
    out = copo_surrogate(pred, old, candidates, advantages, step_index, tau=tau, clip=clip, reduction="mean" if mean else "sum")
    weight = torch.randn(5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out.loss * weight).sum(), pred)
    reference = [
        definition(p.flatten(), o.flatten(), candidates[s].flatten(1), advantages, tau, clip, mean)
        for p, o, s in zip(pred, old, step_index)
    ]
    losses, ratios = (torch.stack(parts) for parts in zip(*reference))
    (expected,) = torch.autograd.grad((losses * weight).sum(), pred)
    torch.testing.assert_close(out.loss, losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.ratio_minus_one, ratios.detach() - 1, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * expected.abs().max().item() + 1e-18)
    if clip == 1e-4 and update == 1e-1:
        assert not out.live.all() and out.live.any(), "this case must exercise the clip"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_update_the_ratio_is_exactly_one(dtype: torch.dtype) -> None:
    """And the ascent direction is (2 / (tau G)) sum_i A_i x_i at every anchor, whatever tau and the anchor."""
    group, tau = 12, 0.3
    _, old, candidates, advantages, step_index = draw(4, 2, group, (301,), 0.0)
    pred = old.to(dtype).requires_grad_()
    out = copo_surrogate(pred, pred.detach(), candidates.to(dtype), advantages, step_index, tau=tau, reduction="sum")
    assert (out.ratio_minus_one == 0).all() and out.live.all()
    (gradient,) = torch.autograd.grad(out.loss.sum(), pred)
    ascent = 2 / (tau * group) * torch.einsum("g,ngd->nd", advantages, candidates.to(dtype).double()[step_index])
    torch.testing.assert_close(-gradient.double(), ascent, rtol=0, atol=torch.finfo(dtype).eps * ascent.abs().max().item())


def test_bad_arguments_are_named() -> None:
    pred, old, candidates, advantages, step_index = draw(2, 1, 4, (6,), 0.1)
    with pytest.raises(ValueError, match=r"advantages have shape \(3,\); expected \[4\]"):
        copo_surrogate(pred, old, candidates, advantages[:3], step_index)
    with pytest.raises(ValueError, match=r"expected \[T, G, 6\]"):
        copo_surrogate(pred, old, candidates[0], advantages, step_index)
    with pytest.raises(ValueError, match="tau is 0"):
        copo_surrogate(pred, old, candidates, advantages, step_index, tau=0)
