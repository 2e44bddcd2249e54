"""The settings with which a run fits a GPU, those that cost the fewest passes, and what `--dry-run` prints of it.

    python -m arcopo_fast.train RECIPE --dry-run        for the GPU that is here, or for 24, 40, 80 and 141 GB

`memory` counts the bytes. Seconds are not predicted: plans are compared by what they repeat, and then by the parts they cut a run into.
"""

from __future__ import annotations

from math import ceil
from typing import Callable, NamedTuple, Sequence

import torch

from arcopo_fast.build import check_fits, generator_sizes
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import videos_at_once
from arcopo_fast.model.sizes import GeneratorSizes
from arcopo_fast.planning.layers import transformer_parameters
from arcopo_fast.planning.lockstep import check_lockstep, uneven
from arcopo_fast.planning.memory import CONTEXT, GB, SETTINGS, SLACK, Estimate, Settings, Share, estimate, host_bytes, waiting_bytes
from arcopo_fast.planning.spread import spread
from arcopo_fast.rollout.stream import VideoShape

DEVICES = (24.0, 40.0, 80.0, 141.0)
"""GB of the cards that a plan is made for where none is named and none is here."""
SHORTFALL = 0.01
"""Share by which cards fall short of their name."""


class Passes(NamedTuple):
    """The work that settings make a run do in parts or twice: for a group and its updates, or, where a run on a buffer makes videos, for an
    evaluation.

    Attributes:
        trips: of decoder and rewards between host and device.
        repeated: (anchor, step) pairs whose forward pass is done again for the gradient.
        waves, slices, micro_batches: parts that the branches, the videos to decode and the updates are cut into.
    """

    trips: int
    repeated: int
    waves: int
    slices: int
    micro_batches: int

    def cost(self, *, buffered: bool) -> tuple[int, ...]:
        """Return what plans are ordered by: the first number that differs decides.

        Moving weights costs most, then arithmetic that is repeated. Parts only make calls smaller: a wave has dozens of calls of the
        network, a slice or a micro-batch few. A run on a buffer makes videos in its two evaluations alone, so its updates come first.
        """
        if buffered:
            return self.repeated, self.micro_batches, self.trips, self.waves + self.slices
        return self.trips, self.repeated, self.waves, self.slices + self.micro_batches


PASSES = ("trips of decoder and rewards", "forward passes repeated", "waves of branches", "slices that are decoded", "micro-batches")
"""The names that `--dry-run` gives the fields of `Passes`, in its order."""


class Plan(NamedTuple):
    """Settings and what they cost.

    Attributes:
        estimate: the memory that they need.
        passes: that they take.
        cost: by which plans are ordered, see `Passes.cost`.
    """

    settings: Settings
    estimate: Estimate
    passes: Passes
    cost: tuple[int, ...]


def plan(config: Config, sizes: GeneratorSizes, device_bytes: int, ranks: int = 1) -> Plan:
    """Return the settings with the fewest passes that fit a device of `device_bytes`; of equals, those that need least memory.

    Raises:
        UserError: nothing fits.
    """
    return _best(_plans(config, sizes, ranks), device_bytes)


def _plan_of(config: Config, sizes: GeneratorSizes, ranks: int) -> Plan:
    """Return the plan of the configuration's own settings."""
    needs, repeats = estimate(config, sizes, ranks), passes(config, sizes, ranks)
    return Plan(Settings.of(config, ranks), needs, repeats, repeats.cost(buffered=config.train.buffer is not None))


def _plans(config: Config, sizes: GeneratorSizes, ranks: int) -> list[Plan]:
    choices = [settings.apply(config) for settings in Settings.choices(config, ranks)]
    if config.generator.shard and ranks > 1:
        choices = [choice for choice in choices if not uneven(choice, spread(config, ranks))]
    return [_plan_of(choice, sizes, ranks) for choice in choices]


