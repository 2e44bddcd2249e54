"""Golden outputs of the official generators: which files there are, and how one becomes our model, engine and inputs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from arcopo_fast.model.causal_wan import CausalWan, CausalWanConfig
from arcopo_fast.model.checkpoints import load_into, read_state_dict, to_diffusers_names
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.engine import Engine, SamplerSettings, VideoShape

DIRECTORY = Path(os.environ.get("ARCOPO_FIXTURES", Path(__file__).parents[1] / "fixtures"))
GRADIENTS = sorted(DIRECTORY.glob("*.grad.safetensors"))
VAES = sorted(DIRECTORY.glob("*_vae.safetensors"))
ROLLOUTS = sorted(set(DIRECTORY.glob("*.safetensors")) - set(GRADIENTS) - set(VAES))
VARIANTS = {"sf": "self_forcing", "cf": "self_forcing", "ll": "longlive", "ir": "infinity_rope"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and all tensors of a fixture."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@dataclass
class RecordedNoise:
    """The noise that the official run drew."""

    tensors: dict[str, Tensor]
    sizes: list[int]

    def initial(self, chunk: int) -> Tensor:
        start = sum(self.sizes[:chunk])
        return self.tensors["noise"][:, start : start + self.sizes[chunk]].float()

    def renoise(self, chunk: int, step: int) -> Tensor:
        return self.tensors[f"chunk{chunk}/step{step}/eps"].float()


@dataclass
class Case:
    """A fixture turned into a runnable engine."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    model: CausalWan
    engine: Engine
    noise: RecordedNoise

    @property
    def sizes(self) -> list[int]:
        return self.config["chunk_sizes"]

    def text(self, segment: int = 0) -> Tensor:
        return self.tensors[f"text{segment}"]

    @property
    def initial_latents(self) -> list[Tensor]:
        """The clean chunks that the video begins with, cut as the official pipeline does."""
        latents = self.tensors.get("initial_latent")
        if latents is None:
            return []
        frames, size = latents.shape[1], self.config["nfpb"]
        first = [1] if self.config["independent_first_frame"] else []
        cuts = first + [size] * ((frames - sum(first)) // size)
        return list(latents.split(cuts, dim=1))

    @property
    def switches(self) -> dict[int, Tensor]:
        return {frame: self.text(index + 1) for index, frame in enumerate(self.config["switch"] or [])}


def load(path: Path) -> Case:
    config, tensors = read(path)
    sizes = CausalWanConfig(
        num_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["head_dim"],
        ffn_dim=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        text_dim=config["text_dim"],
        text_len=config["text_len"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        eps=config["eps"],
    )
    dtype = getattr(torch, config["dtype"])
    model = CausalWan(sizes)
    load_into(model, to_diffusers_names({name.removeprefix("w/model."): t for name, t in tensors.items() if name.startswith("w/")}))
    model = model.to(dtype)
    shape = VideoShape(tuple(config["chunk_sizes"]), config["in_dim"], config["h"], config["w"])
    first = config["first_chunk_steps"]
    sampler = SamplerSettings(
        tuple(config["steps"]), config["warp"], config["shift"], tuple(first) if first else None, config["context_noise"]
    )
    variant = VARIANTS[config["repo"]] + ("_infinity" if config["infinity"] else "")
    policy = CachePolicy(variant, None if config["local"] == -1 else config["local"], config["sink"], config["global_sink"])
    pages = config["batch"] * (shape.frames + config["init_frames"])
    return Case(config, tensors, model, Engine(model, shape, sampler, policy, pages=pages), RecordedNoise(tensors, config["chunk_sizes"]))


__all__ = ["GRADIENTS", "ROLLOUTS", "VAES", "Case", "RecordedNoise", "load", "read", "read_state_dict"]
