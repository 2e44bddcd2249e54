"""Golden outputs of the official generators: which files there are, and how one becomes our model, engine and inputs.

ARCOPO_FIXTURES names another folder of such files for the parity tests, which take every setting from the files.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from arcopo_fast.build import load_model
from arcopo_fast.config.reading import load_config
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import plan_pages
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.stream import Stream, VideoShape

OWN = Path(__file__).parents[1] / "fixtures"
"""The repository's own files: their generators were run with the settings of the published recipes."""
DIRECTORY = Path(os.environ.get("ARCOPO_FIXTURES") or OWN)


class Files(NamedTuple):
    """The fixtures of a directory, by what they hold."""

    rollouts: list[Path]
    gradients: list[Path]
    vaes: list[Path]


def files_of(directory: Path) -> Files:
    gradients, vaes = sorted(directory.glob("*.grad.safetensors")), sorted(directory.glob("*_vae.safetensors"))
    return Files(sorted(set(directory.glob("*.safetensors")) - {*gradients, *vaes}), gradients, vaes)


ROLLOUTS, GRADIENTS, VAES = files_of(DIRECTORY)


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
        """The clean chunks that the video begins with, cut as the official pipeline did."""
        latents = self.tensors.get("initial_latent")
        return [] if latents is None else list(latents.split(initial_sizes(self.config, latents.shape[1]), dim=1))

    @property
    def switches(self) -> dict[int, Tensor]:
        return {frame: self.text(index + 1) for index, frame in enumerate(self.config["switch"] or [])}

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """The video, not begun yet. Whatever happens in the block, its pages are given back."""
        stream = self.engine.start(self.text())
        try:
            yield stream
        finally:
            stream.cache.release()

    def switch(self, stream: Stream, chunk: int) -> Tensor | None:
        """Change to the prompt that begins with `chunk`, if one does; returns it."""
        frames = sum(latents.shape[1] for latents in self.initial_latents)
        starts = [frames + sum(self.sizes[:index]) for index in range(chunk + 1)]
        pending = sorted(self.switches.items())
        begun: Tensor | None = None
        for start in starts:  # one switch for each chunk at most
            begun = pending.pop(0)[1] if pending and start >= pending[0][0] else None
        if begun is not None:
            self.engine.switch_prompt(stream, begun)
        return begun

    def extend_to(self, stream: Stream, chunk: int) -> Tensor:
        """Make everything before `chunk`, from the recorded noise; returns the text of the prompt in use there."""
        text = self.text()
        for latents in self.initial_latents:
            self.engine.append(stream, latents)
        for index in range(chunk + 1):
            begun = self.switch(stream, index)
            text = text if begun is None else begun
            if index < chunk:
                self.engine.extend(stream, index, self.noise.initial(index), self.noise, last=False)
        return text


def cached(engine: Engine, stream: Stream, frames: int) -> tuple[Tensor, Tensor]:
    """Visible keys and values [layers, B, tokens, H, D], those of the newest `frames`."""
    start = stream.cache.frames - frames
    pool = engine.pool
    rows = [[pool.runs([table], start) for table in stream.cache.tables]] * engine.model.config.num_layers
    read = [[[pool.read(layer, run) for run in runs] for runs in row] for layer, row in enumerate(rows)]
    both = [torch.stack([torch.cat([torch.cat([run[which] for run in runs], dim=1) for runs in row]) for row in read]) for which in (0, 1)]
    return both[0], both[1]


def initial_sizes(config: dict[str, Any], frames: int) -> list[int]:
    """Frames of each call in which `frames` initial frames were cached: as recorded, or else by the official pipeline's rule."""
    ends = [call["global_end"] // config["frame_seqlen"] for call in config.get("calls", []) if call["kind"] == "init"]
    if ends:
        return [end - start for start, end in zip([0, *ends], ends)]
    first = [1] if config["independent_first_frame"] else []
    return first + [config["nfpb"]] * ((frames - sum(first)) // config["nfpb"])


VARIANTS = {"sf": "self_forcing", "cf": "self_forcing", "ll": "longlive", "ir": "infinity_rope"}
"""How the official repositories that fixtures are of cache, where they do not say `infinity`."""


def recipe_of(config: dict[str, Any]) -> str:
    """The recipe of the generator that a fixture is of; Infinity-RoPE is a way to run Self-Forcing's."""
    if config["repo"] == "cf":
        return "causal_forcing_2step" if config["nfpb"] == 1 else "causal_forcing"
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


def overrides_of(config: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a fixture's official run, by the recipe's keys."""
    return {
        "generator.dtype": config["dtype"],
        "video.chunks": config["chunks"],
        "video.chunk_frames": config["nfpb"],
        "video.independent_first_frame": config["independent_first_frame"] and not config["init_frames"],
        "video.latent_height": config["h"],
        "video.latent_width": config["w"],
        "sampler.steps": config["steps"],
        "sampler.first_chunk_steps": config["first_chunk_steps"],
        "sampler.warp": config["warp"],
        "sampler.shift": config["shift"],
        "sampler.context_noise": config["context_noise"],
        "cache.variant": "longlive_infinity" if config["infinity"] else VARIANTS[config["repo"]],
        "cache.window": None if config["local"] == -1 else config["local"],
        "cache.sink": config["sink"],
        "cache.global_sink": config["global_sink"],
    }


def load(path: Path) -> Case:
    """The way of a run: the generator's recipe with the fixture's settings, and a checkpoint in the official layout."""
    config, tensors = read(path)
    if config["repo"] not in VARIANTS:
        pytest.skip(f"{path.name} is of {config['repo']}, which has no recipe here")
    ours = load_config(recipe_of(config), [f"{key}={json.dumps(value)}" for key, value in overrides_of(config).items()])
    with TemporaryDirectory() as directory:
        checkpoint = write_official(Path(directory), config, tensors, ours.generator.weights)
        model = load_model(checkpoint, dtype=getattr(torch, ours.generator.dtype), weights=ours.generator.weights)
    shape = VideoShape(tuple(config["chunk_sizes"]), config["in_dim"], config["h"], config["w"])
    # Unlike a run's, these videos begin with given frames and cache their last chunk: pages as for longer ones.
    given = tensors["initial_latent"].shape[1] if "initial_latent" in tensors else 0
    longer = (*[1] * given, *shape.chunk_frames, 1)
    pages = 2 * config["batch"] * plan_pages(ours.cache, longer, len(longer) - 1, 1).prefix
    engine = Engine(model, shape, ours.sampler, ours.cache, pages=pages, cuda_graphs=ours.rollout.cuda_graphs)
    return Case(config, tensors, model, engine, RecordedNoise(tensors, config["chunk_sizes"]))


def rollout_of(gradient: Path) -> Path:
    """The file of the rollout that a file of gradients is of: that of its name, or of its case."""
    named = gradient.with_name(gradient.name.replace(".grad.", "."))
    if named.is_file():
        return named
    case = read(gradient)[0]["case"]
    found = [path for path in files_of(gradient.parent).rollouts if read(path)[0].get("case") == case]
    assert len(found) == 1, f"{gradient.name} is of case {case}, of which {gradient.parent} holds {len(found)} rollouts"
    return found[0]