def _best(plans: Sequence[Plan], device_bytes: int) -> Plan:
    fitting = [candidate for candidate in plans if candidate.estimate.peak <= device_bytes * (1 - SHORTFALL)]
    if fitting:
        return min(fitting, key=lambda candidate: (candidate.cost, candidate.estimate.peak))
    least = min(plans, key=lambda candidate: candidate.estimate.peak).estimate
    passing = {name for names in least.stages.values() for name in names} - set(least.stages[least.peak_stage])
    largest = max((name for name in least.components if name not in passing), key=least.components.__getitem__)
    raise UserError(
        f"nothing fits {device_bytes / GB:.3g} GB: with the most sparing settings the stage {least.peak_stage!r} needs "
        f"{least.peak / GB / (1 - SHORTFALL):.1f} GB, {least.components[largest] / GB:.1f} of it for {largest}; "
        "take a larger device or a smaller video"
    )


def passes(config: Config, sizes: GeneratorSizes, ranks: int = 1) -> Passes:
    """Count how often one of so many ranks does what memory for everything at once would let it do once."""
    settings, updates, (videos, pairs) = Settings.of(config, ranks), config.objective.updates, Share.of(config, ranks)
    wave, finished = settings.branches_per_wave, videos
    if config.train.buffer is not None:
        videos = config.evaluation.prompts * config.evaluation.videos_per_prompt
        wave = finished = videos_at_once(config)
    anchor = config.anchored and config.train.buffer is None  # a wave and a slice of one branch
    slices = ceil(videos / min(finished, settings.decode_branches)) + anchor
    return Passes(
        trips=slices if settings.offload else 0,
        repeated=updates * pairs if settings.checkpoint else 0,
        waves=ceil(videos / wave) + anchor,
        slices=slices,
        micro_batches=updates * ceil(pairs / settings.micro_batch),
    )


# The table -------------------------------------------------------------------------------------------------------------------------


def dry_run(config: Config, devices: Sequence[float] = (), ranks: int = 1) -> str:
    """Return the text of `--dry-run`: the recipe as it stands, and the plan for each device.

    Args:
        devices: their GB; none: the GPU that is here, else `DEVICES`.
        ranks: processes that share the run, each with a device of its own.

    Raises:
        UserError: the recipe's parts do not go together, or so many ranks cannot share it.
    """
    check_fits(config)
    if config.generator.shard and ranks > 1:
        check_lockstep(config, spread(config, ranks))
    sizes = generator_sizes(config.generator.checkpoint, config.generator.base)
    if not devices and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(0).total_memory / GB / (1 - SHORTFALL)]
    plans = _plans(config, sizes, ranks)
    columns: dict[str, Plan | str] = {"as it stands": _plan_of(config, sizes, ranks)}
    for device in devices or DEVICES:
        name = f"{device:.3g} GB"
        try:
            columns[name] = _best(plans, int(device * GB))
        except UserError as error:
            columns[name] = str(error)
    return "\n".join([*_heading(config, sizes, ranks), "", *_table(columns), "", *_advice(columns)])


def over_plan(config: Config, allocated: int, ranks: int = 1) -> str | None:
    """Return a warning if the peak of `allocated` bytes on one of so many ranks exceeds the estimate, else None."""
    needs = estimate(config, generator_sizes(config.generator.checkpoint, config.generator.base), ranks)
    predicted = needs.peak - CONTEXT
    if allocated <= predicted:
        return None
    excess = f"{(allocated - predicted) / GB:.1f} GB ({allocated / predicted - 1:.0%}) more than planned (the stage {needs.peak_stage!r})"
    advice = "if memory runs out, take the settings that --dry-run gives for a smaller device"
    return f"the run has allocated {allocated / GB:.1f} GB at its peak, {excess}; {advice}"


