"""A group of videos, and what it is made of: the engine's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from arcopo_fast.rollout.history import History
from arcopo_fast.rollout.noise import GroupId, NoisePlan
from arcopo_fast.rollout.sampler import StepRule, Steps, Trajectory
from arcopo_fast.rollout.stream import Stream


@dataclass(frozen=True)
class Branching:
    """The branches of a group, wherever it forks.

    Attributes:
        members: G.
        plan: the noises that they do not share.
        horizon: H, the chunks that they go on for after the pivot chunk; None: to the end of the video.
        part: make only these members; None: all.
        branches_per_wave: finish at most so many at once; less K/V memory, the same result within rounding. None: all.
        kept: latent frames before the pivot that a group keeps with a window, at least; None: all of them.
        anchor: make one more branch, with no noise of its own, which is no member.
    """

    members: int
    plan: NoisePlan
    horizon: int | None = None
    part: range | None = None
    branches_per_wave: int | None = None
    kept: int | None = None
    anchor: bool = False

    @property
    def wave_size(self) -> int:
        """The branches that are finished at once, if the memory is enough."""
        made = self.members if self.part is None else len(self.part)
        return min(self.branches_per_wave or made, made)

    def chunks(self, pivot: int, of: int) -> range:
        """Return the chunks that a group which forks at `pivot` makes, of the video's."""
        return range(pivot, of if self.horizon is None else min(pivot + self.horizon + 1, of))


class Fork(NamedTuple):
    """The point where a wave of a group's branches begins.

    Attributes:
        prefix: the shared videos so far.
        chunks: numbers of the chunks that come next; the first one is the pivot.
        switches: prompts [1, length, text_dim] by the chunk after the pivot that is the first to use them.
        tails: for each branch the pages set aside for its tail; the first wave takes them out of these lists.
        tail_pages: pages that a tail needs.
    """

    prefix: Stream
    chunks: range
    switches: Mapping[int, Tensor]
    tails: list[list[int]]
    tail_pages: int


class Wave(NamedTuple):
    """Branches that were finished together.

    Attributes:
        trajectories: of the chunks with noises of their own, by number.
        tails: latents from the pivot on, [g, F1, C, h, w].
    """

    trajectories: dict[int, Trajectory]
    tails: Tensor


@dataclass(frozen=True)
class Samples:
    """Noisy inputs of one chunk of a group's videos, of some members, at some timesteps: N samples to predict.

    Attributes:
        chunk: number of the chunk in the video.
        members: [N] int64.
        x: noisy inputs x_t, [N, F, C, h, w] float32.
        timesteps, sigmas: [N] float32.
        steps: [N] int64, steps of the sampler where x is what the rollout had there; else None.
    """

    chunk: int
    members: Tensor
    x: Tensor
    timesteps: Tensor
    sigmas: Tensor
    steps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.members)

    @classmethod
    def noised(cls, chunk: int, clean: Tensor, noise: Tensor, steps: Steps, step: Tensor) -> Samples:
        """Return every member's clean chunk [G, F, C, h, w], noised to x_t = (1 - sigma) x_0 + sigma noise at `step` [G] of the sampler."""
        timesteps, sigmas = (torch.tensor(table)[step].to(clean.device) for table in (steps.timesteps, steps.sigmas))
        sigma = sigmas.view(-1, 1, 1, 1, 1)
        return cls(chunk, torch.arange(len(clean)), (1 - sigma) * clean + sigma * noise.to(clean), timesteps, sigmas)

    def part(self, cut: slice) -> Samples:
        """Return the samples of a slice."""
        steps = None if self.steps is None else self.steps[cut]
        return Samples(self.chunk, self.members[cut], self.x[cut], self.timesteps[cut], self.sigmas[cut], steps)

    def split(self, size: int) -> list[Samples]:
        """Return parts of at most `size` samples."""
        return [self.part(slice(start, start + size)) for start in range(0, len(self), size)]


@dataclass
class Explored:
    """A chunk in which the G members have noises of their own, as the rollout made it.

    Attributes:
        steps: the sampler's, T of them.
        inputs, predictions: x_t and x0hat_t, [T, G, F, C, h, w] float32.
    """

    steps: Steps
    inputs: Tensor
    predictions: Tensor


