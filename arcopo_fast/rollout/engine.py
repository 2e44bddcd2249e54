"""The rollout engine: generate the shared context once, fork at the pivot, finish the branches as one batch.

`rollout` makes a group for AR-CoPO out of a stream, see `rollout.stream`; `predict` predicts samples of the group's chunks again, with
gradient through that chunk only.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any, Iterator, Sequence

import torch
from arcopo_kernels.paging import GroupPlan
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rollout.cache import plan_pages
from arcopo_fast.rollout.group import Branching, Explored, Fork, Group, Samples, Wave
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, MemberNoise
from arcopo_fast.rollout.sampler import Trajectory, predict
from arcopo_fast.rollout.stream import Stream, Streamer
from arcopo_fast.runtime.profiling import stage


class Engine(Streamer):
    """A generator at work: it makes videos and groups of them, and predicts their samples again.

    Attributes:
        largest_wave: branches that fit the memory at once; None: as many as asked for.
    """

    largest_wave: int | None = None  # set when a larger one ran out of memory

    def plan(self, pivot: int, branches: int, *, horizon: int | None = None) -> GroupPlan:
        """Return the pages of a group that forks at `pivot`; the last chunk is never cached."""
        return plan_pages(self.cache, self.shape.chunk_frames, pivot, branches, horizon=horizon)

    # Groups

    @torch.no_grad()
    def rollout(self, text: Tensor, group: GroupId, *, pivot: int, **branching: Any) -> Group:
        """Make a group of videos for one prompt (AR-CoPO, one iteration, steps 2 to 4).

        Args:
            text: [1, length, text_dim].
            group: names every draw.
            pivot: the chunk to fork at, counted from 0.
            branching: see `Branching`.
        """
        if not 0 <= pivot < self.shape.chunks:
            raise ValueError(f"pivot {pivot} is not a chunk of this video; it has {self.shape.chunks}, counted from 0")
        text = text.to(self.model.device)  # once, and not for every replay
        branches = Branching(**branching)
        noise, part = KeyedNoise(self.shape, group), branches.part or range(branches.members)
        wave_size = min(branches.branches_per_wave or branches.members, self.largest_wave or branches.members, len(part))
        pages, chunks = self.plan(pivot, wave_size, horizon=branches.horizon), branches.chunks(pivot, self.shape.chunks)
        prefix = self.start(text)
        reserved = self.pool.reserve(pages)  # a group that does not fit fails here, before a frame is computed
        prefix.cache.reserved = [reserved.prefix]
        try:
            with stage("prefix") if pivot else nullcontext():
                for chunk in range(pivot):
                    self.extend(prefix, chunk, noise.initial(chunk), noise, last=False)
            waves: list[Wave] = []
            while part:
                wave_noise = MemberNoise(noise, branches.plan, pivot, part[:wave_size])
                wave = self._try_finish(Fork(prefix, chunks, wave_noise, reserved.tails, pages.tail))
                if wave is None:
                    wave_size = self.largest_wave = (wave_size + 1) // 2
                    continue
                waves.append(wave)
                part = part[len(wave_noise.members) :]
        except BaseException:
            prefix.cache.release()
            reserved.release()
            raise
        prefix.cache.finish()
        explored = {chunk: self._explored(chunk, [wave.trajectories[chunk] for wave in waves]) for chunk in waves[0].trajectories}
        tails = torch.cat([wave.tails for wave in waves])
        prefix_latents = self._joined(prefix.latents)
        prefix.latents = list(prefix_latents.split(self.shape.chunk_frames[:pivot], dim=1)) if pivot else []  # no second copy
        return Group(group, text, pivot, prefix, prefix_latents, tails, explored, branches.plan.rule or self.rule)

    def _explored(self, chunk: int, waves: Sequence[Trajectory]) -> Explored:
        """Return a chunk of all waves' members as a group keeps it."""
        inputs, predictions = (
            torch.cat([torch.stack(states) for states in parts], dim=1)
            for parts in ([wave.inputs for wave in waves], [wave.predictions for wave in waves])
        )
        return Explored(self.steps_of(chunk), inputs, predictions)

    def _joined(self, chunks: Sequence[Tensor]) -> Tensor:
        """Return the frames of chunks [1, F, C, h, w] as one tensor, without frames where there is no chunk."""
        if chunks:
            return torch.cat(list(chunks), dim=1)
        return torch.empty(1, 0, *self.shape.chunk(0)[1:], device=self.model.device)

    def _try_finish(self, fork: Fork) -> Wave | None:
        """Finish a wave as `_finish` does; return None if a wave of several branches ran out of memory, which is then free again."""
        members = len(fork.noise.members)
        half = (members + 1) // 2
        try:
            return self._finish(fork)
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

    def _finish(self, fork: Fork) -> Wave:
        """Complete the branches of one wave.

        The first wave takes the pages reserved for its tails; those after it take `tail_pages` for each branch of what it gave back.
        """
        prefix, pivot, noise = fork.prefix, fork.chunks[0], fork.noise
        with stage("fork"):
            initial = noise.initial(pivot)
        stream = replace(prefix, cache=prefix.cache.fork(len(initial)), latents=list(prefix.latents))
        stream.cache.reserved = fork.tails[: len(initial)]
        try:
            stream.cache.reserve(fork.tail_pages)
            trajectories: dict[int, Trajectory] = {}
            for chunk in fork.chunks:
                rule = noise.plan.rule if noise.is_own(chunk) else None
                initial = initial if chunk == pivot else noise.initial(chunk)
                trajectory = self.extend(stream, chunk, initial, noise, last=chunk == fork.chunks[-1], rule=rule)
                if noise.is_own(chunk):
                    trajectories[chunk] = trajectory
        finally:
            stream.cache.release()
        return Wave(trajectories, torch.cat(stream.latents[pivot:], dim=1))

    def rebuild_prefix(self, text: Tensor, latents: Tensor) -> Stream:
        """Return the context after the first chunks again, from their clean latents [1, F0, C, h, w], by clean passes only."""
        stream = self.start(text)
        chunks = list(accumulate(self.shape.chunk_frames, initial=0)).index(latents.shape[1])
        try:
            for index, chunk in enumerate(latents.split(self.shape.chunk_frames[:chunks], dim=1) if chunks else ()):
                replaced = stream.cache.recomputed and index < chunks - 1  # by the context after the next chunk
                self.append(stream, chunk, timestep=self.context_noise, last=replaced)
        except BaseException:
            stream.cache.release()
            raise
        stream.cache.finish()
        return stream

    @torch.no_grad()
    def bring_back(self, group: Group) -> None:
        """Move a group that was put away to the device, and make its context anew under the weights as they are."""
        group.move(self.model.device)
        group.prefix = self.rebuild_prefix(group.text, group.prefix_latents)

    # Prediction

    @contextmanager
    def recomputed_prefix(self, group: Group, recompute: bool) -> Iterator[Stream | None]:
        """Give the context of a group's pivot chunk anew, under the weights as they are, as long as the block lasts; or None."""
        if not recompute:
            yield None
            return
        with torch.no_grad():
            prefix = self.rebuild_prefix(group.text, group.prefix_latents)
        try:
            yield prefix
        finally:
            prefix.cache.release()

    def at_once(self, group: Group, chunk: int) -> int | None:
        """Return how many members' own contexts of a chunk the free pages hold; None: any number, since the chunk is the pivot."""
        own_frames = sum(self.shape.chunk_frames[group.pivot : chunk])
        return max(1, self.pool.pages_free // own_frames) if own_frames else None

    @contextmanager
    def context(self, group: Group, chunk: int, members: Tensor, *, prefix: Stream | None = None) -> Iterator[Stream]:
        """Give what chunk `chunk` of `members` [N] sees, as long as the block lasts: the group's prefix, then each member's own chunks.

        The members' own chunks are made anew by clean passes of their latents, under the weights as they are, once for each member.

        Args:
            prefix: instead of the group's own.
        """
        prefix = prefix or group.prefix
        assert prefix is not None, "the group has no context: see bring_back"
        distinct, rows = members, list(range(len(members)))
        if chunk > group.pivot:
            distinct, inverse = members.unique(return_inverse=True)
            rows = inverse.tolist()
        with ExitStack() as stack:
            cache = prefix.cache.fork(len(distinct))
            stack.callback(cache.release)
            stream = replace(prefix, cache=cache, latents=list(prefix.latents))
            own = [latents for number, latents in group.own_chunks(self.shape.chunk_frames).items() if number < chunk]
            cache.reserve(sum(latents.shape[1] for latents in own))  # consecutive pages, as in the rollout
            for latents in own:
                with torch.no_grad():
                    self.append(stream, latents[distinct], timestep=self.context_noise)
            if rows != list(range(len(distinct))):
                stream.cache = cache.of(rows)
                stack.callback(stream.cache.release)
            yield stream

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
            text = self.model.encode_text(group.text)
            checkpoint = checkpoint and torch.is_grad_enabled()
            return predict(self.model, samples.x, samples.timesteps, samples.sigmas, text, chunk_context, checkpoint=checkpoint)
