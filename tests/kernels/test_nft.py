"""The forward-process loss against the expanded square and its gradient worked out by hand, in float64."""

from __future__ import annotations

from typing import Iterator

import pytest
import torch
from arcopo_kernels import dispatch
from arcopo_kernels.nft import nft_loss
from arcopo_kernels.nft import op as nft_op
from arcopo_kernels.testing import ROUNDING, assert_close
from support.graphs import assert_compiles_whole, assert_replays_other_inputs
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMPLEMENTATIONS = ["reference", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with dispatch.use(request.param):
        yield request.param


def draw(
    shape: tuple[int, ...], update: float, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, an old prediction half a standard deviation off, `update` rms away from it the prediction; rewards in [0, 1]."""
    target = torch.randn(shape)
    old = target + 0.5 * torch.randn(shape)
    pred = old + update * torch.randn(shape)
    given = [tensor.to(dtype) for tensor, dtype in zip((pred, old, target), dtypes)]
    pred, old, target, reward = (tensor.to(device) for tensor in (*given, torch.rand(shape[0])))
    return pred.requires_grad_(), old, target, reward


def worked_out(pred: Tensor, old: Tensor, target: Tensor, reward: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Loss [B] and its gradient [B, D], summed over the elements, from e^2 + beta^2 delta^2 + 2 beta (2 r - 1) e delta."""
    p, p_old, y = (tensor.detach().double().flatten(1) for tensor in (pred, old, target))
    delta, error, sign = p - p_old, p_old - y, (2 * reward.double() - 1)[:, None]
    loss = error**2 + beta**2 * delta**2 + 2 * beta * sign * error * delta
    return loss.sum(1), 2 * beta * (beta * delta + sign * error)


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((3, 3, 4, 5, 7), (F32, F32, F32)),
        ((2, 9001), (BF16, BF16, BF16)),
        ((2, 4096), (BF16, F32, F16)),
        ((16, 1), (F32, F32, F32)),
        ((1, 30_001), (F32, F32, F32)),
    ],
)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient(
    device: torch.device,
    implementation: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    beta: float,
    reduction: str,
) -> None:
    pred, old, target, reward = draw(shape, 0.02, dtypes, device)
    out = nft_loss(pred, old, target, reward, beta=beta, reduction=reduction)  # type: ignore[arg-type]
    used = dispatch.used("nft_loss")
    assert used is not None and used.name == implementation
    loss, gradient = worked_out(pred, old, target, reward, beta)
    size = pred[0].numel() if reduction == "mean" else 1
    # The definition subtracts the target from each mixture, and one error from the other: it rounds more than the kernel's form of it.
    tolerance = 1e-6 if implementation == "triton" else 1e-5
    assert all(part.dtype == F32 and part.shape == shape[:1] for part in out)
    assert_close("loss", out.loss, loss / size, tolerance)
    one, zero = torch.ones_like(reward), torch.zeros_like(reward)
    assert_close("l_plus", out.l_plus, worked_out(pred, old, target, one, beta)[0] / size, tolerance)
    assert_close("l_minus", out.l_minus, worked_out(pred, old, target, zero, beta)[0] / size, tolerance)
    assert_close("drift", out.drift, (pred.double() - old.double()).square().flatten(1).sum(1) / size, 1e-6)
    weight = torch.randn(shape[0], device=device)
    (actual,) = torch.autograd.grad((out.loss * weight).sum(), pred)
    assert actual.dtype == pred.dtype and actual.shape == pred.shape
    if implementation == "reference":  # what is left, near a reward of one half, of two gradients that point against each other
        tolerance *= float(weight.norm() / (weight * (2 * reward - 1)).norm())
    assert_close("gradient", actual.flatten(1), weight[:, None] * gradient / size, max(tolerance, ROUNDING[pred.dtype]))


