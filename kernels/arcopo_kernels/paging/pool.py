"""The page pool of a causal video generator's K/V cache.

A page holds the keys and values of one latent frame in every layer. Pages are reference counted; a video's cache is a table (a host-side
list) of pages. Forking copies the list and counts references up; writing to a page that someone else also holds copies it first; a
sliding window drops entries from the list. No tensor moves for any of these but the copy on write, one launch for all layers.

Attention never sees a page: pages are handed out in consecutive slots, so a prefix, a chunk or the tails of a group of branches are regular
runs of slots, and `runs` gives them as strided views. Irregular tables (they arise only when the pool is fragmented) are gathered.

What holds at any time:

* A page is free, unclaimed, or in tables. Unclaimed pages, fresh from `allocate` or `reserve`, have one reference; they alone can be put
  into a table or given back by number. A page in tables has as many references as tables hold it, and goes back through them.
* `pages_in_use` counts the pages that are not free; `peak_in_use` is the most it has been.
* A page that several tables hold is never written. Writing takes runs from `prepare_write`, which makes the pages exclusive; they are good
  until one of the pages is forked, freed or prepared again.
* What a run reads is what its tables held when it was planned, later writes of theirs included. Once one of its pages was freed, or was
  prepared for a write, which may be another table's by then, the run is refused.
* A call that raises has changed nothing.

Planning and counting is host work, once for a chunk. `read` and `write` are called in every layer: they check their runs in constant time
while the pool is unchanged, and never wait for the device. A captured CUDA graph replays addresses and asks nobody: whoever captured it
keeps its tables as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from arcopo_kernels.paging.op import copy_pages
from arcopo_kernels.paging.plan import GroupPlan
from torch import Tensor


class PagePoolExhausted(RuntimeError):
    """There are not enough free pages; the pool is unchanged."""


@dataclass(eq=False)
class PageRun:
    """Consecutive columns of a batch of page tables that can be read or written as one tensor; planned by the pool, for the pool.

    Attributes:
        column, length: the columns [column, column + length) of the tables.
        rows: of the tensor; 1 where the batch shares its pages.
        first, stride: row i holds pages first + i * stride ... + length - 1.
        index: [B, length] int64 on the device, the pages' numbers when they are irregular; else None.
        pages: all pages of the run.
        pool: planned it.
        stamp: the pool's clock when this was planned.
        checked: the pool's clock when `writable` and `readable` were last found out.
    """

    column: int
    length: int
    rows: int
    first: int
    stride: int
    index: Tensor | None = field(repr=False)
    pages: tuple[int, ...] = field(repr=False)
    pool: PagePool = field(repr=False)
    stamp: int = field(repr=False)
    checked: int = field(repr=False)
    writable: bool
    readable: bool = True


@dataclass(eq=False)
class Reservation:
    """Unclaimed pages for a group.

    Whoever puts pages into a table takes them out of the lists; `release` gives back what is left.

    Attributes:
        prefix: pages of the shared part.
        tails: pages of each branch.
    """

    pool: PagePool = field(repr=False)
    prefix: list[int]
    tails: list[list[int]]

    def release(self) -> None:
        """Give the pages that are left back."""
        for pages in (self.prefix, *self.tails):
            self.pool.release(pages)
            pages.clear()


class PagePool:
    """Storage for `pages` pages: keys and values [layers, pages, tokens_per_page, heads, head_dim] at stable addresses."""

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        tokens_per_page: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, pages, tokens_per_page, heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"a page pool needs positive sizes; got [layers, pages, tokens, heads, head_dim] = {list(shape)}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; keys and values need a floating-point one")
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.peak_in_use = 0
        self._in_use = 0
        self._references = [0] * pages
        self._unclaimed: set[int] = set()
        self._clock = 0  # counts changes
        self._changed = [0] * pages  # the clock when each page was last freed or prepared for a write
        self._writer = [0] * pages  # the stamp of the runs that may write each page, 0 if none may

    @property
    def pages(self) -> int:
        """Number of all pages."""
        return len(self._references)

    @property
    def pages_in_use(self) -> int:
        """Number of pages that are not free."""
        return self._in_use

    @property
    def pages_free(self) -> int:
        """Number of free pages."""
        return self.pages - self._in_use

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers, keys and values."""
        return 2 * self.keys.nbytes // self.pages

    def references(self, page: int) -> int:
        """Return how many tables hold `page`; 1 for an unclaimed page."""
        return self._references[page]

    def table(self) -> PageTable:
        """Return a new, empty table."""
        return PageTable(self, [])

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, consecutive ones where there are any, from the shortest stretch that holds them.

        Raises:
            PagePoolExhausted: fewer are free; nothing is taken.
        """
        pages = self._take(count)
        self._unclaimed.update(pages)
        return pages

    def reserve(self, plan: GroupPlan) -> Reservation:
        """Take all pages of a group at once.

        Raises:
            PagePoolExhausted: fewer are free; nothing is taken.
        """
        if plan.pages > self.pages_free:
            raise PagePoolExhausted(
                f"{plan} are {plan.pages} pages ({plan.pages * self.page_bytes / 2**30:.3g} GiB), {self.pages_free} of {self.pages} are "
                f"free; at most {plan.branches_within(self.pages_free)} branches fit at once"
            )
        # The longer part first: with the shortest stretch for each, both are kept in one piece wherever that is possible.
        tails_first = plan.branches * plan.tail > plan.prefix
        tails = self.allocate(plan.branches * plan.tail) if tails_first else []
        prefix = self.allocate(plan.prefix)
        tails = tails if tails_first else self.allocate(plan.branches * plan.tail)
        rows = [tails[row * plan.tail : (row + 1) * plan.tail] for row in range(plan.branches)]
        return Reservation(self, prefix, rows)

    def release(self, pages: Sequence[int]) -> None:
        """Give unclaimed pages back.

        Raises:
            ValueError: a page is free already, or in a table; none is given back.
        """
        self._claim(pages)
        self._drop(pages)

    # Batches of tables: the host plans once for a chunk, then every layer reads and writes by the plan.

    def runs(self, tables: Sequence[PageTable], start: int = 0, stop: int | None = None) -> list[PageRun]:
        """Return columns [start, stop) of equally long tables as the fewest regular runs."""
        return self._plan(tables, *self._columns(tables, start, stop), writable=False)

    def read(self, layer: int, run: PageRun) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, length * tokens, heads, head_dim] of one layer: views, but for irregular runs.

        Raises:
            ValueError: pages of the run were freed or prepared for a write since it was planned, or the pool's storage was made to require
                gradient; cached pages are constants.
        """
        if self.keys.requires_grad or self.values.requires_grad:
            raise ValueError("cached pages are constants: the pool's keys and values must not require gradient")
        self._check(run)
        if not run.readable:
            raise ValueError(f"{run} is stale: pages of it were freed or prepared for a write since it was planned; call runs again")
        key, value = self._view(self.keys[layer], run), self._view(self.values[layer], run)
        return key.flatten(1, 2), value.flatten(1, 2)

    def prepare_write(self, tables: Sequence[PageTable], start: int, stop: int) -> list[PageRun]:
        """Make columns [start, stop) of all tables exclusively theirs (copying pages that are shared), and plan the write.

        Raises:
            PagePoolExhausted: the copies do not fit; nothing is changed.
        """
        start, stop = self._columns(tables, start, stop)
        if len({id(table) for table in tables}) != len(tables):
            raise ValueError("tables holds one table twice; its pages cannot be written as two rows")
        shared = [(table, column) for table in tables for column in range(start, stop) if self._references[table._pages[column]] > 1]
        copies = self._take(len(shared))
        if shared:
            try:
                sources, targets = self._to_device([[table._pages[column] for table, column in shared], copies])
                copy_pages(self.keys, self.values, sources, targets)
            except BaseException:
                self._drop(copies)
                raise
        for (table, column), copy in zip(shared, copies):
            self._drop([table._pages[column]])
            table._pages[column] = copy
        self._clock += 1
        for table in tables:
            for page in table._pages[start:stop]:
                self._changed[page] = self._writer[page] = self._clock
        return self._plan(tables, start, stop, writable=True)

    def write(self, layer: int, runs: Sequence[PageRun], key: Tensor, value: Tensor) -> None:
        """Store key, value [B, tokens of all runs, heads, head_dim] of one layer into the pages planned by `prepare_write`.

        Raises:
            ValueError: runs that were not prepared or are so no longer, a tensor that carries gradient (cached pages are constants), or one
                of the wrong shape, dtype or device. Nothing is written.
        """
        for run in runs:
            self._check_writable(run)
        tokens = self.keys.shape[2]
        expected = (max((run.rows for run in runs), default=0), sum(run.length for run in runs) * tokens, *self.keys.shape[3:])
        for name, tensor in (("key", key), ("value", value)):
            if tensor.requires_grad:
                raise ValueError(f"{name}: tensors that carry gradient cannot be cached; pages are constants, so detach it first")
            if tensor.shape != expected:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, which the prepared pages do not fit; expected {list(expected)}")
            if tensor.dtype != self.keys.dtype or tensor.device != self.keys.device:
                pages = f"{self.keys.dtype} on {self.keys.device}"
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, the pages are {pages}; convert it")
        at = 0
        for run in runs:
            part = slice(at, at + run.length * tokens)
            at += run.length * tokens
            for store, source in ((self.keys[layer], key), (self.values[layer], value)):
                source = source[:, part].unflatten(1, (run.length, tokens))
                if run.index is None:
                    self._view(store, run).copy_(source)
                else:
                    store[run.index] = source

    # Bookkeeping

    def _take(self, count: int) -> list[int]:
        if count < 0:
            raise ValueError(f"{count} pages asked for; expected a number from 0 on")
        if count > self.pages_free:
            raise PagePoolExhausted(
                f"{count} pages asked for, {self.pages_free} of {self.pages} are free; release tables or make the pool larger"
            )
        free = [page for page, references in enumerate(self._references) if not references]
        starts = [i for i, page in enumerate(free) if not i or free[i - 1] != page - 1]
        stretches = [free[i:j] for i, j in zip(starts, [*starts[1:], len(free)]) if j - i >= count]
        pages = min(stretches, key=len)[:count] if stretches else free[:count]
        for page in pages:
            self._references[page] = 1
        self._clock += 1
        self._in_use += count
        self.peak_in_use = max(self.peak_in_use, self._in_use)
        return pages

    def _share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page; runs that were prepared to write them may no longer."""
        self._clock += 1
        for page in pages:
            self._references[page] += 1
            self._writer[page] = 0

    def _drop(self, pages: Sequence[int]) -> None:
        """Remove a reference from each page; a page without references is free."""
        self._clock += 1
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._in_use -= 1
                self._changed[page], self._writer[page] = self._clock, 0

    def _claim(self, pages: Sequence[int]) -> None:
        """Take pages out of the unclaimed ones: they become a table's, or are about to be free."""
        for page in pages:
            if page not in self._unclaimed:
                holders = self._references[page] if 0 <= page < self.pages else 0
                state = f"held by {holders} tables, which give it back themselves" if holders else "already free"
                raise ValueError(f"page {page} is {state}; expected pages that allocate or reserve handed out, each used once")
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {list(pages)} name one page twice")
        self._unclaimed.difference_update(pages)

    def _columns(self, tables: Sequence[PageTable], start: int, stop: int | None) -> tuple[int, int]:
        if any(table.pool is not self for table in tables):
            raise ValueError("tables holds a table of another pool")
        if len({len(table) for table in tables}) != 1:
            raise ValueError(f"tables have lengths {[len(table) for table in tables]}; expected at least one, all of one length")
        stop = len(tables[0]) if stop is None else stop
        if not 0 <= start <= stop <= len(tables[0]):
            raise ValueError(f"columns [{start}, {stop}) are not within tables of {len(tables[0])} pages")
        return start, stop

    def _plan(self, tables: Sequence[PageTable], start: int, stop: int, *, writable: bool) -> list[PageRun]:
        spans: list[list[list[int]]] = []  # for each run its columns, for each of them the page of every row
        for column in range(start, stop):
            pages = [table._pages[column] for table in tables]
            stride = _stride(pages)
            previous = spans[-1][-1] if spans else None
            if previous and stride == _stride(previous) and (stride is None or pages[0] == previous[0] + 1):
                spans[-1].append(pages)
            else:
                spans.append([pages])
        runs: list[PageRun] = []
        for span in spans:
            stride, first = _stride(span[0]), span[0][0]
            index = self._to_device(list(zip(*span))) if stride is None else None
            rows = 1 if stride == 0 else len(tables)
            pages_of_run = tuple(page for pages in span for page in pages[:rows])
            now = self._clock
            runs.append(PageRun(start, len(span), rows, first, stride or 0, index, pages_of_run, self, now, now, writable))
            start += len(span)
        return runs

    def _check(self, run: PageRun) -> None:
        """Find out whether a run is still good: at once if nothing has changed since the last time."""
        if run.pool is not self:
            raise ValueError(f"{run} was planned by another pool")
        if run.checked != self._clock:
            run.readable = run.readable and all(self._changed[page] <= run.stamp for page in run.pages)
            run.writable = run.writable and all(self._writer[page] == run.stamp for page in run.pages)
            run.checked = self._clock

    def _check_writable(self, run: PageRun) -> None:
        self._check(run)
        if not run.writable:
            raise ValueError(
                f"{run} may not be written: it did not come from prepare_write, or pages of it were forked, freed or prepared again since; "
                "a write now could reach another table's frames"
            )

    def _to_device(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Return int64 numbers on the pool's device, without waiting for it."""
        return torch.tensor(numbers, pin_memory=self.keys.is_cuda).to(self.keys.device, non_blocking=True)

    def _view(self, store: Tensor, run: PageRun) -> Tensor:
        """Return a run of one layer's store [pages, tokens, heads, head_dim] as [rows, length, tokens, heads, head_dim]."""
        if run.index is not None:
            return store[run.index]
        page = store.stride(0)
        size = (run.rows, run.length, *store.shape[1:])
        return store.as_strided(size, (run.stride * page, *store.stride()), store.storage_offset() + run.first * page)


class PageTable:
    """The pages of one video's cache, oldest first. A released table refuses everything, its length included."""

    def __init__(self, pool: PagePool, pages: list[int]) -> None:
        self.pool = pool
        self._pages = pages
        self._released = False

    @property
    def pages(self) -> tuple[int, ...]:
        """Numbers of the pages, oldest first."""
        self._check()
        return tuple(self._pages)

    def __len__(self) -> int:
        self._check()
        return len(self._pages)

    def fork(self) -> PageTable:
        """Return a second table over the same pages."""
        self._check()
        self.pool._share(self._pages)
        return PageTable(self.pool, list(self._pages))

    def extend(self, pages: Sequence[int]) -> None:
        """Append unclaimed pages; the table takes over their reference.

        Raises:
            ValueError: a page is free, or in a table already; nothing is appended.
        """
        self._check()
        self.pool._claim(pages)
        self._pages.extend(pages)

    def drop(self, start: int, stop: int) -> None:
        """Forget columns [start, stop): a window slides past old frames so."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"columns [{start}, {stop}) are not within a table of {len(self)} pages")
        self.pool._drop(self._pages[start:stop])
        del self._pages[start:stop]

    def release(self) -> None:
        """Give all pages back; the table cannot be used afterwards."""
        self._check()
        self._released = True
        self.pool._drop(self._pages)
        self._pages = []

    def _check(self) -> None:
        if self._released:
            raise ValueError("this page table was released; fork or create another one")


def _stride(pages: Sequence[int]) -> int | None:
    """Return the step from row to row: 0 if all share one page, None if it varies or is negative."""
    steps = {after - before for before, after in zip(pages, pages[1:])} or {0}
    return min(steps) if len(steps) == 1 and min(steps) >= 0 else None
