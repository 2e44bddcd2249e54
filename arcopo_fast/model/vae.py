"""The Wan VAE: a streaming decoder whose causal cache is an explicit value, the encoder, and loading.

The parameters are those of diffusers' AutoencoderKLWan, and so is the encoder. The decoder's arithmetic is written out here, over the same
modules, for inference: channels stay innermost from latents to pixels ([B, F, H, W, C] in memory), no padding is materialized, norm and
activation write where the next convolution reads, and an upsampled feature map never exists. What a causal convolution looks back at is a
`VAECache` that goes in and comes out. A cache is never changed, so the one taken at the pivot serves every branch.
Knows nothing of generators or rewards: normalized latents in, frames out, and back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from arcopo_kernels import rms_norm
from arcopo_kernels.norm_silu import norm_silu
from torch import Tensor, nn
from torch.nn import functional

from arcopo_fast.errors import UserError
from arcopo_fast.model.checkpoints import load_into, model_directory, read_container, strip_wrappers
from arcopo_fast.model.tensors import rename, replace_prefix
from arcopo_fast.storage.textfiles import read_json

if TYPE_CHECKING:  # diffusers is imported when a VAE is loaded: a machine without it can still train on given latents
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


@dataclass(frozen=True, eq=False)
class VAECache:
    """The decoder's memory of the latent frames decoded so far.

    Attributes:
        features: for each causal convolution that has run, the last two frames of its input, [B, 2, H, W, C] in its own rows and columns;
            zeros stand for frames before the first.
        frames: number of latent frames decoded so far.
    """

    features: Mapping[nn.Module, Tensor]
    frames: int

    @property
    def batch(self) -> int | None:
        """Batch size, or None before the first frame."""
        return next((feature.shape[0] for feature in self.features.values()), None)


def fork(cache: VAECache, branches: int) -> VAECache:
    """Return the cache of one video as the cache of a batch of `branches` videos that continue it: views, no copies."""
    if cache.batch not in (None, 1):
        raise ValueError(f"a cache of batch 1 can be forked, this one has batch {cache.batch}")
    return VAECache({conv: feature.expand(branches, -1, -1, -1, -1) for conv, feature in cache.features.items()}, cache.frames)


class StreamingDecoder:
    """A decoder of latents chunk by chunk, without gradients.

    The first latent frame of a video gives one pixel frame, each later one four (2 to the number of temporal upsamplers).

    Args:
        vae: its parameters are used as they are at each call, in their dtype and on their device; a bfloat16 VAE decodes in bfloat16.
            `channels_last` makes it faster.
        frames_per_call: latent frames in one call of the network; a video's first frame always has a call of its own. 1, as in the
            official decoder, takes the least memory, and the calls are the same however a clip is cut into chunks, so the frames are
            equal bit for bit. More is faster where frames are small, and then frames of other cuts, and those of other batch sizes, are
            equal up to rounding: 1e-5 in float32.
    """

    def __init__(self, vae: AutoencoderKLWan, frames_per_call: int = 1) -> None:
        self.vae = vae
        self.frames_per_call = frames_per_call
        self._dtype = torch.promote_types(vae.dtype, torch.float32)
        self._mean, self._std = _statistics(vae, self._dtype)

    @property
    def factor(self) -> int:
        """Pixel frames of a latent frame that is not a video's first."""
        return 2 ** sum(self.vae.config["temperal_downsample"])

    def start(self) -> VAECache:
        """Return the cache of a video of which nothing is decoded yet; it fits every batch size."""
        return VAECache({}, 0)

    def decode(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        """Decode the next chunk.

        Args:
            latents: [B, F, C, h, w], normalized, that is, as the generator produces them; any dtype.
            cache: what `start`, a former call or `fork` returned, for the same batch size. It is left as it is.

        Returns:
            frames [B, pixel frames, 3, H, W] in [0, 1], float32 (float64 of a float64 VAE), and the cache to continue with.
        """
        pixels, cache = self.decode_unclamped(latents, cache)
        return pixels.clamp_(-1, 1).mul_(0.5).add_(0.5), cache

    def warm(self, latents: Tensor) -> VAECache:
        """Return the cache after latents [B, F, C, h, w], F >= 0, decoded in the calls that `decode` makes, but without their frames."""
        cache = self.start()
        for part in (latents[:, :1], *latents[:, 1:].split(self.frames_per_call, dim=1)):
            if part.shape[1]:
                cache = self.decode_unclamped(part, cache)[1]
        return cache

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        """Decode the next chunk like `decode`, but without the clamp: return the network's own output, nominally in [-1, 1]."""
        channels = self._mean.shape[0]
        if latents.dim() != 5 or latents.shape[1] == 0 or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; expected [B, F >= 1, {channels}, h, w]")
        if cache.batch not in (None, latents.shape[0]):
            raise ValueError(f"latents have batch {latents.shape[0]}, the cache has batch {cache.batch}; fork the cache first")
        patch = self.vae.config["patch_size"] or 1
        z = latents.movedim(2, -1).to(self._dtype) * self._std.to(latents.device) + self._mean.to(latents.device)
        z = z.to(self.vae.dtype)  # [B, F, h, w, C]
        alone = int(cache.frames == 0)
        features = dict(cache.features)  # entries are replaced, no tensor is written into
        pixels: list[Tensor] = []
        for part in (z[:, :alone], *z[:, alone:].split(self.frames_per_call, dim=1)):
            if part.shape[1]:  # every layer is called with the shapes of the part, so a clip's chunks leave no trace in its frames
                part = _pointwise(self.vae.post_quant_conv, part.contiguous())
                y = _decoder(self.vae.decoder, part, features, first=bool(alone) and not pixels)
                # Output channels are (color, column, row) of a patch; in the frame a row of patches is `patch` rows of pixels.
                y = y.unflatten(-1, (3, patch, patch)).permute(0, 1, 4, 2, 6, 3, 5).to(self._dtype, memory_format=torch.contiguous_format)
                pixels.append(y.flatten(3, 4).flatten(4, 5))  # [B, F, 3, H, W]
        return torch.cat(pixels, dim=1), VAECache(features, cache.frames + latents.shape[1])


# The decoder's network. Feature maps are [B, F, H, W, C], contiguous; `features` are the histories of a VAECache, replaced in passing. ----


def _decoder(decoder: Any, z: Tensor, features: dict[nn.Module, Tensor], *, first: bool) -> Tensor:
    """Decode latent frames z [B, F, h, w, C] -> [B, pixel frames, H, W, 3 p^2]; `first`: z is the first frame of the video, alone."""
    window = _window(decoder.conv_in, z, features)
    window[:, -z.shape[1] :] = z
    x = _causal_conv(decoder.conv_in, window, features)
    x = _residual_block(decoder.mid_block.resnets[0], x, features)
    for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        x = _residual_block(resnet, _attention(attention, x), features)
    for block in decoder.up_blocks:
        x = _up_block(block, x, features, first=first)
    return _norm_silu_conv(decoder.norm_out, decoder.conv_out, x, features)


def _up_block(block: Any, x: Tensor, features: dict[nn.Module, Tensor], *, first: bool) -> Tensor:
    """Run residual blocks, upsampling, and in a Wan 2.2 VAE the shortcut around them, which repeats values."""
    y = x
    for resnet in block.resnets:
        y = _residual_block(resnet, y, features)
    upsampler = block.upsamplers[0] if getattr(block, "upsamplers", None) else getattr(block, "upsampler", None)
    if upsampler is not None:
        y = _upsample(upsampler, y, features, first=first)
    if (shortcut := getattr(block, "avg_shortcut", None)) is not None:
        time, space, channels = shortcut.factor_t, shortcut.factor_s, shortcut.out_channels
        # [.., C_in, repeats], read as [.., C_out, time, space, space]: views of x
        repeated = x.unsqueeze(-1).expand(*x.shape, shortcut.repeats).reshape(*x.shape[:-1], channels, time, space, space)
        if first:
            repeated = repeated[..., -1:, :, :]
        batch, frames, height, width = x.shape[:4]
        blocks = y.view(batch, frames, repeated.shape[-3], height, space, width, space, channels)
        blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).add_(repeated)
    return y


