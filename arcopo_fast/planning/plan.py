"""The settings with which a run fits a GPU, the fastest of them, and what `--dry-run` prints of it.

    python -m arcopo_fast.train RECIPE --dry-run        for the GPU that is here, or for 24, 40, 80 and 141 GB

`footprint` counts the memory, `work` the arithmetic. Times are predictions, compared with each other only.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise
from math import ceil
from typing import Callable, NamedTuple, Sequence

import torch

from arcopo_fast.build import cache_policy, check_fits, generator_sizes, shape_of
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import videos_at_once
from arcopo_fast.model.sizes import GeneratorSizes, transformer_parameters, vae_parameters
from arcopo_fast.planning.floor import workload_of
from arcopo_fast.planning.memory import CONTEXT, GB, SETTINGS, SLACK, Estimate, Settings, estimate, host_bytes, pairs_of
from arcopo_fast.planning.work import decode, forward, steps_of, visible_frames
from arcopo_fast.rollout.engine import VideoShape

DEVICES = (24.0, 40.0, 80.0, 141.0)
"""GB of the cards that a plan is made for where none is named and none is here."""
MISSING = 0.01
"""Share by which cards fall short of their name."""
EQUALLY_FAST = 1.003
"""Times that differ by less are the same to this cost model."""


class Plan(NamedTuple):
    """Settings, the memory they need, and the seconds that an H200 is predicted to take: good for comparing plans, not for more."""

    settings: Settings
    estimate: Estimate
    seconds: float


def plan(config: Config, sizes: GeneratorSizes, device_bytes: int, *, reward_bytes: int = 0) -> Plan:
    """The fastest settings that fit a device of `device_bytes`; of those that are about as fast, the ones that need least memory.

    Args:
        reward_bytes: see `estimate`.

    Raises:
        UserError: nothing fits.
    """
    return _fastest(_plans(config, sizes, reward_bytes), device_bytes)


def _plan_of(config: Config, sizes: GeneratorSizes, reward_bytes: int) -> Plan:
    """The configuration's own settings."""
    needs = estimate(config, sizes, reward_bytes=reward_bytes)
    return Plan(Settings.of(config), needs, seconds(config, sizes, reward_bytes=reward_bytes))


def _plans(config: Config, sizes: GeneratorSizes, reward_bytes: int) -> list[Plan]:
    return [_plan_of(settings.apply(config), sizes, reward_bytes) for settings in Settings.choices(config)]


def _fastest(plans: Sequence[Plan], device_bytes: int) -> Plan:
    fitting = [each for each in plans if each.estimate.peak <= device_bytes * (1 - MISSING)]
    if fitting:
        limit = EQUALLY_FAST * min(each.seconds for each in fitting)
        return min((each for each in fitting if each.seconds <= limit), key=lambda each: (each.estimate.peak, each.seconds))
    least = min(plans, key=lambda each: each.estimate.peak).estimate
    passing = {name for names in least.stages.values() for name in names} - set(least.stages[least.peak_stage])
    largest = max((name for name in least.components if name not in passing), key=least.components.__getitem__)
    raise UserError(
        f"nothing fits {device_bytes / GB:.3g} GB: with the most sparing settings the stage {least.peak_stage!r} needs "
        f"{least.peak / GB / (1 - MISSING):.1f} GB, {least.components[largest] / GB:.1f} of it for {largest}; "
        "take a larger device or a smaller video"
    )


# Time ------------------------------------------------------------------------------------------------------------------------------
# Rates of an H200, operations a second by bytes of an element. Published or estimated, none measured with this code.

MATMUL = {2: 788e12, 4: 50e12}
ATTENTION = {2: 600e12, 4: 40e12}
DECODER = {2: 220e12, 4: 40e12}
FILL = ((1, 0.87), (2, 0.96), (4, 0.96), (12, 0.998))
"""Share of the matmul rate that a batch of so many chunks reaches; between them a straight line."""
LAUNCH = 5e-6
BLOCK_LAUNCHES, DECODER_LAUNCHES = 45, 400
"""Kernels of a transformer block and of a decoder call. Where the arithmetic is shorter, launching them is the time."""
HOST_LINK = 6e9
"""Bytes a second between the host's memory, not pinned, and the device's."""


