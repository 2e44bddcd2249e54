"""One AR-CoPO iteration by the engine and by the reference path: how both are built, run and measured.

The scenes are `toy`, the shipped recipe, for a CPU, and `full_size.full`, bench_1_3b, for a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from arcopo_kernels.testing import error_ratio
from torch import Tensor

from arcopo_fast.build import (
    build_engine,
    build_objective,
    checkpoint_path,
    load_generator,
    load_prompts,
    load_rewards,
)
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.judging import Judging, joined
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.model.vae import StreamingDecoder, channels_last, load_vae
from arcopo_fast.objectives.advantage import group_advantages
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.planning.work import Work, frame_tokens
from arcopo_fast.planning.work import iteration as iteration_work
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.cache import plan_pages
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan, normal
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime import profiling
from benchmarks.reference.iteration import Reference, Result, adamw
from benchmarks.results import OURS
from benchmarks.timing import Ceilings

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


STAGES = (*profiling.STAGES, "other")
PER_BRANCH = ("prefix", "denoise", "clean", "decode", "reward")
"""Stages whose time in the reference path is that of a branch, times G."""
TOLERANCES = {torch.float32: {"latents": 1e-4, "rewards": 1e-2, "adapter": 1e-2}, torch.bfloat16: {"latents": 0.1}}
"""Error ratios of the engine to the reference path above which what is timed is not one algorithm. Adapters move by AdamW's steps, which
magnify the smallest gradients; the tests hold the real tolerances, in float64."""


# Scenes ------------------------------------------------------------------------------------------------------------------------------


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """Return the recipe with other values in some of its sections, as in `changed(config, rollout={"group_size": 4})`."""
    return config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()})


@dataclass
class Scene:
    """The input of an iteration: a recipe, a generator with LoRA, its prompt, and what turns latents into rewards (None: nothing does)."""

    name: str
    config: Config
    model: CausalWan
    text: Tensor
    prompt: str
    vae: AutoencoderKLWan | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)

    @property
    def shape(self) -> VideoShape:
        return VideoShape.of(self.config.video, self.model.config.in_channels)

    @property
    def noise(self) -> KeyedNoise:
        return KeyedNoise(self.shape, GroupId(seed=0))

    @property
    def middle(self) -> int:
        """The pivot in the middle, counted from 0."""
        return self.shape.chunks // 2

    def resized(self, name: str, config: Config) -> Scene:
        """Return the same generator under another recipe."""
        return replace(self, name=name, config=config)

    def copy(self) -> Scene:
        """Return a scene with weights of its own."""
        return replace(self, model=copy.deepcopy(self.model))


def toy(*overrides: str) -> Scene:
    """Return the shipped toy recipe's scene: of one group, and at a fixed temperature, as the reference path has it."""
    config = load_config("toy", ("rollout.prompts_per_iteration=1", "objective.tau=1.0", *overrides))
    generator, prompt = load_generator(config), load_prompts(config).training[0].text
    add_lora(generator.model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, seed=config.seed)
    vae = load_vae(checkpoint_path(config.generator.checkpoint) / "vae")
    return Scene("toy", config, generator.model, generator.encode_text([prompt]), prompt, vae, load_rewards(config))


# The two paths -----------------------------------------------------------------------------------------------------------------------


class OurPath:
    """The library: what `train.Trainer.iteration` does."""

    def __init__(self, scene: Scene, pivot: int) -> None:
        config = scene.config
        self.scene, self.pivot = scene, pivot
        self.plan = plan_pages(config.cache, scene.shape.chunk_frames, pivot, config.rollout.wave_size)
        self.engine = build_engine(config, scene.model, pages=max(1, self.plan.pages))
        self.objective = build_objective(config, self.engine)
        self.parameters = adapter_parameters(scene.model)
        self.optimizer = adamw(config, self.parameters)
        self.stepper = Stepper(self.optimizer, gradient_clip=config.optimizer.gradient_clip)
        self.decoder: StreamingDecoder | None = None
        if scene.vae is not None:
            self.decoder = StreamingDecoder(channels_last(copy.deepcopy(scene.vae)), config.video.decode_frames)

    def iteration(self, advantages: Tensor | None = None) -> Result:
        config = self.scene.config
        with self.rollout() as group:
            rewards: dict[str, Tensor] = {}
            if self.decoder is not None:
                rewards = self.judge(group)
                advantages = group_advantages(rewards, config.rewards, std_floor=config.objective.advantage_std_floor)
            if advantages is None:
                advantages = random_advantages(config)
            statistics = self.update(group, advantages)
            latents = group.videos()
        return Result(latents, rewards, advantages, statistics)

    def rollout(self) -> Group:
        settings = self.scene.config.rollout
        return self.engine.rollout(
            self.scene.text,
            self.scene.noise.id,
            pivot=self.pivot,
            members=settings.group_size,
            plan=NoisePlan(settings.noise_strength),
            branches_per_wave=settings.branches_per_wave,
        )

    def update(self, group: Group, advantages: Tensor) -> dict[str, float]:
        return self.objective.update([(group, advantages)], self.stepper)

    def judge(self, group: Group) -> dict[str, Tensor]:
        """Rewards [G] by name, decoded and judged as many branches at a time as the recipe says."""
        assert self.decoder is not None
        judging = Judging(self.decoder, self.scene.config.rollout.decode_branches)
        parts: list[dict[str, Tensor]] = []
        slices = judging.decode(group.tails, group.prefix_latents)
        for frames, scores in judging.judge(self.scene.rewards, slices, [self.scene.prompt] * group.size):
            del frames  # the next ones need the memory
            parts.append(scores)
        return joined(parts)