@dataclass
class Group:
    """G videos that share their chunks before the pivot, and from there on differ in the noises that a plan names.

    It holds the prefix's pages: release it, or use it as a context manager. It can also
    wait in host memory without them, see `put_away`.

    Attributes:
        id: the name of its video, which keys the draws of its noises.
        pivot: the first chunk that is not shared, counted from 0.
        prefix: the context of the pivot chunk; None where its pages were given back.
        history: what the context was made of.
        tails: [G, F1, C, h, w] float32, from the pivot to the horizon; in a group out of a buffer the explored chunks' alone, where there
            are any.
        explored: the pivot chunk and those after it in which the members have noises of their own, by number; empty where the plan keeps
            only finished chunks.
        rule: takes these chunks from step to step.
        switches: prompts [1, length, text_dim] by the chunk after the pivot that is the first to use them.
        kept: see `Branching`.
        fork: number of the group among those of its video.
        anchor: the branch with no noise of its own, [1, F1, C, h, w] as `tails`; None: there is none, or it is judged and gone.
    """

    id: GroupId
    pivot: int
    prefix: Stream | None
    history: History
    tails: Tensor
    explored: dict[int, Explored]
    rule: StepRule
    switches: Mapping[int, Tensor] = field(default_factory=dict)
    kept: int | None = None
    fork: int = 0
    anchor: Tensor | None = None

    @property
    def key(self) -> tuple[int | str, ...]:
        """Name that keys the draws of its updates: that of its video and, of a later fork off the same video, its number."""
        return (*self.id, "fork", self.fork) if self.fork else tuple(self.id)

    @property
    def text(self) -> Tensor:
        """Embedding of the pivot chunk's prompt, [1, length, text_dim]."""
        return self.text_of(self.pivot)

    def text_of(self, chunk: int) -> Tensor:
        """Return the embedding of the prompt of a chunk from the pivot on, [1, length, text_dim]."""
        return next((text for first, text in sorted(self.switches.items(), reverse=True) if first <= chunk), self.history.prompt)

    @property
    def prefix_latents(self) -> Tensor:
        """Latents before the pivot, [1, F0, C, h, w] float32: all, or the newest chunks that hold `kept` frames."""
        chunks = [chunk.to(self.tails.device) for chunk in self.history.newest(self.kept)]
        return torch.cat(chunks, dim=1) if chunks else self.tails[:1, :0]

    @property
    def size(self) -> int:
        """Number of members, G."""
        return len(self.tails)

    @property
    def steps(self) -> Steps:
        """Steps of the pivot chunk."""
        return self.explored[self.pivot].steps

    @property
    def inputs(self) -> Tensor:
        """Inputs x_t of the pivot chunk, [T, G, F, C, h, w]."""
        return self.explored[self.pivot].inputs

    @property
    def predictions(self) -> Tensor:
        """Predictions x0hat_t of the pivot chunk, [T, G, F, C, h, w]."""
        return self.explored[self.pivot].predictions

    def samples(self, steps: Tensor, members: Tensor, chunk: int | None = None) -> Samples:
        """Return an explored chunk, the pivot by default, as the rollout had it at `steps` [N] of the sampler in `members` [N]."""
        chunk = self.pivot if chunk is None else chunk
        explored = self.explored[chunk]
        tables = explored.steps.timesteps, explored.steps.sigmas
        timesteps, sigmas = (torch.tensor(table)[steps].to(explored.inputs.device) for table in tables)
        return Samples(chunk, members, explored.inputs[steps, members], timesteps, sigmas, steps)

    def own_chunks(self, chunk_frames: Sequence[int]) -> dict[int, Tensor]:
        """Return the members' own chunks [G, F, C, h, w] by number, given the frames of each chunk of the video."""
        sizes, start = chunk_frames[self.pivot :], 0
        chunks = {}
        for chunk, frames in enumerate(sizes, self.pivot):
            if start + frames <= self.tails.shape[1]:  # a group out of a buffer has the pivot chunk's alone
                chunks[chunk] = self.tails[:, start : start + frames]
            start += frames
        return chunks

    def videos(self) -> Tensor:
        """Return the latents of every member, [G, F, C, h, w], from the first one that is kept of the prefix on."""
        prefix = self.prefix_latents
        return torch.cat([prefix.expand(self.size, *prefix.shape[1:]), self.tails], dim=1)

    def release(self) -> None:
        """Give the prefix's pages back; once is enough."""
        if self.prefix is not None:
            self.prefix.cache.release()
            self.prefix = None

    def put_away(self) -> None:
        """Give the prefix's pages back, and wait in host memory until `Engine.bring_back`."""
        self.release()
        self.move("cpu")
        self.history.move("cpu")

    def move(self, device: torch.device | str) -> None:
        """Move the tensors to a device, but for the history, of which only a rebuilt context needs anything."""
        self.tails = self.tails.to(device)
        for explored in self.explored.values():
            explored.inputs, explored.predictions = explored.inputs.to(device), explored.predictions.to(device)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
