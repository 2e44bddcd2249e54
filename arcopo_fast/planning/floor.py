"""The floor of a recipe's iteration: the time its arithmetic and traffic would take at the best rates of a device."""

from __future__ import annotations

from typing import cast

import torch

from arcopo_fast.build import cache_policy, shape_of
from arcopo_fast.config.schema import Config
from arcopo_fast.model.sizes import CausalWanConfig, VAESizes
from arcopo_fast.objectives.copo import CopoSettings
from arcopo_fast.planning.ceilings import Ceilings
from arcopo_fast.planning.work import Workload, iteration
from arcopo_fast.rollout.engine import SamplerSettings


def workload_of(config: Config, name: str, model: CausalWanConfig, vae: VAESizes | None) -> Workload:
    """A recipe as a workload. `iteration` counts AR-CoPO on the policy's own rollouts; chunks, text and decoder are those of any recipe."""
    sampler, optimizer = config.sampler, config.optimizer
    first = tuple(sampler.first_chunk_steps) if sampler.first_chunk_steps else None
    return Workload(
        name,
        model,
        shape_of(config, model.in_channels),
        SamplerSettings(tuple(sampler.steps), sampler.warp, sampler.shift, first, sampler.context_noise, sampler.kind),
        cache_policy(config),
        config.rollout.group_size,
        config.rollout.noise_strength,
        cast(CopoSettings, config.objective),
        config.lora.rank,
        config.lora.alpha,
        tuple(config.lora.targets),
        optimizer.lr,
        optimizer.betas,
        optimizer.weight_decay,
        optimizer.gradient_clip,
        config.objective.advantage_std_floor,
        getattr(torch, config.generator.dtype),
        config.rollout.branches_per_wave,
        config.rollout.decode_branches,
        config.video.decode_frames,
        vae,
    )


def floors(config: Config, model: CausalWanConfig, vae: VAESizes, ceilings: Ceilings) -> dict[int, dict[str, float]]:
    """Seconds below which no stage of a recipe's iteration gets on a device, by pivot, from 1: empty where nothing was counted.

    Counted are iterations of AR-CoPO on its own rollouts, each frame cached once. Matrix products and convolutions at the ceiling of a
    large matrix product, then the passes between them at that of a copy; rewards are not counted.
    """
    if config.objective.kind != "copo" or config.train.buffer is not None or cache_policy(config).recomputed:
        return {}
    workload = workload_of(config, config.name, model, vae)
    return {
        pivot + 1: {
            stage: config.rollout.prompts_per_iteration * ceilings.seconds(work.flops, work.traffic)
            for stage, work in iteration(workload, pivot).items()
        }
        for pivot in range(workload.shape.chunks)
    }