def _heading(config: Config, sizes: GeneratorSizes, ranks: int) -> list[str]:
    factor, shape = sizes.vae.spatial_factor, VideoShape.of(config.video, sizes.transformer.in_channels)
    pixels = f"{config.video.latent_height * factor}x{config.video.latent_width * factor}"
    parameters = transformer_parameters(sizes.transformer)
    size = f"{parameters / 1e9:.2f} billion" if parameters >= 1e7 else f"{parameters / 1e6:.2f} million"
    lines = [
        f"{config.name}: {size} parameters in {config.generator.dtype}; {sizes.vae.pixel_frames(shape.frames)} frames of {pixels}; "
        f"groups of {config.rollout.group_size}",
        "Nothing is started. Predicted memory, of the recipe as it stands and of the settings with the fewest passes that fit each device:",
    ]
    if config.train.buffer is not None:
        group, run = (_gigabytes(size) for size in host_bytes(config, sizes))
        lines.insert(1, f"Groups from a buffer; of the old predictions the host keeps {group} GB a group, {run} GB in the run, at most.")
    if waiting := waiting_bytes(config, sizes, ranks):
        groups = ceil(config.rollout.prompts_per_iteration / spread(config, ranks).teams) * config.rollout.pivots_per_video
        lines.insert(
            1, f"{groups} groups of an iteration, one after the other; they wait for its end in {_gigabytes(waiting)} GB of host memory."
        )
    if ranks > 1:
        teams, team = spread(config, ranks)
        shared = f"; {team} of them share each group" if team > 1 else ""
        lines.insert(1, f"{ranks} ranks in {teams} team{'s' * (teams > 1)}{shared}: everything below is of one rank, of one device.")
    elif config.generator.shard:
        lines.insert(1, "generator.shard divides the weights among the ranks of a job: give their number with --ranks. One rank has all.")
    risks = config.objective.risks(config.rollout.group_size, config.video.chunk_frames)
    return lines + [f"Beware: {risk}." for risk in risks]


def _table(columns: dict[str, Plan | str]) -> list[str]:
    plans = [column if isinstance(column, Plan) else None for column in columns.values()]
    fitting = [plan for plan in plans if plan is not None]

    def row(label: str, cell: Callable[[Plan], str]) -> str:
        return f"{label:40}" + "".join(f"{'-' if plan is None else cell(plan):>14}" for plan in plans)

    lines = [f"{'':40}" + "".join(f"{name:>14}" for name in columns)]
    for index, key in enumerate(SETTINGS):
        lines.append(row(key, lambda plan: str(plan.settings[index]).lower()))  # noqa: B023, called at once
    lines += ["", "Passes, each over a part of the work"]
    for index, name in enumerate(PASSES):
        lines.append(row(f"  {name}", lambda plan: str(plan.passes[index])))  # noqa: B023
    lines += ["", "GB, at the worst pivot"]
    for name in fitting[0].estimate.components:
        lines.append(row(f"  {name}", lambda plan: _gigabytes(plan.estimate.components[name])))  # noqa: B023
    lines += ["", f"GB of the device by stage, with {SLACK:.0%} for the allocator and {CONTEXT / GB:.1f} for CUDA"]
    for stage in fitting[0].estimate.stages:
        lines.append(row(f"  {stage}", lambda plan: _gigabytes(plan.estimate.total(stage))))  # noqa: B023
    return [*lines, row("peak", lambda plan: _gigabytes(plan.estimate.peak))]


def _gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB or not size else f"{size / GB:.2g}" if size >= 0.0005 * GB else "0.0"


def _advice(columns: dict[str, Plan | str]) -> list[str]:
    (_, current), *devices = columns.items()
    assert isinstance(current, Plan)
    lines = [
        f"As it stands, it needs a device of {ceil(current.estimate.peak / GB / (1 - SHORTFALL))} GB. For another, add to the command line:"
    ]
    return lines + [f"{name}: {plan if isinstance(plan, str) else ' '.join(plan.settings.overrides())}" for name, plan in devices]
