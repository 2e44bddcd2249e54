"""The work of an AR-CoPO iteration, arithmetic and bytes moved, counted from its sizes: for plans, a run's report and the benchmarks.

FLOP of matrix products and convolutions, a multiplication and an addition being two, as torch.utils.flop_counter counts them. Counted is
what the algorithm needs, with what is shared computed once: one prefix, no clean pass after the last chunk, a clean pass up to the last
block's keys and values, the prompt's keys and values once, no gradient for the frozen weights and the cached keys and values.

Bytes (`traffic`) of the passes between the matrix products, each fused as far as a reduction over the row allows, each tensor read and
written once. Those of the VAE and the rewards are not counted, so their floor is FLOP alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple

import torch

from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.evaluation.windows import View
from arcopo_fast.model.sizes import CausalWanConfig, VAESizes
from arcopo_fast.planning.ceilings import Ceilings
from arcopo_fast.planning.layers import Linear, block_linears, decoder_convolutions
from arcopo_fast.rollout.cache import variant_of
from arcopo_fast.rollout.stream import VideoShape


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        linear, self_attention, cross_attention, lora, vae: FLOP by kind.
        traffic: bytes of the passes between them.
    """

    linear: float = 0.0
    self_attention: float = 0.0
    cross_attention: float = 0.0
    lora: float = 0.0
    vae: float = 0.0
    traffic: float = 0.0

    @property
    def flops(self) -> float:
        """FLOP of all kinds."""
        return self.linear + self.self_attention + self.cross_attention + self.lora + self.vae

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * a for a in astuple(self)))


class AttentionBackward(NamedTuple):
    """FLOP of attention's backward pass, in units of its forward's.

    Attributes:
        frozen: for keys that are constants.
        trained: for keys that get gradient.
    """

    frozen: float
    trained: float


NEEDED = AttentionBackward(1.5, 2.5)
"""Flash attention's, which computes the scores again: scores, dP and dQ; dK and dV for the chunk's own keys only."""

BLOCK_PASSES = 19
"""Passes over a tensor [tokens, E] between the matrix products of a block: norm and modulation 2; norm and RoPE of queries and keys 4;
norm of the cross-attention's queries 2; three residuals of 3, two of them with the next norm, 1 more. GELU is a product's epilogue."""
ADAMW_PASSES = 7
"""Parameter, gradient and both moments read; parameter and moments written."""


def forward(config: Config, model: CausalWanConfig, frames: int, visible: int, *, store_only: bool = False) -> Work:
    """Count one chunk of `frames` frames of one video through the network, `visible` frames in sight, itself included.

    A linear layer takes 2 x inputs x outputs for each token, attention 2 x keys x dim for the scores and as much for the values.

    Args:
        store_only: a clean pass, which ends with the last block's keys and values.
    """
    adapted = adapted_linears(config, model)
    dim, inner, layers = model.dim, model.ffn_dim, model.num_layers
    tokens, keys = frames * frame_tokens(config, model), visible * frame_tokens(config, model)
    patch, head = (channels * model.patch_size[1] * model.patch_size[2] for channels in (model.in_channels, model.out_channels))
    blocks = layers - 1 if store_only else layers
    linear = 2 * tokens * (patch * dim + blocks * (6 * dim**2 + 2 * dim * inner))
    linear += 2 * (model.freq_dim * dim + dim**2 + 6 * dim**2)  # the timestep: one row
    lora = 2 * tokens * blocks * _adapters(config, (layer for layer in adapted.values() if not layer.of_text))
    if store_only:  # the last block's keys and values
        linear += 2 * tokens * 2 * dim**2
        lora += 2 * tokens * _adapters(config, (adapted[name] for name in ("attn1.to_k", "attn1.to_v") if name in adapted))
    else:
        linear += 2 * tokens * dim * head
    return Work(
        linear=linear,
        self_attention=4 * tokens * keys * dim * blocks,
        cross_attention=4 * tokens * model.text_len * dim * blocks,
        lora=lora,
        traffic=BLOCK_PASSES * tokens * dim * blocks * itemsize(config.generator.dtype),
    )


