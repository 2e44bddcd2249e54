"""What an iteration needs of a GPU's memory, component by component, and the settings with which it fits: arithmetic on sizes alone.

    python -m arcopo_fast.train RECIPE --dry-run        prints it for the GPU that is here, or for 24, 40, 80 and 141 GB

Nothing is built and no GPU is needed. Tensors are counted as the code keeps them on a GPU, with the fused kernels (plain PyTorch attention,
as on a CPU, keeps all scores and needs far more). 1 GB is 2^30 bytes, as cards are sold. Times are predictions, compared with each other
only. What a text encoder takes is not counted: prompts are embedded by a stand-in or a table so far.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise, product
from math import ceil
from typing import Callable, NamedTuple, Sequence

import torch

from arcopo_fast.assemble import cache_policy, generator_sizes, pool_pages, shape_of, wave_size
from arcopo_fast.config import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation import videos_at_once
from arcopo_fast.model.sizes import GeneratorSizes, Linear, block_linears, decoder_convolutions, transformer_parameters, vae_parameters
from arcopo_fast.rewards.registry import reward_bytes as bytes_of
from arcopo_fast.rollout.engine import Engine, VideoShape

GB = 2**30
DEVICES = (24.0, 40.0, 80.0, 141.0)
"""GB of the cards that a plan is made for where none is named and none is here."""

MISSING = 0.01
"""Share by which cards fall short of their name."""
CONTEXT = int(0.6 * GB)
"""The CUDA context and its libraries' workspaces, which PyTorch does not count. An assumption."""
SLACK = 0.06
"""Of what is allocated, what the allocator holds beside it: rounding and fragments. An assumption."""

ADAPTER = 4
"""Bytes of an adapter's element as it is stored and trained, float32; adapters compute in the network's dtype."""
DECODING = 3.6
"""What lives at once inside a decoder call, in units of the largest window that a causal convolution reads. Measured: 3.4 to 3.6."""
EQUALLY_FAST = 1.003
"""Times that differ by less are the same to this cost model."""


class Estimate(NamedTuple):
    """Bytes by component, and for each stage the components that are there in it only; all others are there all the time."""

    components: dict[str, int]
    stages: dict[str, tuple[str, ...]]

    def total(self, stage: str) -> int:
        """Bytes of the device in a stage, the allocator's slack and the CUDA context included."""
        passing = {name for names in self.stages.values() for name in names}
        there = sum(size for name, size in self.components.items() if name not in passing or name in self.stages[stage])
        return int(there * (1 + SLACK)) + CONTEXT

    @property
    def peak_stage(self) -> str:
        return max(self.stages, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the device in the stage that needs most."""
        return self.total(self.peak_stage)


class Settings(NamedTuple):
    """What trades memory for time and changes no result."""

    branches_per_wave: int
    decode_branches: int
    micro_batch: int
    checkpoint: bool
    offload: bool

    @classmethod
    def of(cls, config: Config) -> Settings:
        """A configuration's own, its nulls resolved."""
        group, pairs = config.rollout.group_size, _pairs(config)
        decode, micro = config.rollout.decode_branches or group, config.objective.micro_batch or pairs
        return cls(wave_size(config), min(decode, group), min(micro, pairs), config.objective.checkpoint, config.generator.offload)

    @classmethod
    def choices(cls, config: Config) -> list[Settings]:
        """All that are worth trying: of numbers that lead to equally many parts, the smallest."""
        group, pairs = _part_sizes(config.rollout.group_size), _part_sizes(_pairs(config))
        return [cls(*values) for values in product(group, group, pairs, (False, True), (False, True))]

    def apply(self, config: Config) -> Config:
        """The configuration with these settings."""
        sections = {
            "rollout": {"branches_per_wave": self.branches_per_wave, "decode_branches": self.decode_branches},
            "objective": {"micro_batch": self.micro_batch, "checkpoint": self.checkpoint},
            "generator": {"offload": self.offload},
        }
        return config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()})

    def overrides(self) -> list[str]:
        """As `key=value` of the command line."""
        return [f"{key}={str(value).lower()}" for key, value in zip(SETTINGS, self)]


SETTINGS = ("rollout.branches_per_wave", "rollout.decode_branches", "objective.micro_batch", "objective.checkpoint", "generator.offload")
"""The keys of `Settings`, in its order."""


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


