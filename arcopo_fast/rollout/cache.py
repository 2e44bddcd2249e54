"""The K/V cache of a batch of videos: page tables plus the rule by which frames become visible, slide out and are positioned.

A class for each published generator (sources: Self-Forcing, LongLive v1.0, Infinity-RoPE, Krea realtime), chosen by `cache.variant`. It
says where a chunk's queries and keys stand, whether keys are cached roped, and what is cached after a chunk and at a prompt switch. A new
variant is one more class here, and its name in `VARIANTS` and in `CacheVariant`.

The noisy chunk is never cached: while it is denoised its keys and values live for one layer at a time.
"""

from __future__ import annotations

from copy import copy
from itertools import accumulate
from typing import Callable, ClassVar, Collection, Hashable, Protocol, Sequence

import torch
from arcopo_kernels.paging import GroupPlan, PagePool, PageRun, plan_group
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.model.causal_wan import CachedRun, ChunkContext
from arcopo_fast.model.vae import VAECache
from arcopo_fast.rollout.decode import Reencoder
from arcopo_fast.rollout.history import Appended, Event, Replayed, Switched
from arcopo_fast.runtime.profiling import stage


class Videos(Protocol):
    """The videos that a cache belongs to, as the cache sees them."""

    @property
    def latents(self) -> list[Tensor]:
        """Finished chunks [1 or B, F, C, h, w], of which the oldest may be left out once they are out of the window."""

    @property
    def frame(self) -> int:
        """Number of latent frames so far."""


Write = Callable[[Tensor, int], None]
"""Runs a clean pass: caches the keys and values of latents [1 or B, F, C, h, w], the first of which is the given frame of the video."""


