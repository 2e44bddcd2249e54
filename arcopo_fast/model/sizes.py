"""The sizes of a generator as plain numbers, read from configurations and checked. No tensors here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from arcopo_fast.errors import UserError


@dataclass(frozen=True)
class CausalWanConfig:
    """Sizes of a causal Wan, under diffusers' names. The defaults are Wan2.1-T2V-1.3B.

    Attributes:
        num_layers: blocks.
        num_attention_heads, attention_head_dim: H and D; the width E is their product.
        ffn_dim: inner width of the feed-forward.
        freq_dim: width of the sinusoidal embedding of a timestep.
        text_dim, text_len: columns and rows of a prompt's embedding.
        in_channels, out_channels: channels of a latent.
        patch_size: frames, rows and columns of latent pixels in one token; a causal generator has one frame.
        eps: of all norms.
    """

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
        """Width of a token, E."""
        return self.num_attention_heads * self.attention_head_dim

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Return the tokens of one latent frame of `height` x `width` latent pixels."""
        _, rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(f"latent frames of {height}x{width} do not divide into patches of {rows}x{columns}")
        return (height // rows) * (width // columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes by name."""
        return asdict(self)


@dataclass(frozen=True)
class VAESizes:
    """Sizes of an AutoencoderKLWan, under diffusers' names. The defaults are Wan2.1's.

    Attributes:
        base_dim, decoder_base_dim: channels of the encoder's and the decoder's first resolution; None: the decoder has the encoder's.
        z_dim: channels of a latent.
        dim_mult: channels of each resolution, in units of the first one's.
        num_res_blocks: residual blocks of each resolution.
        temperal_downsample: which changes of resolution halve the frames, too (diffusers' spelling).
        is_residual: Wan 2.2's blocks with shortcuts around them.
        in_channels, out_channels: of frames, those of a patch included.
        patch_size: pixels of a patch along rows and columns; None: no patches.
    """

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
        """Return the sizes that a config.json holds, whatever else it holds.

        Args:
            source: the file that an error names.

        Raises:
            UserError: an entry is not a size.
        """
        known: dict[str, Any] = {entry.name: config[entry.name] for entry in fields(cls) if entry.name in config}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        for name, value in known.items():
            is_list = name in ("dim_mult", "temperal_downsample")
            kind = bool if name in ("temperal_downsample", "is_residual") else int
            values = value if isinstance(value, tuple) else (value,)
            valid = isinstance(value, tuple) == is_list and all(type(entry) is kind and entry >= (kind is int) for entry in values)
            if not valid and not (value is None and name in ("decoder_base_dim", "patch_size")):
                raise UserError(f"{source}: {name} is {str(config[name])[:60]!r}, which is not a valid size of a VAE")
        sizes = cls(**known)
        if len(sizes.temperal_downsample) != len(sizes.dim_mult) - 1:
            raise UserError(f"{source}: temperal_downsample and dim_mult do not go together; expected one entry less than dim_mult has")
        return sizes

    @property
    def spatial_factor(self) -> int:
        """Pixels of a latent pixel, along rows and along columns."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the frames of a video: the first latent frame gives one, each later one 2 to the number of temporal upsamplers."""
        return 1 + (latent_frames - 1) * 2 ** sum(self.temperal_downsample)


_INTEGERS = (
    *("num_layers", "num_attention_heads", "num_heads", "attention_head_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "text_len"),
    *("_text_len", "in_channels", "out_channels", "in_dim", "out_dim"),
)


def check_sizes(sizes: Mapping[str, Any], source: str | Path) -> None:
    """Raise `UserError` if sizes, under diffusers' or the official names, are none of a causal Wan."""
    known = {name: value for name, value in sizes.items() if value is not None}
    for name in _INTEGERS:
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
    """Sizes of a video generator: the causal Wan and the VAE that decodes its latents."""

    transformer: CausalWanConfig = field(default_factory=CausalWanConfig)
    vae: VAESizes = field(default_factory=VAESizes)