def _part_sizes(whole: int) -> list[int]:
    return sorted({ceil(whole / parts) for parts in range(1, whole + 1)})


# Memory ----------------------------------------------------------------------------------------------------------------------------


def estimate(config: Config, sizes: GeneratorSizes, *, reward_bytes: int = 0) -> Estimate:
    """The bytes of a run at its worst pivot.

    Args:
        reward_bytes: of rewards, their weights and working set, on top of what those of the recipe declare.
    """
    model, shape, settings = sizes.transformer, shape_of(config, sizes.transformer.in_channels), Settings.of(config)
    width, group, branches = _itemsize(config.generator.dtype), config.rollout.group_size, settings.branches_per_wave
    adapters = ADAPTER * model.num_layers * config.lora.rank * sum(linear.inputs + linear.outputs for linear in _adapted(config, sizes))

    worst = max((Engine.plan(shape, cache_policy(config), pivot, branches) for pivot in range(shape.chunks)), key=lambda each: each.pages)
    pages, tails = pool_pages(config, shape), branches * worst.tail
    page = _page_bytes(config, sizes)

    # Inputs and predictions of the pivot's steps, twice while the waves are joined; every chunk; the old predictions of later updates.
    chunk = 4 * max(shape.chunk_frames) * shape.channels * shape.height * shape.width
    stored = group * (2 * 2 * _steps(config) + shape.chunks) + (config.objective.updates - 1) * _pairs(config)

    cache, decoding, video = _decoder_cache(config, sizes), _decoding(config, sizes), _video(config, sizes, shape)
    components = {
        "generator weights": width * transformer_parameters(model),
        "adapters, float32": adapters,
        "optimiser and gradients": 3 * adapters,  # two moments
        "keys and values of the prefix": (pages - tails) * page,
        "keys and values of the branches": tails * page,
        "keys and values of the text": 2 * model.num_layers * model.text_len * model.dim * width,
        "latents of the group": config.rollout.prompts_per_iteration * stored * chunk,
        "denoising a wave": _denoising(config, sizes, shape, branches, branches * worst.tail + worst.prefix),
        "decoder weights": _itemsize(config.generator.vae_dtype) * vae_parameters(sizes.vae),
        "decoder caches": (1 + settings.decode_branches) * cache,  # the prefix's stays
        "decoding": settings.decode_branches * (decoding + video),
        "frames of a slice": (settings.decode_branches + 1) * video,  # the shared frames stand alone as well
        "rewards": reward_bytes + bytes_of(name for name in config.rewards if name not in config.reward_servers.addresses),
        "copies while judging": 2 * video,  # of the one video that is looked at
        "replay and its gradient": _replay(config, sizes, shape, settings),
    }
    # Before and after the run some videos are made at once, in the run's pool.
    videos = videos_at_once(config, shape)
    at_once = min(videos, settings.decode_branches)
    components |= {
        "evaluation: denoising": _denoising(config, sizes, shape, videos, pool_pages(config, shape, videos=videos)),
        "evaluation: decoding and frames": at_once * (cache + decoding + 2 * video),
    }

    decoder: tuple[str, ...] = ("decoder weights",)
    judges: tuple[str, ...] = ("rewards",)
    network: tuple[str, ...] = ()
    if not settings.offload:
        decoder = judges = network = (*decoder, *judges)
    rollout, evaluation = network, network
    if cache_policy(config).reencoded:
        # Of the prefix, of every branch and of the one at work; the frames of one video, at most.
        components["re-encoding"] = (branches + 2) * cache + decoding + video
        components["evaluation: re-encoding"] = (videos + 1) * cache + decoding + video
        rollout, evaluation = (*decoder, *network, "re-encoding"), (*decoder, *network, "evaluation: re-encoding")
    # The prefix's frames and its place in the decoder stay until the last slice is judged.
    stages = {
        "rollout": (*rollout, "denoising a wave"),
        "decode": (*decoder, "decoder caches", "decoding", "frames of a slice"),
        "reward": (*judges, "decoder caches", "frames of a slice", "copies while judging"),
        "update": (*network, "replay and its gradient"),
        "evaluation: rollout": (*evaluation, "evaluation: denoising"),
        "evaluation: decode": (*decoder, "evaluation: decoding and frames"),
    }
    return Estimate(components, stages)


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def _steps(config: Config) -> int:
    """T, of the chunk that has most."""
    return max(len(config.sampler.steps), len(config.sampler.first_chunk_steps or []))


