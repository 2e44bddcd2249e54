"""Linear layers with a low-rank adapter (LoRA), with GELU where it follows."""

from arcopo_kernels.lora_linear.op import lora_linear, lora_linears

__all__ = ["lora_linear", "lora_linears"]
