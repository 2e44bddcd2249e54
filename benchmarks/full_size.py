"""The full size: one AR-CoPO iteration of Wan2.1-1.3B at 480x832 on a GPU, measured in parts, each of which takes minutes.

    python -m benchmarks.full_size PART [PART ...] --write FILE [--rounds N] [--small]

    engine-pN, reference-pN    an iteration that forks at chunk N, by either path
    profile-pN                 the kernels that it spends its time in, in the rollout, in judging, in the update; and is the GPU ever idle?
    within-N                   with the memory of a card of N GB, and what else has to fit
    sweep-WHAT                 other groups, steps, lengths, resolutions

Weights are untrained. diffusers is not needed; without it nothing is decoded or judged, and the advantages are random numbers.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.model.lora import add_lora
from arcopo_fast.model.sizes import GeneratorSizes, VAESizes
from arcopo_fast.model.untrained import HashedText, untrained_vae, untrained_wan
from arcopo_fast.rewards.simple import Sharpness, Steadiness
from arcopo_fast.runtime import profiling
from benchmarks import results, shapes
from benchmarks.iteration import (
    PER_BRANCH,
    VARIED,
    OurPath,
    ReferencePath,
    Samples,
    Scene,
    case,
    changed,
    memory,
    problems,
    random_advantages,
    sweep,
)
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Timer, _timing, measure_ceilings

NAME = "Wan 1.3B"
FULL = changed(load_config("bench_1_3b"), rollout={"branches_per_wave": None, "decode_branches": None}, objective={"micro_batch": None})
"""The recipe, all at once; how it is cut into parts depends on the device."""


@cache
def has_diffusers() -> bool:
    """Whether it can be imported; why not, if it is there, is printed."""
    if find_spec("diffusers") is None:
        return False
    try:
        from diffusers import AutoencoderKLWan  # noqa: F401 - some of its modules load when they are named
    except Exception as error:  # whatever a package of another version, or a half of one, raises
        print(f"diffusers cannot be imported: {type(error).__name__}: {error}", flush=True)
        return False
    return True


class Cut(NamedTuple):
    """Settings that trade memory for time: branches that are denoised and decoded together, (anchor, step) pairs that are replayed
    together.

    resident: bytes of a reward model that stays on the device.
    """

    branches_per_wave: int
    decode_branches: int
    micro_batch: int
    resident: int = 0


CUTS = {
    24: Cut(1, 2, 1),  # as `train bench_1_3b --dry-run` advises
    80: Cut(4, 1, 1, resident=2 * 2 * 10**9),  # the recipe's own, beside a judge of two billion parameters
    141: Cut(12, 4, 4),
}
"""The cuts by the GB of a card."""
USABLE = 0.96
"""The usable share of a card's GB: cards fall short of their names, and CUDA's context takes some."""


def cut_for(gigabytes: int, config: Config = FULL) -> Config:
    """Return the recipe, cut for a card of so many GB."""
    branches, decoded, micro_batch, _ = CUTS[gigabytes]
    return changed(config, rollout={"branches_per_wave": branches, "decode_branches": decoded}, objective={"micro_batch": micro_batch})


def card(device: torch.device = shapes.DEVICE) -> int:
    """The largest of `CUTS` that the device has the memory for; where there is no GPU, the largest."""
    if device.type != "cuda":
        return max(CUTS)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max((size for size in CUTS if size * USABLE <= total), default=min(CUTS))


def small() -> tuple[Config, GeneratorSizes]:
    """Return the recipe and the sizes of a generator with which every part takes a second on a CPU; nothing else is changed."""
    sizes = GeneratorSizes()
    model = replace(sizes.transformer, num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=40, text_dim=20, text_len=7)
    config = changed(
        FULL,
        generator={"dtype": "float32"},
        video={"chunk_frames": 1, "latent_height": 4, "latent_width": 4},
        sampler={"steps": [1000.0, 500.0]},
        rollout={"group_size": 4},
        objective={"anchors_per_update": 2},
        lora={"rank": 2},
    )
    vae = VAESizes(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(True,))
    return cut_for(max(CUTS), config), replace(sizes, transformer=model, vae=vae)


def full(config: Config | None = None, sizes: GeneratorSizes | None = None, device: torch.device = shapes.DEVICE) -> Scene:
    """Return an untrained generator, cut for the device; without its VAE where diffusers is not installed."""
    config = config or cut_for(card(device))
    sizes = sizes or generator_sizes(config.generator.checkpoint)
    dtype, vae_dtype = (getattr(torch, name) for name in (config.generator.dtype, config.generator.vae_dtype))
    model = untrained_wan(sizes.transformer, dtype=dtype, device=device, seed=0)
    add_lora(model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets, seed=0)
    prompt = "a paper boat drifts down a stream"
    text = HashedText(sizes.transformer.text_len, sizes.transformer.text_dim)([prompt])
    if not has_diffusers():
        return Scene(NAME, config, model, text, prompt)
    vae = untrained_vae(sizes.vae, dtype=vae_dtype, device=device, seed=0)
    return Scene(NAME, config, model, text, prompt, vae, {"sharpness": Sharpness(), "steadiness": Steadiness()})


# Parts -------------------------------------------------------------------------------------------------------------------------------

REFERENCE_BRANCHES = 2
"""Members of the group that the reference path runs; the others are taken to cost the same."""
FIRST, MIDDLE, LAST = 1, FULL.video.count // 2 + 1, FULL.video.count
COMPARED = (MIDDLE, LAST, FIRST)
"""Pivots, counted from 1, at which the reference path runs too."""
PARTS = (
    f"engine-p{MIDDLE}",
    f"reference-p{MIDDLE}",
    f"engine-p{LAST}",
    f"reference-p{LAST}",
    f"profile-p{MIDDLE}",
    f"engine-p{FIRST}",
    f"reference-p{FIRST}",
    *(f"engine-p{pivot}" for pivot in range(FIRST, LAST + 1) if pivot not in COMPARED),
    *(f"within-{gigabytes}" for gigabytes in sorted(CUTS, reverse=True)[1:]),
    *(f"sweep-{name}" for name in VARIED),
)
"""The parts; the most telling come first: a run that is cut short has measured that."""


def measure_part(name: str, scene: Scene, timer: Timer, ceilings: Ceilings, rounds: int = 2) -> dict[str, Any]:
    """The cases of one part, or its kernels; an iteration is measured `rounds` times after one that warms up (in a sweep once).

    "problems": what its cases did other than planned. They were measured, and the part has failed.
    """
    kind, _, what = name.partition("-")
    if kind == "sweep":
        cases = [_measure_ours(varied, varied.middle, timer, ceilings, 1, varied=what) for varied in sweep(scene, what)]
    elif kind == "within":
        cases = _measure_within(int(what), scene, timer, ceilings)
    else:
        pivot = int(what.removeprefix("p")) - 1
        if kind == "profile":
            return {"cases": [], "kernels": kernels(scene, pivot, timer), "problems": []}
        measure = _measure_ours if kind == "engine" else _measure_reference
        cases = [measure(scene, pivot, timer, ceilings, rounds)]
    return {"cases": cases, "problems": [f"{one['case']}: {problem}" for one in cases for problem in one.get("problems", [])]}


def _measure_ours(scene: Scene, pivot: int, timer: Timer, ceilings: Ceilings, rounds: int, **more: Any) -> dict[str, Any]:
    if scene.model.device.type == "cuda":
        torch.cuda.empty_cache()  # the pool of the case before is of another size
        torch.cuda.reset_peak_memory_stats()
    samples = Samples(path := OurPath(scene, pivot))
    timing = _timing(sample(samples, timer, rounds), 0.0)
    figures = {"memory": memory(path), "problems": problems(path), **more}
    return case(scene, pivot, ceilings, {OURS: timing}, {OURS: samples.medians(rounds)}, **figures)


def _measure_reference(scene: Scene, pivot: int, timer: Timer, ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    size = scene.config.rollout.group_size
    run = min(REFERENCE_BRANCHES, size)
    samples = Samples(ReferencePath(scene, pivot, branches=run))
    total = sample(samples, timer, rounds)
    measured = samples.medians(rounds)
    stages = {stage: seconds * (size / run if stage in PER_BRANCH else 1) for stage, seconds in measured.items()}
    added = sum(stages.values()) - sum(measured.values())
    timing = _timing([seconds + added for seconds in total], 0.0)
    extrapolated = {"measured_branches": run, "of": size, "stages": PER_BRANCH}
    return case(scene, pivot, ceilings, {"reference": timing}, {"reference": stages}, extrapolated=extrapolated)


def _measure_within(gigabytes: int, scene: Scene, timer: Timer, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return what a card of so many GB takes: the first pivot has the most keys and values of its own, the last the longest context.

    Raises:
        OutOfMemoryError: it does not fit, in whatever small pieces.
    """
    cut = scene.resized(f"{scene.name} within {gigabytes} GB", cut_for(gigabytes, scene.config))
    device, pivots = scene.model.device, (0, cut.shape.chunks - 1)
    with limited(gigabytes, device):
        judge = torch.empty(CUTS[gigabytes].resident if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        cases = [_measure_ours(cut, pivot, timer, ceilings, 1, varied="memory") for pivot in pivots]
        del judge  # until here it takes its room
    return cases


@contextmanager
def limited(gigabytes: int, device: torch.device) -> Iterator[None]:
    """On a GPU PyTorch gets no more memory than on a card of so many GB."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * USABLE * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def sample(samples: Samples, timer: Timer, rounds: int) -> list[float]:
    """Return the seconds of `rounds` iterations, after one that warms up. Each is printed: where the time ends early, that is there."""
    taken = []
    for index in range(rounds + 1):
        taken.append(timer.sample(samples))
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in samples.stages[-1].items())
        print(f"{'warm-up' if index == 0 else f'iteration {index}'}: {taken[-1]:.2f} s: {stages}", flush=True)
    return taken[1:]


KERNELS_KEPT = 25
"""How many kernels of each stage are listed: those that take most."""
PROFILED_GROUP = 4
"""Branches of the group that is profiled: more of the same tell nothing new, and a profiler keeps every launch."""


def kernels(scene: Scene, pivot: int, timer: Timer) -> dict[str, dict[str, Any]]:
    """Return by stage the seconds that it takes, share of them in which kernels run (on a CPU: operators), and the kernels that take most.

    Each with its name, calls, seconds and share of all kernels' seconds. Where kernels run less than nearly all the time, the host is late.
    """
    few = changed(scene.config, rollout={"group_size": min(PROFILED_GROUP, scene.config.rollout.group_size)})
    path = OurPath(scene.resized(scene.name, few), pivot)
    path.iteration()  # warm up
    gpu = scene.model.device.type == "cuda"
    found: dict[str, dict[str, Any]] = {}

    def profile(stage: str, call: Callable[[], object]) -> None:
        seconds = timer.sample(call)  # first without the profiler, which keeps the host busy
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
            call()
            timer.synchronize()
        rows = []
        for event in profiler.key_averages():
            own = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
            if own > 0 and event.key not in profiling.STAGES:
                rows.append({"name": event.key, "calls": event.count, "seconds": own})
        total = sum(row["seconds"] for row in rows)
        rows.sort(key=lambda row: -row["seconds"])
        longest = [row | {"share": row["seconds"] / total} for row in rows[:KERNELS_KEPT]]
        found[stage] = {"seconds": seconds, "busy": total / seconds, "kernels": longest}

    profile("rollout", lambda: path.rollout().release())
    with path.rollout() as group:
        if path.decoder is not None:
            profile("decoding and rewards", lambda: path.judge(group))
        profile("update", lambda: path.update(group, random_advantages(few)))
    return found


def fingerprint(config: Config | None = None) -> str:
    """Return the digest of the settings and of every source file that a measurement depends on: what is the same need not be measured
    again."""
    config = config or cut_for(card())
    digest = hashlib.sha256(repr((config, REFERENCE_BRANCHES, has_diffusers())).encode())
    root = results.ROOT.parent
    for folder in ("arcopo_fast", "kernels/arcopo_kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SAID = re.compile(r"(?P<part>[\w-]+): (?P<verdict>begun|measured|failed)")
"""The line that is printed when a part has begun, and when it has ended."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--write", type=Path, required=True, help="the JSON file to write, anew after each part: what each measured")
    parser.add_argument("--rounds", type=int, default=2, help="iterations that are timed (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="another size, with which the parts take no time and say nothing")
    arguments = parser.parse_args(argv)
    timer = Timer(shapes.DEVICE)
    ceilings = measure_ceilings(timer)
    scene = full(*small()) if arguments.small else full()
    if scene.vae is None:
        print("without the VAE: diffusers is not installed; nothing is decoded, and advantages are random numbers", flush=True)
    measured: dict[str, Any] = {}
    failed = False
    for part in arguments.parts:
        print(f"{part}: begun", flush=True)
        complaints = []
        try:
            found = measure_part(part, scene, timer, ceilings, arguments.rounds)
            measured[part] = {"environment": results.environment(shapes.DEVICE), "ceilings": ceilings._asdict(), **found}
            complaints = found["problems"]
        except Exception as error:  # whatever it is, the other parts can be measured
            traceback.print_exc()
            complaints = [f"{type(error).__name__}: {error}"]
        gc.collect()  # out here the error's frames are gone, and what they held
        results.write(arguments.write, measured)
        print(*complaints, f"{part}: {'failed' if complaints else 'measured'}", sep="\n", flush=True)
        failed = failed or bool(complaints)
        if complaints:
            timer.synchronize()  # raises where the device answers nothing any more: the parts left need a new process
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