def text(config: Config, model: CausalWanConfig, *, backward: bool = False) -> Work:
    """Count the prompt's embedder and every block's keys and values of it; with `backward`, also the gradient of their adapters."""
    dim = model.dim
    linear = 2 * model.text_len * (model.text_dim * dim + dim**2 + model.num_layers * 2 * dim**2)
    of_text = (layer for layer in adapted_linears(config, model).values() if layer.of_text)
    lora = 2 * model.text_len * model.num_layers * _adapters(config, of_text)
    # The embedding that goes in gets no gradient: of an adapter B A x those of A and B and of A x, 3 products of 4.
    return Work(linear=linear, lora=lora * (1 + 1.5 * backward))


def replay(config: Config, model: CausalWanConfig, frames: int, visible: int, backward: AttentionBackward = NEEDED) -> Work:
    """Count one (anchor, step) pair forward and backward, without its prompt.

    Frozen weights get no gradient, so a linear layer's backward is one product; what needs none either is the input of the first block's
    queries, keys and values, and of the patch embedding.
    """
    dim, tokens = model.dim, frames * frame_tokens(config, model)
    once = forward(config, model, frames, visible)
    patch = model.in_channels * model.patch_size[1] * model.patch_size[2]
    unneeded = 2 * tokens * (patch * dim + 3 * dim**2) + 2 * (model.freq_dim * dim + dim**2 + 6 * dim**2)
    own_share = frames / visible
    first_inputs = config.lora.rank * sum(layer.inputs for layer in adapted_linears(config, model).values() if layer.source == "norm1")
    return Work(
        linear=2 * once.linear - unneeded,
        self_attention=once.self_attention * (1 + own_share * backward.trained + (1 - own_share) * backward.frozen),
        cross_attention=once.cross_attention * (1 + backward.trained),
        lora=3 * once.lora - 2 * tokens * first_inputs,
        traffic=3 * once.traffic,
    )


def visible_frames(config: Config, model: CausalWanConfig, chunk: int) -> int:
    """Return how many frames a chunk sees, itself included."""
    until = sum(config.video.chunk_sizes[: chunk + 1])
    return min(until, config.cache.window or until)


def steps_of(config: Config, chunk: int) -> int:
    """Return T of a chunk."""
    return len(config.sampler.first_chunk_steps or config.sampler.steps) if chunk == 0 else len(config.sampler.steps)


def decode(sizes: VAESizes, height: int, width: int, frames: int, *, start: bool = True) -> Work:
    """Count `frames` latent frames of one video through the VAE's decoder; `start`: the first of them is the video's first."""
    alone = int(start and frames > 0)  # the first frame has a call of its own
    return Work(vae=alone * _decode_frame(sizes, height, width, True) + (frames - alone) * _decode_frame(sizes, height, width, False))


@cache
def _decode_frame(sizes: VAESizes, height: int, width: int, first: bool) -> float:
    """Count one latent frame. A video's first gives one pixel frame: no temporal upsampler, a convolution over 3 frames, has anything to
    do."""
    pixels, top = height * width, decoder_convolutions(sizes)[0].outputs
    flops = 2.0 * pixels * sizes.z_dim**2 + 4 * pixels**2 * top  # the way in, and attention over the pixels of a frame
    for conv in decoder_convolutions(sizes):
        if not (first and conv.taps == 3):
            outputs = pixels * conv.spatial**2 * (1 if first else conv.temporal)
            flops += 2 * outputs * conv.inputs * conv.outputs * conv.taps
    return flops


