"""The rollout engine: generate the shared context once, fork at the pivot, finish the branches as one batch.

`rollout` makes a group for AR-CoPO out of a stream, see `rollout.stream`; `predict` predicts samples of the group's chunks again, with
gradient through that chunk only.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Collection, Generator, Iterator, Mapping, Sequence

import torch
from arcopo_kernels.paging import GroupPlan
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rollout.cache import plan_pages, visible_frames
from arcopo_fast.rollout.contexts import Contexts
from arcopo_fast.rollout.group import Branching, Explored, Fork, Group, Samples, Wave
from arcopo_fast.rollout.history import History
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, MemberNoise, NoisePlan
from arcopo_fast.rollout.sampler import Trajectory, predict
from arcopo_fast.rollout.stream import Stream, Streamer
from arcopo_fast.runtime.profiling import stage


class Engine(Streamer):
    """A generator at work: it makes videos and groups of them, and predicts their samples again.

    Attributes:
        largest_wave: branches that fit the memory at once; None: as many as asked for.
    """

    largest_wave: int | None = None  # set when a larger one ran out of memory

    def plan(self, pivot: int, branches: int, *, horizon: int | None = None, switches: Collection[int] = ()) -> GroupPlan:
        """Return the pages of a group that forks at `pivot`, for a prompt that changes with the chunks `switches`."""
        return plan_pages(self.cache, self.shape.chunk_frames, pivot, branches, horizon=horizon, switches=switches)

    # Groups

    def rollout(self, text: Tensor, group: GroupId, *, pivot: int, switches: Mapping[int, Tensor] | None = None, **branching: Any) -> Group:
        """Make a group of videos (AR-CoPO, one iteration, steps 2 to 4).

        Args:
            text: [1, length, text_dim].
            group: names every draw.
            pivot: the chunk to fork at, counted from 0.
            switches: see `stream`.
            branching: see `Branching`.
        """
        return next(self.forks(text, group, [pivot], Branching(**branching), switches))

    @torch.no_grad()
    def forks(
        self, text: Tensor, group: GroupId, pivots: Sequence[int], branching: Branching, switches: Mapping[int, Tensor] | None = None
    ) -> Generator[Group, None, None]:
        """Yield a group for each of the pivots, all forks of one video, which itself goes on with the shared noises.

        Who takes a group releases it. As long as it holds its context, it shares the pages of what the video still sees.

        Args:
            text: [1, length, text_dim].
            group: names every draw.
            pivots: the chunks to fork at, counted from 0, rising.
            branching: of every group.
            switches: see `stream`.
        """
        ends = [pivot + (branching.horizon or 0) for pivot in pivots]
        if not pivots or pivots[0] < 0 or ends[-1] >= self.shape.chunks or any(a >= b for a, b in pairwise(pivots)):
            after = f" and {branching.horizon} after it" if branching.horizon else ""
            raise ValueError(
                f"pivot {', '.join(map(str, pivots))} is not a chunk of this video{after}; it has {self.shape.chunks}, counted from 0, and "
                "pivots rise"
            )
        device = self.model.device  # once, and not for every replay
        texts = {chunk: later.to(device) for chunk, later in self.placed(switches or {}).items()}
        text = texts.pop(0, text.to(device))
        stream = self.start(text)
        stream.history, stream.kept = History(text), branching.kept
        branches = min(branching.wave_size, self.largest_wave or branching.wave_size)
        plans = [self.plan(pivot, branches, horizon=branching.horizon, switches=texts) for pivot in pivots]
        reserved = self.pool.reserve(max(plans, key=lambda plan: plan.pages))  # what does not fit fails before a frame is computed
        stream.cache.reserved = [reserved.prefix]
        held: list[Stream] = [stream]
        try:
            for number, (pivot, plan) in enumerate(zip(pivots, plans)):
                self._go_on(stream, KeyedNoise(self.shape, group), texts, pivot)
                if number < len(pivots) - 1:
                    held.append(replace(stream, cache=stream.cache.fork(1), latents=list(stream.latents), history=stream.history.copy()))
                later = {chunk: later for chunk, later in texts.items() if chunk > pivot}
                fork = Fork(held[-1], branching.chunks(pivot, self.shape.chunks), later, reserved.tails, plan.tail)
                made = self._group(fork, group, branching)
                held.pop()
                yield replace(made, fork=number)
        finally:
            for trunk in held:
                trunk.cache.release()
            reserved.release()

    def _go_on(self, stream: Stream, noise: KeyedNoise, texts: Mapping[int, Tensor], pivot: int) -> None:
        """Extend a video to the chunk `pivot`, whose prompt is in place then."""
        done = list(accumulate(self.shape.chunk_frames, initial=0)).index(stream.frame)
        with stage("prefix") if pivot else nullcontext():
            for chunk in range(done, pivot):
                self.extend(stream, chunk, noise.initial(chunk), noise, last=False)
                if chunk + 1 in texts:
                    self.switch_prompt(stream, texts[chunk + 1])
                self._forget(stream)

    def _group(self, fork: Fork, group: GroupId, branching: Branching) -> Group:
        """Make the branches of a fork, in waves; return them as a group, which has the fork's prefix."""
        waves: list[Wave] = []
        part, wave_size = branching.part or range(branching.members), min(branching.wave_size, self.largest_wave or branching.wave_size)
        while part:
            noise = MemberNoise(KeyedNoise(self.shape, group), branching.plan, fork.chunks[0], part[:wave_size])
            wave = self._try_finish(fork, noise)
            if wave is None:
                wave_size = self.largest_wave = (wave_size + 1) // 2
                continue
            waves.append(wave)
            part = part[len(noise.members) :]
        anchor = self._anchor(fork, group) if branching.anchor else None
        fork.prefix.cache.finish()
        explored = {chunk: self._explored(chunk, [wave.trajectories[chunk] for wave in waves]) for chunk in waves[0].trajectories}
        tails, history = torch.cat([wave.tails for wave in waves]), fork.prefix.history
        assert history is not None
        rule = branching.plan.rule or self.rule
        return Group(group, fork.chunks[0], fork.prefix, history, tails, explored, rule, fork.switches, branching.kept, anchor=anchor)

    def _anchor(self, fork: Fork, group: GroupId) -> Tensor:
        """Return how the video of a fork goes on with no noise of its own, [1, F1, C, h, w]: a wave of its own, after those of members."""
        return self._finish(fork, MemberNoise(KeyedNoise(self.shape, group), NoisePlan(0.0, chunks=0), fork.chunks[0], [0])).tails

    def _explored(self, chunk: int, waves: Sequence[Trajectory]) -> Explored:
        """Return a chunk of all waves' members as a group keeps it."""
        inputs, predictions = (
            torch.cat([torch.stack(states) for states in parts], dim=1)
            for parts in ([wave.inputs for wave in waves], [wave.predictions for wave in waves])
        )
        return Explored(self.steps_of(chunk), inputs, predictions)

    def _try_finish(self, fork: Fork, noise: MemberNoise) -> Wave | None:
        """Finish a wave as `_finish` does; return None if a wave of several branches ran out of memory, which is then free again."""
        members = len(noise.members)
        half = (members + 1) // 2
        try:
            return self._finish(fork, noise)
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
            if self.model.ranks > 1:  # the other ranks wait in the middle of this pass
                advice = f"rollout.branches_per_wave={half}" if half < members else "generator.offload=true, or take a smaller video"
                raise UserError(
                    f"a wave of {members} branches ran out of memory ({message}); with generator.shard one rank alone cannot make it "
                    f"smaller: set {advice}"
                ) from error
            if members == 1:
                raise
        warnings.warn(
            f"a wave of {members} branches ran out of memory ({message}); continuing with waves of {half}: "
            f"set rollout.branches_per_wave={half}",
            stacklevel=3,
        )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _finish(self, fork: Fork, noise: MemberNoise) -> Wave:
        """Complete the branches of one wave.

        The first wave takes the pages reserved for its tails; those after it take `tail_pages` for each branch of what it gave back.
        """
        prefix, pivot = fork.prefix, fork.chunks[0]
        with stage("fork"):
            initial = noise.initial(pivot)
        stream = replace(prefix, cache=prefix.cache.fork(len(initial)), latents=list(prefix.latents), history=None)
        stream.cache.reserved = fork.tails[: len(initial)]
        try:
            stream.cache.reserve(fork.tail_pages)
            trajectories: dict[int, Trajectory] = {}
            for chunk in fork.chunks:
                if chunk in fork.switches:
                    self.switch_prompt(stream, fork.switches[chunk])
                rule = noise.plan.rule if noise.is_own(chunk) else None
                initial = initial if chunk == pivot else noise.initial(chunk)
                trajectory = self.extend(stream, chunk, initial, noise, last=chunk == fork.chunks[-1], rule=rule)
                if noise.is_own(chunk) and noise.plan.keep == "trajectory":
                    trajectories[chunk] = trajectory
        finally:
            stream.cache.release()
        return Wave(trajectories, torch.cat(stream.latents[len(prefix.latents) :], dim=1))

    @torch.no_grad()
    def bring_back(self, group: Group) -> None:
        """Move a group that was put away to the device, and make its context anew under the weights as they are."""
        group.move(self.model.device)
        group.prefix = self.rebuild(group.history)

    # Prediction

    @contextmanager
    def recomputed_prefix(self, group: Group, recompute: bool) -> Iterator[Stream | None]:
        """Give the context of a group's pivot chunk anew, under the weights as they are, as long as the block lasts; or None."""
        if not recompute:
            yield None
            return
        with torch.no_grad():
            prefix = self.rebuild(group.history)
        try:
            yield prefix
        finally:
            prefix.cache.release()

    def at_once(self, group: Group, chunk: int) -> int | None:
        """Return how many members' own contexts of a chunk the free pages hold; None: any number, since the chunk is the pivot."""
        starts = list(accumulate(self.shape.chunk_frames, initial=0))
        own_frames = starts[chunk] - starts[group.pivot]
        if any(first <= chunk for first in group.switches):  # then all that is seen is cached anew
            own_frames = max(own_frames, visible_frames(self.cache, starts[chunk]))
        return max(1, self.pool.pages_free // own_frames) if own_frames else None

    @contextmanager
    def context(self, group: Group, chunk: int, members: Tensor, *, prefix: Stream | None = None) -> Iterator[Stream]:
        """Give what chunk `chunk` of `members` [N] sees, as long as the block lasts, see `Contexts`. prefix: instead of the group's own."""
        with Contexts(self, group, chunk, prefix) as contexts:
            yield contexts.of(chunk, members)

    def predict(self, group: Group, samples: Samples, *, context: Stream | None = None, checkpoint: bool = False) -> Tensor:
        """Predict x0hat of samples, [N, F, C, h, w] float32, under the present weights, with gradient if enabled; the context is constant.

        Args:
            context: from `context`, and held until the backward pass is done; None: made here, which is enough for the pivot chunk, whose
                context the group holds.
            checkpoint: see `CausalWan.forward`.
        """
        manager = self.context(group, samples.chunk, samples.members) if context is None else nullcontext(context)
        with manager as stream:
            frames = samples.x.shape[1]
            stream.cache.make_room(frames)
            chunk_context = stream.cache.context(stream.frame, frames, keep=False)
            # The prompt is encoded again: with gradient, the adapters of the cross-attention keys and values learn too.
            text = self.model.encode_text(group.text_of(samples.chunk))
            checkpoint = checkpoint and torch.is_grad_enabled()
            return predict(self.model, samples.x, samples.timesteps, samples.sigmas, text, chunk_context, checkpoint=checkpoint)
