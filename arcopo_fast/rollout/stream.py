"""Streams: batches of videos in the making, and what extends them.

A `Stream` grows chunk by chunk: slide the window, denoise, and, unless it was the last chunk, one clean pass that stores the keys and
values of the chunk, or those of the whole context anew (krea).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Iterator, Literal, Mapping, Sequence, TypeVar

import torch
from arcopo_kernels.paging import PagePool
from torch import Tensor

from arcopo_fast.config.schema import CacheConfig, SamplerConfig, VideoConfig
from arcopo_fast.model.causal_wan import CausalWan, TextContext
from arcopo_fast.rollout.cache import VideoCache, variant_of
from arcopo_fast.rollout.decode import Reencoder
from arcopo_fast.rollout.graphs import ChunkGraphs
from arcopo_fast.rollout.history import Appended, History
from arcopo_fast.rollout.noise import NoiseSource
from arcopo_fast.rollout.sampler import StepRule, Steps, Trajectory
from arcopo_fast.rollout.scheduler import Schedule
from arcopo_fast.runtime.profiling import stage

T = TypeVar("T")


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


@dataclass
class Stream:
    """A batch of B videos in the making.

    Attributes:
        cache: keys and values of the frames that they see.
        text: the prompts' keys and values.
        latents: finished chunks [1 or B, F, C, h, w] float32, the newest ones.
        frame: number of the next frame to generate.
        kept: with a window, `latents` holds at least so many frames, and those of the window; None: all of them.
        history: of a single video that can be made anew; what is in `latents` no longer waits there in host memory.
    """

    cache: VideoCache
    text: TextContext
    latents: list[Tensor] = field(default_factory=list)
    frame: int = 0
    kept: int | None = 0
    history: History | None = None


class Streamer:
    """A generator at work: it makes videos, chunk by chunk.

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
        self.schedule, self.sampler = Schedule(sampler.shift), sampler
        self.steps = Steps.from_schedule(self.schedule, sampler.steps, warp=sampler.warp)
        self.first_steps = self.steps
        if sampler.first_chunk_steps is not None:
            self.first_steps = Steps.from_schedule(self.schedule, sampler.first_chunk_steps, warp=sampler.warp)
        self.graphs = ChunkGraphs(cuda_graphs)
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
        if stream.history is not None:
            stream.history.append(latents)
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
        if stream.history is not None:
            stream.history.switch(text)
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
        placed = self.placed(switches or {}, first=stream.frame)
        for chunk in range(self.shape.chunks):
            if chunk in placed:
                self.switch_prompt(stream, placed[chunk])
            initial = noise.initial(chunk)
            initial = initial.expand(batch, *initial.shape[1:])
            trajectory = self.extend(stream, chunk, initial, noise, last=chunk == self.shape.chunks - 1)
            self._forget(stream)
            yield trajectory

    def placed(self, switches: Mapping[int, T], *, first: int = 0) -> dict[int, T]:
        """Return the prompts of {frame: prompt} by the chunk that is the first to use them: one that begins at the frame or after it.

        Args:
            first: number of the first chunk's first frame.
        """
        pending = sorted(switches)
        starts = accumulate(self.shape.chunk_frames[:-1], initial=first)
        return {chunk: switches[pending.pop(0)] for chunk, start in enumerate(starts) if pending and start >= pending[0]}

    def _forget(self, stream: Stream) -> None:
        """Drop the chunks that lie entirely before the window: neither a prompt switch nor a recomputed context reaches further back.

        What a stream with a history needs of them to be made anew waits in host memory.
        """
        if self.cache.window is None or stream.kept is None:
            return
        frames = max(self.cache.window, stream.kept)
        while sum(chunk.shape[1] for chunk in stream.latents[1:]) >= frames:
            del stream.latents[0]
        if stream.history is not None:
            stream.history.trim(stream.cache.replay(stream.history.events), stream.kept)
            stream.history.move("cpu", before=stream.frame - sum(chunk.shape[1] for chunk in stream.latents))

    # Made anew

    def rebuild(self, history: History) -> Stream:
        """Return a video in the making again, from what happened to it, by the clean passes that are needed for its keys and values."""
        stream = self.start(history.text)
        stream.kept = None if stream.cache.recomputed else 0
        try:
            for event, cached in stream.cache.replay(history.events):
                if isinstance(event, Appended):
                    stream.frame = event.frame
                    self.append(stream, event.latents.to(self.model.device), timestep=self.context_noise, last=not cached)
                    self._forget(stream)
                else:
                    self.switch_prompt(stream, event.text.to(self.model.device))
        except BaseException:
            stream.cache.release()
            raise
        stream.cache.finish()
        return stream

    def rebuild_prefix(self, text: Tensor, latents: Tensor) -> Stream:
        """Return the context after the first chunks of a video with one prompt again, from their clean latents [1, F0, C, h, w]."""
        chunks = list(accumulate(self.shape.chunk_frames, initial=0)).index(latents.shape[1])
        return self.rebuild(History.of(text, latents.split(self.shape.chunk_frames[:chunks], dim=1) if chunks else ()))
