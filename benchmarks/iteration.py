"""One AR-CoPO iteration by the engine and by the reference path: how both are built, run, measured and reported.

    python -m benchmarks.iteration PART [PART ...] --write FILE       parts of the full-size measurement; `PARTS` are their names

The workloads are `toy`, the shipped recipe, for a CPU, and `full`, Wan2.1-1.3B at 480x832 with untrained weights, for a GPU. The latter
needs no diffusers; without diffusers nothing is decoded or judged, and the advantages are random numbers.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from arcopo_kernels.testing import error_ratio
from torch import Tensor

from arcopo_fast.model.causal_wan import CausalWan, CausalWanConfig
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.model.untrained import HashedText, untrained_vae, untrained_wan
from arcopo_fast.model.vae import StreamingDecoder, channels_last, load_vae
from arcopo_fast.objectives.advantage import group_advantages
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rewards.simple import Sharpness, Steadiness
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.rollout.engine import Engine, Group, SamplerSettings, VideoShape
from arcopo_fast.rollout.noise import KeyedNoise, normal
from arcopo_fast.runtime import profiling
from arcopo_fast.work import Work, Workload
from arcopo_fast.work import iteration as iteration_work
from benchmarks import results, shapes
from benchmarks.reference.iteration import Reference, Result
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Timer, _timing, measure_ceilings

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
    from arcopo_fast.assemble import checkpoint_path, load_generator, load_prompts, load_rewards
    from arcopo_fast.floor import workload_of
    from arcopo_fast.recipe import load_config

    config = load_config("toy", overrides)
    generator, prompt = load_generator(config), load_prompts(config).training[0].text
    add_lora(generator.model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, seed=config.seed)
    vae = load_vae(checkpoint_path(config.generator.checkpoint) / "vae")
    workload = workload_of(config, "toy", generator.model.config, VAESizes.from_config(vae.config))
    text = generator.encode_text([prompt])
    return Scene(workload, generator.model, text, prompt, vae, load_rewards(config), config.rewards)


FULL = Workload(
    "Wan 1.3B",
    CausalWanConfig(),
    VideoShape.of(7, 3, 16, 60, 104),
    SamplerSettings((1000, 750, 500, 250), warp=True, shift=5.0),
    copo=CopoSettings(micro_batch=4),
    dtype=torch.bfloat16,
    decode_branches=4,
)
"""The sizes and numbers of the recipe bench_1_3b, whose waves, micro-batches and decoding are for 80 GB; here they are for 141 GB."""


def full(workload: Workload = FULL, device: torch.device = shapes.DEVICE) -> Scene:
    """An untrained generator; without its VAE where diffusers is not installed."""
    model = untrained_wan(workload.model, dtype=workload.dtype, device=device, seed=0)
    add_lora(model, rank=workload.lora_rank, alpha=workload.lora_alpha, seed=0)
    prompt = "a paper boat drifts down a stream"
    text = HashedText(workload.model.text_len, workload.model.text_dim)([prompt])
    if find_spec("diffusers") is None:
        return Scene(replace(workload, vae=None), model, text, prompt)
    vae = untrained_vae(workload.vae or VAESizes(), dtype=workload.dtype, device=device, seed=0)
    return Scene(
        workload, model, text, prompt, vae, {"sharpness": Sharpness(), "steadiness": Steadiness()}, {"sharpness": 1.0, "steadiness": 1.0}
    )


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
        self.decoder: StreamingDecoder | None = None
        if scene.vae is not None:
            self.decoder = StreamingDecoder(channels_last(copy.deepcopy(scene.vae)), workload.decode_frames)

    def iteration(self, advantages: Tensor | None = None) -> Result:
        scene, workload = self.scene, self.scene.workload
        group = self.engine.rollout(
            scene.text,
            scene.noise,
            pivot=self.pivot,
            branches=workload.group_size,
            sigma=workload.noise_strength,
            branches_per_wave=workload.branches_per_wave,
        )
        with group:
            rewards: dict[str, Tensor] = {}
            if self.decoder is not None:
                rewards = self.judge(group)
                advantages = group_advantages(rewards, dict(scene.weights), std_floor=workload.advantage_std_floor)
            if advantages is None:
                advantages = random_advantages(workload)
            statistics = self.objective.update([(group, advantages)], self.optimizer, self.parameters, gradient_clip=workload.gradient_clip)
            latents = torch.cat([chunk.expand(group.size, *chunk.shape[1:]) for chunk in group.latents], dim=1)
        return Result(latents, rewards, advantages, statistics)

    def judge(self, group: Group) -> dict[str, Tensor]:
        """Rewards [G] by name, decoded and judged as many branches at a time as the workload says."""
        assert self.decoder is not None
        slices = decode_branches(self.decoder, group.latents, group.pivot, self.scene.workload.decode_branches)
        parts: list[dict[str, Tensor]] = []
        while True:
            with profiling.stage("decode"):
                frames = next(slices, None)
            if frames is None:
                return {name: torch.cat([part[name] for part in parts]) for name in self.scene.rewards}
            with profiling.stage("reward"):
                parts.append(score(self.scene.rewards, frames, [self.scene.prompt] * len(frames)))


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
    assert pool.peak_in_use == plan.pages, f"the engine held {pool.peak_in_use} pages, planned were {plan.pages}"
    return figures


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


# Parts of the full-size measurement ------------------------------------------------------------------------------------------------------

REFERENCE_BRANCHES = 2
"""Of the group, run by the reference path at full size; the others are taken to cost the same."""
PIVOTS = range(1, FULL.shape.chunks + 1)
COMPARED = (1, FULL.shape.chunks // 2 + 1, FULL.shape.chunks)
"""Pivots at which the reference path runs too: first, middle, last."""
PARTS = (
    *(f"{path}-p{pivot}" for pivot in COMPARED for path in ("engine", "reference")),
    *(f"engine-p{pivot}" for pivot in PIVOTS if pivot not in COMPARED),
    *(f"sweep-{name}" for name in sweep(FULL)),
)


def measure_part(name: str, scene: Scene, timer: Timer, ceilings: Ceilings, rounds: int = 2) -> list[dict[str, Any]]:
    """The cases of one part: one warm-up, then `rounds` iterations (one in a sweep)."""
    kind, _, what = name.partition("-")
    if kind == "sweep":
        varied = sweep(scene.workload)[what]
        return [_measure_ours(scene.resized(workload), workload.middle, timer, ceilings, 1, varied=what) for workload in varied]
    pivot = int(what.removeprefix("p")) - 1
    if kind == "engine":
        return [_measure_ours(scene, pivot, timer, ceilings, rounds)]
    size = scene.workload.group_size
    run = min(REFERENCE_BRANCHES, size)
    samples = Samples(ReferencePath(scene, pivot, branches=run))
    total = sample(samples, timer, rounds)
    measured = samples.medians(rounds)
    stages = {stage: seconds * (size / run if stage in PER_BRANCH else 1) for stage, seconds in measured.items()}
    added = sum(stages.values()) - sum(measured.values())
    timing = _timing([seconds + added for seconds in total], 0.0)
    extrapolated = {"measured_branches": run, "of": size, "stages": PER_BRANCH}
    return [case(scene.workload, pivot, ceilings, {"reference": timing}, {"reference": stages}, extrapolated=extrapolated)]


def _measure_ours(scene: Scene, pivot: int, timer: Timer, ceilings: Ceilings, rounds: int, **more: Any) -> dict[str, Any]:
    if scene.model.device.type == "cuda":
        torch.cuda.empty_cache()  # the pool of the case before is of another size
        torch.cuda.reset_peak_memory_stats()
    samples = Samples(path := OurPath(scene, pivot))
    timing = _timing(sample(samples, timer, rounds), 0.0)
    return case(scene.workload, pivot, ceilings, {OURS: timing}, {OURS: samples.medians(rounds)}, memory=memory(path), **more)


def sample(call: Callable[[], object], timer: Timer, rounds: int) -> list[float]:
    """Seconds of `rounds` calls, after one that warms up."""
    call()
    return [timer.sample(call) for _ in range(rounds)]


def fingerprint(workload: Workload = FULL) -> str:
    """Of the settings and of every source file that a measurement depends on: what is the same need not be measured again."""
    digest = hashlib.sha256(repr((workload, REFERENCE_BRANCHES, find_spec("diffusers") is not None)).encode())
    root = results.ROOT.parent
    for folder in ("arcopo_fast", "kernels/arcopo_kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Report ------------------------------------------------------------------------------------------------------------------------------


def merged(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cases in which the engine and the reference path were measured apart, as one each; the reference alone is left out."""
    alone = {case["case"]: case for case in cases if OURS not in case["variants"]}
    together = []
    for ours in (dict(case) for case in cases if OURS in case["variants"]):
        theirs = alone.get(ours["case"])
        if theirs is not None:
            ours["variants"] = {**ours["variants"], **theirs["variants"]}
            ratio = theirs["variants"]["reference"]["median"] / ours["variants"][OURS]["median"]
            ours["ratios"] = {**ours["ratios"], "reference": ratio}
            ours["tokens_per_second"] = {**ours["tokens_per_second"], **theirs["tokens_per_second"]}
            rows = [{row["stage"]: row for row in one["stages"]} for one in (theirs, ours)]
            ours["stages"] = [rows[0].get(stage, {}) | rows[1].get(stage, {}) for stage in STAGES if stage in rows[0] | rows[1]]
            ours["extrapolated"] = theirs["extrapolated"]
        together.append(ours)
    return sorted(together, key=lambda case: (1, 0) if "varied" in case else (0, case["pivot"]))


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, {"environment", "ceilings", "cases"}."""
    environment, ceilings, cases = report["environment"], report["ceilings"], report["cases"]
    matmul, bandwidth = ceilings["matmul"] / 1e12, ceilings["bandwidth"] / 1e12
    pivoted, swept = ([case for case in cases if ("varied" in case) == varied] for varied in (False, True))
    lines = [
        f"# One AR-CoPO iteration{', ' + pivoted[0]['workload'] if pivoted else ''}",
        "",
        f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}. Ceilings, measured",
        f"in the same run: matrix product {matmul:.4g} TFLOP/s, copy {bandwidth:.4g} TB/s. Floor: FLOP over the one plus bytes between the",
        "products over the other (`arcopo_fast/work.py`). MFU: FLOP a second over the matrix product's. Seconds are medians.",
    ]
    if pivoted:
        lines += ["", "| pivot | engine | reference | ratio | tokens/s | MFU | of floor | pages | planned | K/V | peak memory |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_total_row(f"{case['pivot']} of {case['chunks']}", case) for case in pivoted]
    if len(pivoted) > 1:
        lines.append(_average_row(pivoted))
    for one in pivoted:
        lines += ["", f"## Pivot {one['pivot']} of {one['chunks']}", ""]
        lines += ["| stage | engine | reference | ratio | GFLOP | MFU | of floor |", "|---|---|---|---|---|---|---|"]
        lines += [_stage_row(row) for row in one["stages"]]
    if note := next((case["extrapolated"] for case in cases if "extrapolated" in case), None):
        lines += [
            "",
            f"The reference path ran {note['measured_branches']} of {note['of']} branches. Of its stages, {', '.join(note['stages'])} are",
        ]
        lines += [f"extrapolated, times {note['of'] / note['measured_branches']:g}; the others, *other* among them, are not scaled."]
    if "decode" not in {row["stage"] for row in cases[0]["stages"]}:
        lines += ["", "Without the VAE and the rewards: diffusers is not installed here. Advantages were random numbers."]
    if agreements := [case["agreement"] for case in pivoted if "agreement" in case]:
        worst = {name: max(agreement[name] for agreement in agreements) for name in agreements[0]}
        lines += [
            "",
            "Error ratio of the engine to the reference path: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()),
        ]
    if swept:
        lines += ["", "## How cost grows", "", "| workload | engine | tokens/s | MFU | of floor | pages |", "|---|---|---|---|---|---|"]
        for one in swept:
            rate = one["tokens_per_second"][OURS]
            ours = one["variants"][OURS]["median"]
            lines.append(
                f"| {one['case']} | {results.duration(ours)} | {rate:.4g} | {_percent(one['utilisation'])} | "
                f"{_percent(one['of_floor'])} | {one['memory']['pages']} |"
            )
    return "\n".join(lines) + "\n"


def _total_row(label: str, one: Mapping[str, Any]) -> str:
    ours, reference = one["variants"][OURS]["median"], one["variants"].get("reference", {}).get("median")
    held = one["memory"]
    kv, peak = f"{held['kv_bytes'] / 2**30:.3g} GiB", f"{held['peak_bytes'] / 2**30:.3g} GiB" if "peak_bytes" in held else "-"
    rate = one["tokens_per_second"][OURS]
    return (
        f"| {label} | {results.duration(ours)} | {_seconds(reference)} | {_times(reference, ours)} | {rate:.4g} | "
        f"{_percent(one['utilisation'])} | {_percent(one['of_floor'])} | {held['pages']} | "
        f"{held['prefix_pages']} + {held['planned_pages'] - held['prefix_pages']} | {kv} | {peak} |"
    )


def _average_row(cases: Sequence[Mapping[str, Any]]) -> str:
    """Over all pivots; the ratio and the reference's time over those at which it was measured."""
    both = [case for case in cases if "reference" in case["variants"]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ours = mean([case["variants"][OURS]["median"] for case in cases])
    floor, flops = mean([case["floor"] for case in cases]), mean([case["flops"] for case in cases])
    reference = mean([case["variants"]["reference"]["median"] for case in both]) if both else None
    of_both = mean([case["variants"][OURS]["median"] for case in both]) if both else 1.0
    rate = cases[0]["tokens_per_second"][OURS] * cases[0]["variants"][OURS]["median"] / ours
    matmul = cases[0]["flops"] / cases[0]["utilisation"] / cases[0]["variants"][OURS]["median"]
    return (
        f"| average | {results.duration(ours)} | {_seconds(reference)} | {_times(reference, of_both)} | {rate:.4g} | "
        f"{_percent(flops / ours / matmul)} | {_percent(floor / ours)} | | | | |"
    )


def _stage_row(row: Mapping[str, Any]) -> str:
    ours, reference = row.get(OURS), row.get("reference")
    work = f"{row['flops'] / 1e9:.4g}" if row.get("flops") else "-"
    figures = f"{_seconds(ours)} | {_seconds(reference)} | {_times(reference, ours)} | {work}"
    return f"| {row['stage']} | {figures} | {_percent(row.get('utilisation'))} | {_percent(row.get('of_floor'))} |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else results.duration(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _times(reference: float | None, ours: float | None) -> str:
    return f"{reference / ours:.2f}x" if reference and ours else "-"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.iteration", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--write", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=2, help="iterations that are timed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    timer = Timer(shapes.DEVICE)
    ceilings = measure_ceilings(timer)
    scene = full()
    if scene.vae is None:
        print("without the VAE: diffusers is not installed; nothing is decoded, and advantages are random numbers", flush=True)
    report: dict[str, Any] = {"environment": results.environment(shapes.DEVICE), "ceilings": ceilings._asdict(), "cases": []}
    for part in arguments.parts:
        report["cases"] += measure_part(part, scene, timer, ceilings, arguments.rounds)
        results.write(arguments.write, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