class ReferencePath:
    """`reference.iteration`; branches: run so many of the group's only."""

    def __init__(self, scene: Scene, pivot: int, *, branches: int | None = None, mp4: bool = False) -> None:
        self.scene, self.pivot, self.branches = scene, pivot, branches
        self.reference = Reference(scene.config, scene.model, scene.vae, scene.rewards, mp4=mp4)
        self.parameters = self.reference.parameters

    def iteration(self, advantages: Tensor | None = None) -> Result:
        scene = self.scene
        if scene.vae is None and advantages is None:
            advantages = random_advantages(scene.config)
        return self.reference.iteration(scene.text, scene.prompt, scene.noise, self.pivot, advantages=advantages, branches=self.branches)


def random_advantages(config: Config) -> Tensor:
    """Return what stands for advantages where there are no rewards: [G] float64, mean 0, variance 1."""
    drawn = normal((config.rollout.group_size,), 0, "advantages").double()
    return (drawn - drawn.mean()) / drawn.std(correction=0)


class Samples:
    """Calls a path's iteration and keeps the seconds of its stages: what is timed."""

    def __init__(self, path: OurPath | ReferencePath) -> None:
        self.path = path
        self.stages: list[dict[str, float]] = []

    def __call__(self) -> Result:
        with profiling.record(self.path.scene.model.device) as seconds:
            result = self.path.iteration()
        self.stages.append(seconds)
        return result

    def medians(self, rounds: int) -> dict[str, float]:
        """Return the times of the last `rounds` calls, by stage."""
        taken = self.stages[-rounds:]
        return {name: median(seconds.get(name, 0.0) for seconds in taken) for name in profiling.STAGES if any(name in s for s in taken)}


def agreement(ours: OurPath, reference: ReferencePath) -> dict[str, float]:
    """Run both once from equal weights: error ratios of what they give.

    Raises:
        AssertionError: they disagree, or the ratio was not 1 before the first update.
    """
    a, b = ours.iteration(), reference.iteration()
    errors = {"latents": error_ratio(a.latents, b.latents)}
    if a.rewards:
        errors["rewards"] = max(error_ratio(a.rewards[name], b.rewards[name]) for name in a.rewards)
    pairs = list(zip(ours.parameters, reference.parameters))
    errors["adapter"] = error_ratio(torch.cat([p.flatten() for p, _ in pairs]), torch.cat([q.flatten() for _, q in pairs]))
    assert a.statistics.get("update1/ratio_max", 0.0) == 0, "before the first update the ratio must be exactly 1"
    for name, allowed in TOLERANCES[ours.scene.model.dtype].items():
        assert errors.get(name, 0.0) <= allowed, (
            f"engine and reference path: error ratio of {name} {errors[name]:.3g}, allowed {allowed:.3g}"
        )
    return errors


# Figures -----------------------------------------------------------------------------------------------------------------------------