def test_at_the_old_policy(device: torch.device, implementation: str) -> None:
    """The gradient is 2 beta (2 r - 1) (p_old - y) / D: a reward of one half gives none, and the two mixtures coincide."""
    _, old, target, reward = draw((3, 101), 0.0, (F32, F32, F32), device)
    reward.copy_(torch.tensor([0.5, 0.1, 0.9]))
    pred = old.clone().requires_grad_()
    out = nft_loss(pred, old, target, reward, beta=0.3)
    (gradient,) = torch.autograd.grad(out.loss.sum(), pred)
    assert (gradient[0] == 0).all() and (out.drift == 0).all() and torch.equal(out.l_plus, out.l_minus)
    assert_close("gradient", gradient, 2 * 0.3 * (2 * reward - 1)[:, None] * (old - target) / 101, 1e-6)


def test_only_pred_gets_a_gradient_and_only_from_the_loss(device: torch.device, implementation: str) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in draw((2, 30), 0.1, (F32, F32, F32), device)]
    out = nft_loss(*leaves, beta=1.0)
    assert out.loss.requires_grad and not any(part.requires_grad for part in out[1:])
    out.loss.sum().backward()
    assert leaves[0].grad is not None and all(leaf.grad is None for leaf in leaves[1:])
    with torch.no_grad():
        assert torch.equal(nft_loss(*leaves, beta=1.0).loss, out.loss.detach())


def test_two_calls_are_bitwise_equal_and_layout_does_not_matter(device: torch.device, implementation: str) -> None:
    inputs = draw((2, 3, 5000), 0.1, (F32, F32, F32), device)
    strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs[:3]]
    results = []
    for given in (inputs[:3], inputs[:3], strided):
        pred = given[0].detach().requires_grad_()
        out = nft_loss(pred, *given[1:], inputs[3], beta=0.1)
        results.append([*out, *torch.autograd.grad(out.loss.sum(), pred)])
    once, again, elsewhere = results
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    for a, b in zip(once, elsewhere):  # plain PyTorch may sum other layouts in another order
        assert torch.equal(a, b) if implementation == "triton" else torch.allclose(a, b, rtol=1e-5, atol=1e-7 * a.abs().max().item())


def test_operator_passes_opcheck(device: torch.device) -> None:
    pytest.importorskip("triton")
    pred, old, target, reward = draw((2, 30), 0.1, (F32, F32, F32), device)
    torch.library.opcheck(nft_op._nft_loss.registered, (pred, old, target, reward, 0.1, True, True))
    torch.library.opcheck(nft_op._nft_loss.registered, (pred.detach(), old, target, reward, 0.1, False, False))


def test_compile_without_graph_breaks(device: torch.device, implementation: str) -> None:
    pred, old, target, reward = draw((2, 31), 0.1, (BF16, BF16, BF16), device)

    def step(pred: Tensor) -> tuple[Tensor, Tensor]:
        out = nft_loss(pred, old, target, reward, beta=0.1)
        return out.loss.sum(), out.l_plus

    assert_compiles_whole(step, pred, "l_plus")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_graph(device: torch.device) -> None:
    """Captured once, forward and backward, and replayed with other inputs."""
    static = draw((4, 9001), 0.1, (BF16, BF16, BF16), device)

    def step() -> tuple[Tensor, Tensor]:
        loss = nft_loss(*static, beta=0.1).loss
        return loss, torch.autograd.grad(loss.sum(), static[0])[0]

    assert_replays_other_inputs(step, static, draw((4, 9001), 0.1, (BF16, BF16, BF16), device))


def test_float64_falls_back(device: torch.device) -> None:
    dtypes = (torch.float64, F32, F32)
    out = nft_loss(*draw((2, 8), 0.1, dtypes, device), beta=0.1)
    used = dispatch.used("nft_loss")
    assert used is not None and used.name == "reference" and out.loss.dtype == torch.float64


def test_bad_arguments_are_named() -> None:
    pred, old, target, reward = draw((2, 8), 0.1, (F32, F32, F32), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"reward has shape \(1,\); expected \(2,\)"):
        nft_loss(pred, old, target, reward[:1], beta=0.1)
    with pytest.raises(ValueError, match=r"target has shape \(2, 7\); expected \(2, 8\)"):
        nft_loss(pred, old, target[:, :7], reward, beta=0.1)
    with pytest.raises(ValueError, match="beta is 0"):
        nft_loss(pred, old, target, reward, beta=0)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        nft_loss(pred, old, target, reward, beta=0.1, reduction="none")  # type: ignore[arg-type]
