"""From a group's latents to frames, decoding what the branches share only once."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from arcopo_fast.model.vae import StreamingDecoder, fork


@torch.no_grad()
def decode_group(decoder: StreamingDecoder, latents: Sequence[Tensor], pivot: int) -> Tensor:
    """Frames [G, F, 3, H, W] in [0, 1] of a group's latents: the prefix decoded once, the decoder's causal cache forked at the pivot."""
    cache = decoder.start()
    parts = []
    for index, chunk in enumerate(latents):
        if index == pivot:
            cache = fork(cache, chunk.shape[0])
        frames, cache = decoder.decode(chunk, cache)
        parts.append(frames)
    branches = latents[-1].shape[0]
    return torch.cat([part.expand(branches, *part.shape[1:]) for part in parts], dim=1)
