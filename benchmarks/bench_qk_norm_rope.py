"""qk_norm_rope: the norm and the rotary positions of a chunk's queries and keys.

Traffic in units of B * T * E elements. Forward: q and k are read and written, 4.
Backward: q, k and two gradients are read, two are written, 6. The goal is 85 % of the copy bandwidth, and no less than torch.compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from arcopo_kernels.qk_norm_rope import qk_norm_rope, reference
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
    return f"{shape.model.name} B={shape.batch} T={shape.model.chunk} E={shape.model.dim}"


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value [B, T, H, D] and the two weights [E]."""
    new: dict[str, Any] = {"device": shapes.DEVICE, "dtype": shapes.ACTIVATIONS}
    model = shape.model
    query, key, value = (torch.randn(shape.batch, model.chunk, model.heads, model.head_dim, **new) for _ in range(3))
    query_weight, key_weight = 1 + 0.1 * torch.randn(2, model.dim, **new)
    return query, key, value, query_weight, key_weight


def flashinfer_call(shape: Shape, query: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor) -> Other | str:
    """FlashInfer's fusion for bidirectional Wan: forward only, from frame 0 on, and it copies v."""
    if (module := library("flashinfer.norm")) is None or not hasattr(module, "fused_qk_rmsnorm_rope"):
        return "not installed, or too old"
    if shape.backward:
        return "has no backward"
    model = shape.model
    heads = dict.fromkeys(("num_heads_q", "num_heads_k", "num_heads_v"), model.heads)
    patches = dict(zip(("ppf", "pph", "ppw"), (model.chunk_frames, *model.grid)))
    frame, height, width = (2 * pairs for pairs in reference.axis_pairs(model.head_dim))
    channels = {"num_frame_channels": frame, "num_height_channels": height, "num_width_channels": width}
    sizes = {**patches, **channels, **heads, "head_dim": model.head_dim}
    fused = torch.cat([x.flatten(2) for x in (query, key, value)], dim=-1)

    def call() -> list[Tensor]:
        outputs = module.fused_qk_rmsnorm_rope(fused, query_weight, key_weight, **sizes, eps=EPS)
        return [x.view(query.shape) for x in outputs[:2]]

    return Other(call)


def liger_call(shape: Shape, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, leaves: list[Tensor]) -> Other | str:
    """Liger's RMSNorm, and RoPE as in the reference: its own RoPE has one axis."""
    if (module := library("liger_kernel.ops.rms_norm")) is None:
        return "not installed"
    grid = (shape.model.chunk_frames, *shape.model.grid)

    def call() -> list[Tensor]:
        normed = [
            # Without offset, casts as in Llama; not in place, for the gradient of the output is used again.
            module.LigerRMSNormFunction.apply(x.flatten(2), weight, EPS, 0.0, "llama", False).view(x.shape)
            for x, weight in ((query, query_weight), (key, key_weight))
        ]
        return [reference.apply_rope(x, 0, grid) for x in normed]

    return Other(call, leaves)


@pytest.mark.parametrize("shape", FORWARD + BACKWARD, ids=str)
def test_qk_norm_rope(bench: Bench, shape: Shape) -> None:
    query, key, value, query_weight, key_weight = inputs(shape)
    leaves = [query.requires_grad_(), key.requires_grad_()] if shape.backward else []
    bench(
        "qk_norm_rope",
        name(shape),
        lambda: qk_norm_rope(query, key, query_weight, key_weight, grid=(shape.model.chunk_frames, *shape.model.grid), eps=EPS),
        traffic=(10 if shape.backward else 4) * query.nbytes,
        gradients=leaves,
        others={
            "flashinfer": flashinfer_call(shape, query, key, value, query_weight, key_weight),
            "liger + plain RoPE": liger_call(shape, query, key, query_weight, key_weight, leaves),
        },
    )
