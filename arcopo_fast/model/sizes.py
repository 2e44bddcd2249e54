"""The sizes of a generator as plain numbers, read from configurations and checked. No tensors here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

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
