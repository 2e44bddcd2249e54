"""Noise by key: every draw is a pure function of what it is for.

A draw is named by (seed, iteration, group, role, chunk, step, branch). The name is hashed to the key of a counter-based generator
(Philox), so no generator state exists: branches share noise by asking for the same name, a resumed run goes on as if it had never
stopped, and any number of processes or devices draws the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Literal, NamedTuple, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from arcopo_fast.rollout.sampler import StepRule


def keyed_rng(*name: int | str) -> np.random.Generator:
    """Return the random number generator of one named draw."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], *name: int | str) -> Tensor:
    """Return standard normal float32 numbers on the CPU for one named draw."""
    return torch.from_numpy(keyed_rng(*name).standard_normal(tuple(shape), dtype=np.float32))


class NoiseSource(Protocol):
    """A source of a sampler's noise, [B, F, C, h, w] float32 on the CPU (batch 1: the same for all videos)."""

    def initial(self, chunk: int) -> Tensor:
        """Return the noise that chunk `chunk` starts from."""

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Return the noise that takes the prediction of `step` to the next step."""


class ChunkShapes(Protocol):
    """The shape of a video's latents, chunk by chunk."""

    def chunk(self, index: int) -> tuple[int, int, int, int]:
        """Return [F, C, h, w] of chunk `index`."""


class GroupId(NamedTuple):
    """The name of a group, which keys all that is drawn for it and all that is kept of it.

    Attributes:
        seed: the run's.
        iteration: counted from 0.
        group: number of the group in its iteration.
    """

    seed: int
    iteration: int = 0
    group: int = 0


@dataclass(frozen=True)
class KeyedNoise:
    """The noise of one shared video: batch 1, so every branch that uses it uses the same tensor.

    Attributes:
        shape: of the video, chunk by chunk.
        id: the name of the group.
    """

    shape: ChunkShapes
    id: GroupId

    def initial(self, chunk: int) -> Tensor:
        """Return the noise that chunk `chunk` starts from, [1, F, C, h, w]."""
        return normal((1, *self.shape.chunk(chunk)), *self.id, "initial", chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Return the shared noise after `step`, [1, F, C, h, w]."""
        return normal((1, *self.shape.chunk(chunk)), *self.id, "renoise", chunk, step)

    def neighbors(self, chunk: int, members: Iterable[int], sigma: float) -> Tensor:
        """Return eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i for each i of `members`: [members, ...].

        eps* is the chunk's own initial noise. The norm is preserved in expectation; eps* is not a member (AR-CoPO, arXiv 2603.17461).
        """
        members = list(members)
        if sigma == 0:
            return self.initial(chunk).expand(len(members), *self.shape.chunk(chunk))
        return (1 - sigma**2) ** 0.5 * self.initial(chunk) + sigma * self._for_each("neighbour", chunk, members)

    def own(self, chunk: int, step: int, members: Iterable[int]) -> Tensor:
        """Return a re-noise of its own for each of `members`, [members, F, C, h, w]."""
        return self._for_each("own renoise", chunk, members, step)

    def _for_each(self, role: str, chunk: int, members: Iterable[int], *name: int) -> Tensor:
        return torch.cat([normal((1, *self.shape.chunk(chunk)), *self.id, role, chunk, *name, member) for member in members])


@dataclass(frozen=True)
class NoisePlan:
    """The noises that are a member's own, from the chunk on at which its group forks; all others are shared.

    Attributes:
        initial: strength sigma of the members' own initial noise; 0: shared, 1: a fresh one for each.
        rule: each member draws noise of its own at every step, through this rule; None: the sampler's rule, with shared draws.
        chunks: number of chunks for which noises are the members' own; None: all that the branches make.
        keep: what the group holds of these chunks besides the finished ones: "trajectory": x_t and x0hat of every step; "clean": nothing.
    """

    initial: float
    rule: StepRule | None = None
    chunks: int | None = 1
    keep: Literal["trajectory", "clean"] = "trajectory"


@dataclass(frozen=True)
class MemberNoise:
    """The noise of some members of a group by its plan, [members, F, C, h, w].

    Attributes:
        shared: the group's noise.
        plan: the noises that are the members' own.
        fork: number of the chunk at which the group forks.
        members: their numbers, in the order of the rows.
    """

    shared: KeyedNoise
    plan: NoisePlan
    fork: int
    members: Sequence[int]

    def is_own(self, chunk: int) -> bool:
        """Return whether the members have noises of their own in a chunk."""
        return self.fork <= chunk and (self.plan.chunks is None or chunk < self.fork + self.plan.chunks)

    def initial(self, chunk: int) -> Tensor:
        """Return the noise that each member's chunk `chunk` starts from."""
        return self.shared.neighbors(chunk, self.members, self.plan.initial if self.is_own(chunk) else 0)

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Return the noise after `step`, each member's own if the plan has a rule, else one row for all."""
        own = self.plan.rule is not None and self.is_own(chunk)
        return self.shared.own(chunk, step, self.members) if own else self.shared.renoise(chunk, step)


class StackedNoise:
    """Independent videos as one batch: each source's noise in its own row."""

    def __init__(self, sources: Sequence[NoiseSource]) -> None:
        self.sources = sources

    def initial(self, chunk: int) -> Tensor:
        """Return each source's initial noise in its own row."""
        return torch.cat([source.initial(chunk) for source in self.sources])

    def renoise(self, chunk: int, step: int) -> Tensor:
        """Return each source's noise after `step` in its own row."""
        return torch.cat([source.renoise(chunk, step) for source in self.sources])
