"""The rollout engine: generate the shared context once, fork at the pivot, finish the branches as one batch.

A `Stream` is a batch of videos in the making. The engine extends it chunk by chunk: slide the window, denoise, and, unless it was the last
chunk, one clean pass that stores the chunk's keys and values, or those of the whole context anew (krea). `rollout` makes a group for
AR-CoPO; `replay` predicts anchors of the group's pivot chunk again, with gradient through that chunk only.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Iterator, Literal, Sequence

import torch
from arcopo_kernels.paging import GroupPlan, PagePool
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig, SamplerConfig, VideoConfig
from arcopo_fast.errors import UserError
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import plan_pages, variant_of
from arcopo_fast.rollout.decode import Reencoder
from arcopo_fast.rollout.graphs import ChunkGraphs
from arcopo_fast.rollout.group import Explored, Fork, Group, Samples, Stream, Wave
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, MemberNoise, NoisePlan, NoiseSource
from arcopo_fast.rollout.sampler import StepRule, Steps, Trajectory, predict
from arcopo_fast.rollout.scheduler import Schedule
from arcopo_fast.runtime.profiling import stage


@dataclass(frozen=True)
class VideoShape:
    """The shape of a video's latents.

    Attributes:
        chunk_frames: latent frames of each chunk.
        channels, height, width: C, h and w of a latent frame.
    """

    chunk_frames: tuple[int, ...]
    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, video: VideoConfig, channels: int) -> VideoShape:
        """Return the shape of a recipe's videos in latents of `channels` channels."""
        return cls(video.chunk_sizes, channels, video.latent_height, video.latent_width)

    @property
    def chunks(self) -> int:
        """Number of chunks, L."""
        return len(self.chunk_frames)

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return sum(self.chunk_frames)

    def chunk(self, index: int) -> tuple[int, int, int, int]:
        """Return [F, C, h, w] of chunk `index`."""
        return self.chunk_frames[index], self.channels, self.height, self.width


