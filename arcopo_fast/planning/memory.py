"""The memory of a GPU that a run needs, component by component and stage by stage: arithmetic on sizes alone.

Nothing is built and no GPU is needed. Tensors are counted as the code keeps them on a GPU, with the fused kernels (plain PyTorch attention,
as on a CPU, keeps all scores and needs far more). 1 GB is 2^30 bytes, as cards are sold. What a text encoder takes is not counted: it is
gone before anything else is there.

A run on a buffer rebuilds prefixes instead of rolling out, and neither decodes nor judges but in its evaluations, before and after.
With several ranks the memory is that of one: of a team that shares its groups each rank has a part of the branches and of the samples.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil
from typing import NamedTuple

from arcopo_kernels.paging import GroupPlan

from arcopo_fast.build import pool_pages, switching_chunks
from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.evaluation.judging import videos_at_once
from arcopo_fast.evaluation.windows import View
from arcopo_fast.model.sizes import CausalWanConfig, GeneratorSizes
from arcopo_fast.planning.layers import decoder_convolutions, transformer_parameters, vae_parameters
from arcopo_fast.planning.spread import spread
from arcopo_fast.planning.work import adapted_linears, frame_tokens, itemsize, lora_parameters
from arcopo_fast.rewards.registry import reward_bytes
from arcopo_fast.rollout.cache import variant_of, worst_plan
from arcopo_fast.rollout.stream import VideoShape

GB = 2**30
CONTEXT = int(0.6 * GB)
"""The CUDA context and its libraries' workspaces, which PyTorch does not count. An assumption."""
SLACK = 0.06
"""Overhead of the allocator, rounding and fragments, as a fraction of the allocated bytes. An assumption."""

ADAPTER = 4
"""Bytes of an adapter's element as it is stored and trained, float32; adapters compute in the network's dtype."""
DECODING = 3.6
"""Bytes that live at once inside a decoder call, in units of the largest window that a causal convolution reads. Measured: 3.4 to 3.6."""


class Share(NamedTuple):
    """A rank's part of a group, or that of the rank which has most.

    Attributes:
        branches: that it makes.
        pairs: samples of an update that it trains.
    """

    branches: int
    pairs: int

    @classmethod
    def of(cls, config: Config, ranks: int) -> Share:
        """Return the share of one of so many ranks."""
        team = spread(config, ranks).ranks
        return cls(ceil(config.rollout.group_size / team), ceil(pairs_of(config) / team))


class Settings(NamedTuple):
    """The settings that trade memory for time and change no result; see `SETTINGS`."""

    branches_per_wave: int
    decode_branches: int
    micro_batch: int
    checkpoint: bool
    offload: bool

    @classmethod
    def of(cls, config: Config, ranks: int = 1) -> Settings:
        """Return a configuration's own settings on one of so many ranks, with its nulls resolved."""
        branches, pairs = Share.of(config, ranks)
        wave, decode = (min(size or branches, branches) for size in (config.rollout.wave_size, config.rollout.decode_branches))
        micro = min(config.objective.micro_batch or pairs, pairs)
        return cls(wave, decode, micro, config.objective.checkpoint, config.generator.offload)

    @classmethod
    def choices(cls, config: Config, ranks: int = 1) -> list[Settings]:
        """Return all settings worth trying: of numbers that lead to equally many parts, the smallest."""
        branches, pairs = (_part_sizes(total) for total in Share.of(config, ranks))
        return [cls(*values) for values in product(branches, branches, pairs, (False, True), (False, True))]

    def apply(self, config: Config) -> Config:
        """Return the configuration with these settings."""
        sections = {
            "rollout": {"branches_per_wave": self.branches_per_wave, "decode_branches": self.decode_branches},
            "objective": {"micro_batch": self.micro_batch, "checkpoint": self.checkpoint},
            "generator": {"offload": self.offload},
        }
        return config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()})

    def overrides(self) -> list[str]:
        """Return the settings as `key=value` of the command line."""
        return [f"{key}={str(value).lower()}" for key, value in zip(SETTINGS, self)]


SETTINGS = ("rollout.branches_per_wave", "rollout.decode_branches", "objective.micro_batch", "objective.checkpoint", "generator.offload")
"""The keys of `Settings`, in its order."""


def _part_sizes(total: int) -> list[int]:
    return sorted({ceil(total / parts) for parts in range(1, total + 1)})


