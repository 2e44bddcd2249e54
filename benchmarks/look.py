"""The first look at a device, in twenty seconds: what is there, and whether what the design rests on is so.

    python -m benchmarks.look --write FILE

    machine            versions; packages that are missing; the card's memory
    ceilings           a copy, a matrix product
    backends           which attention backend gets the calls over 1 to 24 cached frames, and why not a faster one
    attention          the time of a call by each backend, and of a first call, in which plans are made
    block              one block of Wan 1.3B: the host's time to launch it against the device's to run it; its launches
    synchronization    the lines at which the host waits for the device in a rollout; there should be none in the few-step loop

FILE is written anew after each; what fails is written as "failed", and the others go on. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from arcopo_kernels import Segment, dispatch, segment_attention
from arcopo_kernels.attention import chosen
from arcopo_kernels.attention.backends import BACKENDS
from torch import Tensor

from benchmarks import results, shapes
from benchmarks.timing import Timer, measure_ceilings

PACKAGES = ("pytest", "pytest_benchmark", "numpy", "peft", "transformers", "safetensors", "pydantic", "diffusers", "kernels", "flash_attn")
MODEL = shapes.WAN_1_3B if shapes.DEVICE.type == "cuda" else shapes.SMALL
CACHED_FRAMES = range(1, 25)
"""The context of a frame-wise generator, and of one of chunks, in a video of 24 frames at most."""
BATCHES = (1, 4, shapes.GROUP) if shapes.DEVICE.type == "cuda" else (1,)


def _missing(package: str) -> bool:
    spec = find_spec(package)
    return spec is None or spec.origin is None  # a folder of that name is none


def machine(timer: Timer) -> dict[str, Any]:
    """Return versions, missing packages, and bytes of memory."""
    found: dict[str, Any] = {"cudnn": torch.backends.cudnn.version(), "missing": [name for name in PACKAGES if _missing(name)]}
    if timer.device.type == "cuda":
        properties = torch.cuda.get_device_properties(timer.device)
        found |= {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count, "L2": properties.L2_cache_size}
    return results.environment(timer.device) | found


def ceilings(timer: Timer) -> dict[str, Any]:
    """Return the bytes and FLOP a second."""
    return measure_ceilings(timer)._asdict()


def random(*shape: int) -> Tensor:
    """Return random activations."""
    return torch.randn(shape, device=shapes.DEVICE, dtype=shapes.ACTIVATIONS)


def _segments(batch: int, cached: Sequence[int]) -> list[Segment]:
    """Return a shared frozen segment of so many frames for each of `cached`, and the branches' own chunk."""

    def new(rows: int, tokens: int, frozen: bool) -> Segment:
        size = (rows, tokens, MODEL.heads, MODEL.head_dim)
        return Segment(random(*size), random(*size), frozen)

    return [*(new(1, frames * MODEL.frame, True) for frames in cached), new(batch, MODEL.chunk, False)]


def backends(timer: Timer) -> dict[str, Any]:
    """Return by backend and reason the numbers of cached frames at which it gets the queries of one branch or of a group."""
    found: dict[str, list[int]] = {}
    most = random(1, max(CACHED_FRAMES) * MODEL.frame, MODEL.heads, MODEL.head_dim)
    for frames in CACHED_FRAMES:
        key = most[:, : frames * MODEL.frame]
        for branches in (1, shapes.GROUP):
            query = most[:, : MODEL.chunk].expand(branches, -1, -1, -1)
            choice = chosen(query, [Segment(key, key, frozen=True)])
            frames_of = found.setdefault(f"{choice.name} ({choice.reason})", [])
            frames_of += [frames] if frames not in frames_of else []
    return found


def attention(timer: Timer) -> dict[str, Any]:
    """Return by call and backend seconds of it, of a first one, and FLOP a second; or why the backend refuses."""
    found: dict[str, Any] = {}
    for batch, cached, backward in ((4, 9, False), (1, 18, False), (1, 18, True)):
        query, segments = random(batch, MODEL.chunk, MODEL.heads, MODEL.head_dim), _segments(batch, (cached,))
        leaves = [query, segments[-1].key, segments[-1].value]
        for leaf in leaves:
            leaf.requires_grad_(backward)
        keys = cached * MODEL.frame + MODEL.chunk
        flops = 4 * batch * MODEL.heads * MODEL.head_dim * MODEL.chunk * keys * (3.5 if backward else 1)
        rows = found[f"B={batch}, {cached} cached frames{', backward' if backward else ''}"] = {}
        for name in ("auto", *BACKENDS):
            if name == "math" and timer.device.type == "cuda":
                continue  # it keeps all scores
            if name == "triton" and dispatch.INTERPRETED:
                continue  # minutes

            def call(name: str = name, query: Tensor = query, segments: list[Segment] = segments, leaves: list[Tensor] = leaves) -> None:
                out = segment_attention(query, segments, backend=name)
                if out.requires_grad:
                    torch.autograd.grad(out, leaves, out.detach())

            try:
                timer.synchronize()
                start = perf_counter()
                call()
                timer.synchronize()
                first = perf_counter() - start
                seconds = median(timer.sample(call, timer.host_time(call)) for _ in range(5))
                rows[name] = {"seconds": seconds, "first": first, "flops_per_second": flops / seconds}
            except (ValueError, RuntimeError, ImportError) as error:  # it says what keeps the backend from here
                reason = f"{error}".split("\n")[0].partition(", but ")
                rows[name] = {"refused": (reason[2] or reason[0]).partition("; use 'auto'")[0][:200]}
    return found


