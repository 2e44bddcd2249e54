"""segment_attention: the queries of a chunk over a shared prefix, what each branch has cached of its own, and the branches' own chunk.

FLOP forward: 4 * B * H * Tq * Tk * D. Backward, at least: the scores again, dP and dQ for every key (1.5 times the forward), dK and dV for
the own chunk only (as much as its forward). The yardstick is one dense call over the same keys, concatenated beforehand, by the best
backend there is; the goal is 95 % of its speed. "cat + SDPA" concatenates in the call, as code without segments has to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from arcopo_kernels import Segment, segment_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import shapes
from benchmarks.measure import Bench, Other, library


class Shape(NamedTuple):
    model: shapes.Model
    branches: int
    prefix_chunks: int
    backward: bool = False
    tail_chunks: int = 0


CASES = shapes.cases(
    gpu=[
        *(Shape(shapes.WAN_1_3B, shapes.GROUP, chunks) for chunks in range(1, 7)),
        Shape(shapes.WAN_1_3B, shapes.GROUP, 3, tail_chunks=2),
        Shape(shapes.WAN_14B, shapes.GROUP, 3),
        # Replay: the gradient is taken for a few anchors at a time.
        *(Shape(shapes.WAN_1_3B, branches, 6, backward=True) for branches in (1, 4)),
        Shape(shapes.WAN_14B, 1, 3, backward=True),
    ],
    cpu=[Shape(shapes.SMALL, 3, 2), Shape(shapes.SMALL, 3, 1, tail_chunks=1), Shape(shapes.SMALL, 3, 2, backward=True)],
)


def dense(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """One call of PyTorch's attention on [B, T, H, D], by one backend or by its own choice."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def dense_calls(query: Tensor, keys: Tensor, values: Tensor, leaves: list[Tensor]) -> dict[str, Other | str]:
    """The same attention over keys and values that lie together already, by every backend that can be had."""
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if query.is_cuda else (SDPBackend.FLASH_ATTENTION,)

    def by(function: Callable[..., Any], *arguments: Any) -> Other:
        return Other(lambda: function(query, keys, values, *arguments), leaves)

    calls: dict[str, Other | str] = {f"dense {backend.name.split('_')[0].lower()}": by(dense, backend) for backend in backends}
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface"), ("flash-attn 4", "flash_attn.cute")):
        function = getattr(library(module), "flash_attn_func", None)
        calls[name] = by(function) if function else "not installed"
    return calls


@pytest.mark.parametrize("shape", CASES, ids=lambda s: f"{s.model.name}-B{s.branches}-P{s.prefix_chunks}-T{s.tail_chunks}")
def test_segment_attention(bench: Bench, shape: Shape) -> None:
    model, branches, prefix_chunks, backward, tail_chunks = shape
    new: dict[str, Any] = {"device": shapes.DEVICE, "dtype": shapes.ACTIVATIONS}
    query = torch.randn(branches, model.chunk, model.heads, model.head_dim, **new)
    own_key, own_value = torch.randn(2, *query.shape, **new).unbind()
    prefix_key, prefix_value = torch.randn(2, 1, prefix_chunks * model.chunk, model.heads, model.head_dim, **new).unbind()
    tail_key, tail_value = torch.randn(2, branches, tail_chunks * model.chunk, model.heads, model.head_dim, **new).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, own_key, own_value)] if backward else []

    def together(prefix: Tensor, tail: Tensor, own: Tensor) -> Tensor:
        return torch.cat([prefix.expand(branches, -1, -1, -1), tail, own], dim=1)

    keys, values = together(prefix_key, tail_key, own_key).detach(), together(prefix_value, tail_value, own_value).detach()
    others = dense_calls(query, keys, values, [query, *(tensor.requires_grad_() for tensor in (keys, values))] if backward else [])
    others["cat + SDPA"] = Other(
        lambda: dense(query, together(prefix_key, tail_key, own_key), together(prefix_value, tail_value, own_value)), leaves
    )
    segments = [Segment(prefix_key, prefix_value, frozen=True), Segment(own_key, own_value)]
    if tail_chunks:
        segments.insert(1, Segment(tail_key, tail_value, frozen=True))

    for name in ("cudnn", "flash", "triton") if query.is_cuda else ("cpu",):
        others[f"backend={name}"] = Other(partial(segment_attention, query, segments, backend=name), leaves, competes=False)

    product = 4 * branches * model.heads * model.head_dim * model.chunk**2  # of the queries with one chunk of keys
    moved = 2 * (query.numel() + prefix_key.numel() + tail_key.numel() + own_key.numel()) * query.element_size()
    tail = f"tail={tail_chunks}x{model.chunk} " if tail_chunks else ""
    bench(
        "segment_attention",
        f"{model.name} B={branches} prefix={prefix_chunks}x{model.chunk} {tail}own={model.chunk}",
        lambda: segment_attention(query, segments),
        # Backward reads its inputs, the output and its gradient, and writes dq, dk and dv.
        traffic=moved + (moved + 4 * query.numel() * query.element_size() if backward else 0),
        flops=product * ((2.5 * (prefix_chunks + tail_chunks) + 3.5) if backward else (prefix_chunks + tail_chunks + 1)),
        gradients=leaves,
        others=others,
    )
