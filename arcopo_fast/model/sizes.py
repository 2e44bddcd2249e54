"""Generators as plain numbers: the published sizes, and what follows from any sizes by arithmetic alone.

For planning before anything is built, and for untrained generators. No tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from arcopo_fast.errors import UserError


@dataclass(frozen=True)
class CausalWanConfig:
    """Sizes, under diffusers' names. The defaults are Wan2.1-T2V-1.3B."""

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size is {self.patch_size}; a causal generator needs one latent frame to a patch, (1, height, width)")
        if self.attention_head_dim % 2 or self.freq_dim % 2:
            raise ValueError(f"attention_head_dim {self.attention_head_dim} and freq_dim {self.freq_dim} must be even")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels."""
        _, rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(f"latent frames of {height}x{width} do not divide into patches of {rows}x{columns}")
        return (height // rows) * (width // columns)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class VAESizes:
    """Sizes of an AutoencoderKLWan, under diffusers' names. The defaults are Wan2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str | Path = "the VAE's configuration") -> VAESizes:
        """From a config.json, whatever else it holds.

        Raises:
            UserError: a size is none. `source` is the file named in the message.
        """
        known: dict[str, Any] = {entry.name: config[entry.name] for entry in fields(cls) if entry.name in config}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        for name, value in known.items():
            several = name in ("dim_mult", "temperal_downsample")
            kind = bool if name in ("temperal_downsample", "is_residual") else int
            values = value if isinstance(value, tuple) else (value,)
            sound = isinstance(value, tuple) == several and all(type(one) is kind and one >= (kind is int) for one in values)
            if not sound and not (value is None and name in ("decoder_base_dim", "patch_size")):
                raise UserError(f"{source}: {name} is {str(config[name])[:60]!r}, which is no size of a VAE")
        sizes = cls(**known)
        if len(sizes.temperal_downsample) != len(sizes.dim_mult) - 1:
            raise UserError(f"{source}: temperal_downsample and dim_mult do not go together; expected one entry less than dim_mult has")
        return sizes

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent pixel, along rows and along columns."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    def pixel_frames(self, latent_frames: int) -> int:
        """Of a video: the first latent frame gives one, each later one 2 to the number of temporal upsamplers."""
        return 1 + (latent_frames - 1) * 2 ** sum(self.temperal_downsample)