def seconds(config: Config, sizes: GeneratorSizes, *, reward_bytes: int = 0) -> float:
    """The predicted time of an iteration on an H200, judging not counted; the mean over the pivots that the recipe allows.

    In a run on a buffer the evaluations weigh: each iteration bears its share of them.

    Args:
        reward_bytes: see `estimate`; they move when decoder and rewards take turns.
    """
    workload, settings = workload_of(config, config.name, sizes.transformer, sizes.vae), Settings.of(config)
    shape, updates, buffered = workload.shape, config.objective.updates, config.train.buffer is not None
    width, vae_width = workload.dtype.itemsize, getattr(torch, config.generator.vae_dtype).itemsize
    launches = sizes.transformer.num_layers * BLOCK_LAUNCHES * LAUNCH
    batches, one = _parts(pairs_of(config), settings.micro_batch), Counter([1])
    work = [forward(workload, frames, visible_frames(workload, chunk)) for chunk, frames in enumerate(shape.chunk_frames)]
    reencoded = _reencoded(config, shape)
    swap = 2 * (vae_width * vae_parameters(sizes.vae) + reward_bytes) / HOST_LINK if settings.offload else 0.0  # there and back

    def network(chunk: int, parts: Counter[int], passes: tuple[int, int, int] = (1, 1, 1)) -> float:
        """Batches of one chunk through the network, each kind of operation `passes` times a forward pass's."""
        total, kinds = 0.0, (work[chunk].linear, work[chunk].lora, work[chunk].self_attention + work[chunk].cross_attention)
        for batch, count in parts.items():
            rates = MATMUL[width] * _fill(batch), MATMUL[width], ATTENTION[width]
            arithmetic = batch * sum(times * part / rate for times, part, rate in zip(passes, kinds, rates))
            total += count * max(passes[0] * launches, arithmetic)
        return total

    def decoder(first: int, last: int, parts: Counter[int]) -> float:
        """Batches of latent frames [first, last) through the decoder."""
        once = decode(sizes.vae, shape.height, shape.width, last - first, start=not first).vae / DECODER[vae_width]
        calls = ceil((last - first) / config.video.decode_frames)
        return sum(count * max(batch * once, calls * DECODER_LAUNCHES * LAUNCH) for batch, count in parts.items())

    def videos(pivot: int, count: int, waves: Counter[int], slices: Counter[int]) -> float:
        """Make and decode `count` videos that share what comes before the pivot."""
        total, prefix = 0.0, sum(shape.chunk_frames[:pivot])
        for chunk in range(shape.chunks):
            clean = chunk < shape.chunks - 1
            total += (steps_of(workload, chunk) + clean) * network(chunk, waves if chunk >= pivot else one)
        total += decoder(0, reencoded[pivot], one) + decoder(reencoded[pivot], reencoded[-1], Counter({1: count}))
        return total + decoder(0, prefix, one) + decoder(prefix, shape.frames, slices) + swap * sum(slices.values())

    def group(pivot: int) -> float:
        if buffered:
            return sum(network(chunk, one) for chunk in range(pivot)) + decoder(0, reencoded[pivot], one)
        size = config.rollout.group_size
        return videos(pivot, size, _parts(size, settings.branches_per_wave), _parts(size, settings.decode_branches))

    def update(pivot: int) -> float:
        # Backward: frozen layers once more, adapters twice, attention 2.5 times at 5/6 of its rate; a checkpointed forward once more.
        again, old = int(settings.checkpoint), updates if buffered else updates - 1
        return updates * network(pivot, batches, (2 + again, 3 + again, 4 + again)) + old * network(pivot, batches)

    def evaluation() -> float:
        count, at_once = config.evaluation.prompts * config.evaluation.videos_per_prompt, videos_at_once(config, shape)
        return videos(0, count, _parts(count, at_once), _parts(count, min(at_once, settings.decode_branches)))

    pivots = [config.rollout.pivot - 1] if isinstance(config.rollout.pivot, int) else range(shape.chunks)
    total = config.rollout.prompts_per_iteration * sum(group(pivot) + update(pivot) for pivot in pivots) / len(pivots)
    return total + (2 * evaluation() / config.train.iterations if buffered else 0.0)


def _reencoded(config: Config, shape: VideoShape) -> list[int]:
    """Latent frames of a video that are decoded before each chunk, for the sake of its context, those before earlier chunks included."""
    policy, starts = cache_policy(config), accumulate(shape.chunk_frames[:-1], initial=0)
    if not policy.reencoded or policy.window is None:
        return [0] * shape.chunks
    context = policy.context_frames(max(shape.chunk_frames))
    return [start - context + 1 if start >= policy.window else 0 for start in starts]


def _parts(whole: int, size: int) -> Counter[int]:
    """Sizes of the parts, and how many there are of each."""
    return Counter(min(size, whole - done) for done in range(0, whole, size))


def _fill(batch: int) -> float:
    for (fewer, low), (more, high) in pairwise(FILL):
        if batch <= more:
            return low + (high - low) * (batch - fewer) / (more - fewer)
    return FILL[-1][1]


