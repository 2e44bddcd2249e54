"""What an AR-CoPO iteration has to compute and move, counted from its sizes: for plans, a run's report and the benchmarks.

FLOP of matrix products and convolutions, a multiplication and an addition being two, as torch.utils.flop_counter counts them. Counted is
what the algorithm needs, with what is shared computed once: one prefix, no clean pass after the last chunk, a clean pass up to the last
block's keys and values, the prompt's keys and values once, no gradient for the frozen weights and the cached keys and values.

Bytes (`traffic`) of the passes between the matrix products, each fused as far as a reduction over the row allows, each tensor read and
written once. Those of the VAE and the rewards are not counted, so their floor is FLOP alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from arcopo_fast.model.lora import BLOCK_TARGETS
from arcopo_fast.model.sizes import CausalWanConfig, Linear, VAESizes, block_linears, decoder_convolutions
from arcopo_fast.objectives.copo import CopoSettings
from arcopo_fast.rollout.cache import CachePolicy
from arcopo_fast.rollout.engine import SamplerSettings, VideoShape


@dataclass(frozen=True)
class Workload:
    """One iteration: sizes and settings, of the engine and of the reference path alike."""

    name: str
    model: CausalWanConfig
    shape: VideoShape
    sampler: SamplerSettings
    policy: CachePolicy = CachePolicy()
    group_size: int = 12
    noise_strength: float = 0.5
    copo: CopoSettings = CopoSettings()
    lora_rank: int = 64
    lora_alpha: float = 128
    lora_targets: tuple[str, ...] = BLOCK_TARGETS
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    gradient_clip: float | None = 1.0
    advantage_std_floor: float = 0.0
    dtype: torch.dtype = torch.float32
    branches_per_wave: int | None = None
    decode_branches: int | None = None
    decode_frames: int = 1
    vae: VAESizes | None = field(default_factory=VAESizes)

    @property
    def frame_tokens(self) -> int:
        return self.model.tokens_per_frame(self.shape.height, self.shape.width)

    @property
    def video_tokens(self) -> int:
        """Of the finished videos of a group."""
        return self.group_size * self.shape.frames * self.frame_tokens

    @property
    def adapted(self) -> dict[str, Linear]:
        """The linear layers of a block that have an adapter, by name. Targets outside of the blocks, small layers, are left out."""
        linears = block_linears(self.model).items()
        return {name: linear for name, linear in linears if any(f".{name}".endswith(f".{target}") for target in self.lora_targets)}

    @property
    def middle(self) -> int:
        """The pivot in the middle, counted from 0."""
        return self.shape.chunks // 2

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Work:
    """FLOP by kind, and bytes of the passes between them."""

    linear: float = 0.0
    self_attention: float = 0.0
    cross_attention: float = 0.0
    lora: float = 0.0
    vae: float = 0.0
    traffic: float = 0.0

    @property
    def flops(self) -> float:
        return self.linear + self.self_attention + self.cross_attention + self.lora + self.vae

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * a for a in astuple(self)))


class AttentionBackward(NamedTuple):
    """FLOP of attention's backward pass over its forward's: of keys that are constants, and of keys that get gradient."""

    frozen: float
    trained: float


NEEDED = AttentionBackward(1.5, 2.5)
"""Flash attention's, which computes the scores again: scores, dP and dQ; dK and dV for the chunk's own keys only."""
DENSE = AttentionBackward(2.5, 2.5)
"""What kernels without a notion of frozen keys do."""
STORED = AttentionBackward(1.0, 2.0)
"""Where the forward keeps the scores: dP and dQ, dK and dV."""

BLOCK_PASSES = 19
"""Passes over a tensor [tokens, E] between the matrix products of a block: norm and modulation 2; norm and RoPE of queries and keys 4;
norm of the cross-attention's queries 2; three residuals of 3, two of them with the next norm, 1 more. GELU is a product's epilogue."""
ADAMW_PASSES = 7
"""Parameter, gradient and both moments read; parameter and moments written."""


def forward(workload: Workload, frames: int, visible: int, *, store_only: Literal["", "early", "whole"] = "") -> Work:
    """One chunk of `frames` frames of one video through the network, `visible` frames in sight, itself included.

    store_only: a clean pass; "early" ends with the last block's keys and values, "whole" is a full forward.
    """
    config, adapted = workload.model, workload.adapted
    dim, inner, layers = config.dim, config.ffn_dim, config.num_layers
    tokens, keys = frames * workload.frame_tokens, visible * workload.frame_tokens
    patch = config.in_channels * config.patch_size[1] * config.patch_size[2]
    head = config.out_channels * config.patch_size[1] * config.patch_size[2]
    early = store_only == "early"
    blocks = layers - 1 if early else layers
    linear = 2 * tokens * (patch * dim + blocks * (6 * dim**2 + 2 * dim * inner))
    linear += 2 * (config.freq_dim * dim + dim**2 + 6 * dim**2)  # the timestep: one row
    lora = 2 * tokens * blocks * _adapters(workload, (layer for layer in adapted.values() if not layer.of_text))
    if early:  # the last block's keys and values
        linear += 2 * tokens * 2 * dim**2
        lora += 2 * tokens * _adapters(workload, (adapted[name] for name in ("attn1.to_k", "attn1.to_v") if name in adapted))
    else:
        linear += 2 * tokens * dim * head
    return Work(
        linear=linear,
        self_attention=4 * tokens * keys * dim * blocks,
        cross_attention=4 * tokens * config.text_len * dim * blocks,
        lora=lora,
        traffic=BLOCK_PASSES * tokens * dim * blocks * workload.dtype.itemsize,
    )


def text(workload: Workload, *, backward: bool = False) -> Work:
    """The prompt's embedder and every block's keys and values of it; with `backward`, and the gradient of their adapters."""
    config, dim = workload.model, workload.model.dim
    linear = 2 * config.text_len * (config.text_dim * dim + dim**2 + config.num_layers * 2 * dim**2)
    of_text = (layer for layer in workload.adapted.values() if layer.of_text)
    lora = 2 * config.text_len * config.num_layers * _adapters(workload, of_text)
    # The embedding that goes in gets no gradient: of an adapter B A x those of A and B and of A x, 3 products of 4.
    return Work(linear=linear, lora=lora * (1 + 1.5 * backward))


def replay(workload: Workload, frames: int, visible: int, backward: AttentionBackward = NEEDED) -> Work:
    """One (anchor, step) pair forward and backward, without its prompt.

    Frozen weights get no gradient, so a linear layer's backward is one product; what needs none either is the input of the first block's
    queries, keys and values, and of the patch embedding.
    """
    config, dim, tokens = workload.model, workload.model.dim, frames * workload.frame_tokens
    once = forward(workload, frames, visible)
    patch = config.in_channels * config.patch_size[1] * config.patch_size[2]
    unneeded = 2 * tokens * (patch * dim + 3 * dim**2) + 2 * (config.freq_dim * dim + dim**2 + 6 * dim**2)
    own = frames / visible
    first = workload.lora_rank * sum(layer.inputs for layer in workload.adapted.values() if layer.source == "norm1")
    return Work(
        linear=2 * once.linear - unneeded,
        self_attention=once.self_attention * (1 + own * backward.trained + (1 - own) * backward.frozen),
        cross_attention=once.cross_attention * (1 + backward.trained),
        lora=3 * once.lora - 2 * tokens * first,
        traffic=3 * once.traffic,
    )


def visible_frames(workload: Workload, chunk: int) -> int:
    """Frames in sight of a chunk, itself included."""
    until = sum(workload.shape.chunk_frames[: chunk + 1])
    return min(until, workload.policy.window or until)


def steps_of(workload: Workload, chunk: int) -> int:
    """T of a chunk."""
    first = workload.sampler.first_chunk_steps
    return len(first) if chunk == 0 and first is not None else len(workload.sampler.steps)


def decode(sizes: VAESizes, height: int, width: int, frames: int, *, start: bool = True) -> Work:
    """`frames` latent frames of one video through the VAE's decoder; `start`: the first of them is the video's first."""
    first = int(start and frames > 0)
    return Work(vae=first * _decode_frame(sizes, height, width, True) + (frames - first) * _decode_frame(sizes, height, width, False))


@cache
def _decode_frame(sizes: VAESizes, height: int, width: int, first: bool) -> float:
    """A video's first latent frame gives one pixel frame: no temporal upsampler, a convolution over 3 frames, has anything to do."""
    pixels, top = height * width, decoder_convolutions(sizes)[0].outputs
    flops = 2.0 * pixels * sizes.z_dim**2 + 4 * pixels**2 * top  # the way in, and attention over the pixels of a frame
    for conv in decoder_convolutions(sizes):
        if not (first and conv.taps == 3):
            outputs = pixels * conv.spatial**2 * (1 if first else conv.temporal)
            flops += 2 * outputs * conv.inputs * conv.outputs * conv.taps
    return flops