def block(timer: Timer) -> dict[str, Any]:
    """Return by batch the device's and the host's seconds of one block without gradient, and its launches."""
    from arcopo_fast.model.causal_wan import CachedRun, ChunkContext
    from arcopo_fast.model.lora import add_lora
    from arcopo_fast.model.sizes import CausalWanConfig
    from arcopo_fast.model.untrained import untrained_wan

    past = random(1, 3 * MODEL.chunk, MODEL.heads, MODEL.head_dim)

    class Past(ChunkContext):
        """Three chunks that all branches share."""

        query_position = key_position = 9

        def cached(self, layer: int) -> Sequence[CachedRun]:
            return [CachedRun(past, past)]

    config = CausalWanConfig(num_layers=1, num_attention_heads=MODEL.heads, attention_head_dim=MODEL.head_dim)
    if MODEL is shapes.SMALL:
        config = replace(config, ffn_dim=40, text_dim=20, text_len=7)
    model = untrained_wan(config, dtype=shapes.ACTIVATIONS, device=shapes.DEVICE, seed=0)
    add_lora(model, rank=64, alpha=128, targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"), seed=0)
    found: dict[str, Any] = {}
    with torch.no_grad():
        text = model.encode_text(torch.randn(1, config.text_len, config.text_dim))
        _, modulation = model.condition_embedder.time(torch.full((1, 1), 500.0, device=shapes.DEVICE), model.dtype)
        grid = (MODEL.chunk_frames, *MODEL.grid)
        for batch in BATCHES:
            x = random(batch, MODEL.chunk_frames, MODEL.frame, MODEL.dim)

            def call(x: Tensor = x) -> None:
                model.blocks[0](x, modulation, 0, grid, (text.keys[0], text.values[0]), Past(), False)

            host = timer.host_time(call)
            device = median(timer.sample(call, host) for _ in range(5))
            found[f"B={batch}"] = {"device": device, "host": host, "launches": _launches(call, timer)}
    return found


def _launches(call: Callable[[], object], timer: Timer) -> int:
    gpu = timer.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        timer.synchronize()
    return sum(event.count for event in profiler.key_averages() if not gpu or event.self_device_time_total > 0)


def synchronization(timer: Timer) -> dict[str, Any]:
    """Return the source lines at which a rollout waits for the device, with how often each does, from its second run on."""
    from arcopo_fast.build import generator_sizes
    from benchmarks import full_size
    from benchmarks.iteration import OurPath

    config, sizes = full_size.small()
    if timer.device.type == "cuda":
        config, sizes = full_size.cut_for(full_size.card()), generator_sizes(full_size.FULL.generator.checkpoint)
    scene = full_size.full(config, replace(sizes, transformer=replace(sizes.transformer, num_layers=1)))
    path = OurPath(scene, scene.middle)
    path.rollout().release()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if timer.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            path.rollout().release()
        finally:
            if timer.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{warning.filename.rpartition('/site-packages/')[-1]}:{warning.lineno}"
            lines[place] = lines.get(place, 0) + 1
    return {"lines": lines}


LOOKS = (machine, ceilings, backends, attention, block, synchronization)


def _printed(value: Any, indent: str = "  ") -> list[str]:
    """Return the lines that a person reads."""
    if not isinstance(value, dict):
        return [f"{indent}{value}"]
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and any(isinstance(inner, dict) for inner in item.values()):
            lines += [f"{indent}{name}", *_printed(item, indent + "  ")]
        elif isinstance(item, dict):
            row = ", ".join(f"{key} {_short(inner)}" for key, inner in item.items())
            lines.append(f"{indent}{name}: {row}")
        else:
            lines.append(f"{indent}{name}: {_short(item)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.look", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="the JSON file to write, anew after each look")
    arguments = parser.parse_args(argv)
    timer, found, failed = Timer(shapes.DEVICE), dict[str, Any](), False
    torch.manual_seed(0)
    for look in LOOKS:
        try:
            value: Any = look(timer)
        except ModuleNotFoundError as error:
            value = {"not available": str(error)}
        except Exception as error:  # whatever it is, the others can be looked at
            traceback.print_exc()
            value, failed = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}, True
        found[look.__name__] = value
        results.write(arguments.write, found)
        print(look.__name__, *_printed(value), sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
