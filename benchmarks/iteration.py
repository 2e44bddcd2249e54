"""One AR-CoPO iteration by the engine and by the reference path: how both are built, run and measured.

The workloads are `toy`, the shipped recipe, for a CPU, and `full_size.full`, for a GPU.
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

from arcopo_fast.evaluation.judging import Judging, joined
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.model.vae import StreamingDecoder, channels_last, load_vae
from arcopo_fast.objectives.advantage import group_advantages
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.planning.work import Work, Workload
from arcopo_fast.planning.work import iteration as iteration_work
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.engine import Engine, Group, VideoShape
from arcopo_fast.rollout.noise import KeyedNoise, normal
from arcopo_fast.runtime import profiling
from benchmarks.reference.iteration import Reference, Result
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


# Workloads ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What an iteration works on: a generator with LoRA, its prompt, and what turns latents into rewards (None: nothing does)."""

    workload: Workload
    model: CausalWan
    text: Tensor
    prompt: str
    vae: AutoencoderKLWan | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def noise(self) -> KeyedNoise:
        return KeyedNoise(self.workload.shape.chunk, seed=0)

    def resized(self, workload: Workload) -> Scene:
        """The same generator in another workload."""
        return replace(self, workload=workload)

    def copy(self) -> Scene:
        """With weights of its own."""
        return replace(self, model=copy.deepcopy(self.model))


def toy(*overrides: str) -> Scene:
    """The shipped toy recipe."""
    from arcopo_fast.build import checkpoint_path, load_generator, load_prompts, load_rewards
    from arcopo_fast.config.reading import load_config
    from arcopo_fast.planning.floor import workload_of

    config = load_config("toy", overrides)
    generator, prompt = load_generator(config), load_prompts(config).training[0].text
    add_lora(generator.model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, seed=config.seed)
    vae = load_vae(checkpoint_path(config.generator.checkpoint) / "vae")
    workload = workload_of(config, "toy", generator.model.config, VAESizes.from_config(vae.config))
    text = generator.encode_text([prompt])
    return Scene(workload, generator.model, text, prompt, vae, load_rewards(config), config.rewards)


# The two paths -----------------------------------------------------------------------------------------------------------------------


class OurPath:
    """The library: what `train.Trainer.iteration` does."""

    def __init__(self, scene: Scene, pivot: int) -> None:
        workload = scene.workload
        self.scene, self.pivot = scene, pivot
        wave = min(workload.branches_per_wave or workload.group_size, workload.group_size)
        self.plan = Engine.plan(workload.shape, workload.policy, pivot, wave)
        self.engine = Engine(
            scene.model, workload.shape, workload.sampler, workload.policy, pages=max(1, self.plan.pages), cuda_graphs="auto"
        )
        self.objective = CopoObjective(self.engine, workload.copo)
        self.parameters = adapter_parameters(scene.model)
        self.optimizer = workload.optimizer(self.parameters)
        self.stepper = Stepper(self.optimizer, gradient_clip=workload.gradient_clip)
        self.decoder: StreamingDecoder | None = None
        if scene.vae is not None:
            self.decoder = StreamingDecoder(channels_last(copy.deepcopy(scene.vae)), workload.decode_frames)

    def iteration(self, advantages: Tensor | None = None) -> Result:
        scene, workload = self.scene, self.scene.workload
        with self.rollout() as group:
            rewards: dict[str, Tensor] = {}
            if self.decoder is not None:
                rewards = self.judge(group)
                advantages = group_advantages(rewards, dict(scene.weights), std_floor=workload.advantage_std_floor)
            if advantages is None:
                advantages = random_advantages(workload)
            statistics = self.update(group, advantages)
            latents = torch.cat([chunk.expand(group.size, *chunk.shape[1:]) for chunk in group.latents], dim=1)
        return Result(latents, rewards, advantages, statistics)

    def rollout(self) -> Group:
        scene, workload = self.scene, self.scene.workload
        return self.engine.rollout(
            scene.text,
            scene.noise,
            pivot=self.pivot,
            branches=workload.group_size,
            sigma=workload.noise_strength,
            branches_per_wave=workload.branches_per_wave,
        )

    def update(self, group: Group, advantages: Tensor) -> dict[str, float]:
        return self.objective.update([(group, advantages)], self.stepper)

    def judge(self, group: Group) -> dict[str, Tensor]:
        """Rewards [G] by name, decoded and judged as many branches at a time as the workload says."""
        assert self.decoder is not None
        judging = Judging(self.decoder, self.scene.workload.decode_branches)
        parts: list[dict[str, Tensor]] = []
        for frames, scores in judging.judge(self.scene.rewards, group.latents, [self.scene.prompt] * group.size, group.pivot):
            del frames  # the next ones need the memory
            parts.append(scores)
        return joined(parts)


