"""What a run needs of a GPU's memory, component by component and stage by stage: arithmetic on sizes alone.

Nothing is built and no GPU is needed. Tensors are counted as the code keeps them on a GPU, with the fused kernels (plain PyTorch attention,
as on a CPU, keeps all scores and needs far more). 1 GB is 2^30 bytes, as cards are sold. What a text encoder takes is not counted: it is
gone before anything else is there.

A run on a buffer rebuilds prefixes instead of rolling out, and neither decodes nor judges but in its evaluations, before and after.
"""

from __future__ import annotations

from itertools import product
from math import ceil
from typing import NamedTuple

from arcopo_fast.build import cache_policy, pool_pages, shape_of, wave_size
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.judging import videos_at_once
from arcopo_fast.model.sizes import GeneratorSizes, decoder_convolutions, transformer_parameters, vae_parameters
from arcopo_fast.planning.floor import workload_of
from arcopo_fast.planning.work import lora_parameters
from arcopo_fast.rewards.registry import reward_bytes as bytes_of
from arcopo_fast.rollout.engine import Engine, VideoShape

GB = 2**30
CONTEXT = int(0.6 * GB)
"""The CUDA context and its libraries' workspaces, which PyTorch does not count. An assumption."""
SLACK = 0.06
"""Of what is allocated, what the allocator holds beside it: rounding and fragments. An assumption."""

ADAPTER = 4
"""Bytes of an adapter's element as it is stored and trained, float32; adapters compute in the network's dtype."""
DECODING = 3.6
"""What lives at once inside a decoder call, in units of the largest window that a causal convolution reads. Measured: 3.4 to 3.6."""


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
        group, pairs = config.rollout.group_size, pairs_of(config)
        decode, micro = config.rollout.decode_branches or group, config.objective.micro_batch or pairs
        return cls(wave_size(config), min(decode, group), min(micro, pairs), config.objective.checkpoint, config.generator.offload)

    @classmethod
    def choices(cls, config: Config) -> list[Settings]:
        """All that are worth trying: of numbers that lead to equally many parts, the smallest."""
        group, pairs = _part_sizes(config.rollout.group_size), _part_sizes(pairs_of(config))
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


def _part_sizes(whole: int) -> list[int]:
    return sorted({ceil(whole / parts) for parts in range(1, whole + 1)})


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


def estimate(config: Config, sizes: GeneratorSizes, *, reward_bytes: int = 0) -> Estimate:
    """The bytes of a run at its worst pivot.

    Args:
        reward_bytes: of rewards, their weights and working set, on top of what those of the recipe declare.
    """
    model, shape, settings = sizes.transformer, shape_of(config, sizes.transformer.in_channels), Settings.of(config)
    width, updates, buffered = _itemsize(config.generator.dtype), config.objective.updates, config.train.buffer is not None
    group, prompts, branches = config.rollout.group_size, config.rollout.prompts_per_iteration, settings.branches_per_wave
    adapters = ADAPTER * lora_parameters(workload_of(config, config.name, model, sizes.vae))

    # The pool is there all the time. What a run on a buffer does not need of it for prefixes, only the evaluations use.
    pages, whole = pool_pages(config, shape), pool_pages(config, shape, videos=1)
    plans = [Engine.plan(shape, cache_policy(config), pivot, branches) for pivot in range(shape.chunks)]
    worst = max(plans, key=lambda each: each.pages)
    tails = pages - (prompts + (config.objective.context == "recompute")) * whole if buffered else branches * worst.tail

    # Inputs and predictions of the pivot's steps, twice while the waves are joined; every chunk, or the prefix's; old predictions.
    if buffered:
        stored = group * 2 * _steps(config) + shape.chunks + updates * pairs_of(config)
    else:
        stored = group * (2 * 2 * _steps(config) + shape.chunks) + (updates - 1) * pairs_of(config)

    texts = 2 * model.num_layers * model.text_len * model.dim * width  # of one prompt, in every layer

    components = {
        "generator weights": width * transformer_parameters(model),
        "adapters, float32": adapters,
        "optimiser and gradients": 3 * adapters,  # two moments
        "keys and values of the prefix": (pages - tails) * _page_bytes(config, sizes),
        f"keys and values of {'evaluations' if buffered else 'the branches'}": tails * _page_bytes(config, sizes),
        "keys and values of the text": texts,
        "latents of the group": prompts * stored * _chunk(shape),
        "decoder weights": _itemsize(config.generator.vae_dtype) * vae_parameters(sizes.vae),
        "rewards": reward_bytes + bytes_of(name for name in config.rewards if name not in config.reward_servers.addresses),
    }
    decoder: tuple[str, ...] = ("decoder weights",)
    judges: tuple[str, ...] = ("rewards",)
    network: tuple[str, ...] = ()
    if not settings.offload:
        decoder = judges = network = (*decoder, *judges)

    cache, decoding, video = _decoder_cache(config, sizes), _decoding(config, sizes), _video(config, sizes, shape)
    # Before and after the run some videos are made at once, in the run's pool.
    videos = videos_at_once(config, shape)
    at_once = min(videos, settings.decode_branches)
    making = evaluating = network
    if cache_policy(config).reencoded:
        # Of the prefix, of every branch and of the one at work; the frames of one video, at most.
        components["re-encoding"] = (2 + (0 if buffered else branches)) * cache + decoding + video
        components["evaluation: re-encoding"] = (videos + 1) * cache + decoding + video
        making, evaluating = (*decoder, *network, "re-encoding"), (*decoder, *network, "evaluation: re-encoding")

    if buffered:
        components["rebuilding a prefix"] = _denoising(config, sizes, shape, 1, whole)
        stages = {"prefix": (*making, "rebuilding a prefix")}
    else:
        components |= {
            "denoising a wave": _denoising(config, sizes, shape, branches, branches * worst.tail + worst.prefix),
            "decoder cache of the prefix": cache,
            "decoder caches of a slice": settings.decode_branches * cache,
            "decoding": settings.decode_branches * (decoding + video),
            "frames of a slice": (settings.decode_branches + 1) * video,  # the shared frames stand alone as well
        }
        # The prefix's frames and its place in the decoder stay until the last slice is judged.
        stages = {
            "rollout": (*making, "denoising a wave"),
            "decode": (*decoder, "decoder cache of the prefix", "decoder caches of a slice", "decoding", "frames of a slice"),
            "reward": (*judges, "decoder cache of the prefix", "frames of a slice", "copies while judging"),
        }
    components |= {
        "copies while judging": 2 * video,  # of the one video that is looked at
        "replay and its gradient": _replay(config, sizes, shape, settings),
        "evaluation: keys and values of the texts": (videos - 1) * texts,  # each video has a prompt of its own
        "evaluation: denoising": _denoising(config, sizes, shape, videos, videos * whole),
        "evaluation: decoding": at_once * (decoding + video),
        "evaluation: caches": at_once * cache,
        "evaluation: frames": at_once * video,
    }
    stages |= {
        "update": (*network, "replay and its gradient"),
        "evaluation: rollout": (*evaluating, "evaluation: keys and values of the texts", "evaluation: denoising"),
        "evaluation: decode": (*decoder, "evaluation: decoding", "evaluation: caches", "evaluation: frames"),
        "evaluation: reward": (*judges, "evaluation: frames", "copies while judging"),
    }
    return Estimate(components, stages)


