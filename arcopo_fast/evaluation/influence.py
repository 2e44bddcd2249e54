"""The influence of each noise: replace one noise tensor at a time, everything else frozen, and look at the change of the output.

In few-step autoregressive generators the initial noise of a chunk decides what it shows and re-noises barely matter (AR-CoPO, Figure 6).
That is why AR-CoPO explores through it, and a toy world must share the property to be worth training on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import pages_for
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoiseSource, StackedNoise
from arcopo_fast.rollout.stream import Stream, VideoShape


@dataclass(frozen=True)
class Replaced:
    """A noise source with one tensor of chunk `chunk` taken from another: the initial noise (step None) or one re-noise."""

    base: NoiseSource
    other: NoiseSource
    chunk: int
    step: int | None

    def initial(self, chunk: int) -> Tensor:
        return (self.other if (chunk, None) == (self.chunk, self.step) else self.base).initial(chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        return (self.other if (chunk, step) == (self.chunk, self.step) else self.base).renoise(chunk, step)


@dataclass(frozen=True)
class Substitutions:
    """A batch of videos that differ in one noise tensor of chunk `pivot`: row 0 has none replaced, row 1 + i has `replaced[i]`.

    replaced: (index of the source that the tensor comes from, step; None: the initial noise). latents: of each chunk, [1, F, C, h, w]
    before the pivot and [rows, F, C, h, w] float32 from it on. pivot counts from 0.
    """

    pivot: int
    replaced: Sequence[tuple[int, int | None]]
    latents: list[Tensor]

    @property
    def tail(self) -> Tensor:
        """Latents from the pivot on, [rows, F, C, h, w]."""
        return torch.cat(self.latents[self.pivot :], dim=1)


def noise_name(step: int | None) -> str:
    """Return the name of the noise drawn after `step`, counted from 0: "renoise1", ...; "initial" for None, the initial noise."""
    return "initial" if step is None else f"renoise{step + 1}"


def noise_tensors(engine: Engine, chunk: int) -> list[int | None]:
    """Return a chunk's draws: its initial noise (None) and, unless the sampler is deterministic, the re-noise of each step but the last."""
    return [None, *(range(len(engine.steps_of(chunk)) - 1) if engine.rule.random else ())]


def mean_squared_change(rows: Tensor) -> Tensor:
    """Return the change of each row but the first, against the first: [B, ...] -> [B - 1]."""
    return (rows[1:] - rows[:1]).square().flatten(1).mean(dim=1)


@torch.no_grad()
def substitute(
    engine: Engine,
    text: Tensor,
    noise: NoiseSource,
    others: Sequence[NoiseSource],
    *,
    pivots: Collection[int] | None = None,
    branches: int | None = None,
) -> Iterator[Substitutions]:
    """The video of `noise`, and for each pivot and each noise tensor of that chunk the video with the tensor taken from each of `others`.

    The context before a pivot is generated once and forked, and grows from pivot to pivot.

    Args:
        text: [1, length, text_dim].
        noise, others: of one video each.
        pivots: chunks, counted from 0; None: all.
        branches: videos that are finished at once, the unchanged one included, which is among each batch, so that only equal batches are
            compared; at least 2; None: all of a pivot. The engine's pool holds as many.

    Yields:
        each batch, pivot by pivot; the tensors of `others[0]` first.
    """
    if branches is not None and branches < 2:
        raise ValueError(f"branches is {branches}; a changed video is finished beside the unchanged one: give at least 2, or None for all")
    pivots = range(engine.shape.chunks) if pivots is None else pivots
    prefix = engine.start(text)
    try:
        for pivot in range(max(pivots, default=-1) + 1):
            tensors = [(other, step) for other in range(len(others)) for step in noise_tensors(engine, pivot)] if pivot in pivots else []
            at_once = branches - 1 if branches else len(tensors)
            for first in range(0, len(tensors), at_once or 1):
                replaced = tensors[first : first + at_once]
                sources = [noise, *(Replaced(noise, others[other], pivot, step) for other, step in replaced)]
                yield Substitutions(pivot, replaced, _finish(engine, prefix, pivot, StackedNoise(sources)))
            if pivot < max(pivots):
                engine.extend(prefix, pivot, noise.initial(pivot), noise, last=False)
    finally:
        prefix.cache.release()


def _finish(engine: Engine, prefix: Stream, pivot: int, noise: StackedNoise) -> list[Tensor]:
    """Fork the context for every source of `noise` and generate the chunks from the pivot on; latents as in `Substitutions`."""
    rows, chunks = len(noise.sources), engine.shape.chunks
    stream = replace(prefix, cache=prefix.cache.fork(rows), latents=list(prefix.latents))
    try:
        stream.cache.reserve(engine.plan(pivot, rows).tail)
        for chunk in range(pivot, chunks):
            engine.extend(stream, chunk, noise.initial(chunk), noise, last=chunk == chunks - 1)
    finally:
        stream.cache.release()
    return stream.latents


def noise_influence(model: CausalWan, text: Tensor, shape: VideoShape, sampler: SamplerConfig, *, seed: int) -> dict[str, list[float]]:
    """Return the mean squared change of the whole latent video, averaged over prompts, for each pivot chunk.

    Args:
        text: prompts [B, length, text_dim], one video each.
        sampler: with at least one re-noise.

    Returns:
        {"initial": [L], "renoise1": [L], ..., "ratio": [L]}; ratio is the initial noise's change over the largest change of any re-noise.
    """
    cache = CacheConfig()
    engine = Engine(model, shape, sampler, cache, pages=pages_for(cache, shape.chunk_frames, 1 + len(sampler.steps)))
    changes: dict[str, list[float]] = {}
    for row in range(len(text)):
        noise, other = (KeyedNoise(shape, GroupId(seed + offset, group=row)) for offset in (0, 1))
        for videos in substitute(engine, text[row : row + 1], noise, [other]):
            tail = videos.tail
            of_whole = mean_squared_change(tail) * (tail.shape[1] / shape.frames)  # nothing changes before the pivot
            for (_, step), change in zip(videos.replaced, of_whole.tolist()):
                changes.setdefault(noise_name(step), [0.0] * shape.chunks)[videos.pivot] += change / len(text)
    renoises = [values for name, values in changes.items() if name != "initial"]
    return changes | {"ratio": [a / max(b) for a, *b in zip(changes["initial"], *renoises)]}
