"""RMSNorm of queries and keys over all heads together, and 3-axis rotary positions, in one pass."""

from arcopo_kernels.qk_norm_rope.op import apply_rope, qk_norm_rope, rms_norm

__all__ = ["apply_rope", "qk_norm_rope", "rms_norm"]
