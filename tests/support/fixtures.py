"""Golden outputs of the official generators: which files there are, and how one becomes our model, engine and inputs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from arcopo_fast.assemble import build_engine, load_model, shape_of
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.checkpoints import read_state_dict
from arcopo_fast.recipe import load_config
from arcopo_fast.rollout.engine import Engine

DIRECTORY = Path(os.environ.get("ARCOPO_FIXTURES", Path(__file__).parents[1] / "fixtures"))
GRADIENTS = sorted(DIRECTORY.glob("*.grad.safetensors"))
VAES = sorted(DIRECTORY.glob("*_vae.safetensors"))
ROLLOUTS = sorted(set(DIRECTORY.glob("*.safetensors")) - set(GRADIENTS) - set(VAES))


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


def recipe_of(config: dict[str, Any]) -> str:
    """The recipe of the generator that a fixture is of; Infinity-RoPE is a way to run Self-Forcing's."""
    if config["repo"] == "cf":
        return {3: "causal_forcing", 1: "causal_forcing_2step"}[config["nfpb"]]
    return {"sf": "self_forcing", "ll": "longlive", "ir": "self_forcing"}[config["repo"]]


def write_official(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], wanted: str) -> Path:
    """The fixture's weights as a training checkpoint in the official form, the wrapper's `model.` in the names; the other set is noise.

    Sizes stand beside it in config.json: heads of these widths leave no trace in the shapes.
    """
    named = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "out_dim", "eps")
    (directory / "config.json").write_text(json.dumps({"model_type": "t2v"} | {name: config[name] for name in named}))
    weights = {name.removeprefix("w/"): tensor for name, tensor in tensors.items() if name.startswith("w/")}
    other = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    sets = {"ema": (other, weights), "generator": (weights, other)}[wanted]
    path = directory / "diffusion_pytorch_model.pt"
    torch.save(dict(zip(("generator", "generator_ema"), sets)), path)
    return path


def load(path: Path) -> Case:
    """The way of a run: the recipe of the published generator, with the fixture's small sizes, a checkpoint in the official layout."""
    config, tensors = read(path)
    recipe = recipe_of(config)
    overrides = {
        "generator.dtype": config["dtype"],
        "video.chunks": config["chunks"],
        "video.independent_first_frame": config["independent_first_frame"] and not config["init_frames"],
        "video.latent_height": config["h"],
        "video.latent_width": config["w"],
        "sampler.context_noise": config["context_noise"],
        "cache.window": None if config["local"] == -1 else config["local"],
        "cache.sink": config["sink"],
    }
    if config["infinity"]:
        overrides["cache.variant"] = "longlive_infinity"
    if config["repo"] == "ir":
        overrides["cache.variant"] = "infinity_rope"
    ours = load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    # What a recipe says of its generator must be what the official run was made with.
    official = [config["steps"], config["warp"], config["shift"], config["first_chunk_steps"], config["nfpb"]]
    sampler = ours.sampler
    assert [sampler.steps, sampler.warp, sampler.shift, sampler.first_chunk_steps, ours.video.chunk_frames] == official, recipe
    assert ours.cache.global_sink == config["global_sink"]
    with TemporaryDirectory() as directory:
        checkpoint = write_official(Path(directory), config, tensors, ours.generator.weights)
        model = load_model(checkpoint, dtype=getattr(torch, ours.generator.dtype), weights=ours.generator.weights)
    shape = shape_of(ours, config["in_dim"])
    assert list(shape.chunk_frames) == config["chunk_sizes"]
    engine = build_engine(ours, model, shape, videos=2 * config["batch"])  # room for what a video begins with, and for its last chunk
    return Case(config, tensors, model, engine, RecordedNoise(tensors, config["chunk_sizes"]))


__all__ = ["GRADIENTS", "ROLLOUTS", "VAES", "Case", "RecordedNoise", "load", "read", "read_state_dict"]
