"""Attention of a chunk's queries over a few contiguous K/V segments."""

from arcopo_kernels.attention.op import Segment, merge_attention, segment_attention

__all__ = ["Segment", "merge_attention", "segment_attention"]