def _pairs(config: Config) -> int:
    """(anchor, step) pairs of one update of one group."""
    objective, steps = config.objective, _steps(config)
    available = steps - (objective.skip_last_step and steps > 1)
    chosen = available if objective.steps == "all" else max(1, round(objective.steps * available))
    return objective.anchors_per_update * chosen


def _adapted(config: Config, sizes: GeneratorSizes) -> list[Linear]:
    """The linear layers of a block that have an adapter. Targets outside of the blocks, small layers, are left out."""
    linears = block_linears(sizes.transformer)
    return [linear for name, linear in linears.items() if any(f".blocks.0.{name}".endswith(f".{target}") for target in config.lora.targets)]


def _frame_tokens(config: Config, sizes: GeneratorSizes) -> int:
    return sizes.transformer.tokens_per_frame(config.video.latent_height, config.video.latent_width)


def _page_bytes(config: Config, sizes: GeneratorSizes) -> int:
    """Keys and values of one latent frame in every layer."""
    model = sizes.transformer
    return 2 * model.num_layers * _frame_tokens(config, sizes) * model.dim * _itemsize(config.generator.dtype)


def _denoising(config: Config, sizes: GeneratorSizes, shape: VideoShape, branches: int, pages: int) -> int:
    """The most that lives at once in a forward pass without gradient: inside the second layer of a block's feed-forward.

    Then there are seven tensors of the hidden size (two residual streams and what the block's names still hold) and of the inner size the
    layer's output and the adapter's, before and after scaling. Pages that are cached un-roped are roped for one layer at a time.
    """
    model, width, tokens = sizes.transformer, _itemsize(config.generator.dtype), _frame_tokens(config, sizes)
    token = model.dim * 7 * width + model.ffn_dim * 3 * width
    roped = 0 if cache_policy(config).roped else pages * tokens * model.dim * width
    return branches * max(shape.chunk_frames) * tokens * token + roped


def kept_by_block(config: Config, sizes: GeneratorSizes) -> tuple[int, int]:
    """Bytes that autograd keeps of one block, for each token of the chunk and for each row of the text.

    The operators keep: the input of each of the three norms; q and k before and after their norms, and v; the cross-attention's q before
    and after its norm; both attentions' outputs and log-sum-exps; the feed-forward before GELU. The text's keys are kept before and after
    their norm, beside its values. Frozen linear layers keep nothing. An adapter keeps its input, which layers that read one tensor share,
    and the product with A.
    """
    model, width = sizes.transformer, _itemsize(config.generator.dtype)
    token = width * (12 * model.dim + model.ffn_dim) + 2 * 4 * model.num_attention_heads
    row = width * 3 * model.dim
    shared = {"attn1", "attn2", "text"}  # kept anyway, or one tensor for all layers
    for linear in _adapted(config, sizes):
        kept = width * config.lora.rank
        if linear.source not in shared:
            kept += width * linear.inputs
            shared.add(linear.source)
        if linear.of_text:
            row += kept
        else:
            token += kept
    return token, row


def _replay(config: Config, sizes: GeneratorSizes, shape: VideoShape, settings: Settings) -> int:
    """Activations of a micro-batch (checkpointed: the inputs of all blocks and one block's activations), and what its backward works in."""
    model, width, frame = sizes.transformer, _itemsize(config.generator.dtype), _frame_tokens(config, sizes)
    tokens = settings.micro_batch * max(shape.chunk_frames) * frame
    kept, row = kept_by_block(config, sizes)
    hidden = tokens * model.dim * width
    blocks = (model.num_layers + 1) * hidden + tokens * kept if settings.checkpoint else model.num_layers * tokens * kept + hidden
    text = model.num_layers * model.text_len * row
    visible = pool_pages(config, shape, videos=1)
    # In the feed-forward the gradient of its inner tensor; in attention those of q, k and v, float32 sums of the first, and the dropped
    # gradients of the prefix.
    feed_forward = tokens * (model.ffn_dim * 2 * width + model.dim * width)
    attention = tokens * model.dim * (6 * width + 4) + 2 * visible * frame * model.dim * width
    roped = 0 if cache_policy(config).roped else model.num_layers * visible * frame * model.dim * width
    return blocks + text + max(feed_forward, attention) + roped