_WHOLE = (
    *("num_layers", "num_attention_heads", "num_heads", "attention_head_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "text_len"),
    *("_text_len", "in_channels", "out_channels", "in_dim", "out_dim"),
)


def check_sizes(sizes: Mapping[str, Any], source: str | Path) -> None:
    """Raise `UserError` if sizes, under diffusers' or the official names, are none of a causal Wan."""
    known = {name: value for name, value in sizes.items() if value is not None}
    for name in _WHOLE:
        if name in known and (type(known[name]) is not int or not 1 <= known[name] < 2**31):
            raise UserError(f"{source}: {name} is {str(known[name])[:60]!r}; expected a whole number above 0")
    patch = known.get("patch_size", (1, 2, 2))
    if not isinstance(patch, list | tuple) or len(patch) != 3 or any(type(size) is not int or size < 1 for size in patch) or patch[0] != 1:
        raise UserError(
            f"{source}: patch_size is {str(patch)[:60]}; expected [1, height, width]: a causal generator has one frame to a patch"
        )
    if "eps" in known and not (isinstance(known["eps"], float) and 0 < known["eps"] < 1):
        raise UserError(f"{source}: eps is {str(known['eps'])[:60]!r}; expected a number between 0 and 1, such as 1e-06")
    for name in ("attention_head_dim", "freq_dim"):
        if known.get(name, 2) % 2:
            raise UserError(f"{source}: {name} is {known[name]}; expected an even number")


@dataclass(frozen=True)
class GeneratorSizes:
    """A video generator: the causal Wan and the VAE that decodes its latents."""

    transformer: CausalWanConfig = field(default_factory=CausalWanConfig)
    vae: VAESizes = field(default_factory=VAESizes)


PUBLISHED = {
    "1.3b": GeneratorSizes(),
    "14b": GeneratorSizes(CausalWanConfig(num_layers=40, num_attention_heads=40, ffn_dim=13824)),
}
"""Wan2.1-T2V by size; both share one VAE."""


def published(size: str) -> GeneratorSizes:
    """Raises UserError for a size that is not known."""
    if size not in PUBLISHED:
        raise UserError(f"no generator of size {size!r} is known; the sizes are {', '.join(PUBLISHED)}")
    return PUBLISHED[size]


# The transformer -------------------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A linear layer: its features, what it reads (layers with the same source read the same tensor), and whether that is the text."""

    inputs: int
    outputs: int
    source: str
    of_text: bool = False


def block_linears(config: CausalWanConfig) -> dict[str, Linear]:
    """The linear layers of one block, by their names in it."""
    dim, inner = config.dim, config.ffn_dim
    return {
        **{f"attn1.to_{part}": Linear(dim, dim, "norm1") for part in "qkv"},
        "attn1.to_out.0": Linear(dim, dim, "attn1"),
        "attn2.to_q": Linear(dim, dim, "norm2"),
        **{f"attn2.to_{part}": Linear(dim, dim, "text", of_text=True) for part in "kv"},
        "attn2.to_out.0": Linear(dim, dim, "attn2"),
        "ffn.net.0.proj": Linear(dim, inner, "norm3"),
        "ffn.net.2": Linear(inner, dim, "gelu"),
    }


def transformer_parameters(config: CausalWanConfig) -> int:
    dim, patch = config.dim, config.patch_size[1] * config.patch_size[2]
    linears = [(linear.inputs, linear.outputs) for linear in block_linears(config).values()] * config.num_layers
    linears += [(config.in_channels * patch, dim), (dim, config.out_channels * patch), (dim, 6 * dim)]
    linears += [(config.text_dim, dim), (dim, dim), (config.freq_dim, dim), (dim, dim)]
    # Beside the linears a block has four q/k norms, an affine LayerNorm and a table of six rows; the head has a table of two.
    return sum(inputs * outputs + outputs for inputs, outputs in linears) + config.num_layers * 12 * dim + 2 * dim


# The VAE ---------------------------------------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """A convolution of the decoder (or encoder, which is only counted).

    taps: elements of its kernel. spatial, temporal: rows of its output for each latent row, frames for each latent frame. cached: the
    decoder keeps its last two input frames from call to call.
    """

    inputs: int
    outputs: int
    taps: int
    spatial: int = 1
    temporal: int = 1
    cached: bool = False


@cache
def decoder_convolutions(vae: VAESizes) -> tuple[Convolution, ...]:
    """Those of diffusers' WanDecoder3d, in the order of its forward pass."""
    base = vae.decoder_base_dim or vae.base_dim
    widths = [base * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    layers = [Convolution(vae.z_dim, widths[0], 27, cached=True), *_middle(widths[0])]
    spatial = temporal = 1
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        if level and not vae.is_residual:
            inputs //= 2
        for block in range(vae.num_res_blocks + 1):
            layers += _residual(outputs if block else inputs, outputs, spatial, temporal)
        if level < len(vae.dim_mult) - 1:
            if vae.temperal_downsample[-1 - level]:
                layers.append(Convolution(outputs, 2 * outputs, 3, spatial, temporal, cached=True))
                temporal *= 2
            spatial *= 2
            layers.append(Convolution(outputs, outputs if vae.is_residual else outputs // 2, 9, spatial, temporal))
    return *layers, Convolution(widths[-1], vae.out_channels, 27, spatial, temporal, cached=True)


def vae_parameters(vae: VAESizes) -> int:
    """Of encoder and decoder, but for the scales of their norms, a thousandth."""
    widths = [vae.base_dim * factor for factor in (1, *vae.dim_mult)]
    encoder = [Convolution(vae.in_channels, widths[0], 27), *_middle(widths[-1]), Convolution(widths[-1], 2 * vae.z_dim, 27)]
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        for block in range(vae.num_res_blocks):
            encoder += _residual(outputs if block else inputs, outputs)
        if level < len(vae.dim_mult) - 1:
            encoder += [Convolution(outputs, outputs, 9), *[Convolution(outputs, outputs, 3)] * vae.temperal_downsample[level]]
    between = [Convolution(width, width, 1) for width in (2 * vae.z_dim, vae.z_dim)]
    return sum(conv.inputs * conv.outputs * conv.taps + conv.outputs for conv in [*encoder, *between, *decoder_convolutions(vae)])


def _residual(inputs: int, outputs: int, spatial: int = 1, temporal: int = 1) -> list[Convolution]:
    scale = (spatial, temporal)
    pair = [Convolution(inputs, outputs, 27, *scale, cached=True), Convolution(outputs, outputs, 27, *scale, cached=True)]
    return pair if inputs == outputs else [*pair, Convolution(inputs, outputs, 1, *scale)]


def _middle(width: int) -> list[Convolution]:
    return [*_residual(width, width), Convolution(width, 3 * width, 1), Convolution(width, width, 1), *_residual(width, width)]
