"""Noise by key: every draw is a pure function of what it is for.

A draw is named by (seed, iteration, group, role, chunk, step, branch). The name is hashed to the key of a counter-based generator
(Philox), so no generator state exists: branches share noise by asking for the same name, a resumed run goes on as if it had never
stopped, and any number of processes or devices draws the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(*name: int | str) -> np.random.Generator:
    """A generator for one named draw."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], *name: int | str) -> Tensor:
    """Standard normal float32 numbers on the CPU for one named draw."""
    return torch.from_numpy(generator(*name).standard_normal(tuple(shape), dtype=np.float32))


class NoiseSource(Protocol):
    """Where a sampler's noise comes from; both give [B, frames, C, h, w] float32 (batch 1: the same for all videos)."""

    def initial(self, chunk: int) -> Tensor:
        """The noise that chunk `chunk` starts from."""

    def renoise(self, chunk: int, step: int) -> Tensor:
        """The noise that takes the prediction of `step` to the next step."""


@dataclass(frozen=True)
class KeyedNoise:
    """The noise of one shared video: batch 1, so every branch that uses it uses the same tensor.

    shape(chunk) is [frames, C, h, w] of a chunk.
    """

    shape: Callable[[int], tuple[int, int, int, int]]
    seed: int
    iteration: int = 0
    group: int = 0

    def initial(self, chunk: int) -> Tensor:
        return normal((1, *self.shape(chunk)), self.seed, self.iteration, self.group, "initial", chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        return normal((1, *self.shape(chunk)), self.seed, self.iteration, self.group, "renoise", chunk, step)

    def neighbours(self, chunk: int, branches: int, sigma: float) -> Tensor:
        """eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i, i = 1..branches, around the chunk's own initial noise eps*: [branches, ...].

        The norm is preserved in expectation; eps* is not a member (AR-CoPO, arXiv 2603.17461).
        """
        if sigma == 0:
            return self.initial(chunk).expand(branches, *self.shape(chunk))
        return (1 - sigma**2) ** 0.5 * self.initial(chunk) + sigma * self._of_each("neighbour", chunk, branches)

    def own(self, chunk: int, step: int, branches: int) -> Tensor:
        """A re-noise of its own for every branch: [branches, ...]."""
        return self._of_each("own renoise", chunk, branches, step)

    def _of_each(self, role: str, chunk: int, branches: int, *more: int) -> Tensor:
        names: tuple[int | str, ...] = (self.seed, self.iteration, self.group, role, chunk, *more)
        return torch.cat([normal((1, *self.shape(chunk)), *names, branch) for branch in range(branches)])


@dataclass(frozen=True)
class OwnRenoise:
    """A shared source, but for the re-noise of one chunk, which differs by branch: draws [B, ...] of each step."""

    base: NoiseSource
    chunk: int
    draws: Sequence[Tensor]

    def initial(self, chunk: int) -> Tensor:
        return self.base.initial(chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        return self.draws[step] if chunk == self.chunk else self.base.renoise(chunk, step)

    def rows(self, branches: slice) -> OwnRenoise:
        return OwnRenoise(self.base, self.chunk, [draw[branches] for draw in self.draws])


class StackedNoise:
    """Independent videos as one batch: each source's noise in its own row."""

    def __init__(self, sources: Sequence[NoiseSource]) -> None:
        self.sources = sources

    def initial(self, chunk: int) -> Tensor:
        return torch.cat([source.initial(chunk) for source in self.sources])

    def renoise(self, chunk: int, step: int) -> Tensor:
        return torch.cat([source.renoise(chunk, step) for source in self.sources])
