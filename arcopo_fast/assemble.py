"""From a recipe to objects: the generator, its engine, the rewards and the prompts, as every command needs them.

Whatever is wrong with the input is said here, as a UserError, before anything is written.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor

from arcopo_fast.config import Config
from arcopo_fast.data.prompts import Prompts, read_prompts, split_prompts
from arcopo_fast.errors import UserError
from arcopo_fast.model.causal_wan import CausalWan, CausalWanConfig
from arcopo_fast.model.checkpoints import infer_config, load_into, read_config, read_state_dict
from arcopo_fast.model.vae import StreamingDecoder, channels_last, load_vae
from arcopo_fast.objectives.copo import CopoSettings
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.engine import Engine, SamplerSettings, VideoShape
from arcopo_fast.rollout.noise import generator as random_for
from arcopo_fast.toy import data as toy_data
from arcopo_fast.toy import metrics as toy_metrics
from arcopo_fast.toy import rewards as toy_rewards
from arcopo_fast.toy.text import ToyTextEncoder

TextEncoder = Callable[[Sequence[str]], Tensor]


@dataclass
class Generator:
    """A text-to-video generator: prompts -> text embeddings -> latents -> frames."""

    model: CausalWan
    encode_text: TextEncoder
    decoder: StreamingDecoder
    directory: Path


def checkpoint_directory(checkpoint: str) -> Path:
    """Where a recipe's `generator.checkpoint` lies: "toy" ships with the package, anything else is a path."""
    if checkpoint == "toy":
        return Path(str(importlib.resources.files("arcopo_fast.toy") / "checkpoint"))
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; give 'toy' or the path of one")
    return path


def device_of(name: str) -> torch.device:
    """The device of a recipe's `generator.device`; "auto" takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"generator.device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"generator.device is {name!r}, but PyTorch sees no GPU here; use generator.device=cpu")
    return device


def load_model(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> CausalWan:
    """A frozen causal Wan from any container of its weights; sizes from config.json and the shapes."""
    state = read_state_dict(path)
    model = CausalWan(CausalWanConfig(**infer_config(state, read_config(path), source=path)))
    load_into(model, state, source=path)
    return model.to(device, dtype).requires_grad_(False)


def load_generator(config: Config) -> Generator:
    """Everything of a checkpoint directory: transformer/, vae/ and text/."""
    directory, device = checkpoint_directory(config.generator.checkpoint), device_of(config.generator.device)
    model = load_model(directory, dtype=getattr(torch, config.generator.dtype), device=device)
    if not (directory / "vae").is_dir() or not (directory / "text").is_dir():
        absent = "text/" if (directory / "vae").is_dir() else "vae/"
        raise UserError(f"{directory} lacks {absent}; expected a directory with transformer/, vae/ and text/")
    vae = channels_last(load_vae(directory / "vae")).to(device)
    text = ToyTextEncoder.from_pretrained(directory / "text")
    return Generator(model, text, StreamingDecoder(vae, config.video.decode_frames), directory)


def video_shape(config: Config, generator: Generator) -> VideoShape:
    video = config.video
    return VideoShape.of(
        video.chunks,
        video.chunk_frames,
        generator.model.config.in_channels,
        video.latent_height,
        video.latent_width,
        independent_first_frame=video.independent_first_frame,
    )


def build_engine(config: Config, model: CausalWan, shape: VideoShape, *, videos: int | None = None) -> Engine:
    """An engine whose pool holds a group of the recipe, or `videos` independent videos."""
    sampler = config.sampler
    wave = min(config.rollout.branches_per_wave or config.rollout.group_size, config.rollout.group_size)
    policy = CachePolicy(config.cache.variant, config.cache.window, config.cache.sink, config.cache.global_sink)
    cached = sum(shape.chunk_frames[:-1])
    visible = cached if policy.window is None else min(cached, policy.window)
    # Every group of an iteration holds its prefix until the update; a context that is recomputed stands beside the rollout's own.
    held = config.rollout.prompts_per_iteration - 1 + (config.objective.context == "recompute")
    pages = max(1, videos * visible) if videos else Engine.pages_for(shape, wave, policy=policy) + held * visible
    return Engine(
        model,
        shape,
        SamplerSettings(
            tuple(sampler.steps),
            sampler.warp,
            sampler.shift,
            tuple(sampler.first_chunk_steps) if sampler.first_chunk_steps else None,
            sampler.context_noise,
            sampler.kind,
        ),
        policy,
        pages=pages,
        cuda_graphs=config.rollout.cuda_graphs,
    )


def copo_settings(config: Config) -> CopoSettings:
    objective = config.objective
    return CopoSettings(
        distance=objective.distance,
        distance_reduction=objective.distance_reduction,
        tau=objective.tau,
        clip=objective.clip,
        steps=objective.steps,
        skip_last_step=objective.skip_last_step,
        anchors_per_update=objective.anchors_per_update,
        updates=objective.updates,
        context=objective.context,
        micro_batch=objective.micro_batch,
        checkpoint=objective.checkpoint,
    )


def load_rewards(config: Config) -> dict[str, Reward]:
    """The rewards that the recipe names, in its order."""
    known: dict[str, Callable[[], Reward]] = {
        "toy_vq": toy_rewards.VisualQuality,
        "toy_mq": toy_rewards.MotionQuality,
        "toy_ta": toy_rewards.TextAlignment,
    }
    for name in config.rewards:
        if name not in known:
            raise UserError(f"rewards names {name!r}, which is not known; the rewards are {', '.join(known)}")
    return {name: known[name]() for name in config.rewards}


def load_held_out(generator: Generator) -> dict[str, Reward]:
    """Metrics that are never trained on; those of the toy world read its classifier from the checkpoint."""
    return toy_metrics.held_out(generator.directory / "classifier")


def load_prompts(config: Config) -> Prompts:
    """Training and evaluation prompts; which are kept for evaluation depends on `evaluation.seed` alone."""
    prompts = toy_data.all_captions() if config.prompts == "toy" else read_prompts(config.prompts)
    return split_prompts(prompts, config.evaluation.prompts, random_for(config.evaluation.seed, "evaluation prompts"))
