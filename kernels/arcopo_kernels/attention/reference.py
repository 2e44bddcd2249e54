"""Segment attention in plain PyTorch: the specification.

    out = softmax([q k_1^T, q k_2^T, ...] * scale) [v_1; v_2; ...]

One softmax over the concatenated scores; keys and values are never concatenated or copied, so a segment shared by all branches (batch 1)
is read in place. Computed in float32 (float64 for float64 inputs) and rounded once to the query's dtype.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A contiguous run of keys and values that every query sees.

    Attributes:
        key, value: [1 or B, Tk, H, D]; batch 1 is shared by all branches.
        frozen: no gradient flows into it (a cached prefix).
    """

    key: Tensor
    value: Tensor
    frozen: bool = False


def segment_attention(query: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """Return the attention of query [B, Tq, H, D] over the segments, [B, Tq, H, D] of the query's dtype."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype) * scale
    scores, values = [], []
    for segment in segments:
        key, value = (segment.key.detach(), segment.value.detach()) if segment.frozen else (segment.key, segment.value)
        key, value = key.to(dtype), value.to(dtype)
        shared = key.shape[0] == 1
        scores.append(torch.einsum("bqhd,khd->bhqk", q, key[0]) if shared else torch.einsum("bqhd,bkhd->bhqk", q, key))
        values.append(value)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([s.shape[-1] for s in scores], dim=-1)
    out = torch.zeros_like(q)
    for weight, value in zip(weights, values):
        shared = value.shape[0] == 1
        out = out + (torch.einsum("bhqk,khd->bqhd", weight, value[0]) if shared else torch.einsum("bhqk,bkhd->bqhd", weight, value))
    return out.to(query.dtype)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the attention over disjoint sets of keys into that over their union.

        lse = log sum_i exp(lse_i),    out = sum_i exp(lse_i - lse) out_i

    Args:
        outs: outputs [B, Tq, H, D] over each set.
        lses: log-sum-exps of the scores [B, H, Tq] over each set, natural logarithm; -inf where a query sees none of the keys.

    Returns:
        out [B, Tq, H, D] of outs[0]'s dtype, zero where a query sees no key at all, and lse [B, H, Tq]. Computed in float32 (float64).
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{len(outs)} outputs and {len(lses)} log-sum-exps; expected as many of both, at least one")
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    lse_parts = torch.stack([lse.to(dtype) for lse in lses])  # [parts, B, H, Tq]
    lse = lse_parts.logsumexp(0)
    weights = (lse_parts - lse.masked_fill(lse == -torch.inf, 0)).exp().transpose(2, 3).unsqueeze(-1)  # [parts, B, Tq, H, 1]
    merged = weights[0] * outs[0].to(dtype)
    for weight, out in zip(weights[1:], outs[1:]):
        merged = merged + weight * out.to(dtype)
    return merged.to(outs[0].dtype), lse
