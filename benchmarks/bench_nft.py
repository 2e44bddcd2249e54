"""nft_loss: the forward-process loss of a batch of samples.

Traffic: pred, old_pred and target [B, D] are read, the gradient [B, D] is written.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from arcopo_kernels.nft import nft_loss

from benchmarks import shapes
from benchmarks.measure import Bench


class Shape(NamedTuple):
    samples: int
    size: int
    dtype: torch.dtype = torch.float32


CASES = shapes.cases(
    gpu=[
        Shape(shapes.GROUP, shapes.LATENT),
        Shape(shapes.GROUP, shapes.LATENT, torch.bfloat16),
        Shape(4, 7 * shapes.LATENT),  # whole videos of seven chunks
    ],
    cpu=[Shape(4, 1001)],
)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_nft_loss(bench: Bench, shape: Shape) -> None:
    samples, size, dtype = shape
    old_pred, target, update = torch.randn(3, samples, size, device=shapes.DEVICE).to(dtype)
    pred = (old_pred + 0.1 * update).requires_grad_()
    reward = torch.rand(samples, device=shapes.DEVICE)
    bench(
        "nft_loss",
        f"B={samples} D={size} {dtype}".replace("torch.", ""),
        lambda: nft_loss(pred, old_pred, target, reward, beta=0.1).loss,
        traffic=4 * pred.numel() * pred.element_size(),
        gradients=[pred],
    )
