"""LayerNorm with a shift and scale for each frame, gated residuals, and the two in one pass."""

from arcopo_kernels.modulation.op import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate

__all__ = ["gated_residual", "gated_residual_layer_norm_modulate", "layer_norm_modulate"]