class Engine:
    """A generator at work: it makes videos and groups of them, and predicts their samples again.

    Args:
        model: the generator.
        shape: of its videos, in latents of the model's channels.
        sampler, cache: those sections of a recipe.
        pages: the size of the K/V pool in latent frames; `cache.pages_for` says how many a group needs.
        cuda_graphs: see `ChunkGraphs`.
        reencoder: for a cache that encodes frames again (krea with a sink of 0), which needs one.
    """

    def __init__(
        self,
        model: CausalWan,
        shape: VideoShape,
        sampler: SamplerConfig,
        cache: CacheConfig,
        *,
        pages: int,
        cuda_graphs: Literal["auto", "on", "off"] = "off",
        reencoder: Reencoder | None = None,
    ) -> None:
        if variant_of(cache).reencodes(cache) and reencoder is None:
            raise ValueError(
                f"{cache.variant} with a sink of {cache.sink} encodes frames again: give a reencoder, or a sink that keeps the first frame"
            )
        self.model = model
        self.shape = shape
        self.cache = cache
        self.reencoder = reencoder
        self.rule = StepRule(sampler.kind)
        self.context_noise = sampler.context_noise
        schedule = Schedule(sampler.shift)
        self.steps = Steps.from_schedule(schedule, sampler.steps, warp=sampler.warp)
        self.first_steps = self.steps
        if sampler.first_chunk_steps is not None:
            self.first_steps = Steps.from_schedule(schedule, sampler.first_chunk_steps, warp=sampler.warp)
        self.graphs = ChunkGraphs(cuda_graphs)
        self.largest_wave: int | None = None  # set when a larger one ran out of memory
        config = model.config
        self.pool = PagePool(
            layers=config.num_layers,
            pages=pages,
            tokens_per_page=config.tokens_per_frame(shape.height, shape.width),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            dtype=model.dtype,
            device=model.device,
        )

    def plan(self, pivot: int, branches: int) -> GroupPlan:
        """Return the pages of a group that forks at `pivot`; the last chunk is never cached."""
        return plan_pages(self.cache, self.shape.chunk_frames, pivot, branches)

    # One chunk at a time

    def start(self, text: Tensor) -> Stream:
        """Begin one video for each row of `text` [B, length, text_dim]."""
        largest = max(self.shape.chunk_frames)
        cache = variant_of(self.cache)(self.pool, self.cache, len(text), chunk_frames=largest, reencoder=self.reencoder)
        return Stream(cache, self.model.encode_text(text))

    def steps_of(self, chunk: int) -> Steps:
        """Return the sampler's steps for a chunk: the first one may have its own."""
        return self.first_steps if chunk == 0 else self.steps

    @contextmanager
    def stopping_after(self, steps: int) -> Iterator[None]:
        """Let the sampler stop after so many of its steps within the block: its last prediction is the chunk."""
        whole = self.steps, self.first_steps
        self.steps, self.first_steps = (Steps(each.timesteps[:steps], each.sigmas[:steps]) for each in whole)
        try:
            yield
        finally:
            self.steps, self.first_steps = whole

    def extend(
        self, stream: Stream, chunk: int, initial: Tensor, noise: NoiseSource, *, last: bool, rule: StepRule | None = None
    ) -> Trajectory:
        """Generate the next chunk of every video.

        Args:
            stream: the videos, each of which gets the chunk.
            chunk: number of the chunk, which names its draws and its step list.
            initial: the noise to start from, [B, F, C, h, w].
            noise: gives the noise between steps.
            last: nothing follows, so nothing is cached.
            rule: instead of the sampler's own.
        """
        frames, steps, rule = initial.shape[1], self.steps_of(chunk), rule or self.rule
        stream.cache.make_room(frames)
        context = stream.cache.context(stream.frame, frames, keep=False)
        draws = [noise.renoise(chunk, step) for step in range(len(steps) - 1)] if rule.random else []
        with stage("denoise"):
            initial, fresh = self._on_device(initial), [self._on_device(draw) for draw in draws]
            trajectory = self.graphs.denoise(self.model, initial, steps, fresh, stream.text, context, rule=rule)
        self.append(stream, trajectory.predictions[-1], timestep=self.context_noise, last=last)
        return trajectory

    def append(self, stream: Stream, latents: Tensor, *, timestep: float = 0.0, last: bool = False) -> None:
        """Add finished frames [1 or B, F, C, h, w] to every video and, unless nothing follows, cache what the next chunk sees."""
        stream.latents.append(latents)
        stream.frame += latents.shape[1]
        if not last:
            stream.cache.after_chunk(stream, partial(self._clean_pass, stream, timestep))

    def _on_device(self, noise: Tensor) -> Tensor:
        """Copy noise to the device through pinned memory, without waiting for it; an expanded batch stays one row in memory."""
        device = self.model.device
        unique = noise[:1] if noise.stride(0) == 0 else noise  # an expanded tensor cannot be pinned
        pinned = device.type == "cuda" and noise.device.type == "cpu"
        return (unique.pin_memory().to(device, non_blocking=True) if pinned else unique.to(device)).expand_as(noise)

    def switch_prompt(self, stream: Stream, text: Tensor) -> None:
        """Go on with another prompt, [B, length, text_dim]."""
        stream.text = self.model.encode_text(text)
        stream.cache.switch_prompt(stream, partial(self._clean_pass, stream, self.context_noise))

    def _clean_pass(self, stream: Stream, timestep: float, latents: Tensor, first_frame: int) -> None:
        """Cache the keys and values of finished frames."""
        latents = latents.to(self.model.device).expand(len(stream.cache.tables), *latents.shape[1:])
        context = stream.cache.context(first_frame, latents.shape[1], keep=True)
        with stage("clean"), torch.no_grad():
            self.model(latents, torch.full((1, 1), timestep, device=latents.device), stream.text, context, store_only=True)

    # Whole videos

    @torch.no_grad()
    def generate(
        self, text: Tensor, noise: NoiseSource, *, initial_latents: Sequence[Tensor] = (), switches: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Make independent videos, one for each row of `text`; return latents [B, F, C, h, w] float32.

        Args:
            text: [B, length, text_dim].
            noise: of all chunks.
            initial_latents: clean chunks [1 or B, F, C, h, w] that the videos begin with (image- or video-to-video).
            switches: {frame: text}; the first chunk that starts at or after the frame uses that prompt.
        """
        batch, stream = text.shape[0], self.start(text)
        chunks = [chunk.to(self.model.device, torch.float32) for chunk in initial_latents]
        try:
            for trajectory in self.stream(stream, noise, initial_latents=initial_latents, switches=switches):
                chunks.append(trajectory.predictions[-1])
        finally:
            stream.cache.release()
        return torch.cat([chunk.expand(batch, *chunk.shape[1:]) for chunk in chunks], dim=1)

    @torch.no_grad()
    def stream(
        self, stream: Stream, noise: NoiseSource, *, initial_latents: Sequence[Tensor] = (), switches: dict[int, Tensor] | None = None
    ) -> Iterator[Trajectory]:
        """Yield each chunk's trajectory as soon as it is there (its clean pass done).

        With a window, `stream.latents` keeps only the newest chunks: a video of any length takes the same memory.
        """
        batch = len(stream.cache.tables)
        for latents in initial_latents:
            self.append(stream, latents.to(self.model.device, torch.float32))
        pending = sorted((switches or {}).items())
        for chunk in range(self.shape.chunks):
            if pending and stream.frame >= pending[0][0]:
                self.switch_prompt(stream, pending.pop(0)[1])
            initial = noise.initial(chunk)
            initial = initial.expand(batch, *initial.shape[1:])
            trajectory = self.extend(stream, chunk, initial, noise, last=chunk == self.shape.chunks - 1)
            self._forget(stream)
            yield trajectory

    def _forget(self, stream: Stream) -> None:
        """Drop the chunks that lie entirely before the window: neither a prompt switch nor a recomputed context reaches further back."""
        window = self.cache.window
        while window is not None and sum(chunk.shape[1] for chunk in stream.latents[1:]) >= window:
            del stream.latents[0]

    # Groups

    @torch.no_grad()
    def rollout(
        self,
        text: Tensor,
        group: GroupId,
        *,
        pivot: int,
        members: int,
        plan: NoisePlan,
        part: range | None = None,
        branches_per_wave: int | None = None,
    ) -> Group:
        """Make a group of G = `members` videos for one prompt (AR-CoPO, one iteration, steps 2 to 4).

        Args:
            text: [1, length, text_dim].
            group: names every draw.
            pivot: the chunk to fork at, counted from 0.
            plan: the noises that the members do not share.
            part: make only these members; None: all.
            branches_per_wave: finish at most so many branches at once; less K/V memory, the same result within rounding.
        """
        if not 0 <= pivot < self.shape.chunks:
            raise ValueError(f"pivot {pivot} is not a chunk of this video; it has {self.shape.chunks}, counted from 0")
        text = text.to(self.model.device)  # once, and not for every replay
        noise, part = KeyedNoise(self.shape, group), part or range(members)
        wave_size = min(branches_per_wave or members, self.largest_wave or members, len(part))
        pages = self.plan(pivot, wave_size)
        prefix = self.start(text)
        reserved = self.pool.reserve(pages)  # a group that does not fit fails here, before a frame is computed
        prefix.cache.reserved = [reserved.prefix]
        try:
            with stage("prefix") if pivot else nullcontext():
                for chunk in range(pivot):
                    self.extend(prefix, chunk, noise.initial(chunk), noise, last=False)
            waves: list[Wave] = []
            while part:
                wave_noise = MemberNoise(noise, plan, pivot, part[:wave_size])
                wave = self._try_finish(Fork(prefix, pivot, wave_noise, reserved.tails, pages.tail))
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
        return Group(group, text, pivot, prefix, prefix_latents, tails, explored, plan.rule or self.rule)

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
        prefix, pivot, noise = fork.prefix, fork.pivot, fork.noise
        with stage("fork"):
            initial = noise.initial(pivot)
        stream = replace(prefix, cache=prefix.cache.fork(len(initial)), latents=list(prefix.latents))
        stream.cache.reserved = fork.tails[: len(initial)]
        try:
            stream.cache.reserve(fork.tail_pages)
            trajectories: dict[int, Trajectory] = {}
            for chunk in range(pivot, self.shape.chunks):
                rule = noise.plan.rule if noise.is_own(chunk) else None
                initial = initial if chunk == pivot else noise.initial(chunk)
                trajectory = self.extend(stream, chunk, initial, noise, last=chunk == self.shape.chunks - 1, rule=rule)
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
