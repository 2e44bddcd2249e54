"""From a group's latents to frames, decoding what the branches share only once."""

from __future__ import annotations

from typing import Iterator, Sequence

import torch
from torch import Tensor

from arcopo_fast.model.vae import StreamingDecoder, fork


@torch.no_grad()
def decode_branches(
    decoder: StreamingDecoder, latents: Sequence[Tensor], pivot: int, branches_at_once: int | None = None
) -> Iterator[Tensor]:
    """Frames of a group's latents, some branches after the other: the prefix decoded once, the decoder's causal cache forked at the pivot.

    Args:
        decoder: of the VAE to use.
        latents: of each chunk [1 or G, F, C, h, w]: one video before the pivot, G branches from it on.
        pivot: the chunk from which the branches differ.
        branches_at_once: how many branches the VAE decodes together, all of them if None. Fewer need less memory, of activations, of the
            decoder's cache and of frames, all of which are large at full size. The frames are the same up to rounding.

    Yields:
        frames [branches_at_once or fewer, F, 3, H, W] in [0, 1].

    Raises:
        ValueError: branches_at_once is not positive.
    """
    if branches_at_once is not None and branches_at_once < 1:
        raise ValueError(f"branches_at_once is {branches_at_once}; expected at least 1, or None for all")
    cache, shared = decoder.start(), None
    if pivot:
        shared, cache = decoder.decode(torch.cat(list(latents[:pivot]), dim=1), cache)
    tails = torch.cat(list(latents[pivot:]), dim=1)
    for part in tails.split(branches_at_once or len(tails)):
        own, _ = decoder.decode(part, fork(cache, len(part)))
        yield own if shared is None else torch.cat([shared.expand(len(part), *shared.shape[1:]), own], dim=1)


def decode_group(decoder: StreamingDecoder, latents: Sequence[Tensor], pivot: int, branches_at_once: int | None = None) -> Tensor:
    """All of `decode_branches`: [G, F, 3, H, W]."""
    return torch.cat(list(decode_branches(decoder, latents, pivot, branches_at_once)))
