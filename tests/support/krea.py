"""In the place of a VAE where only the engine is tested: a latent frame that depends on every latent before it, in their order."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from arcopo_fast.model.vae import VAECache
from arcopo_fast.rollout.decode import Reencoder


class StandIn(Reencoder):
    """h = 0.8 h + tanh(latent), over the latent frames; the image is cos(2 h)."""

    def __init__(self) -> None:
        self.at_work = nullcontext
        self.key = nn.Identity()
        self.calls: list[int] = []  # latent frames of each

    def start(self) -> VAECache:
        return VAECache({}, 0)

    def reencode(self, latents: Tensor, state: VAECache) -> tuple[Tensor, VAECache]:
        assert latents.shape[0] == 1 and latents.shape[1] > 0
        self.calls.append(latents.shape[1])
        hidden = state.features.get(self.key, torch.zeros_like(latents[:, 0]))
        for frame in latents.unbind(1):
            hidden = 0.8 * hidden + torch.tanh(frame)
        return torch.cos(2 * hidden)[:, None], VAECache({self.key: hidden}, state.frames + latents.shape[1])
