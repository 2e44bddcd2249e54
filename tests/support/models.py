"""Small random generators for tests. Every parameter is non-zero, so that nothing can hide behind an initial zero."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from arcopo_fast.config.sections import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.sizes import CausalWanConfig
from arcopo_fast.model.vae import StreamingDecoder
from arcopo_fast.rollout.cache import pages_for
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.stream import VideoShape

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SHAPE = VideoShape((2,) * 4, 8, 4, 6)  # 4 chunks of 2 latent frames, 8 channels, 4 x 6 latent pixels
GLOBAL = CacheConfig()
SAMPLER = SamplerConfig(steps=[1000, 750, 500], warp=True, shift=5.0)


def small_config(**changes: object) -> CausalWanConfig:
    small = CausalWanConfig(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=40,
        freq_dim=16,
        text_dim=10,
        text_len=5,
        in_channels=8,
        out_channels=8,
    )
    return replace(small, **changes)  # type: ignore[arg-type]


def small_model(dtype: torch.dtype = torch.float32, **changes: object) -> CausalWan:
    model = CausalWan(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else 1.0 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn_like(parameter) + (1.0 if parameter.dim() == 1 else 0.0))
    return model.to(dtype)


TINY = small_config(in_channels=4, out_channels=4)


def tiny_wan() -> CausalWan:
    """Return a generator of which no parameter is zero."""
    model = CausalWan(TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def small_engine(
    model: CausalWan,
    *,
    branches: int = 6,
    cache: CacheConfig = GLOBAL,
    shape: VideoShape = SHAPE,
    sampler: SamplerConfig = SAMPLER,
) -> Engine:
    return Engine(model, shape, sampler, cache, pages=pages_for(GLOBAL, shape.chunk_frames, branches))


def random_text(batch: int = 1) -> torch.Tensor:
    """Embeddings of two words, padded by zero rows as the real encoders pad."""
    text = torch.zeros(batch, 5, 10)
    text[:, :2] = torch.randn(batch, 2, 10)
    return text


def decode_video(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Return whole clips at once: latents [B, F, C, h, w] -> frames [B, 1 + 4 (F - 1), 3, H, W] in [0, 1]."""
    decoder = StreamingDecoder(vae)
    return decoder.decode(latents, decoder.start())[0]