def case(
    scene: Scene,
    pivot: int,
    ceilings: Ceilings,
    timings: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, float]],
    **more: Any,
) -> dict[str, Any]:
    """Return the figures of one scene and pivot, as `measure.Bench` gives those of an operator, and its stages.

    timings: by path ("arcopo", "reference"), whole iterations; stages: by path, seconds by stage. "other" is what is in no stage.
    more: other fields; `varied` says what was varied, in a sweep.
    """
    config, model, group = scene.config, scene.model.config, scene.config.rollout.group_size
    work = iteration_work(config, model, VAESizes.from_config(scene.vae.config) if scene.vae is not None else None, pivot)
    tokens = group * scene.shape.frames * frame_tokens(config, model)  # of the finished videos
    total = sum(work.values(), Work())
    variants = {name: {**timing._asdict(), "error": None} for name, timing in timings.items()}
    rows = []
    for stage in STAGES:
        done, row = work.get(stage, Work()), dict[str, Any](stage=stage)
        for name, seconds in stages.items():
            if stage == "other":
                row[name] = max(0.0, variants[name]["median"] - sum(seconds.values()))
            elif stage in seconds:
                row[name] = seconds[stage]
        if row.keys() & variants.keys():
            rows.append(row | _yardstick(done, ceilings, row.get(OURS)))
    times = {name: figures["median"] for name, figures in variants.items()}
    ratio = times["reference"] / times[OURS] if {"reference", OURS} <= times.keys() else None
    yardstick = _yardstick(total, ceilings, times.get(OURS))
    return {
        "operator": "iteration",
        "mode": "rollout+update",
        "case": f"{scene.name} p={pivot + 1}",
        "workload": scene.name,
        "pivot": pivot + 1,
        "chunks": scene.shape.chunks,
        "implementation": None,
        "settings": {
            "branches_per_wave": config.rollout.wave_size,
            "decode_branches": min(config.rollout.decode_branches or group, group),
            "micro_batch": config.objective.micro_batch,
        },
        "limit": "matmul",
        "of_ceiling": yardstick["of_floor"],
        **yardstick,
        "tokens_per_second": {name: tokens / time for name, time in times.items()},
        "ratios": {"reference": ratio, "compiled": None, "best": None},
        "best": None,
        "alternatives": [],
        "variants": variants,
        "stages": rows,
        **more,
    }


def _yardstick(work: Work, ceilings: Ceilings, seconds: float | None) -> dict[str, Any]:
    """FLOP, bytes, and the floor: the products at the matmul ceiling, then the passes between them at the copy bandwidth."""
    floor = work.flops / ceilings.matmul + work.traffic / ceilings.bandwidth
    return {
        "flops": work.flops,
        "bytes": work.traffic,
        "floor": floor,
        "of_floor": floor / seconds if seconds and floor else None,
        "utilisation": work.flops / seconds / ceilings.matmul if seconds and work.flops else None,
    }


def memory(path: OurPath) -> dict[str, Any]:
    """Peak pages and their bytes against the plan, and on a GPU the peak of all memory, since the path's first iteration."""
    pool, plan = path.engine.pool, path.plan
    figures = {"pages": pool.peak_in_use, "planned_pages": plan.pages, "prefix_pages": plan.prefix, "tail_pages": plan.tail}
    figures |= {"kv_bytes": pool.keys.nbytes + pool.values.nbytes, "planned_kv_bytes": max(1, plan.pages) * pool.page_bytes}
    if path.engine.model.device.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def problems(path: OurPath) -> list[str]:
    """Return what the path did other than planned, since its first iteration; what was measured of it is not what its case says."""
    engine, changes = path.engine, path.objective.batching.changed()
    found = []
    if engine.pool.peak_in_use != path.plan.pages:
        found.append(f"the engine held {engine.pool.peak_in_use} pages, planned were {path.plan.pages}")
    if engine.largest_wave is not None:
        found.append(f"a rollout ran out of memory, and went on with waves of {engine.largest_wave} branches")
    if changes:
        found.append(f"an update ran out of memory, and went on with {', '.join(f'{name}={value}' for name, value in changes.items())}")
    return found


VARIED = ("group", "steps", "length", "resolution")
"""The settings that `sweep` varies."""


def sweep(scene: Scene, what: str) -> list[Scene]:
    """Return the scene with other sizes: what cost grows with."""
    config, name, video = scene.config, scene.name, scene.config.video
    height, width, frames, steps = video.latent_height, video.latent_width, video.chunk_frames, config.sampler.steps
    if what == "group":
        return [scene.resized(f"{name} G={size}", changed(config, rollout={"group_size": size})) for size in (4, 8, 12, 24)]
    if what == "steps":
        lists = [steps[:count] for count in range(1, len(steps) + 1)]
        return [scene.resized(f"{name} T={len(kept)}", changed(config, sampler={"steps": kept})) for kept in lists]
    if what == "length":
        return [
            scene.resized(
                f"{name} L={chunks} {f'window={window}' if window else 'no window'}",
                changed(config, video={"chunks": chunks}, cache={"window": window, "sink": sink}),
            )
            for chunks in (video.chunks, 2 * video.chunks)
            for window, sink in ((None, 0), (4 * frames, frames))
        ]
    sizes = [(height // 4 * 2, width // 4 * 2), (height * 3 // 8 * 2, width * 3 // 8 * 2), (height, width)]
    return [
        scene.resized(f"{name} {rows}x{columns} latents", changed(config, video={"latent_height": rows, "latent_width": columns}))
        for rows, columns in sizes
    ]
