"""The public operator: checks at the boundary, then the implementation."""

from __future__ import annotations

import math
from typing import Sequence

from arcopo_kernels.attention import reference
from arcopo_kernels.attention.reference import Segment
from torch import Tensor


def segment_attention(query: Tensor, segments: Sequence[Segment], *, scale: float | None = None) -> Tensor:
    """Attention of `query` over all `segments` together, without concatenating them.

    Args:
        query: [B, Tq, H, D], any floating dtype.
        segments: keys and values [1 or B, Tk, H, D] of the query's dtype and device; batch 1 is shared by all B. A frozen segment gets no
            gradient. Segments of zero tokens are allowed as long as one key is visible.
        scale: factor on the scores; 1/sqrt(D) when None.

    Returns:
        [B, Tq, H, D] of the query's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or no key at all.
    """
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, Tq, H, D]")
    batch, _, heads, head_dim = query.shape
    for index, segment in enumerate(segments):
        for name, tensor in (("key", segment.key), ("value", segment.value)):
            fits = tensor.dim() == 4 and tensor.shape[0] in (1, batch) and tensor.shape[2:] == (heads, head_dim)
            if not fits or tensor.shape[:2] != segment.key.shape[:2]:
                expected = f"[1 or {batch}, Tk, {heads}, {head_dim}]"
                raise ValueError(
                    f"segment {index}: {name} has shape {tuple(tensor.shape)}; expected {expected}, the same Tk for key and value"
                )
            if tensor.dtype != query.dtype or tensor.device != query.device:
                theirs, ours = f"{tensor.dtype} on {tensor.device}", f"{query.dtype} on {query.device}"
                raise ValueError(f"segment {index}: {name} is {theirs}, the query {ours}; convert one of them")
    if not sum(segment.key.shape[1] for segment in segments):
        raise ValueError(f"{len(segments)} segments hold no key at all; a query needs at least one")
    return reference.segment_attention(query, segments, scale if scale is not None else 1.0 / math.sqrt(head_dim))
