"""The K/V cache of a batch of videos: page tables plus the rule by which frames become visible, slide out and are positioned.

Variants (sources: Self-Forcing, LongLive v1.0, Infinity-RoPE, Krea realtime):

* ``self_forcing``       keys cached roped at their absolute frame; window of the newest frames, the sink (first frames) inside it.
* ``longlive``           the same numbers; on a prompt switch the visible frames are cached again under the new prompt.
* ``longlive_infinity``  keys cached un-roped and roped at every read by their place in the window.
* ``infinity_rope``      the same, with the official query position: the chunk's frame while it is below the window, then window - chunk.
* ``krea``               before every chunk the keys and values of a short context are computed anew, roped at its places from 0.

The noisy chunk is never cached: while it is denoised its keys and values live for one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Hashable, Literal, Sequence

from arcopo_kernels.paging import PagePool, PageRun
from torch import Tensor

from arcopo_fast.model.causal_wan import CachedRun, ChunkContext


@dataclass(frozen=True)
class CachePolicy:
    """window: visible latent frames, the chunk being denoised included (None: all). sink: first frames that never leave.

    global_sink: on a prompt switch the sink keeps its keys and values (longlive).

    With krea the sink is 1 or 0. The context is the first latent frame and the newest ones. With a sink of 0 the first frame is replaced
    once the video fills the window: by the pixel frame that comes before the newest ones, encoded as an image of its own.
    """

    variant: Literal["self_forcing", "longlive", "longlive_infinity", "infinity_rope", "krea"] = "self_forcing"
    window: int | None = None
    sink: int = 0
    global_sink: bool = True

    def __post_init__(self) -> None:
        if self.sink < 0 or (self.window is not None and self.window <= self.sink):
            raise ValueError(f"a window of {self.window} frames cannot hold a sink of {self.sink} and a chunk")
        if self.variant == "infinity_rope" and self.window is not None and self.sink < 1:
            raise ValueError("infinity_rope with a window needs a sink of at least 1 frame")
        if self.recomputed and (self.window is None or self.sink > 1):
            raise ValueError(f"krea needs a window and a sink of 0 or 1; got a window of {self.window} and a sink of {self.sink}")

    @property
    def absolute(self) -> bool:
        """Frames stand at their place in the video; else, at their place in the window."""
        return self.variant in ("self_forcing", "longlive")

    @property
    def roped(self) -> bool:
        """Keys are cached roped."""
        return self.absolute or self.recomputed

    @property
    def recomputed(self) -> bool:
        """The context is computed anew before every chunk."""
        return self.variant == "krea"

    @property
    def reencoded(self) -> bool:
        """The first frame of a recomputed context is decoded and encoded again."""
        return self.recomputed and self.sink == 0

    def context_frames(self, chunk_frames: int) -> int:
        """Frames of a recomputed context, at most, beside which a chunk of `chunk_frames` frames fills the window."""
        if self.window is None or self.window <= chunk_frames:
            raise ValueError(f"a window of {self.window} frames has no room for a context beside a chunk of {chunk_frames}")
        return self.window - chunk_frames


class VideoCache:
    """Page tables of B videos that stand at the same frame; all tables have the same length.

    reserved: for each video the pages set aside for its next frames; the cache takes them out of these lists, or gives them back.
    """

    def __init__(self, pool: PagePool, policy: CachePolicy, batch: int) -> None:
        self.pool = pool
        self.policy = policy
        self.tables = [pool.table() for _ in range(batch)]
        self.reserved: list[list[int]] = [[] for _ in range(batch)]

    @property
    def frames(self) -> int:
        """Cached frames that are visible now."""
        return len(self.tables[0])

    def fork(self, branches: int) -> VideoCache:
        """`branches` caches over the pages of this one video (batch 1), copying nothing."""
        if len(self.tables) != 1:
            raise ValueError(f"a cache of {len(self.tables)} videos cannot be forked; fork one video at a time")
        child = VideoCache(self.pool, self.policy, branches)
        child.tables = [self.tables[0].fork() for _ in range(branches)]
        return child

    def reserve(self, frames: int) -> None:
        """Set aside what is missing for the next `frames` frames of every video, all at once, so that each video's are consecutive."""
        missing = max(0, frames - len(self.reserved[0]))
        pages = self.pool.allocate(missing * len(self.tables))
        for row, reserved in enumerate(self.reserved):
            reserved.extend(pages[row * missing : (row + 1) * missing])

    def make_room(self, frames: int) -> None:
        """Slide the window for a chunk of `frames` frames: drop the oldest frames after the sink."""
        window, sink = self.policy.window, self.policy.sink
        excess = 0 if window is None else self.frames + frames - window
        if excess > 0:
            if sink + excess > self.frames:
                raise ValueError(f"a chunk of {frames} frames does not fit a window of {window} with a sink of {sink}")
            for table in self.tables:
                table.drop(sink, sink + excess)

    def drop_all(self, keep: int) -> None:
        """Forget all but the first `keep` frames."""
        for table in self.tables:
            table.drop(keep, len(table))

    def context(self, first_frame: int, frames: int, *, keep: bool) -> PagedContext:
        """What a chunk of `frames` frames starting at `first_frame` of the video sees; with `keep`, its pages are appended and written."""
        visible = self.frames
        if self.policy.absolute:
            query = key = first_frame
        else:
            query = key = visible
            window = self.policy.window
            if self.policy.variant == "infinity_rope" and window is not None:
                query = first_frame if first_frame < window else window - frames
        reads = self.pool.runs(self.tables, 0, visible) if visible else []
        writes = self._append(frames) if keep else []
        return PagedContext(self.pool, reads, writes, query, key, self.policy.roped)

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

    def place(self) -> Hashable | None:
        if self.keep:
            return None
        runs = tuple((run.column, run.length, run.rows, run.first, run.stride, run.pages) for run in self.reads)
        return runs, self.query_position, self.key_position, self.keep_roped
