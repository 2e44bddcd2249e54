"""A network with adapters and what goes into it, for counting; nothing need be computed."""

from __future__ import annotations

import torch
from torch import Tensor

from arcopo_fast.config.schema import Config
from arcopo_fast.model.causal_wan import CachedRun, CausalWan, ChunkContext
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.model.sizes import GeneratorSizes


class Cached(ChunkContext):
    """A prefix of two chunks."""

    def __init__(self, like: Tensor) -> None:
        self.pages = like

    def cached(self, layer: int) -> list[CachedRun]:
        return [CachedRun(self.pages, self.pages)]


class Replay:
    """A network with adapters and the inputs of a micro-batch, as the fused operators compute it: in Triton's interpreter or, on the meta
    device, not at all."""

    def __init__(self, config: Config, sizes: GeneratorSizes, device: str) -> None:
        self.model, video = sizes.transformer, config.video
        dtype, frames, height, width = getattr(torch, config.generator.dtype), video.chunk_frames, video.latent_height, video.latent_width
        with torch.device(device):
            self.network = CausalWan(self.model).to(dtype)
        add_lora(self.network, rank=config.lora.rank, alpha=8, targets=config.lora.targets, seed=0)
        self.adapters = adapter_parameters(self.network.to(device))
        self.network.requires_grad_(False)
        for parameter in self.adapters:
            parameter.requires_grad_()
        tokens = 2 * frames * self.model.tokens_per_frame(height, width)
        heads = (self.model.num_attention_heads, self.model.attention_head_dim)
        self.context = Cached(torch.randn(1, tokens, *heads, device=device, dtype=dtype))
        self.x = torch.randn(config.objective.micro_batch or 1, frames, self.model.in_channels, height, width, device=device)
        self.t = torch.full((len(self.x), 1), 500.0, device=device)
        self.text = torch.randn(1, self.model.text_len, self.model.text_dim, device=device)
        self.constants = [*self.network.parameters(), self.context.pages, self.x, self.t, self.text]

    def __call__(self, checkpoint: bool = False) -> Tensor:
        flow = self.network(self.x, self.t, self.network.encode_text(self.text), self.context, checkpoint=checkpoint)
        assert flow is not None
        return flow
