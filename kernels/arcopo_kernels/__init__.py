"""Operators for few-step autoregressive video generators and their alignment.

`attention` (queries over contiguous K/V segments), `paging` (a copy-on-write pool of K/V pages) and `surrogate` (the AR-CoPO objective).
Needs torch only (triton where it is there); knows nothing of training, configuration or checkpoints.
"""

from arcopo_kernels.attention import Segment, segment_attention
from arcopo_kernels.paging import PagePool, PagePoolExhausted, PageTable
from arcopo_kernels.surrogate import SurrogateOutput, copo_surrogate

__all__ = ["PagePool", "PagePoolExhausted", "PageTable", "Segment", "SurrogateOutput", "copo_surrogate", "segment_attention"]