def _decoder_cache(config: Config, sizes: GeneratorSizes) -> int:
    """One video's causal cache: the last two input frames of every causal convolution."""
    pixels = config.video.latent_height * config.video.latent_width
    cached = sum(2 * conv.inputs * conv.spatial**2 for conv in decoder_convolutions(sizes.vae) if conv.cached)
    return _itemsize(config.generator.vae_dtype) * pixels * cached


def _decoding(config: Config, sizes: GeneratorSizes) -> int:
    """The working set of decoding one video, `video.decode_frames` latent frames at a time."""
    return int(DECODING * _largest_window(config, sizes))


def _largest_window(config: Config, sizes: GeneratorSizes) -> int:
    """What the hungriest causal convolution reads, for one video: two frames of history and those of the call."""
    pixels, frames = config.video.latent_height * config.video.latent_width, config.video.decode_frames
    windows = (conv.inputs * conv.spatial**2 * (2 + frames * conv.temporal) for conv in decoder_convolutions(sizes.vae) if conv.cached)
    return _itemsize(config.generator.vae_dtype) * pixels * max(windows)


def _video(config: Config, sizes: GeneratorSizes, shape: VideoShape) -> int:
    """The frames of one video, float32."""
    pixels = config.video.latent_height * config.video.latent_width * sizes.vae.spatial_factor**2
    return 4 * 3 * sizes.vae.pixel_frames(shape.frames) * pixels


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


class Operations(NamedTuple):
    """Of one forward pass of a chunk, for one video."""

    linear: float
    adapters: float
    attention: float


def forward_operations(config: Config, sizes: GeneratorSizes, frames: int, visible: int) -> Operations:
    """For a chunk of `frames` frames that sees `visible` frames, itself included."""
    model, frame = sizes.transformer, _frame_tokens(config, sizes)
    rows = 2 * model.num_layers * frames * frame
    linear = sum(each.inputs * each.outputs for each in block_linears(model).values() if not each.of_text)
    adapters = sum(config.lora.rank * (each.inputs + each.outputs) for each in _adapted(config, sizes) if not each.of_text)
    return Operations(rows * linear, rows * adapters, rows * 2 * model.dim * (visible * frame + model.text_len))


def decoder_operations(config: Config, sizes: GeneratorSizes, *, first: bool = False) -> float:
    """Of decoding one latent frame; a video's first gives one pixel frame only."""
    pixels = config.video.latent_height * config.video.latent_width
    convolutions = decoder_convolutions(sizes.vae)
    attention = 4 * pixels**2 * convolutions[0].outputs
    return attention + sum(
        2 * conv.inputs * conv.outputs * conv.taps * conv.spatial**2 * pixels * (1 if first else conv.temporal) for conv in convolutions
    )


