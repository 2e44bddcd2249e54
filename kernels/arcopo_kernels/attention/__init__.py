"""Attention of a chunk's queries over a few contiguous K/V segments."""

from arcopo_kernels.attention.backends import slow_on_hopper
from arcopo_kernels.attention.op import Segment, chosen, merge_attention, segment_attention

__all__ = ["Segment", "chosen", "merge_attention", "segment_attention", "slow_on_hopper"]