def host_bytes(config: Config, sizes: GeneratorSizes) -> tuple[int, int]:
    """What the host keeps of the reference policy's predictions, at most: of a group all members at all steps, of a run what it draws."""
    chunk = _chunk(shape_of(config, sizes.transformer.in_channels))
    drawn = config.train.iterations * config.rollout.prompts_per_iteration * config.objective.updates * pairs_of(config)
    return config.rollout.group_size * _steps(config) * chunk, drawn * chunk


def _chunk(shape: VideoShape) -> int:
    """The latents of the longest chunk of one video, float32."""
    return 4 * max(shape.chunk_frames) * shape.channels * shape.height * shape.width


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def _steps(config: Config) -> int:
    """T, of the chunk that has most."""
    return max(len(config.sampler.steps), len(config.sampler.first_chunk_steps or []))


def pairs_of(config: Config) -> int:
    """(anchor, step) pairs of one update of one group."""
    objective, steps = config.objective, _steps(config)
    available = steps - (objective.skip_last_step and steps > 1)
    chosen = available if objective.steps == "all" else max(1, round(objective.steps * available))
    return objective.largest_update * chosen


def _frame_tokens(config: Config, sizes: GeneratorSizes) -> int:
    return sizes.transformer.tokens_per_frame(config.video.latent_height, config.video.latent_width)


def _page_bytes(config: Config, sizes: GeneratorSizes) -> int:
    """Keys and values of one latent frame in every layer."""
    model = sizes.transformer
    return 2 * model.num_layers * _frame_tokens(config, sizes) * model.dim * _itemsize(config.generator.dtype)


def _denoising(config: Config, sizes: GeneratorSizes, shape: VideoShape, branches: int, pages: int) -> int:
    """The most that lives at once in a forward pass without gradient: inside a block's feed-forward.

    Then there are seven tensors of the hidden size (two residual streams and what the block's names still hold) and two of the inner size,
    before and after GELU. Pages that are cached un-roped are roped for one layer at a time.
    """
    model, width, tokens = sizes.transformer, _itemsize(config.generator.dtype), _frame_tokens(config, sizes)
    token = (model.dim * 7 + model.ffn_dim * 2) * width
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
    for linear in workload_of(config, config.name, model, sizes.vae).adapted.values():
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
    # In the feed-forward the gradients of its inner tensor and its output; in attention those of q, k and v, float32 sums of the first, and
    # the dropped gradients of the prefix, when what GELU kept is free again.
    feed_forward = tokens * (model.ffn_dim + model.dim) * width
    attention = tokens * model.dim * (6 * width + 4) + 2 * visible * frame * model.dim * width - tokens * model.ffn_dim * width
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