def seconds(config: Config, sizes: GeneratorSizes, *, reward_bytes: int = 0) -> float:
    """The predicted time of an iteration on an H200, judging not counted; the mean over the pivots that the recipe allows.

    Args:
        reward_bytes: see `estimate`; they move when decoder and rewards take turns.
    """
    shape, settings, window = shape_of(config, sizes.transformer.in_channels), Settings.of(config), config.cache.window
    width, vae_width = _itemsize(config.generator.dtype), _itemsize(config.generator.vae_dtype)
    launches, updates = sizes.transformer.num_layers * BLOCK_LAUNCHES * LAUNCH, config.objective.updates
    group, ends = config.rollout.group_size, accumulate(shape.chunk_frames)
    waves, decoded = _parts(group, settings.branches_per_wave), _parts(group, settings.decode_branches)
    batches = _parts(_pairs(config), settings.micro_batch)
    work = [forward_operations(config, sizes, frames, min(end, window or end)) for frames, end in zip(shape.chunk_frames, ends)]
    frame = decoder_operations(config, sizes) / DECODER[vae_width]
    reencoded = _reencoded(config, shape)

    def network(chunk: int, parts: Counter[int], passes: tuple[int, int, int] = (1, 1, 1)) -> float:
        """Batches of one chunk through the network, each kind of operation `passes` times a forward pass's."""
        total = 0.0
        for batch, count in parts.items():
            rates = MATMUL[width] * _fill(batch), MATMUL[width], ATTENTION[width]
            arithmetic = batch * sum(times * part / rate for times, part, rate in zip(passes, work[chunk], rates))
            total += count * max(passes[0] * launches, arithmetic)
        return total

    def decoder(frames: int, parts: Counter[int]) -> float:
        calls = ceil(frames / config.video.decode_frames)
        return sum(count * max(batch * frames * frame, calls * DECODER_LAUNCHES * LAUNCH) for batch, count in parts.items())

    def iteration(pivot: int) -> float:
        rollout = 0.0
        for chunk in range(shape.chunks):
            steps = len((config.sampler.first_chunk_steps if chunk == 0 else None) or config.sampler.steps)
            clean = chunk < shape.chunks - 1
            rollout += (steps + clean) * network(chunk, waves if chunk >= pivot else Counter([1]))
        prefix = sum(shape.chunk_frames[:pivot])
        rollout += decoder(reencoded[pivot], Counter([1])) + decoder(reencoded[-1] - reencoded[pivot], Counter({1: group}))
        decode = decoder(prefix, Counter([1])) + decoder(shape.frames - prefix, decoded)
        # Backward: frozen layers once more, adapters twice, attention 2.5 times at 5/6 of its rate; a checkpointed forward once more.
        again = int(settings.checkpoint)
        update = updates * network(pivot, batches, (2 + again, 3 + again, 4 + again)) + (updates - 1) * network(pivot, batches)
        return rollout + decode + update

    pivots = [config.rollout.pivot - 1] if isinstance(config.rollout.pivot, int) else range(shape.chunks)
    total = sum(map(iteration, pivots)) / len(pivots)
    if settings.offload:
        moved = vae_width * vae_parameters(sizes.vae) + reward_bytes
        total += 2 * sum(decoded.values()) * moved / HOST_LINK  # there and back, for every slice
    return config.rollout.prompts_per_iteration * total


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
    return [
        f"{config.name}: {size} parameters in {config.generator.dtype}; {sizes.vae.pixel_frames(shape.frames)} frames of {pixels}; "
        f"groups of {config.rollout.group_size}",
        "Nothing is started. Predicted, for the recipe as it stands and for the fastest settings that fit each device:",
    ]


def _table(columns: dict[str, Plan | str]) -> list[str]:
    plans = [each if isinstance(each, Plan) else None for each in columns.values()]
    known = [each for each in plans if each is not None]
    fastest = min(each.seconds for each in known)

    def row(label: str, cell: Callable[[Plan], str]) -> str:
        return f"{label:34}" + "".join(f"{'-' if each is None else cell(each):>14}" for each in plans)

    def gigabytes(size: int) -> str:
        return f"{size / GB:.1f}" if size >= 0.05 * GB or not size else f"{size / GB:.2g}" if size >= 0.0005 * GB else "0.0"

    lines = [f"{'':34}" + "".join(f"{name:>14}" for name in columns)]
    for index, key in enumerate(SETTINGS):
        lines.append(row(key, lambda each: str(each.settings[index]).lower()))  # noqa: B023, called at once
    lines += [row("predicted time of an iteration", lambda each: f"{each.seconds / fastest:.2f}x"), "", "GB, at the worst pivot"]
    for name in known[0].estimate.components:
        lines.append(row(f"  {name}", lambda each: gigabytes(each.estimate.components[name])))  # noqa: B023
    lines += ["", f"GB of the device by stage, with {SLACK:.0%} for the allocator and {CONTEXT / GB:.1f} for CUDA"]
    for stage in known[0].estimate.stages:
        lines.append(row(f"  {stage}", lambda each: gigabytes(each.estimate.total(stage))))  # noqa: B023
    return [*lines, row("peak", lambda each: gigabytes(each.estimate.peak))]


def _advice(columns: dict[str, Plan | str]) -> list[str]:
    (_, own), *devices = columns.items()
    assert isinstance(own, Plan)
    lines = [f"As it stands, it needs a device of {ceil(own.estimate.peak / GB / (1 - MISSING))} GB. For another, add to the command line:"]
    return lines + [f"{name}: {each if isinstance(each, str) else ' '.join(each.settings.overrides())}" for name, each in devices]
