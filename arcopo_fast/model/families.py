"""The published generators: one entry for each, with all that differs between them.

Whoever adds a generator of the same architecture adds an entry to `FAMILIES` and a recipe. What a recipe trains with stands in the recipe
alone; here is what must be known of a generator before its files are read, and how to tell that they are whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from arcopo_fast.config.sections import CacheVariant
from arcopo_fast.errors import UserError
from arcopo_fast.model.sizes import CausalWanConfig, GeneratorSizes
from arcopo_fast.storage import hub
from arcopo_fast.storage.hub import Published

SIZES = {
    "1.3b": GeneratorSizes(),
    "14b": GeneratorSizes(CausalWanConfig(num_layers=40, num_attention_heads=40, ffn_dim=13824)),
}
"""Wan2.1-T2V by size, transformer and VAE; both share one VAE."""


@dataclass(frozen=True)
class Layout:
    """The places of a text encoder and a VAE in a repository.

    Attributes:
        text, vae: files, or directories in diffusers' form.
        tokenizer: a tokenizer.json.
    """

    text: str
    tokenizer: str
    vae: str

    @property
    def files(self) -> list[str]:
        """Names or patterns of the files that are needed."""
        return [part if Path(part).suffix else f"{part}/*" for part in (self.text, self.tokenizer, self.vae)]


OFFICIAL = Layout("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth")
DIFFUSERS = Layout("text_encoder", "tokenizer/tokenizer.json", "vae")
LAYOUTS = (OFFICIAL, DIFFUSERS)


@dataclass(frozen=True)
class Base:
    """A repository with the text encoder and the VAE that generators share.

    Attributes:
        repository: on Hugging Face, owner/name.
        files: its large files by path, with size and SHA-256.
    """

    repository: str
    layout: Layout = OFFICIAL
    files: Mapping[str, Published] = field(default_factory=lambda: MappingProxyType({}))


WAN_1_3B = Base(
    "Wan-AI/Wan2.1-T2V-1.3B",
    OFFICIAL,
    {
        OFFICIAL.text: Published(11_361_920_418, "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d"),
        OFFICIAL.vae: Published(507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),
        OFFICIAL.tokenizer: Published(16_837_417, "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b"),
    },
)
WAN_14B = Base("Wan-AI/Wan2.1-T2V-14B")


@dataclass(frozen=True)
class Family:
    """A published generator.

    Attributes:
        name: what its authors call it.
        size: of its transformer and VAE, a key of `SIZES`.
        repository: on Hugging Face, owner/name.
        files: by path in the repository, the checkpoint first, then an adapter that is part of the generator; the size is about right where
            there is no SHA-256.
        weights: which set of the checkpoint its authors run.
        base: the repository of its text encoder and VAE.
        cache: the rule by which its frames stay visible, a `cache.variant`.
    """

    name: str
    size: str
    repository: str
    files: Mapping[str, Published]
    weights: Literal["auto", "ema", "generator"] = "ema"
    base: Base = WAN_1_3B
    cache: CacheVariant = "self_forcing"

    @property
    def checkpoint(self) -> str:
        """Name of the file with its weights, as recipes write it."""
        return f"{hub.HUGGING_FACE}{self.repository}/{next(iter(self.files))}"


FAMILIES = (
    Family("Self-Forcing", "1.3b", "gdhe17/Self-Forcing", {"checkpoints/self_forcing_dmd.pt": Published(5_680_000_000)}),
    Family(
        "Causal-Forcing, chunk-wise",
        "1.3b",
        "zhuhz22/Causal-Forcing",
        {"chunkwise/causal_forcing.pt": Published(5_676_282_643, "cf75ee5cc6f4e2e336c59c973f5544655d8f0aa481761efe6de1b9cb2eb0cd9d")},
        weights="generator",
    ),
    Family(
        "Causal-Forcing, frame-wise",
        "1.3b",
        "zhuhz22/Causal-Forcing",
        {"framewise/causal_forcing.pt": Published(5_676_220_819, "70cae8c3b0b7191fa9840b4f6fe8655ba0cf5c6520c87ba85a46b861c3735cd3")},
    ),
    Family(
        "Causal-Forcing++, 2 steps",
        "1.3b",
        "zhuhz22/Causal-Forcing",
        {
            "causal-forcing++/framewise-2step.pt": Published(
                5_676_220_819, "8f899a016dffb9539788fac82c6200e43ef6e23b6e61ec6b885bb507a760ce42"
            )
        },
    ),
    Family(
        "Causal-Forcing++, 1 step",
        "1.3b",
        "zhuhz22/Causal-Forcing",
        {
            "causal-forcing++/framewise-1step.pt": Published(
                5_676_220_819, "bdb1b475fc88d528f510158a0990cd457f02c661b527ceb11ca9e4728533e2d0"
            )
        },
    ),
    Family(
        "LongLive 1.0",
        "1.3b",
        "Efficient-Large-Model/LongLive-1.3B",
        {"models/longlive_base.pt": Published(5_680_000_000), "models/lora.pt": Published(1_400_000_000)},
        weights="generator",
        cache="longlive",
    ),
    Family(
        "Krea realtime 14B",
        "14b",
        "krea/krea-realtime-video",
        {"krea-realtime-video-14b.safetensors": Published(28_600_000_000)},
        weights="auto",
        base=WAN_14B,
        cache="krea",
    ),
)

for _entry in (*FAMILIES, WAN_1_3B):
    hub.FILES.update({f"{_entry.repository}/{path}": published_file for path, published_file in _entry.files.items()})


def published(size: str) -> GeneratorSizes:
    """Return the sizes of Wan2.1-T2V, for "1.3b" or "14b".

    Raises:
        UserError: no generator of this size is known.
    """
    if size not in SIZES:
        raise UserError(f"no generator of size {size!r} is known; the sizes are {', '.join(SIZES)}")
    return SIZES[size]


def sizes_by_name(checkpoint: str, base: str | None) -> GeneratorSizes | None:
    """Return the sizes of a published family's checkpoint, or those that its name, or its base's, speaks of; None: neither says."""
    for family in FAMILIES:
        if checkpoint == family.checkpoint:
            return SIZES[family.size]
    found = re.search(rf"(?<![\d.])({'|'.join(map(re.escape, SIZES))})", f"{base or ''} {checkpoint}".lower())
    return SIZES[found[1]] if found else None


def base_files(base: str) -> list[str]:
    """Return what is needed of a published repository beside the generator itself: text encoder and VAE, in the layout it has."""
    if not hub.is_published(base):
        return []
    return (DIFFUSERS if base.partition("@")[0].rstrip("/").endswith("-Diffusers") else OFFICIAL).files