class VideoCache:
    """Page tables of B videos that stand at the same frame; all tables have the same length.

    This class is ``self_forcing``: keys are cached roped at their absolute frame; the window holds the newest frames and, inside it, the
    sink, which are the first ones. It is also the base of the other variants.

    Attributes:
        tables: the pages of each video's visible frames.
        reserved: for each video the pages set aside for its next frames; the cache takes them out of these lists, or gives them back.

    Args:
        pool: where the pages come from.
        settings: the window and the sink.
        batch: B.
        chunk_frames: the latent frames of the video's largest chunk.
        reencoder: for a variant that encodes frames again, see `reencodes`.
    """

    roped: ClassVar[bool] = True
    """Keys are cached roped; else, they are roped at every read."""
    recomputed: ClassVar[bool] = False
    """Whether what is cached after a chunk replaces everything cached before, so that only the last chunk matters."""

    def __init__(self, pool: PagePool, settings: CacheConfig, batch: int, *, chunk_frames: int, reencoder: Reencoder | None = None) -> None:
        self.pool = pool
        self.settings = settings
        self.chunk_frames = chunk_frames
        self.reencoder = reencoder
        self.tables = [pool.table() for _ in range(batch)]
        self.reserved: list[list[int]] = [[] for _ in range(batch)]

    # Overridden by variants

    @classmethod
    def plan(
        cls, settings: CacheConfig, chunk_frames: Sequence[int], pivot: int, branches: int, switches: Collection[int] = ()
    ) -> GroupPlan:
        """Return the pages of a group that forks at `pivot`; the last chunk of the branches is never cached.

        Args:
            chunk_frames: the latent frames of each chunk, up to the last one of the branches.
            switches: chunks with which a prompt changes; each branch then caches what it sees anew, for itself.
        """
        cached, starts = chunk_frames[:-1], list(accumulate(chunk_frames, initial=0))
        inside = [chunk for chunk in switches if pivot < chunk < len(chunk_frames)]
        replaced = {chunk - pivot: cls.outliving(settings, starts[chunk]) for chunk in inside}
        return plan_group(cached[:pivot], cached[pivot:], branches, window=settings.window, sink=settings.sink, replaced=replaced)

    @classmethod
    def reencodes(cls, settings: CacheConfig) -> bool:
        """Return whether frames are decoded and encoded again, which takes a reencoder."""
        return False

    def positions(self, first_frame: int, frames: int) -> tuple[int, int]:
        """Return the RoPE time positions of the first query and the first key of a chunk that starts at `first_frame` of the video."""
        return first_frame, first_frame

    def make_room(self, frames: int) -> None:
        """Slide the window for a chunk of `frames` frames: drop the oldest frames after the sink."""
        window, sink = self.settings.window, self.settings.sink
        excess = 0 if window is None else self.frames + frames - window
        if excess > 0:
            if sink + excess > self.frames:
                raise ValueError(f"a chunk of {frames} frames does not fit a window of {window} with a sink of {sink}")
            for table in self.tables:
                table.drop(sink, sink + excess)

    def after_chunk(self, videos: Videos, write: Write) -> None:
        """Cache what the next chunk will see, now that a chunk was added to the videos."""
        latents = videos.latents[-1]
        self.make_room(latents.shape[1])
        write(latents, videos.frame - latents.shape[1])

    def switch_prompt(self, videos: Videos, write: Write) -> None:
        """Cache the visible frames again under another prompt, all at once (LongLive's KV-recache)."""
        keep = self.outliving(self.settings, videos.frame)
        frames = visible_frames(self.settings, videos.frame) - keep
        if frames:
            latents = self.newest(videos, frames)
            self.drop_all(keep)
            write(latents, videos.frame - frames)

    @classmethod
    def outliving(cls, settings: CacheConfig, frame: int) -> int:
        """Return how many of the first visible frames a prompt switch leaves as they are, when the video has `frame` frames."""
        overflow = settings.window is not None and frame > settings.window
        return settings.sink if settings.global_sink and overflow else 0

    def replay(self, events: Sequence[Event]) -> list[Replayed]:
        """Return the fewest of a video's events that make its keys and values, when they happen again in an empty cache.

        A prompt switch caches all that it sees anew, but for a sink that outlives it. So needed are the passes that last wrote this sink,
        the frames that the last switch saw, and what came later.
        """
        last = max((index for index, event in enumerate(events) if isinstance(event, Switched)), default=None)
        if last is None:
            return [Replayed(event, cached=True) for event in events]
        switch = events[last]
        keep = self.outliving(self.settings, switch.frame)
        sink = self._sink(events[:last]) if keep else []
        oldest, known = switch.frame - visible_frames(self.settings, switch.frame) + keep, {id(event) for event, _ in sink}
        seen = [event for event in events[:last] if isinstance(event, Appended) and event.end > oldest and id(event) not in known]
        return [*sink, *(Replayed(event, cached=False) for event in seen), *(Replayed(event, cached=True) for event in events[last:])]

    def _sink(self, events: Sequence[Event]) -> list[Replayed]:
        """Return the events that last wrote a sink which no later switch has: the first passes, or a switch before the window was full."""
        window = self.settings.window or 0
        early = (index for index, event in enumerate(events) if isinstance(event, Switched) and event.frame <= window)
        rewritten, replayed, frames = max(early, default=-1), [], 0
        for index, event in enumerate(events):
            if isinstance(event, Appended):
                replayed.append(Replayed(event, cached=index > rewritten))
                frames = event.end
            elif index == rewritten:
                replayed.append(Replayed(event, cached=True))
            if index >= rewritten and frames >= self.settings.sink:
                break
        return replayed

    def finish(self) -> None:
        """Let go of what serves only to add more chunks to these videos; their pages stay."""

    # Common to all variants

    @property
    def frames(self) -> int:
        """Number of cached frames that are visible now."""
        return len(self.tables[0])

    def newest(self, videos: Videos, frames: int) -> Tensor:
        """Return the newest latent frames of every video, [B, frames, C, h, w]."""
        latents = torch.cat([chunk.expand(len(self.tables), *chunk.shape[1:]) for chunk in videos.latents], dim=1)
        return latents[:, latents.shape[1] - frames :]

    def fork(self, branches: int) -> VideoCache:
        """Return `branches` caches over the pages of this one video (batch 1), copying nothing."""
        if len(self.tables) != 1:
            raise ValueError(f"a cache of {len(self.tables)} videos cannot be forked; fork one video at a time")
        return self.of([0] * branches)

    def of(self, videos: Sequence[int]) -> VideoCache:
        """Return a cache over the pages of some of these videos, each as often as it is named, copying nothing."""
        child = copy(self)
        child.tables = [self.tables[video].fork() for video in videos]
        child.reserved = [[] for _ in videos]
        return child

    def reserve(self, frames: int) -> None:
        """Set aside what is missing for the next `frames` frames of every video, all at once, so that each video's are consecutive."""
        missing = max(0, frames - len(self.reserved[0]))
        pages = self.pool.allocate(missing * len(self.tables))
        for row, reserved in enumerate(self.reserved):
            reserved.extend(pages[row * missing : (row + 1) * missing])

    def drop_all(self, keep: int) -> None:
        """Forget all but the first `keep` frames."""
        for table in self.tables:
            table.drop(keep, len(table))

    def context(self, first_frame: int, frames: int, *, keep: bool) -> PagedContext:
        """Return what a chunk of `frames` frames starting at `first_frame` of the video sees.

        With `keep`, pages for the chunk are appended, and its keys and values are written to them.
        """
        query, key = self.positions(first_frame, frames)
        reads = self.pool.runs(self.tables, 0, self.frames) if self.frames else []
        writes = self._append(frames) if keep else []
        return PagedContext(self.pool, reads, writes, query, key, self.roped)

    def _append(self, frames: int) -> list[PageRun]:
        self.reserve(frames)
        for table, reserved in zip(self.tables, self.reserved):
            table.extend(reserved[:frames])
            del reserved[:frames]
        return self.pool.prepare_write(self.tables, self.frames - frames, self.frames)

    def release(self) -> None:
        """Give every page back."""
        for table, reserved in zip(self.tables, self.reserved):
            table.release()
            self.pool.release(reserved)
            reserved.clear()


