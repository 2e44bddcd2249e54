"""Untrained generators of published sizes: what a full-size iteration costs can be measured without a checkpoint.

Weights are drawn on the device in their final dtype, nothing else is ever allocated. No parameter is zero, and the scales keep activations
of order one through any number of blocks: each residual branch ends in weights smaller by the root of the number of branches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.sizes import CausalWanConfig, VAESizes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

Module = TypeVar("Module", bound=nn.Module)


def untrained_wan(config: CausalWanConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int) -> CausalWan:
    """Return a frozen causal Wan with random weights. The same seed gives the same weights on the same kind of device."""
    with torch.device("meta"):
        model = CausalWan(config)
    return _drawn(model, _gain(config), dtype, device, seed)


def untrained_weights(
    config: CausalWanConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `untrained_wan` has, by name, one at a time."""
    with torch.device("meta"):
        model = CausalWan(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        yield name, _draw(name, torch.empty(parameter.shape, dtype=dtype, device=device), _gain(config), generator)


def untrained_vae(sizes: VAESizes, *, dtype: torch.dtype, device: torch.device | str, seed: int) -> AutoencoderKLWan:
    """Return a frozen AutoencoderKLWan with random weights and the latent statistics of Wan2.1, in evaluation mode."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan  # only where it is needed, as in vae.py

    with torch.device("meta"):
        vae = AutoencoderKLWan(**{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(sizes).items()})
    blocks = sum(name.endswith("conv2") for name, _ in vae.decoder.named_modules())

    def gain(name: str) -> float:
        if name.endswith("conv2.weight"):
            return blocks**-0.5
        return 0.5 if name == "decoder.conv_out.weight" else math.sqrt(2)  # most pixels in [-1, 1]; SiLU halves a mean square

    return _drawn(vae, gain, dtype, device, seed).eval()


class HashedText:
    """A stand-in for a text encoder: an embedding drawn by the hash of the prompt, without meaning but of the shape of a real one.

    The first 8 to `text_len` / 4 rows are random, the rest exactly zero, as padded prompts are.
    """

    def __init__(self, text_len: int, text_dim: int) -> None:
        self.text_len = text_len
        self.text_dim = text_dim

    @property
    def fingerprint(self) -> str:
        """Name of everything that its embeddings depend on."""
        return f"hashed {self.text_len} {self.text_dim}"

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, [B, text_len, text_dim] float32 on the CPU."""
        embeddings = torch.zeros(len(prompts), self.text_len, self.text_dim)
        for prompt, rows in zip(prompts, embeddings):
            digest = hashlib.sha256(prompt.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            longest = max(1, self.text_len // 4)
            words = int(torch.randint(min(8, longest), longest + 1, (), generator=generator))
            rows[:words] = torch.randn(words, self.text_dim, generator=generator)
        return embeddings


def _gain(config: CausalWanConfig) -> Callable[[str], float]:
    branch = (3 * config.num_layers) ** -0.5  # a block adds three times to the residual stream
    return lambda name: branch if name.endswith(("to_out.0.weight", "ffn.net.2.weight")) else 1.0


def _drawn(module: Module, gain: Callable[[str], float], dtype: torch.dtype, device: torch.device | str, seed: int) -> Module:
    """Give a module on the meta device random weights."""
    nn.Module.to(module, dtype)  # diffusers' own `to` warns of modules to be kept in float32, of which there are none
    module.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        _draw(name, parameter, gain, generator)
    return module


def _draw(name: str, weight: Tensor, gain: Callable[[str], float], generator: torch.Generator) -> Tensor:
    """Fill a weight with random values: matrices and kernels `gain` / sqrt(fan-in), norms about 1, the rest small."""
    if name.endswith("scale_shift_table"):
        return weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    if name.endswith("bias"):
        return weight.normal_(0, 0.02, generator=generator)
    if "norm" in name.split(".")[-2] or name.endswith("gamma"):
        return weight.normal_(1, 0.1, generator=generator)
    return weight.normal_(0, gain(name) * math.prod(weight.shape[1:]) ** -0.5, generator=generator)