class ReferencePath:
    """`reference.iteration`; branches: run so many of the group's only."""

    def __init__(self, scene: Scene, pivot: int, *, branches: int | None = None, mp4: bool = False) -> None:
        self.scene, self.pivot, self.branches = scene, pivot, branches
        self.reference = Reference(scene.workload, scene.model, scene.vae, scene.rewards, scene.weights, mp4=mp4)
        self.parameters = self.reference.parameters

    def iteration(self, advantages: Tensor | None = None) -> Result:
        scene = self.scene
        if scene.vae is None and advantages is None:
            advantages = random_advantages(scene.workload)
        return self.reference.iteration(scene.text, scene.prompt, scene.noise, self.pivot, advantages=advantages, branches=self.branches)


def random_advantages(workload: Workload) -> Tensor:
    """Where there are no rewards: [G] float64, mean 0, variance 1."""
    drawn = normal((workload.group_size,), 0, "advantages").double()
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
        """Of the last `rounds` calls, by stage."""
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
    for name, allowed in TOLERANCES[ours.scene.workload.dtype].items():
        assert errors.get(name, 0.0) <= allowed, (
            f"engine and reference path: error ratio of {name} {errors[name]:.3g}, allowed {allowed:.3g}"
        )
    return errors


# Figures -----------------------------------------------------------------------------------------------------------------------------


def case(
    workload: Workload,
    pivot: int,
    ceilings: Ceilings,
    timings: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, float]],
    **more: Any,
) -> dict[str, Any]:
    """The figures of one workload and pivot, as `measure.Bench` gives those of an operator, and its stages.

    timings: by path ("arcopo", "reference"), whole iterations; stages: by path, seconds by stage. "other" is what is in no stage.
    more: other fields; `varied` says what was varied, in a sweep.
    """
    work = iteration_work(workload, pivot)
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
        "case": f"{workload.name} p={pivot + 1}",
        "workload": workload.name,
        "pivot": pivot + 1,
        "chunks": workload.shape.chunks,
        "implementation": None,
        "settings": {
            "branches_per_wave": min(workload.branches_per_wave or workload.group_size, workload.group_size),
            "decode_branches": min(workload.decode_branches or workload.group_size, workload.group_size),
            "micro_batch": workload.copo.micro_batch,
        },
        "limit": "matmul",
        "of_ceiling": yardstick["of_floor"],
        **yardstick,
        "tokens_per_second": {name: workload.video_tokens / time for name, time in times.items()},
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
    """What the path did other than planned, since its first iteration; what was measured of it is not what its case says."""
    engine, settings, planned = path.engine, path.objective.settings, path.scene.workload.copo
    found = []
    if engine.pool.peak_in_use != path.plan.pages:
        found.append(f"the engine held {engine.pool.peak_in_use} pages, planned were {path.plan.pages}")
    if engine.largest_wave is not None:
        found.append(f"a rollout ran out of memory, and went on with waves of {engine.largest_wave} branches")
    if settings != planned:
        found.append(f"an update ran out of memory, and went on with {settings}, not {planned}")
    return found


def sweep(workload: Workload) -> dict[str, list[Workload]]:
    """What cost grows with: the workload with other sizes, by what is varied."""
    shape, steps = workload.shape, workload.sampler.steps
    chunk = shape.chunk_frames[-1]
    window = CachePolicy(window=4 * chunk, sink=chunk)

    def of_length(chunks: int, policy: CachePolicy) -> Workload:
        kind = f"window={policy.window}" if policy.window else "no window"
        long = VideoShape((chunk,) * chunks, shape.channels, shape.height, shape.width)
        return replace(workload, name=f"{workload.name} L={chunks} {kind}", shape=long, policy=policy)

    def of_size(height: int, width: int) -> Workload:
        other = replace(shape, height=height, width=width)
        return replace(workload, name=f"{workload.name} {height}x{width} latents", shape=other)

    sizes = [
        (shape.height // 4 * 2, shape.width // 4 * 2),
        (shape.height * 3 // 8 * 2, shape.width * 3 // 8 * 2),
        (shape.height, shape.width),
    ]
    return {
        "group": [replace(workload, name=f"{workload.name} G={size}", group_size=size) for size in (4, 8, 12, 24)],
        "steps": [
            replace(workload, name=f"{workload.name} T={count}", sampler=replace(workload.sampler, steps=steps[:count]))
            for count in range(1, len(steps) + 1)
        ],
        "length": [of_length(chunks, policy) for chunks in (shape.chunks, 2 * shape.chunks) for policy in (CachePolicy(), window)],
        "resolution": [of_size(*size) for size in sizes],
    }
