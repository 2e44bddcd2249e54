"""copo_surrogate: one update's anchors against their group.

Traffic: T * G * D elements of candidates are read once, pred and old_pred [N, D] are read and the gradient [N, D] is written. The goal is
twice that floor, and ten times the speed of the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from arcopo_kernels import copo_surrogate
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import Bench, Other


class Shape(NamedTuple):
    anchors: int
    steps: int
    group: int
    size: int
    dtype: torch.dtype = torch.float32


CASES = shapes.cases(
    gpu=[
        Shape(shapes.ANCHORS, shapes.STEPS, shapes.GROUP, shapes.LATENT),
        Shape(shapes.ANCHORS, shapes.STEPS, shapes.GROUP, shapes.LATENT, torch.bfloat16),
        Shape(1, 1, shapes.GROUP, shapes.LATENT),
    ],
    cpu=[Shape(4, 2, 3, 1001)],
)


def plain(pred: Tensor, old_pred: Tensor, candidates: Tensor, advantages: Tensor, step_index: Tensor, tau: float, clip: float) -> Tensor:
    """The surrogate as one would first write it: mean squared distances and two softmaxes in float32. Too coarse for a clip of 1e-4."""
    own = candidates[step_index].float()  # [N, G, D]
    log_pi, log_pi_old = ((-(own - x.float()[:, None]).square().mean(-1) / tau).log_softmax(-1) for x in (pred, old_pred))
    ratio = (log_pi - log_pi_old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean(-1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_copo_surrogate(bench: Bench, shape: Shape, backward: bool) -> None:
    items, steps, group, size, dtype = shape
    new: dict[str, Any] = {"device": shapes.DEVICE}
    candidates = torch.randn(steps, group, size, **new).to(dtype)
    step_index = torch.arange(items, **new) % steps
    old_pred = candidates[step_index, 0] + 0.1 * torch.randn(items, size, **new).to(dtype)
    pred = (old_pred + 1e-3 * torch.randn(items, size, **new).to(dtype)).requires_grad_()
    advantages = torch.randn(group, **new)
    arguments = (pred, old_pred, candidates, advantages, step_index)
    leaves = [pred] if backward else []
    bench(
        "copo_surrogate",
        f"N={items} T={steps} G={group} D={size} {dtype}".replace("torch.", ""),
        lambda: copo_surrogate(*arguments, tau=1.0, clip=1e-4).loss,
        traffic=(steps * group + 3 * items) * size * pred.element_size(),
        gradients=leaves,
        others={"plain float32": Other(lambda: plain(*arguments, tau=1.0, clip=1e-4), leaves)},
    )
