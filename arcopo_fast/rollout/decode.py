"""Decoding of latents to frames: a group's, what the branches share only once; and single frames on their way back to latents."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Callable, Iterator

import torch
from torch import Tensor

from arcopo_fast.model.vae import StreamingDecoder, VAECache, encode, fork

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


def decode_branches(
    decoder: StreamingDecoder,
    prefix: Tensor,
    tails: Tensor,
    branches_at_once: int | None = None,
    *,
    warmup: int = 0,
    anchor: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the frames of a group's latents, a slice of branches at a time: the prefix is decoded once, and the decoder's cache forked
    after it.

    A slice is bound to no name here, so that it is freed before the next one is decoded.

    Args:
        decoder: of the VAE to use.
        prefix: latents that all branches share, [1, F0, C, h, w]; F0 may be 0.
        tails: each branch's own latents, [G, F1, C, h, w].
        branches_at_once: how many branches the VAE decodes together, all of them if None. Fewer need less memory, of activations, of the
            decoder's cache and of frames, all of which are large at full size. The frames are the same up to rounding.
        warmup: the first latent frames of the prefix that are decoded for the decoder's cache alone. Then the first that is seen is not
            decoded as a video's first, and gives as many pixel frames as any other.
        anchor: one more branch [1, F1, C, h, w], decoded by itself after the others, whose frames are those that they are without it.

    Yields:
        frames [branches_at_once or fewer, F, 3, H, W] in [0, 1].

    Raises:
        ValueError: branches_at_once is not positive.
    """
    if branches_at_once is not None and branches_at_once < 1:
        raise ValueError(f"branches_at_once is {branches_at_once}; expected at least 1, or None for all")
    cache, shared = decoder.warm(prefix[:, :warmup]) if warmup else decoder.start(), None
    if prefix.shape[1] > warmup:
        shared, cache = decoder.decode(prefix[:, warmup:], cache)
    for part in [*tails.split(branches_at_once or len(tails)), *([] if anchor is None else [anchor])]:
        yield _all_frames(shared, decoder.decode(part, fork(cache, len(part)))[0])


def _all_frames(shared: Tensor | None, tails: Tensor) -> Tensor:
    """Return the frames of some branches, those before the pivot included."""
    return tails if shared is None else torch.cat([shared.expand(len(tails), *shared.shape[1:]), tails], dim=1)


class Reencoder:
    """An encoder of single pixel frames of a video as images of their own, as Krea realtime has it for the first frame of its context.

    A pixel frame depends on all latents before it, so a video is decoded along, one latent frame at a time and one video after the other:
    the VAE's calls are the same however videos are cut into chunks and batched, and so is the result, bit for bit.

    Args:
        vae: decodes and encodes.
        at_work: entered while the VAE works; for a VAE that waits elsewhere than on the device of the latents.
    """

    def __init__(self, vae: AutoencoderKLWan, at_work: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.vae = vae
        self.at_work = at_work
        self.decoder = StreamingDecoder(vae)

    def start(self) -> VAECache:
        """Return the state of a video of which nothing is decoded yet."""
        return self.decoder.start()

    @torch.no_grad()
    def __call__(self, latents: Tensor, states: list[VAECache]) -> Tensor:
        """Decode the next latents [B, F, C, h, w] and encode the last pixel frame of each video: [B, 1, C, h, w].

        Args:
            states: the decoder's state of each video, from `start` or a former call; updated in place.
        """
        images = []
        with self.at_work():
            for video, video_latents in enumerate(latents.split(1)):
                image, states[video] = self.reencode(video_latents, states[video])
                images.append(image.to(latents.dtype))
        return torch.cat(images)

    def reencode(self, latents: Tensor, state: VAECache) -> tuple[Tensor, VAECache]:
        """Return the last pixel frame of one video's next latents [1, F, C, h, w] as an image [1, 1, C, h, w], and the decoder's next
        state."""
        frames, state = self.decoder.decode(latents, state)
        return encode(self.vae, frames[:, -1:]), state
