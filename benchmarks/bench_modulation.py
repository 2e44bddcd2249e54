"""Modulation: LayerNorm with a shift and scale for each frame, the gated residual, and the two in one pass.

Traffic in units of B * F * T * E elements, the modulations being small. The norm: forward 2, backward 3 (the gradient and x are read, a
gradient is written). The gated residual: forward 3. Both in one: forward 4, backward 5. The goal is 85 % of the copy bandwidth, and no less
than torch.compile. FlashInfer's fusions take 3072 channels only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from arcopo_kernels.modulation import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import Bench, Other, library

EPS = 1e-6


class Shape(NamedTuple):
    model: shapes.Model
    batch: int
    backward: bool = False


FORWARD = shapes.cases(
    gpu=[Shape(shapes.WAN_1_3B, 1), Shape(shapes.WAN_1_3B, shapes.GROUP), Shape(shapes.WAN_14B, shapes.GROUP)], cpu=[Shape(shapes.SMALL, 2)]
)
BACKWARD = shapes.cases(
    gpu=[Shape(shapes.WAN_1_3B, 4, backward=True), Shape(shapes.WAN_14B, 1, backward=True)], cpu=[Shape(shapes.SMALL, 2, backward=True)]
)


def name(shape: Shape) -> str:
    model = shape.model
    return f"{model.name} B={shape.batch} F={model.chunk_frames} T={model.frame} E={model.dim}"


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y [B, F, T, E] and gate, scale, shift [B, F, 1, E]; x and y with gradient in a case with a backward pass."""
    new: dict[str, Any] = {"device": shapes.DEVICE, "dtype": shapes.ACTIVATIONS}
    model = shape.model
    size = (shape.batch, model.chunk_frames, model.frame, model.dim)
    x, y = (torch.randn(size, **new).requires_grad_(shape.backward) for _ in range(2))
    gate, scale, shift = 0.3 * torch.randn(3, *size[:2], 1, model.dim, **new)
    return x, y, gate, scale, shift


def diffusers_norm(x: Tensor, scale: Tensor, shift: Tensor, leaves: list[Tensor]) -> Other | str:
    """The norm of diffusers' Wan block, in float32."""
    if (module := library("diffusers.models.normalization")) is None:
        return "not installed"
    norm = module.FP32LayerNorm(x.shape[-1], EPS, elementwise_affine=False)
    return Other(lambda: (norm(x.float()) * (1 + scale) + shift).type_as(x), leaves)


def liger_norm(x: Tensor, scale: Tensor, shift: Tensor, leaves: list[Tensor]) -> Other | str:
    """Liger's LayerNorm, which needs a weight and a bias, and the modulation apart."""
    if (module := library("liger_kernel.ops.layer_norm")) is None:
        return "not installed"
    weight, bias = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    return Other(lambda: module.LigerLayerNormFunction.apply(x, weight, bias, EPS) * (1 + scale) + shift, leaves)


@pytest.mark.parametrize("shape", FORWARD + BACKWARD, ids=str)
def test_layer_norm_modulate(bench: Bench, shape: Shape) -> None:
    x, _, _, scale, shift = inputs(shape)
    leaves = [x] if shape.backward else []
    bench(
        "layer_norm_modulate",
        name(shape),
        lambda: layer_norm_modulate(x, scale=scale, shift=shift, eps=EPS),
        traffic=(5 if shape.backward else 2) * x.nbytes,
        gradients=leaves,
        others={
            "diffusers": diffusers_norm(x, scale, shift, leaves),
            "liger + plain modulation": liger_norm(x, scale, shift, leaves),
        },
    )


@pytest.mark.parametrize("shape", FORWARD, ids=str)
def test_gated_residual(bench: Bench, shape: Shape) -> None:
    x, y, gate, _, _ = inputs(shape)
    bench("gated_residual", name(shape), lambda: gated_residual(x, y, gate), traffic=3 * x.nbytes)


@pytest.mark.parametrize("shape", FORWARD + BACKWARD, ids=str)
def test_gated_residual_layer_norm_modulate(bench: Bench, shape: Shape) -> None:
    x, y, gate, scale, shift = inputs(shape)
    bench(
        "gated_residual_layer_norm_modulate",
        name(shape),
        lambda: gated_residual_layer_norm_modulate(x, y, gate, scale=scale, shift=shift, eps=EPS),
        traffic=(9 if shape.backward else 4) * x.nbytes,
        gradients=[x, y] if shape.backward else [],
    )
