"""RMSNorm and SiLU over the channels of a channels-last feature map, in one pass."""

from arcopo_kernels.norm_silu.op import norm_silu

__all__ = ["norm_silu"]