def iteration(config: Config, model: CausalWanConfig, vae: VAESizes | None, pivot: int) -> dict[str, Work]:
    """Count the work of a group of AR-CoPO on its own rollouts, by stage; `pivot` counts from 0, without a `vae` nothing is decoded."""
    shape, objective, group = VideoShape.of(config.video, model.in_channels), config.objective, config.rollout.group_size

    def chunks(start: int, stop: int, clean: bool) -> Work:
        """Count denoising, or the clean passes, of chunks [start, stop) of one video."""
        total = Work()
        for chunk in range(start, stop):
            once = forward(config, model, shape.chunk_frames[chunk], visible_frames(config, model, chunk), store_only=clean)
            total += once * (1 if clean else steps_of(config, chunk))
        return total

    kind, horizon = objective_class(objective.kind), config.rollout.horizon
    stop, made = shape.chunks if horizon is None else pivot + horizon + 1, group + config.anchored
    train, old_policy = Work(), Work()
    for chunk in range(pivot, min(pivot + (kind.explored_chunks(objective) or shape.chunks), stop)):
        frames, visible = shape.chunk_frames[chunk], visible_frames(config, model, chunk)
        items = kind.samples_per_update(objective, steps_of(config, chunk), group)
        prompts = -(-items // (objective.micro_batch or items))  # the prompt is encoded once for each micro-batch
        train += replay(config, model, frames, visible) * items + text(config, model, backward=True) * prompts
        old_policy += forward(config, model, frames, visible) * items + text(config, model) * prompts
    stages = {
        "prefix": chunks(0, pivot, False) + chunks(0, pivot, True),
        "denoise": chunks(pivot, stop, False) * made,
        "clean": chunks(pivot, stop - 1, True) * made,
        "replay": train * objective.updates + old_policy * (objective.updates - 1),
        "optimizer": Work(traffic=ADAMW_PASSES * 4 * lora_parameters(config, model)) * objective.updates,
    }
    if vae is not None:
        view, before = View.of(config, pivot), sum(shape.chunk_frames[:pivot])
        shared = before - view.frames.start + view.warmup
        tail = decode(vae, shape.height, shape.width, view.frames.stop - before, start=not shared)
        stages["decode"] = decode(vae, shape.height, shape.width, shared) + tail * made
    return {name: work for name, work in stages.items() if work != Work()}


def floors(config: Config, model: CausalWanConfig, vae: VAESizes, ceilings: Ceilings) -> dict[int, dict[str, float]]:
    """Return the seconds below which no stage of a recipe's iteration gets on a device, by pivot, from 1: empty where nothing is counted.

    Counted are iterations of AR-CoPO on its own rollouts, each frame cached once. Matrix products and convolutions at the ceiling of a
    large matrix product, then the passes between them at that of a copy; rewards are not counted.
    """
    forks = config.rollout.pivots_per_video > 1  # which share a video
    if config.objective.kind != "copo" or config.train.buffer is not None or variant_of(config.cache).recomputed or forks:
        return {}
    return {
        pivot + 1: {
            stage: config.rollout.groups * ceilings.seconds(work.flops, work.traffic)
            for stage, work in iteration(config, model, vae, pivot).items()
        }
        for pivot in range(config.rollout.pivots(config.video.count))
    }


def adapted_linears(config: Config, model: CausalWanConfig) -> dict[str, Linear]:
    """Return the linear layers of a block that have an adapter, by name. Targets outside of the blocks, small layers, are left out."""
    linears, targets = block_linears(model).items(), config.lora.targets
    return {name: linear for name, linear in linears if any(f".{name}".endswith(f".{target}") for target in targets)}


def lora_parameters(config: Config, model: CausalWanConfig) -> int:
    """Return how many parameters the adapters of all blocks have."""
    return model.num_layers * _adapters(config, adapted_linears(config, model).values())


def _adapters(config: Config, layers: Iterable[Linear]) -> int:
    """Count the parameters of some layers' adapters; a row that goes through them takes one multiplication and one addition for each."""
    return config.lora.rank * sum(layer.inputs + layer.outputs for layer in layers)


def frame_tokens(config: Config, model: CausalWanConfig) -> int:
    """Return the tokens of a latent frame."""
    return model.tokens_per_frame(config.video.latent_height, config.video.latent_width)


def itemsize(dtype: str) -> int:
    """Return the bytes of an element of a recipe's dtype."""
    size: int = getattr(torch, dtype).itemsize
    return size