# The table -------------------------------------------------------------------------------------------------------------------------


def dry_run(config: Config, devices: Sequence[float] = (), *, reward_bytes: int = 0) -> str:
    """What `--dry-run` prints: the recipe as it stands, and the plan for each device.

    Args:
        devices: their GB; none: the GPU that is here, else `DEVICES`.
        reward_bytes: see `estimate`.
    """
    check_fits(config)
    sizes = generator_sizes(config.generator.checkpoint, config.generator.base)
    if not devices and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(0).total_memory / GB / (1 - MISSING)]
    plans = _plans(config, sizes, reward_bytes)
    columns: dict[str, Plan | str] = {"as it stands": _plan_of(config, sizes, reward_bytes)}
    for device in devices or DEVICES:
        name = f"{device:.3g} GB"
        try:
            columns[name] = _fastest(plans, int(device * GB))
        except UserError as error:
            columns[name] = str(error)
    return "\n".join([*_heading(config, sizes), "", *_table(columns), "", *_advice(columns)])


def over_plan(config: Config, allocated: int) -> str | None:
    """What to say of a run that has allocated so many bytes at its peak: None, or by how much that is more than was predicted."""
    needs = estimate(config, generator_sizes(config.generator.checkpoint, config.generator.base))
    predicted = needs.peak - CONTEXT
    if allocated <= predicted:
        return None
    more = f"{(allocated - predicted) / GB:.1f} GB ({allocated / predicted - 1:.0%}) more than planned (the stage {needs.peak_stage!r})"
    advice = "if memory runs out, take the settings that --dry-run gives for a smaller device"
    return f"the run has allocated {allocated / GB:.1f} GB at its peak, {more}; {advice}"


def _heading(config: Config, sizes: GeneratorSizes) -> list[str]:
    factor, shape = sizes.vae.spatial_factor, shape_of(config, sizes.transformer.in_channels)
    pixels = f"{config.video.latent_height * factor}x{config.video.latent_width * factor}"
    parameters = transformer_parameters(sizes.transformer)
    size = f"{parameters / 1e9:.2f} billion" if parameters >= 1e7 else f"{parameters / 1e6:.2f} million"
    lines = [
        f"{config.name}: {size} parameters in {config.generator.dtype}; {sizes.vae.pixel_frames(shape.frames)} frames of {pixels}; "
        f"groups of {config.rollout.group_size}",
        "Nothing is started. Predicted, for the recipe as it stands and for the fastest settings that fit each device:",
    ]
    if config.train.buffer is not None:
        group, run = (_gigabytes(size) for size in host_bytes(config, sizes))
        lines.insert(1, f"Groups from a buffer; of the old predictions the host keeps {group} GB a group, {run} GB in the run, at most.")
    return lines


def _table(columns: dict[str, Plan | str]) -> list[str]:
    plans = [each if isinstance(each, Plan) else None for each in columns.values()]
    known = [each for each in plans if each is not None]
    fastest = min(each.seconds for each in known)

    def row(label: str, cell: Callable[[Plan], str]) -> str:
        return f"{label:34}" + "".join(f"{'-' if each is None else cell(each):>14}" for each in plans)

    lines = [f"{'':34}" + "".join(f"{name:>14}" for name in columns)]
    for index, key in enumerate(SETTINGS):
        lines.append(row(key, lambda each: str(each.settings[index]).lower()))  # noqa: B023, called at once
    lines += [row("predicted time of an iteration", lambda each: f"{each.seconds / fastest:.2f}x"), "", "GB, at the worst pivot"]
    for name in known[0].estimate.components:
        lines.append(row(f"  {name}", lambda each: _gigabytes(each.estimate.components[name])))  # noqa: B023
    lines += ["", f"GB of the device by stage, with {SLACK:.0%} for the allocator and {CONTEXT / GB:.1f} for CUDA"]
    for stage in known[0].estimate.stages:
        lines.append(row(f"  {stage}", lambda each: _gigabytes(each.estimate.total(stage))))  # noqa: B023
    return [*lines, row("peak", lambda each: _gigabytes(each.estimate.peak))]


def _gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB or not size else f"{size / GB:.2g}" if size >= 0.0005 * GB else "0.0"


def _advice(columns: dict[str, Plan | str]) -> list[str]:
    (_, own), *devices = columns.items()
    assert isinstance(own, Plan)
    lines = [f"As it stands, it needs a device of {ceil(own.estimate.peak / GB / (1 - MISSING))} GB. For another, add to the command line:"]
    return lines + [f"{name}: {each if isinstance(each, str) else ' '.join(each.settings.overrides())}" for name, each in devices]