class LongLiveInfinity(VideoCache):
    """``longlive_infinity``: keys are cached un-roped, and roped at every read by their place in the window."""

    roped = False

    def positions(self, first_frame: int, frames: int) -> tuple[int, int]:
        return self.frames, self.frames


class InfinityRope(LongLiveInfinity):
    """``infinity_rope``: the same, with the official query position: the chunk's frame while that is below the window, then
    window - chunk."""

    def positions(self, first_frame: int, frames: int) -> tuple[int, int]:
        window, place = self.settings.window, self.frames
        if window is None:
            return place, place
        return first_frame if first_frame < window else window - frames, place


class Krea(VideoCache):
    """``krea``: before every chunk the keys and values of a short context are computed anew, roped at its places from 0.

    The context is the first latent frame and the newest ones. With a sink of 0 the first frame is replaced once the video fills the window:
    by the pixel frame that comes before the newest ones, encoded as an image of its own.

    Attributes:
        first_frame: the context's first frame [1 or B, 1, C, h, w], or None before there is one.
        decoded: the re-encoder's state after the frames decoded so far, one for each video, or a single one for all.
    """

    recomputed = True
    first_frame: Tensor | None = None
    decoded: tuple[VAECache, ...] = ()

    @classmethod
    def plan(
        cls, settings: CacheConfig, chunk_frames: Sequence[int], pivot: int, branches: int, switches: Collection[int] = ()
    ) -> GroupPlan:
        limit = context_frames(settings, max(chunk_frames))
        contexts = [min(start, limit) for start in accumulate(chunk_frames[:-1], initial=0)]
        return GroupPlan(contexts[pivot], contexts[-1] if pivot < len(chunk_frames) - 1 else 0, branches)

    @classmethod
    def reencodes(cls, settings: CacheConfig) -> bool:
        return settings.sink == 0

    def positions(self, first_frame: int, frames: int) -> tuple[int, int]:
        return self.frames, self.frames

    def after_chunk(self, videos: Videos, write: Write) -> None:
        """Compute the context of the next chunk anew.

        A block of as many frames as a chunk sees itself and the blocks before it, so they are cached one after the other.
        """
        limit = context_frames(self.settings, self.chunk_frames)
        frames = min(videos.frame, limit)
        if self.first_frame is None:
            self.first_frame = videos.latents[0][:, :1]
        if self.reencodes(self.settings) and videos.frame >= limit + self.chunk_frames:
            self.first_frame = self._reencode(videos, videos.frame - frames)
        newest = self.newest(videos, frames - 1)
        context = torch.cat([self.first_frame.expand(len(newest), *self.first_frame.shape[1:]), newest], dim=1)
        self.drop_all(keep=0)
        self.reserve(frames)
        for part in context.split(self.chunk_frames, dim=1):
            write(part, self.frames)

    def switch_prompt(self, videos: Videos, write: Write) -> None:
        """Do nothing: the context follows by itself, a chunk later, as in Krea's server. The next one stands already."""

    def replay(self, events: Sequence[Event]) -> list[Replayed]:
        """Return the fewest of a video's events that make its context: the chunks in it, or all where the decoder's state needs them.

        Only the last chunk is followed by a pass, under the prompt that counted then.
        """
        chunks = [index for index, event in enumerate(events) if isinstance(event, Appended)]
        if not chunks:
            return [Replayed(event, cached=True) for event in events]
        oldest = events[chunks[-1]].frame - context_frames(self.settings, self.chunk_frames)
        needed = [index for index in chunks if index in (chunks[0], chunks[-1]) or events[index].frame > oldest]
        replayed = chunks if self.reencodes(self.settings) else needed
        switches = [index for index, event in enumerate(events) if isinstance(event, Switched)]
        before, after = ([index for index in switches if (index < chunks[-1]) == early] for early in (True, False))
        return [Replayed(events[index], cached=index >= chunks[-1]) for index in sorted([*replayed, *before[-1:], *after[-1:]])]

    def finish(self) -> None:
        """Let go of the re-encoder's states, which are large."""
        self.decoded = ()  # large

    def _reencode(self, videos: Videos, frame: int) -> Tensor:
        """Return the last pixel frame of latent frame `frame` of every video, encoded as an image: [B, 1, C, h, w]."""
        assert self.reencoder is not None
        states = list(self.decoded or [self.reencoder.start()])
        self.decoded = ()  # nothing else holds a state while it is replaced
        decoded_frames = states[0].frames
        latents = self.newest(videos, videos.frame - decoded_frames)[:, : frame + 1 - decoded_frames]
        if len(states) == 1:
            states *= len(latents)
        with stage("reencode"):
            images = self.reencoder(latents, states)
        self.decoded = tuple(states)
        return images