def iteration(workload: Workload, pivot: int) -> dict[str, Work]:
    """The work of each stage that has any; `pivot` counts from 0."""
    shape, copo, group = workload.shape, workload.copo, workload.group_size

    def chunks(first: int, last: int, clean: bool) -> Work:
        """Denoising, or the clean passes, of chunks [first, last) of one video."""
        total = Work()
        for chunk in range(first, last):
            frames, visible = shape.chunk_frames[chunk], visible_frames(workload, chunk)
            once = forward(workload, frames, visible, store_only="early" if clean else "")
            total += once * (1 if clean else steps_of(workload, chunk))
        return total

    last = shape.chunks - 1
    frames, visible = shape.chunk_frames[pivot], visible_frames(workload, pivot)
    items = min(copo.largest_update, group) * steps_of(workload, pivot)
    prompts = -(-items // (copo.micro_batch or items))  # the prompt is encoded once for each micro-batch
    train = replay(workload, frames, visible) * items + text(workload, backward=True) * prompts
    old = forward(workload, frames, visible) * items + text(workload) * prompts
    parameters = lora_parameters(workload)
    stages = {
        "prefix": chunks(0, pivot, False) + chunks(0, pivot, True),
        "denoise": chunks(pivot, shape.chunks, False) * group,
        "clean": chunks(pivot, last, True) * group,
        "replay": train * copo.updates + old * (copo.updates - 1),
        "optimiser": Work(traffic=ADAMW_PASSES * 4 * parameters) * copo.updates,
    }
    if workload.vae is not None:
        before = sum(shape.chunk_frames[:pivot])
        own = decode(workload.vae, shape.height, shape.width, shape.frames - before, start=not pivot)
        stages["decode"] = decode(workload.vae, shape.height, shape.width, before) + own * group
    return {name: work for name, work in stages.items() if work != Work()}


def lora_parameters(workload: Workload) -> int:
    return workload.model.num_layers * _adapters(workload, workload.adapted.values())


def _adapters(workload: Workload, layers: Iterable[Linear]) -> int:
    """Parameters of the adapters of some layers; a row that goes through them takes one multiplication and one addition for each."""
    return workload.lora_rank * sum(layer.inputs + layer.outputs for layer in layers)