def _residual_block(block: Any, x: Tensor, features: dict[nn.Module, Tensor]) -> Tensor:
    y = _norm_silu_conv(block.norm1, block.conv1, x, features)
    y = _norm_silu_conv(block.norm2, block.conv2, y, features)
    return y.add_(x if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(block.conv_shortcut, x))


def _attention(block: Any, x: Tensor) -> Tensor:
    """Run single-head self-attention within each frame."""
    tokens = x.flatten(2, 3).flatten(0, 1)  # [B F, H W, C]
    normed = rms_norm(tokens, block.norm.gamma.flatten(), eps=1e-24)  # diffusers' floor of 1e-12 under the norm, not its mean square
    query, key, value = _pointwise(block.to_qkv, normed).unsqueeze(1).chunk(3, dim=-1)
    y = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
    return _pointwise(block.proj, y).view_as(x).add_(x)


def _upsample(upsampler: Any, x: Tensor, features: dict[nn.Module, Tensor], *, first: bool) -> Tensor:
    """Double rows and columns, and where the upsampler has a `time_conv` the frames, too, except the first frame."""
    if upsampler.mode == "upsample3d" and not first:
        window = _window(upsampler.time_conv, x, features)
        window[:, -x.shape[1] :] = x
        y = _causal_conv(upsampler.time_conv, window, features)  # [B, F, H, W, 2 C]: of each frame two
        x = y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)
    # Nearest-neighbor doubling followed by a 3 x 3 convolution reads each input pixel as a 2 x 2 block. Summing the taps that fall on the
    # same input pixel turns the two into one transposed convolution of kernel 4 and stride 2: 4/9 of the operations, nothing to store.
    conv = upsampler.resample[1]
    kernel = functional.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
    y = functional.conv_transpose2d(_channels_first(x.flatten(0, 1)), kernel, conv.bias, stride=2, padding=1)
    return _channels_innermost(y).unflatten(0, x.shape[:2])


