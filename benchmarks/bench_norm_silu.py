"""norm_silu: the norm and activation in front of the convolutions of Wan 2.1's decoder, over the feature maps of one latent frame.

Traffic: x is read, y is written. The goal is 85 % of the copy bandwidth, and no less than torch.compile.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from arcopo_kernels.norm_silu import norm_silu
from torch import Tensor
from torch.nn import functional

from benchmarks import shapes
from benchmarks.measure import Bench, Other, library


class Shape(NamedTuple):
    """A feature map [B, F, H, W, C]."""

    batch: int
    frames: int
    height: int
    width: int
    channels: int

    @property
    def model(self) -> int:
        """A kernel is compiled for each number of channels: `--sweep` takes a case of each."""
        return self.channels


CASES = shapes.cases(
    gpu=[
        Shape(shapes.GROUP, 2, 120, 208, 384),
        Shape(shapes.GROUP, 4, 240, 416, 192),
        Shape(4, 4, 480, 832, 96),  # of the whole group the check in float64 would take some 60 GB
    ],
    cpu=[Shape(2, 2, 5, 7, 12)],
)


def diffusers_call(x: Tensor, weight: Tensor) -> Other | str:
    """The norm of diffusers' Wan VAE and SiLU, on x as it lies there, [B, C, F, H, W]."""
    if (module := library("diffusers.models.autoencoders.autoencoder_kl_wan")) is None:
        return "not installed"
    norm = module.WanRMS_norm(len(weight), images=False).to(x.device, x.dtype).requires_grad_(False)
    norm.gamma.copy_(weight.view_as(norm.gamma))
    channels_first = x.movedim(-1, 1).contiguous()
    return Other(lambda: functional.silu(norm(channels_first)).movedim(1, -1))


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_norm_silu(bench: Bench, shape: Shape) -> None:
    x = torch.randn(shape, device=shapes.DEVICE, dtype=shapes.ACTIVATIONS)
    weight = 1 + 0.1 * torch.randn(shape.channels, device=x.device, dtype=x.dtype)
    bench(
        "norm_silu",
        f"B={shape.batch} F={shape.frames} {shape.height}x{shape.width} C={shape.channels}",
        lambda: norm_silu(x, weight),
        traffic=2 * x.nbytes,
        others={"diffusers": diffusers_call(x, weight)},
    )
