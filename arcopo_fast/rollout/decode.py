"""From a group's latents to frames, decoding what the branches share only once."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from arcopo_fast.model.vae import StreamingDecoder, fork


@torch.no_grad()
def decode_group(decoder: StreamingDecoder, latents: Sequence[Tensor], pivot: int) -> Tensor:
    """Frames [G, F, 3, H, W] in [0, 1] of a group's latents: the prefix decoded once, the decoder's causal cache forked at the pivot."""
    cache, branches = decoder.start(), latents[-1].shape[0]
    shared = []
    if pivot:
        prefix, cache = decoder.decode(torch.cat(list(latents[:pivot]), dim=1), cache)
        shared = [prefix.expand(branches, *prefix.shape[1:])]
    own, _ = decoder.decode(torch.cat(list(latents[pivot:]), dim=1), fork(cache, branches))
    return torch.cat([*shared, own], dim=1)