def _norm_silu_conv(norm: Any, conv: Any, x: Tensor, features: dict[nn.Module, Tensor]) -> Tensor:
    window = _window(conv, x, features)
    norm_silu(x, norm.gamma.flatten(), out=window[:, -x.shape[1] :])
    return _causal_conv(conv, window, features)


def _window(conv: Any, x: Tensor, features: dict[nn.Module, Tensor]) -> Tensor:
    """Return what a causal convolution reads: its history [B, 2, H, W, C], then room for the new frames x; without history, zeros.

    A single frame without history, which is what each convolution sees of a video's first latent frame, has room for itself only.
    """
    history = features.get(conv)
    if history is None and x.shape[1] == 1:
        return torch.empty_like(x)
    window = x.new_empty(x.shape[0], 2 + x.shape[1], *x.shape[2:])
    window[:, :2] = 0 if history is None else history
    return window


def _causal_conv(conv: Any, window: Tensor, features: dict[nn.Module, Tensor]) -> Tensor:
    """Convolve a filled window, [B, 2 + F, H, W, C] or a single frame -> [B, F, H, W, C_out], and keep its end as the history."""
    if window.shape[1] == 1:
        features[conv] = torch.cat([torch.zeros_like(window), window], dim=1)
    else:
        features[conv] = window[:, -2:].clone()  # a view would keep the whole window
    weight = conv.weight[:, :, -window.shape[1] :]  # of a single frame the earlier taps would see zeros only
    _, rows, columns = conv.kernel_size
    if rows == columns == 1:  # a 2-d convolution over (time, pixel): the library has no fast 3-d one for such kernels on a CPU
        y = functional.conv2d(_channels_first(window.flatten(2, 3)), weight.squeeze(-1), conv.bias)
        return _channels_innermost(y).unflatten(2, window.shape[2:4])
    x, padding = _channels_first(window), (0, rows // 2, columns // 2)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # PyTorch's own choice passes oneDNN by for one small video on one thread, where it is six times as fast.
        return _channels_innermost(torch.mkldnn_convolution(x, weight, conv.bias, padding, (1, 1, 1), (1, 1, 1), 1))
    return _channels_innermost(functional.conv3d(x, weight, conv.bias, padding=padding))


def _pointwise(conv: Any, x: Tensor) -> Tensor:
    """Run a convolution of kernel 1 over x [..., C]."""
    return functional.linear(x, conv.weight.flatten(1), conv.bias)


def _channels_first(x: Tensor) -> Tensor:
    """Return x [B, ..., C] as PyTorch's convolutions take it: a view [B, C, ...] whose memory format is channels_last."""
    return x.movedim(-1, 1)


def _channels_innermost(x: Tensor) -> Tensor:
    """Return x [B, C, ...] as [B, ..., C]: a view, except where a backend answered in another memory format."""
    return x.movedim(1, -1).contiguous()


def encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Encode whole clips: frames [B, 1 + 4 n, 3, H, W] in [0, 1] -> normalized latents [B, 1 + n, C, h, w]; a single frame is an image.

    The mean of the posterior, no sampling; float32 (float64 of a float64 VAE).
    """
    factor = 2 ** sum(vae.config["temperal_downsample"])
    if frames.dim() != 5 or frames.shape[1] % factor != 1 % factor:
        raise ValueError(f"frames have shape {list(frames.shape)}; expected [B, {factor} n + 1, 3, H, W]")
    dtype = torch.promote_types(vae.dtype, torch.float32)
    mean, std = (statistic.to(frames.device) for statistic in _statistics(vae, dtype))
    posterior = vae.encode((frames.transpose(1, 2) * 2 - 1).to(vae.dtype)).latent_dist
    return ((posterior.mode().to(dtype).movedim(1, -1) - mean) / std).movedim(-1, 2)


def _statistics(vae: AutoencoderKLWan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of the raw latents: raw = normalized * std + mean."""
    config = vae.config
    mean, std = (torch.tensor(config[name], dtype=dtype, device=vae.device) for name in ("latents_mean", "latents_std"))
    if not len(mean) == len(std) == config["z_dim"]:
        raise ValueError(f"the VAE has {config['z_dim']} latent channels, but {len(mean)} latents_mean and {len(std)} latents_std values")
    return mean, std


# Loading ---------------------------------------------------------------------------------------------------------------------------


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """Return a frozen VAE in evaluation mode, on the CPU.

    Args:
        path: a diffusers directory (or a pipeline directory with a `vae` in it), or a single file with official (Wan2.1_VAE.pth) or
            diffusers names, whose sizes are read off the shapes.
        dtype: of the parameters.

    Raises:
        UserError: missing, damaged, not a Wan VAE, or a file from which the sizes or the latent statistics cannot be known; or diffusers
            is not installed.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise UserError(f"a VAE needs the package diffusers, which cannot be imported ({error}); pip install diffusers") from error
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
    _check_statistics(vae, path)
    load_into(vae, state, source=path)
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns of modules to be kept in float32, of which this model has none
    return vae.eval().requires_grad_(False)


def _check_statistics(vae: AutoencoderKLWan, source: Path) -> None:
    """Raise `UserError` unless a configuration has a finite mean and a positive deviation for each latent channel."""
    for name in ("latents_mean", "latents_std"):
        values = vae.config[name]
        numbers = isinstance(values, list | tuple) and all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
        )
        if not numbers or len(values) != vae.config["z_dim"] or (name == "latents_std" and min(values) <= 0):
            expected = f"{vae.config['z_dim']} {'positive ' * (name == 'latents_std')}numbers, one for each latent channel"
            raise UserError(f"{source}: its configuration's {name} is {str(values)[:80]}; expected {expected}")


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Put the weights of a VAE's 3-d convolutions in the memory format that is fastest, on a CPU nearly twice as fast; return the same
    VAE."""
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
    """Return the state dict of an official Wan2.1 VAE under diffusers' names. diffusers names are returned as they are.

    The official decoder counts its residual blocks and upsamplers in one list, diffusers groups them by resolution; the first
    upsampler tells how many blocks a resolution has.
    """
    if "decoder.conv1.weight" not in state:
        return dict(state)
    upsamplers = [int(match.group(1)) for match in map(re.compile(r"decoder\.upsamples\.(\d+)\.resample\.").match, state) if match]
    if not upsamplers:
        raise UserError(f"{source} is not a Wan2.1 VAE: it has no decoder.upsamples.N.resample; Wan2.2's needs its diffusers directory")
    blocks = min(upsamplers)

    def diffusers(name: str) -> str:
        half, _, rest = name.partition(".")
        if half not in ("encoder", "decoder"):
            return replace_prefix(name, _TOP_NAMES)
        if match := re.match(r"upsamples\.(\d+)\.", rest):
            level, index = divmod(int(match.group(1)), blocks + 1)
            inner = f"resnets.{index}" if index < blocks else "upsamplers.0"
            rest = f"up_blocks.{level}.{inner}.{rest[match.end() :]}"
        else:
            rest = replace_prefix(rest, _HALF_NAMES)
        for old, new in _RESIDUAL_NAMES.items():
            rest = rest.replace(f".{old}.", f".{new}.")
        return f"{half}.{rest}"

    return rename(state, diffusers, source)


def infer_vae_config(state: Mapping[str, Tensor], *, source: str | Path = "the checkpoint") -> dict[str, object]:
    """Return AutoencoderKLWan's configuration from a state dict with diffusers names, for VAEs like Wan2.1's with 16 latent channels."""
    needed = {"encoder.conv_in.weight": 5, "decoder.conv_in.weight": 5, "decoder.conv_out.weight": 5}
    if misshapen := [name for name, rank in needed.items() if name not in state or state[name].dim() != rank or not state[name].numel()]:
        found = f"{len(state)} tensors such as {', '.join(sorted(state)[:3])}" if state else "no tensors"
        raise UserError(f"{source} is not a Wan VAE: {misshapen[0]} is missing or misshapen among {found}; give a Wan2.1 VAE checkpoint")
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
