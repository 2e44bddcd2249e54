"""The Wan VAE as a streaming decoder whose causal cache is an explicit value.

diffusers' AutoencoderKLWan does the arithmetic. Its decoder looks back at the last frames that each causal convolution has seen; here
those features are a `VAECache` that goes in and comes out. A cache is never changed, so the one taken at the pivot serves every branch.
Knows nothing of generators or rewards: normalised latents in, frames out, and back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.model.checkpoints import load_into, model_directory, read_container, read_json, strip_wrappers


@dataclass(frozen=True, eq=False)
class VAECache:
    """What the decoder remembers of the latent frames decoded so far.

    Attributes:
        features: one entry for each causal convolution: its last input frames [B, C, 1 or 2, h, w], "Rep" for a temporal upsampler
            that has seen the first frame only, None where nothing is kept.
        frames: latent frames decoded so far.
    """

    features: tuple[Tensor | str | None, ...]
    frames: int

    @property
    def batch(self) -> int | None:
        """Batch size, or None before the first frame."""
        return next((feature.shape[0] for feature in self.features if isinstance(feature, Tensor)), None)


def fork(cache: VAECache, branches: int) -> VAECache:
    """The cache of one video as the cache of a batch of `branches` videos that continue it. Views, no copies."""
    if cache.batch not in (None, 1):
        raise ValueError(f"a cache of batch 1 can be forked, this one has batch {cache.batch}")
    features = (feature.expand(branches, *feature.shape[1:]) if isinstance(feature, Tensor) else feature for feature in cache.features)
    return VAECache(tuple(features), cache.frames)


class StreamingDecoder:
    """Decodes latents chunk by chunk. The first latent frame of a video gives one pixel frame, each later one four (2 to the number of
    temporal upsamplers). Nothing here turns gradients off.

    Args:
        vae: whose decoder is used.
        frames_per_call: latent frames in one call of the network. 1, as in the official decoder, takes the least memory, and however a
            clip is cut into chunks, the frames are the same, bit for bit. More is faster where frames are small; equal up to rounding.
            A video's first frame always has a call of its own.
    """

    def __init__(self, vae: AutoencoderKLWan, frames_per_call: int = 1) -> None:
        self.vae = vae
        self.frames_per_call = frames_per_call
        self._convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._mean, self._std = _statistics(vae)

    def start(self) -> VAECache:
        """The cache of a video of which nothing is decoded yet; it fits every batch size."""
        return VAECache((None,) * self._convolutions, 0)

    def decode(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        """Decode the next chunk.

        Args:
            latents: [B, F, C, h, w], normalised, that is, as the generator produces them; any dtype.
            cache: what `start`, a former call or `fork` returned, for the same batch size. It is left as it is.

        Returns:
            frames [B, pixel frames, 3, H, W] in [0, 1], float32, and the cache to continue with.
        """
        pixels, cache = self.decode_unclamped(latents, cache)
        return pixels.clamp(-1, 1) * 0.5 + 0.5, cache

    def decode_unclamped(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        """`decode` before the clamp: the network's own output, nominally in [-1, 1], float32."""
        channels = self._mean.shape[0]
        if latents.dim() != 5 or latents.shape[1] == 0 or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; expected [B, F >= 1, {channels}, h, w]")
        if cache.batch not in (None, latents.shape[0]):
            raise ValueError(f"latents have batch {latents.shape[0]}, the cache has batch {cache.batch}; fork the cache first")
        z = latents.movedim(2, -1).float() * self._std.to(latents.device) + self._mean.to(latents.device)
        z = z.movedim(-1, 1).to(self.vae.dtype)  # [B, C, F, h, w]
        features = list(cache.features)  # the decoder replaces entries of this list and writes into no tensor
        frames = []
        alone = z[:, :, : int(cache.frames == 0)]
        rest = z[:, :, alone.shape[2] :]
        parts = [part for part in (alone, *rest.split(self.frames_per_call, dim=2)) if part.shape[2]]
        for index, part in enumerate(parts):
            first = cache.frames + index == 0
            frames.append(self.vae.decoder(self.vae.post_quant_conv(part), feat_cache=features, feat_idx=[0], first_chunk=first))
        pixels = torch.cat(frames, dim=2)  # [B, 3, F, H, W]; with a patch size 3 p^2 channels, and H / p, W / p
        if self.vae.config["patch_size"] is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config["patch_size"])
        return pixels.transpose(1, 2).float(), VAECache(tuple(features), cache.frames + latents.shape[1])