class Estimate(NamedTuple):
    """The memory of a run.

    Attributes:
        components: bytes by name.
        stages: for each stage the components that exist in it only; all others exist all the time.
    """

    components: dict[str, int]
    stages: dict[str, tuple[str, ...]]

    def total(self, stage: str) -> int:
        """Return the bytes of the device in a stage, the allocator's slack and the CUDA context included."""
        passing = {name for names in self.stages.values() for name in names}
        present = sum(size for name, size in self.components.items() if name not in passing or name in self.stages[stage])
        return int(present * (1 + SLACK)) + CONTEXT

    @property
    def peak_stage(self) -> str:
        """Stage that needs most."""
        return max(self.stages, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the device in the stage that needs most."""
        return self.total(self.peak_stage)


def estimate(config: Config, sizes: GeneratorSizes, ranks: int = 1) -> Estimate:
    """Return the bytes of a run at its worst pivot, on one of so many ranks."""
    settings = Settings.of(config, ranks)
    making = _rebuilding(config, sizes) if config.train.buffer is not None else _rolling_out(config, sizes, settings)
    parts = [_kept(config, sizes, ranks), making, _updating(config, sizes, settings), _evaluating(config, sizes)]
    components = {name: size for part in parts for name, size in part.components.items()}
    return Estimate(components, {stage: names for part in parts for stage, names in part.stages.items()})


def _at_work(config: Config, *working: str) -> tuple[str, ...]:
    """Return which of decoder and rewards the device holds while `working` have their turn: with offloading no others."""
    return working if config.generator.offload else ("decoder weights", "rewards")


def _kept(config: Config, sizes: GeneratorSizes, ranks: int) -> Estimate:
    """Count what outlives a stage: weights, adapters, the pool, and what a group keeps from its rollout to its update.

    A group keeps the inputs and predictions of the T steps of chunks that explore, 2 T chunks a member where the method needs them (twice
    while its waves are joined), and all its chunks, or on a buffer the prefix's. An update holds the old predictions of one group's pairs,
    a chunk each. The old policy of groups of its own is a copy of the adapter, and a method may keep others; while one is asked, another
    one keeps the live policy.
    """
    model, branches = sizes.transformer, config.rollout.wave_size
    shape, buffered = _shape(config, sizes), config.train.buffer is not None
    group, updates, chunks = config.rollout.group_size, config.objective.updates, _branch_chunks(config, sizes)
    adapters = ADAPTER * lora_parameters(config, model)
    summed = config.rollout.groups > 1 or ranks > 1

    # The pool is there all the time. What a run on a buffer does not need of it for prefixes, only the evaluations use.
    pages, full_video = pool_pages(config), pool_pages(config, videos=1)
    worst = _worst_plan(config, sizes)
    tails = pages - (1 + (config.objective.context == "recompute")) * full_video if buffered else branches * worst.tail
    copies, old_predictions = (1, 1) if buffered else (2, int(updates > 1))
    kind = objective_class(config.objective.kind)
    made = 0 if buffered else group + config.anchored
    stored = copies * group * _states(config, sizes) + made * chunks + _prefix_chunks(config, sizes)
    others = kind.kept_policies(config.objective) - 1
    return Estimate(
        {
            **_weights(config, model, ranks),
            "adapters, float32": adapters,
            "optimizer and gradients": 3 * adapters,  # two moments
            **({"sum of the groups' gradients, float64": 2 * adapters} if summed else {}),
            **({} if buffered else {"the old policy": 2 * adapters}),
            **({"other policies": others * adapters} if others else {}),
            "keys and values of the prefix": (pages - tails) * _page_bytes(config, sizes),
            f"keys and values of {'evaluations' if buffered else 'the branches'}": tails * _page_bytes(config, sizes),
            "keys and values of the text": _text_bytes(config, sizes),
            "latents of the group": (stored + old_predictions * pairs_of(config)) * _chunk(shape),
            "decoder weights": itemsize(config.generator.vae_dtype) * vae_parameters(sizes.vae),
            "rewards": reward_bytes(name for name in config.rewards if name not in config.reward_servers.addresses),
            "copies while judging": 2 * _video(config, sizes),  # of the one video that is looked at
        },
        {},
    )


def _weights(config: Config, model: CausalWanConfig, ranks: int) -> dict[str, int]:
    """Count the weights, or a rank's part of them and what it gathers: the block at work, the next one, and what is of no block."""
    width, weights = itemsize(config.generator.dtype), transformer_parameters(model)
    if ranks == 1 or not config.generator.shard:
        return {"generator weights": width * weights}
    block = weights - transformer_parameters(replace(model, num_layers=model.num_layers - 1))
    gathered = 2 * block + weights - model.num_layers * block
    return {f"generator weights, 1 / {ranks}": width * ceil(weights / ranks), "weights gathered to work": width * gathered}


def _worst_plan(config: Config, sizes: GeneratorSizes) -> GroupPlan:
    """Return the pages of the pivot whose waves need most."""
    rollout = config.rollout
    chunk_frames, switches = _shape(config, sizes).chunk_frames, switching_chunks(config)
    return worst_plan(config.cache, chunk_frames, rollout.wave_size, horizon=rollout.horizon, switches=switches)


def _making(config: Config, sizes: GeneratorSizes, name: str, states: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return what making videos needs beside the network (a component `name` where Krea encodes frames again), and what is there with it.

    Encoding again takes the decoder's states of `states` videos and of the one at work, and the frames of one video at most.
    """
    if not variant_of(config.cache).reencodes(config.cache):
        return {}, _at_work(config)
    needs = (states + 1) * _decoder_cache(config, sizes) + _decoding(config, sizes) + _video(config, sizes)
    return {name: needs}, (*_at_work(config, "decoder weights"), name)


def _rebuilding(config: Config, sizes: GeneratorSizes) -> Estimate:
    """Count the making of a prefix for a group from a buffer: one video, at the length of a whole one."""
    reencoding, making = _making(config, sizes, "re-encoding", 1)
    needs = {"rebuilding a prefix": _denoising(config, sizes, 1, pool_pages(config, videos=1))}
    return Estimate(reencoding | needs, {"prefix": (*making, *needs)})


def _rolling_out(config: Config, sizes: GeneratorSizes, settings: Settings) -> Estimate:
    """Count the making of a group: waves of branches, of which what rewards see is decoded and judged in slices.

    The shared frames and their place in the decoder stay until the last slice is judged; a slice's frames hold the shared ones again. A
    window that is cut from them is a copy.
    """
    branches, slices = settings[:2]
    cache, (video, window) = _decoder_cache(config, sizes), _seen(config, sizes)
    worst, (reencoding, making) = _worst_plan(config, sizes), _making(config, sizes, "re-encoding", 1 + branches)
    needs = {
        "denoising a wave": _denoising(config, sizes, branches, branches * worst.tail + worst.prefix),
        "decoder cache of the prefix": cache,
        "decoder caches of a slice": slices * cache,
        "decoding": slices * (_decoding(config, sizes) + video),
        "frames of a slice": (slices + 1) * video,  # the shared frames stand alone as well
    }
    windows = {"window of a slice": slices * window} if window else {}
    decoding = ("decoder cache of the prefix", "decoder caches of a slice", "decoding", "frames of a slice")
    stages = {
        "rollout": (*making, "denoising a wave"),
        "decode": (*_at_work(config, "decoder weights"), *decoding),
        "reward": (*_at_work(config, "rewards"), "decoder cache of the prefix", "frames of a slice", *windows, "copies while judging"),
    }
    return Estimate(reencoding | needs | windows, stages)


def _updating(config: Config, sizes: GeneratorSizes, settings: Settings) -> Estimate:
    needs = {"replay and its gradient": _replay(config, sizes, settings)}
    return Estimate(needs, {"update": (*_at_work(config), *needs)})


def _evaluating(config: Config, sizes: GeneratorSizes) -> Estimate:
    """Count the evaluations before and after a run: some videos at once in the run's pool, each with a prompt of its own."""
    videos, video = videos_at_once(config), _video(config, sizes)
    at_once = min(videos, config.rollout.decode_branches or videos)
    reencoding, making = _making(config, sizes, "evaluation: re-encoding", videos)
    needs = {
        "evaluation: keys and values of the texts": (videos - 1) * _text_bytes(config, sizes),
        "evaluation: denoising": _denoising(config, sizes, videos, videos * pool_pages(config, videos=1)),
        "evaluation: decoding": at_once * (_decoding(config, sizes) + video),
        "evaluation: caches": at_once * _decoder_cache(config, sizes),
        "evaluation: frames": at_once * video,
    }
    stages = {
        "evaluation: rollout": (*making, "evaluation: keys and values of the texts", "evaluation: denoising"),
        "evaluation: decode": (*_at_work(config, "decoder weights"), *(f"evaluation: {part}" for part in ("decoding", "caches", "frames"))),
        "evaluation: reward": (*_at_work(config, "rewards"), "evaluation: frames", "copies while judging"),
    }
    return Estimate(reencoding | needs, stages)


def host_bytes(config: Config, sizes: GeneratorSizes) -> tuple[int, int]:
    """Return the most that the host keeps of the reference policy's predictions: of a group, all members at all steps; of a run, all it
    draws."""
    chunk = _chunk(_shape(config, sizes))
    run_pairs = config.train.iterations * config.rollout.groups * config.objective.updates * pairs_of(config)
    return config.rollout.group_size * _steps(config) * chunk, run_pairs * chunk


def waiting_bytes(config: Config, sizes: GeneratorSizes, ranks: int = 1) -> int:
    """Return the most host memory in which one of so many ranks keeps the groups of an iteration until its end; 0 if it has only one.

    They wait without keys and values: texts, latents, and the inputs and predictions of the explored chunks' steps.
    """
    videos_of_rank = ceil(config.rollout.prompts_per_iteration / spread(config, ranks).teams)
    groups, members = videos_of_rank * config.rollout.pivots_per_video, config.rollout.group_size
    shape, model = _shape(config, sizes), sizes.transformer
    made, videos = _branch_chunks(config, sizes), 1 if config.train.buffer is not None else members
    latents = members * _states(config, sizes) + videos * made + shape.chunks - made
    group = latents * _chunk(shape) + 4 * model.text_len * model.text_dim
    return groups * group if groups > 1 else 0


def _branch_chunks(config: Config, sizes: GeneratorSizes) -> int:
    """Return the most chunks that a branch makes."""
    chunks, horizon = _shape(config, sizes).chunks, config.rollout.horizon
    return chunks if horizon is None else min(horizon + 1, chunks)


def _states(config: Config, sizes: GeneratorSizes) -> int:
    """Return the chunks of latents that a group keeps of each member's explored chunks, besides the finished ones."""
    kind, made = objective_class(config.objective.kind), _branch_chunks(config, sizes)
    return kind.states_per_chunk(config.objective, _steps(config)) * min(kind.explored_chunks(config.objective) or made, made)


def _prefix_chunks(config: Config, sizes: GeneratorSizes) -> int:
    """Return the most chunks before the pivot that the device keeps: all, or with a window those in it and those that are decoded."""
    shape, window, reach, buffered = _shape(config, sizes), config.cache.window, config.judge.reach, config.train.buffer is not None
    chunks = shape.chunks if buffered else shape.chunks - _branch_chunks(config, sizes)
    return chunks if window is None or reach is None or buffered else min(chunks, ceil(max(window, reach) / config.video.chunk_frames) + 1)


def _chunk(shape: VideoShape) -> int:
    """Return the bytes of the longest chunk of one video's latents, float32."""
    return 4 * max(shape.chunk_frames) * shape.channels * shape.height * shape.width


def _shape(config: Config, sizes: GeneratorSizes) -> VideoShape:
    return VideoShape.of(config.video, sizes.transformer.in_channels)


def _text_bytes(config: Config, sizes: GeneratorSizes) -> int:
    """Return the bytes of keys and values of one prompt in every layer."""
    model = sizes.transformer
    return 2 * model.num_layers * model.text_len * model.dim * itemsize(config.generator.dtype)


def _steps(config: Config) -> int:
    """Return T of the chunk that has most."""
    return max(len(config.sampler.steps), len(config.sampler.first_chunk_steps or []))


def pairs_of(config: Config) -> int:
    """Return the samples of one update of one group, at most: with a ratio method its (anchor, step) pairs."""
    objective = objective_class(config.objective.kind)
    return objective.samples_per_update(config.objective, _steps(config), config.rollout.group_size)


def _page_bytes(config: Config, sizes: GeneratorSizes) -> int:
    """Return the bytes of keys and values of one latent frame in every layer."""
    model = sizes.transformer
    return 2 * model.num_layers * frame_tokens(config, sizes.transformer) * model.dim * itemsize(config.generator.dtype)


def _denoising(config: Config, sizes: GeneratorSizes, branches: int, pages: int) -> int:
    """Return the most bytes that live at once in a forward pass without gradient: inside a block's feed-forward.

    Then there are seven tensors of the hidden size (two residual streams and what the block's names still hold) and two of the inner size,
    before and after GELU. Pages that are cached un-roped are roped for one layer at a time.
    """
    model, width, tokens = sizes.transformer, itemsize(config.generator.dtype), frame_tokens(config, sizes.transformer)
    token = (model.dim * 7 + model.ffn_dim * 2) * width
    roped = 0 if variant_of(config.cache).roped else pages * tokens * model.dim * width
    return branches * max(_shape(config, sizes).chunk_frames) * tokens * token + roped


def kept_by_block(config: Config, sizes: GeneratorSizes) -> tuple[int, int]:
    """Return the bytes that autograd keeps of one block, for each token of the chunk and for each row of the text.

    The operators keep: the input of each of the three norms; q and k before and after their norms, and v; the cross-attention's q before
    and after its norm; both attentions' outputs and log-sum-exps; the feed-forward before GELU. The text's keys are kept before and after
    their norm, beside its values. Frozen linear layers keep nothing. An adapter keeps its input, which layers that read one tensor share,
    and the product with A.
    """
    model, width = sizes.transformer, itemsize(config.generator.dtype)
    token = width * (12 * model.dim + model.ffn_dim) + 2 * 4 * model.num_attention_heads
    row = width * 3 * model.dim
    shared = {"attn1", "attn2", "text"}  # kept anyway, or one tensor for all layers
    for linear in adapted_linears(config, model).values():
        bytes_kept = width * config.lora.rank
        if linear.source not in shared:
            bytes_kept += width * linear.inputs
            shared.add(linear.source)
        if linear.of_text:
            row += bytes_kept
        else:
            token += bytes_kept
    return token, row


def _replay(config: Config, sizes: GeneratorSizes, settings: Settings) -> int:
    """Return the bytes of a micro-batch's activations and of its backward's working set.

    Kept is what every block keeps and the head's input; checkpointed, the inputs of all blocks and of the head, and what one block keeps.
    Beside it stands the more of two moments: in the feed-forward the gradients of its inner tensor and of its output; in attention those
    of q, k and v, float32 sums of the first, and the dropped gradients of the prefix, when what GELU kept is free again.
    """
    model, width, frame = sizes.transformer, itemsize(config.generator.dtype), frame_tokens(config, sizes.transformer)
    shape = _shape(config, sizes)
    tokens, visible = settings.micro_batch * max(shape.chunk_frames) * frame, pool_pages(config, videos=1)
    token, row = kept_by_block(config, sizes)
    hidden = tokens * model.dim * width
    blocks = (model.num_layers + 1) * hidden + tokens * token if settings.checkpoint else model.num_layers * tokens * token + hidden
    text = model.num_layers * model.text_len * row
    feed_forward = tokens * (model.ffn_dim + model.dim) * width
    attention = tokens * model.dim * (6 * width + 4) + 2 * visible * frame * model.dim * width - tokens * model.ffn_dim * width
    roped = 0 if variant_of(config.cache).roped else model.num_layers * visible * frame * model.dim * width
    return blocks + text + max(feed_forward, attention) + roped


def _decoder_cache(config: Config, sizes: GeneratorSizes) -> int:
    """Return the bytes of one video's causal cache: the last two input frames of every causal convolution."""
    pixels = config.video.latent_height * config.video.latent_width
    cached = sum(2 * conv.inputs * conv.spatial**2 for conv in decoder_convolutions(sizes.vae) if conv.cached)
    return itemsize(config.generator.vae_dtype) * pixels * cached


def _decoding(config: Config, sizes: GeneratorSizes) -> int:
    """Return the working set of decoding one video, `video.decode_frames` latent frames at a time."""
    return int(DECODING * _largest_window(config, sizes))


def _largest_window(config: Config, sizes: GeneratorSizes) -> int:
    """Return the largest input of a causal convolution, for one video: two frames of history and those of the call."""
    pixels, frames = config.video.latent_height * config.video.latent_width, config.video.decode_frames
    windows = (conv.inputs * conv.spatial**2 * (2 + frames * conv.temporal) for conv in decoder_convolutions(sizes.vae) if conv.cached)
    return itemsize(config.generator.vae_dtype) * pixels * max(windows)


def _video(config: Config, sizes: GeneratorSizes) -> int:
    """Return the bytes of one video's frames."""
    return sizes.vae.pixel_frames(_shape(config, sizes).frames) * _pixel_frame(config, sizes)


def _pixel_frame(config: Config, sizes: GeneratorSizes) -> int:
    """Return the bytes of a frame, float32."""
    return 4 * 3 * config.video.latent_height * config.video.latent_width * sizes.vae.spatial_factor**2


def _seen(config: Config, sizes: GeneratorSizes) -> tuple[int, int]:
    """Return the most bytes that rewards see of one video of a group, and those of the largest window that is a part of them."""
    factor, frame = sizes.vae.pixel_frames(2) - 1, _pixel_frame(config, sizes)
    whole, windows = 0, [0]
    for pivot in range(config.rollout.pivots(config.video.count)):
        view = View.of(config, pivot)
        whole = max(whole, view.pixels(view.frames, factor).stop)
        cuts = [view.pixels(part.frames, factor) for window in view.windows for part in window.parts if part.frames != view.frames]
        windows += [cut.stop - cut.start for cut in cuts]
    return whole * frame, max(windows) * frame
