"""Operators for few-step autoregressive video generators and their alignment.

`attention` (queries over contiguous K/V segments), `paging` (a copy-on-write pool of K/V pages), `surrogate` (the AR-CoPO objective),
`qk_norm_rope` and `modulation` (what lies between a block's matrix products), `lora_linear` (linear layers with an adapter),
`norm_silu` (what lies between the convolutions of Wan's VAE) and `nft` (the negative-aware forward-process loss).
Functions named like their folder are imported from it: here they would hide it.
Needs torch only (triton where it is there); knows nothing of training, configuration or checkpoints.
"""

from arcopo_kernels.attention import Segment, merge_attention, segment_attention
from arcopo_kernels.dispatch import Choice, use, used
from arcopo_kernels.lora_linear import lora_linears
from arcopo_kernels.modulation import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from arcopo_kernels.nft import NFTOutput, nft_loss
from arcopo_kernels.paging import GroupPlan, PagePool, PagePoolExhausted, PageTable, Reservation, plan_group
from arcopo_kernels.qk_norm_rope import apply_rope, rms_norm
from arcopo_kernels.surrogate import SurrogateOutput, copo_surrogate

__all__ = [
    "Choice",
    "GroupPlan",
    "NFTOutput",
    "PagePool",
    "PagePoolExhausted",
    "PageTable",
    "Reservation",
    "Segment",
    "SurrogateOutput",
    "apply_rope",
    "copo_surrogate",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "lora_linears",
    "merge_attention",
    "nft_loss",
    "plan_group",
    "rms_norm",
    "segment_attention",
    "use",
    "used",
]
