"""Queries and segments of keys, dense attention over them in float64, and the bound that every backend is held to."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from arcopo_kernels import Segment, dispatch, segment_attention
from arcopo_kernels.testing import ROUNDING, assert_no_worse
from torch import Tensor


class Run(NamedTuple):
    """One segment of a test: how many keys, shared by the batch or not, frozen or not."""

    keys: int
    shared: bool
    frozen: bool


PREFIX, WINDOW, OWN = Run(13, True, True), Run(7, True, False), Run(9, False, False)


def draw(
    batch: int,
    queries: int,
    runs: Sequence[Run],
    dtype: torch.dtype = torch.float64,
    heads: int = 2,
    head_dim: int = 32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, list[Segment]]:
    """Random query and segments, all requiring gradient; frozen ones too, so that a gradient given to them would be seen."""

    def leaf(rows: int, tokens: int) -> Tensor:
        return torch.randn(rows, tokens, heads, head_dim, dtype=dtype, device=device, requires_grad=True)

    query = leaf(batch, queries)
    return query, [Segment(*(leaf(1 if run.shared else batch, run.keys) for _ in range(2)), run.frozen) for run in runs]


def dense(query: Tensor, segments: Sequence[Segment]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all keys at once."""
    batch = query.shape[0]
    key, value = (torch.cat([segment[i].expand(batch, -1, -1, -1) for segment in segments], dim=1) for i in (0, 1))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def plain(query: Tensor, segments: Sequence[Segment]) -> Tensor:
    """PyTorch's own attention over the same keys."""
    batch = query.shape[0]
    key, value = (torch.cat([segment[i].expand(batch, -1, -1, -1) for segment in segments], dim=1).transpose(1, 2) for i in (0, 1))
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value).transpose(1, 2)


def leaves(query: Tensor, segments: Sequence[Segment]) -> dict[str, Tensor]:
    """Return the tensors that are due a gradient, by name. Empty segments are skipped: no implementation owes them a gradient."""
    named = {"query": query}
    for index, segment in enumerate(segments):
        if not segment.frozen and segment.key.shape[1]:
            named |= {f"key {index}": segment.key, f"value {index}": segment.value}
    return named


def differentiate(out: Tensor, grad_out: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out.to(out.dtype))))


def in_double(query: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, list[Segment]]:
    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    return double(query), [Segment(double(segment.key), double(segment.value), segment.frozen) for segment in segments]


def check(backend: str, query: Tensor, segments: list[Segment]) -> None:
    """Output and every gradient of a backend within the budget of their precision."""
    grad_out = torch.randn_like(query)
    out = segment_attention(query, segments, backend=backend)
    used = dispatch.used("segment_attention")
    assert used is not None and used.name == backend
    assert out.dtype == query.dtype and out.shape == query.shape
    ours = differentiate(out, grad_out, leaves(query, segments))
    exact_query, exact_segments = in_double(query, segments)
    exact_out = dense(exact_query, exact_segments)
    exact = differentiate(exact_out, grad_out, leaves(exact_query, exact_segments))
    plain_out = plain(query, segments)
    same_precision = differentiate(plain_out, grad_out, leaves(query, segments))
    slack = ROUNDING[query.dtype] / 4
    assert_no_worse(f"{backend}: output", out, plain_out, exact_out, slack=slack)
    for name in exact:
        assert ours[name].shape == same_precision[name].shape
        assert_no_worse(f"{backend}: gradient of {name}", ours[name], same_precision[name], exact[name], slack=slack)