def visible_frames(settings: CacheConfig, frame: int) -> int:
    """Return how many frames are cached between two chunks of a video of `frame` frames."""
    return min(frame, settings.window or frame)


def context_frames(settings: CacheConfig, chunk_frames: int) -> int:
    """Return the most frames of a recomputed context: those that fill the window beside a chunk of `chunk_frames` frames.

    Raises:
        ValueError: there is no room for any.
    """
    if settings.window is None or settings.window <= chunk_frames:
        raise ValueError(f"a window of {settings.window} frames has no room for a context beside a chunk of {chunk_frames}")
    return settings.window - chunk_frames


VARIANTS: dict[str, type[VideoCache]] = {
    "self_forcing": VideoCache,
    "longlive": VideoCache,  # the same numbers
    "longlive_infinity": LongLiveInfinity,
    "infinity_rope": InfinityRope,
    "krea": Krea,
}
"""The class of each `cache.variant`."""


def variant_of(settings: CacheConfig) -> type[VideoCache]:
    """Return the class of cache that a recipe's section names."""
    return VARIANTS[settings.variant]


def plan_pages(
    settings: CacheConfig,
    chunk_frames: Sequence[int],
    pivot: int,
    branches: int,
    *,
    horizon: int | None = None,
    switches: Collection[int] = (),
) -> GroupPlan:
    """Return the pages of a group that forks at `pivot`.

    Args:
        chunk_frames: the latent frames of each chunk of the video.
        horizon: chunks after the pivot's; None: to the end of the video.
        switches: chunks with which the prompt changes.
    """
    end = None if horizon is None else pivot + horizon + 1
    return variant_of(settings).plan(settings, chunk_frames[:end], pivot, branches, switches)


def worst_plan(
    settings: CacheConfig,
    chunk_frames: Sequence[int],
    branches: int,
    *,
    horizon: int | None = None,
    switches: Collection[Collection[int]] = ((),),
) -> GroupPlan:
    """Return the pages of a group at the pivot that takes most.

    Args:
        chunk_frames: the latent frames of each chunk of the video.
        horizon: chunks after the pivot's; None: to the end of the video.
        switches: the chunks with which the prompt changes, of each video that there may be.
    """
    chunks = len(chunk_frames)
    inside = (
        (pivot, frozenset(chunk for chunk in of_video if pivot < chunk <= pivot + (chunks if horizon is None else horizon)))
        for pivot in range(chunks - (horizon or 0))
        for of_video in switches
    )
    plans = (
        plan_pages(settings, chunk_frames, pivot, branches, horizon=horizon, switches=chunks_inside)
        for pivot, chunks_inside in dict.fromkeys(inside)
    )
    return max(plans, key=lambda plan: plan.pages)


def pages_for(
    settings: CacheConfig,
    chunk_frames: Sequence[int],
    branches: int,
    *,
    horizon: int | None = None,
    switches: Collection[Collection[int]] = ((),),
) -> int:
    """Return the pages of a prefix and `branches` tails at the pivot that takes most; for the arguments see `worst_plan`."""
    return max(1, worst_plan(settings, chunk_frames, branches, horizon=horizon, switches=switches).pages)


class PagedContext(ChunkContext):
    """A chunk's view of the pool: planned once on the host, read and written layer by layer."""

    def __init__(
        self, pool: PagePool, reads: Sequence[PageRun], writes: Sequence[PageRun], query_position: int, key_position: int, roped: bool
    ) -> None:
        self.pool = pool
        self.reads = reads
        self.writes = writes
        self.query_position = query_position
        self.key_position = key_position
        self.keep = bool(writes)
        self.keep_roped = roped

    def cached(self, layer: int) -> list[CachedRun]:
        return [CachedRun(*self.pool.read(layer, run), None if self.keep_roped else run.column) for run in self.reads]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.pool.write(layer, self.writes, key, value)

    def addresses(self) -> Hashable | None:
        if self.keep:
            return None
        runs = tuple((run.column, run.length, run.rows, run.first, run.stride, run.pages) for run in self.reads)
        return runs, self.query_position, self.key_position, self.keep_roped