def decode_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode whole clips: normalised latents [B, F, C, h, w] -> frames [B, 1 + 4 (F - 1), 3, H, W] in [0, 1], float32."""
    decoder = StreamingDecoder(vae)
    return decoder.decode(latents, decoder.start())[0]


def encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Encode whole clips: frames [B, 1 + 4 n, 3, H, W] in [0, 1] -> normalised latents [B, 1 + n, C, h, w], float32.

    The mean of the posterior, no sampling.
    """
    factor = 2 ** sum(vae.config["temperal_downsample"])
    if frames.dim() != 5 or frames.shape[1] % factor != 1 % factor:
        raise ValueError(f"frames have shape {list(frames.shape)}; expected [B, {factor} n + 1, 3, H, W]")
    mean, std = (statistic.to(frames.device) for statistic in _statistics(vae))
    posterior = vae.encode((frames.transpose(1, 2) * 2 - 1).to(vae.dtype)).latent_dist
    return ((posterior.mode().float().movedim(1, -1) - mean) / std).movedim(-1, 2)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of the raw latents, float32: raw = normalised * std + mean."""
    config = vae.config
    mean, std = (torch.tensor(config[name], dtype=torch.float32, device=vae.device) for name in ("latents_mean", "latents_std"))
    if not len(mean) == len(std) == config["z_dim"]:
        raise ValueError(f"the VAE has {config['z_dim']} latent channels, but {len(mean)} latents_mean and {len(std)} latents_std values")
    return mean, std


# Loading ---------------------------------------------------------------------------------------------------------------------------


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A frozen VAE in evaluation mode, on the CPU.

    Args:
        path: a diffusers directory (or a pipeline directory with a `vae` in it), or a single file with official (Wan2.1_VAE.pth) or
            diffusers names, whose sizes are read off the shapes.
        dtype: of the parameters.

    Raises:
        UserError: missing, damaged, not a Wan VAE, or a file from which the sizes or the latent statistics cannot be known.
    """
    path = Path(path)
    directory = model_directory(path, "vae")
    config_file = directory / "config.json"
    if path.is_dir() and not config_file.exists():
        raise UserError(f"{path} has no config.json; give a diffusers VAE directory, or a VAE checkpoint file")
    if path.is_dir():
        config = read_json(config_file)
        if config.get("_class_name") != "AutoencoderKLWan":
            raise UserError(f"{config_file} describes a {config.get('_class_name')}; expected an AutoencoderKLWan")
    state = official_to_diffusers_names(strip_wrappers(read_container(path, subfolder="vae"), path), source=path)
    if not path.is_dir():
        config = infer_vae_config(state, source=path)
    try:
        vae = AutoencoderKLWan.from_config(config)
    except Exception as error:  # diffusers does not check sizes, so what a wrong one raises is open
        raise UserError(f"{path}: no Wan VAE can be built from its configuration ({type(error).__name__}: {error})") from error
    load_into(vae, state, source=path)
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns of modules to be kept in float32, of which this model has none
    return vae.eval().requires_grad_(False)


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same VAE with the weights of its 3-d convolutions in the memory format that is fastest: on a CPU nearly twice as fast."""
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


_RESIDUAL_NAMES = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2", "shortcut": "conv_shortcut"}
_TOP_NAMES = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_HALF_NAMES = {
    "conv1": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "downsamples": "down_blocks",
}


def official_to_diffusers_names(state: Mapping[str, Tensor], *, source: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """The state dict of an official Wan2.1 VAE under diffusers' names. diffusers names are returned as they are.

    The official decoder counts its residual blocks and upsamplers in one list, diffusers groups them by resolution; the first
    upsampler tells how many blocks a resolution has.
    """
    if "decoder.conv1.weight" not in state:
        return dict(state)
    upsamplers = [int(match.group(1)) for match in map(re.compile(r"decoder\.upsamples\.(\d+)\.resample\.").match, state) if match]
    if not upsamplers:
        raise UserError(f"{source} is not a Wan2.1 VAE: it has no decoder.upsamples.N.resample; Wan2.2's needs its diffusers directory")
    blocks = min(upsamplers)

    def rename(name: str) -> str:
        half, _, rest = name.partition(".")
        if half not in ("encoder", "decoder"):
            return _replace_prefix(name, _TOP_NAMES)
        if match := re.match(r"upsamples\.(\d+)\.", rest):
            level, index = divmod(int(match.group(1)), blocks + 1)
            inner = f"resnets.{index}" if index < blocks else "upsamplers.0"
            rest = f"up_blocks.{level}.{inner}.{rest[match.end() :]}"
        else:
            rest = _replace_prefix(rest, _HALF_NAMES)
        for old, new in _RESIDUAL_NAMES.items():
            rest = rest.replace(f".{old}.", f".{new}.")
        return f"{half}.{rest}"

    return {rename(name): tensor for name, tensor in state.items()}


def infer_vae_config(state: Mapping[str, Tensor], *, source: str | Path = "the checkpoint") -> dict[str, object]:
    """AutoencoderKLWan's configuration from a state dict with diffusers names, for VAEs of Wan2.1's kind and its 16 latent channels."""
    needed = {"encoder.conv_in.weight": 5, "decoder.conv_in.weight": 5, "decoder.conv_out.weight": 5}
    if wrong := [name for name, rank in needed.items() if name not in state or state[name].dim() != rank]:
        found = f"{len(state)} tensors such as {', '.join(sorted(state)[:3])}" if state else "no tensors"
        raise UserError(f"{source} is not a Wan VAE: {wrong[0]} is missing or misshapen among {found}; give a Wan2.1 VAE checkpoint")
    if any(name.startswith("encoder.down_blocks.0.resnets.") for name in state):
        raise UserError(f"{source} is a Wan2.2 VAE; its sizes cannot be read off the weights, so give its diffusers directory")
    base_dim, in_channels = state["encoder.conv_in.weight"].shape[:2]
    out_channels, decoder_dim = state["decoder.conv_out.weight"].shape[:2]
    z_dim = state["decoder.conv_in.weight"].shape[1]
    if z_dim != 16:
        raise UserError(f"{source}: the mean and deviation of its {z_dim} latent channels are unknown; give a diffusers directory")

    down: dict[int, set[str]] = {}
    for name in state:
        if match := re.match(r"encoder\.down_blocks\.(\d+)\.(\w+)", name):
            down.setdefault(int(match.group(1)), set()).add(match.group(2))
    resamplers = sorted(index for index, parts in down.items() if "resample" in parts)
    blocks = resamplers[0] if resamplers else len(down)  # residual blocks of one resolution
    try:
        starts = range(0, (blocks + 1) * (len(resamplers) + 1), blocks + 1)
        multipliers = [state[f"encoder.down_blocks.{start}.conv1.weight"].shape[0] // base_dim for start in starts]
    except KeyError as error:
        raise UserError(f"{source} is not a complete Wan VAE: {error.args[0]} is missing") from error
    temporal = ["time_conv" in down[index] for index in resamplers]
    patch = math.isqrt(in_channels // 3)
    return {
        "base_dim": base_dim,
        "decoder_base_dim": decoder_dim,
        "z_dim": z_dim,
        "dim_mult": multipliers,
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": max(patch, 1) * 2 ** len(resamplers),
    }


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    return name
