"""The published files of a generator, small and random but in the official forms, at the places where a recipe looks for them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from arcopo_fast.storage.hub import Source
from support import fixtures, umt5
from support.models import small_model
from support.official import to_official_names

Weights = dict[str, Tensor]

# One head of 128: the official files say nothing of heads, which are taken to be of that width. 16 channels are the VAE's.
SIZES = {"attention_head_dim": 128, "num_attention_heads": 1, "num_layers": 1, "text_dim": umt5.DIM, "text_len": 512}
SIZES |= {"in_channels": 16, "out_channels": 16}
SMALL = ["generator.device=cpu", "generator.dtype=float32", "generator.vae_dtype=float32", "video.latent_height=4", "video.latent_width=6"]


def place(root: Path, source: str) -> Path:
    """Return the place of a published file under $ARCOPO_MODELS, and make its directory."""
    wanted = Source.parse(source)
    path = root / wanted.repository / wanted.inside
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def generator_weights() -> Weights:
    return {name: tensor.detach().clone() for name, tensor in small_model(**SIZES).state_dict().items()}


def write_generator(path: Path, generator: Weights, ema: Weights) -> None:
    """A training checkpoint of the official code: the wrapper's names, those of the EMA with what FSDP leaves in them."""
    named = {f"model.{name}": tensor for name, tensor in to_official_names(generator).items()}
    averaged = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in to_official_names(ema).items()}
    torch.save({"generator": named, "generator_ema": averaged, "critic": {"step": torch.tensor(3)}}, path)


def write_lora(path: Path, *, rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """LongLive's form, alpha equal to the rank: A and B by the official name of their layer, which is returned."""
    width, inner = 128, small_model(**SIZES).config.ffn_dim
    layers = {f"blocks.0.{attention}.{part}": (width, width) for attention in ("self_attn", "cross_attn") for part in "qkvo"}
    layers |= {"blocks.0.ffn.0": (width, inner), "blocks.0.ffn.2": (inner, width)}
    pairs = {name: (torch.randn(rank, inputs) * 0.1, torch.randn(outputs, rank) * 0.1) for name, (inputs, outputs) in layers.items()}
    state = {f"base_model.model.{name}.lora_{kind}.weight": pair[at] for name, pair in pairs.items() for at, kind in enumerate("AB")}
    torch.save({"generator_lora": state}, path)
    return pairs


def write_base(root: Path) -> None:
    """A Wan2.1 directory: text encoder, tokenizer and VAE."""
    base = root / "Wan-AI" / "Wan2.1-T2V-1.3B"
    umt5.write_official(base, umt5.official_state(torch.bfloat16))
    weights = load_file(fixtures.files_of(fixtures.OWN).vaes[0])
    torch.save({name.removeprefix("w/"): tensor for name, tensor in weights.items() if name.startswith("w/")}, base / "Wan2.1_VAE.pth")
