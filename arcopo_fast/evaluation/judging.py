"""Judge a generator on fixed prompts and noises: the rewards it is trained on and the held-out metrics it is not.

A score that failed is NaN, in a summary null; it is counted, and no mean has it in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.build import Generator, pool_pages
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.objectives.advantage import weighted_total
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rollout.engine import Engine, VideoShape
from arcopo_fast.rollout.noise import KeyedNoise, StackedNoise
from arcopo_fast.runtime.memory import resident
from arcopo_fast.storage.metrics import TOTAL

BATCH = 8


@dataclass
class Evaluation:
    """scores: each reward's and metric's values [N] by name, and "reward", the weighted sum that is trained on.

    frames: the first videos, to be looked at.
    """

    scores: dict[str, Tensor]
    prompts: list[str]
    frames: Tensor

    def summary(self) -> dict[str, dict[str, Any]]:
        """Each score's mean and standard deviation over the videos that have it (null if none has), every value, and how many failed."""
        return {name: _summary(values) for name, values in self.scores.items()}


def _summary(values: Tensor) -> dict[str, Any]:
    there = values[values.isfinite()].double()
    mean, std = (there.mean().item(), there.std(correction=0).item()) if len(there) else (None, None)
    if len(there) and there.max() == there.min():  # whose standard deviation may be that of a rounded mean
        std = 0.0
    listed = [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]
    failed = {"failed": len(values) - len(there)} if len(there) < len(values) else {}
    return {"mean": mean, "std": std, "values": listed, **failed}


def videos_at_once(config: Config, shape: VideoShape) -> int:
    """Independent videos that the pages of a run's groups hold, at most `BATCH`; at least one."""
    videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
    return max(1, min(BATCH, videos, pool_pages(config, shape) // pool_pages(config, shape, videos=1)))


def judge(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    rewards: Mapping[str, Reward],
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Make a batch of videos and score them, `rollout.decode_branches` at a time.

    Args:
        prompts: one for each video. groups: which noise is whose.

    Yields:
        frames [n, F, 3, H, W] in [0, 1], and every score [n] on the CPU by its name; NaN for one that failed.
    """
    rows = [KeyedNoise(engine.shape.chunk, config.evaluation.seed, group=group) for group in groups]
    latents = engine.generate(generator.encode_text([prompt.for_generator for prompt in prompts]), StackedNoise(rows))
    device, offload, decoder = generator.model.device, config.generator.offload, generator.decoder
    done = 0
    for some in latents.split(config.rollout.decode_branches or len(latents)):
        with resident(device, decoder.vae, offload=offload):
            frames = decoder.decode(some, decoder.start())[0]  # what it would go on with is not kept
        with resident(device, *rewards.values(), offload=offload), torch.no_grad():
            scores = score(rewards, frames, [prompt.text for prompt in prompts[done : done + len(some)]], quarantine=True)
        yield frames, {name: values.cpu() for name, values in scores.items()}
        del frames  # the next ones need the memory
        done += len(some)


def evaluate(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
    held_out: dict[str, Reward],
) -> Evaluation:
    """Score `evaluation.videos_per_prompt` videos of every prompt. Equal configurations give equal noises, whatever the weights.

    engine: of the generator, between two iterations; as many videos are made at once as its pages hold, at most `BATCH`.
    """
    every = [prompt for prompt in prompts for _ in range(config.evaluation.videos_per_prompt)]
    batch = videos_at_once(config, engine.shape)
    scores: dict[str, list[Tensor]] = {}
    shown: list[Tensor] = []
    for start in range(0, len(every), batch):
        part = every[start : start + batch]
        groups = range(start, start + len(part))
        for frames, judged in judge(config, generator, engine, part, groups, {**rewards, **held_out}):
            for name, values in judged.items():
                scores.setdefault(name, []).append(values)
            shown.append(frames[: max(0, config.evaluation.sample_videos - sum(map(len, shown)))].to("cpu", copy=True))
            del frames
    joined = {name: torch.cat(values) for name, values in scores.items()}
    total = weighted_total(joined, config.rewards)
    return Evaluation({TOTAL: total} | joined, [prompt.text for prompt in every], torch.cat(shown)[: config.evaluation.sample_videos])
