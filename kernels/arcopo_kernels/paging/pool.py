"""The page pool of a causal video generator's K/V cache.

A page holds the keys and values of one latent frame in every layer. Pages are reference counted; a video's cache is a table (a host-side
list) of pages. Forking copies the list and counts references up; writing to a page that someone else also holds copies it first; a
sliding window drops entries from the list. No tensor moves for any of these but the copy on write.

Attention never sees a page: pages are handed out in consecutive slots, so a prefix, a chunk or the tails of a group of branches are regular
runs of slots, and `runs` gives them as strided views. Irregular tables (they arise only when the pool is fragmented) are gathered.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor


class PagePoolExhausted(RuntimeError):
    """There are not enough free pages; the pool is unchanged."""


class PageRun(NamedTuple):
    """`length` consecutive columns of a batch of page tables that can be read or written as one tensor.

    Row i holds pages first + i * stride ... + length - 1 (stride 0: one row shared by the whole batch). `pages` [B, length] is set instead
    when they are irregular.
    """

    column: int
    length: int
    rows: int
    first: int
    stride: int
    pages: Tensor | None = None


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
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._references = [0] * pages
        self._in_use = 0
        self.peak_in_use = 0

    @property
    def pages(self) -> int:
        return len(self._references)

    @property
    def pages_in_use(self) -> int:
        return self._in_use

    @property
    def pages_free(self) -> int:
        return self.pages - self._in_use

    def references(self, page: int) -> int:
        """How many tables hold `page`."""
        return self._references[page]

    def table(self) -> PageTable:
        """A new, empty table."""
        return PageTable(self, [])

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, consecutive ones where there are any; each has one reference.

        Raises:
            PagePoolExhausted: fewer are free; nothing is taken.
        """
        if count > self.pages_free:
            raise PagePoolExhausted(
                f"{count} pages asked for, {self.pages_free} of {self.pages} are free; release tables or make the pool larger"
            )
        free = [page for page, references in enumerate(self._references) if references == 0]
        start = next((i for i in range(len(free) - count + 1) if free[i + count - 1] - free[i] == count - 1), 0) if count else 0
        taken = free[start : start + count]
        for page in taken:
            self._references[page] = 1
        self._in_use += count
        self.peak_in_use = max(self.peak_in_use, self._in_use)
        return taken

    def retain(self, pages: Sequence[int]) -> None:
        """Count one more reference to each page."""
        for page in pages:
            if not self._references[page]:
                raise ValueError(f"page {page} is free; only a page in use can be shared")
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one reference less to each page; a page without references is free again."""
        for page in pages:
            if not self._references[page]:
                raise ValueError(f"page {page} is already free: it was released twice")
            self._references[page] -= 1
            self._in_use -= self._references[page] == 0

    # Batches of tables: the host plans once for a chunk, then every layer reads and writes by the plan.

    def runs(self, tables: Sequence[PageTable], start: int = 0, stop: int | None = None) -> list[PageRun]:
        """Columns [start, stop) of equally long tables as the fewest regular runs."""
        if not tables or len({len(table) for table in tables}) != 1:
            raise ValueError(f"tables of lengths {[len(table) for table in tables]}; expected at least one, all of one length")
        stop = len(tables[0]) if stop is None else stop
        columns = [[table.pages[column] for table in tables] for column in range(start, stop)]
        runs: list[PageRun] = []
        for column, pages in enumerate(columns, start):
            steps = {after - before for before, after in zip(pages, pages[1:])}
            regular = len(steps) <= 1
            stride = steps.pop() if len(steps) == 1 else 0
            shared = len(tables) == 1 or (regular and stride == 0)
            run = PageRun(column, 1, 1 if shared else len(tables), pages[0], stride) if regular and stride >= 0 else None
            if run is None:
                irregular = torch.tensor([pages], device=self.keys.device).T
                run = PageRun(column, 1, len(tables), pages[0], 0, irregular)
            last = runs.pop() if runs else None
            if last is None:
                runs.append(run)
            elif last.pages is not None and run.pages is not None:
                runs.append(last._replace(length=last.length + 1, pages=torch.cat([last.pages, run.pages], dim=1)))
            elif (last.first + last.length, last.rows, last.stride) == (run.first, run.rows, run.stride) and last.pages is run.pages:
                runs.append(last._replace(length=last.length + 1))
            else:
                runs += [last, run]
        return runs

    def read(self, layer: int, run: PageRun) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, length * tokens, heads, head_dim] of one layer: views, but for irregular runs.

        Raises:
            ValueError: the pool's storage was made to require gradient; cached pages are constants.
        """
        if self.keys.requires_grad or self.values.requires_grad:
            raise ValueError("cached pages are constants: the pool's keys and values must not require gradient")
        key, value = self._view(self.keys[layer], run), self._view(self.values[layer], run)
        return key.flatten(1, 2), value.flatten(1, 2)

    def prepare_write(self, tables: Sequence[PageTable], start: int, stop: int) -> list[PageRun]:
        """Make columns [start, stop) of all tables exclusively theirs (copying pages that are shared), and plan the write.

        Raises:
            PagePoolExhausted: the copies do not fit; nothing is changed.
        """
        shared = [(table, column) for table in tables for column in range(start, stop) if self._references[table.pages[column]] > 1]
        copies = self.allocate(len(shared))
        if shared:
            sources = torch.tensor([table.pages[column] for table, column in shared], device=self.keys.device)
            targets = torch.tensor(copies, device=self.keys.device)
            self.keys[:, targets] = self.keys[:, sources]
            self.values[:, targets] = self.values[:, sources]
        for (table, column), page in zip(shared, copies):
            self.release([table.pages[column]])
            table.pages[column] = page
        return self.runs(tables, start, stop)

    def write(self, layer: int, runs: Sequence[PageRun], key: Tensor, value: Tensor) -> None:
        """Store key, value [B, tokens of all runs, heads, head_dim] of one layer into the pages planned by `prepare_write`.

        Raises:
            ValueError: a tensor that carries gradient (cached pages are constants) or of the wrong shape.
        """
        if key.requires_grad or value.requires_grad:
            raise ValueError("keys and values that carry gradient cannot be cached: pages are constants; detach them or run under no_grad")
        tokens = self.keys.shape[2]
        expected = (max(run.rows for run in runs), sum(run.length for run in runs) * tokens, *self.keys.shape[3:])
        if tuple(key.shape) != expected or tuple(value.shape) != expected:
            raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit the pages prepared: expected {expected}")
        at = 0
        for run in runs:
            part = slice(at * tokens, (at + run.length) * tokens)
            at += run.length
            for store, source in ((self.keys[layer], key), (self.values[layer], value)):
                source = source[:, part].unflatten(1, (run.length, tokens))
                if run.pages is None:
                    self._view(store, run).copy_(source)
                else:
                    store[run.pages] = source

    def _view(self, store: Tensor, run: PageRun) -> Tensor:
        """[rows, length, tokens, heads, head_dim] of one layer's store [pages, tokens, heads, head_dim]."""
        if run.pages is not None:
            return store[run.pages]
        page = store.stride(0)
        size = (run.rows, run.length, *store.shape[1:])
        return store.as_strided(size, (run.stride * page, *store.stride()), store.storage_offset() + run.first * page)


class PageTable:
    """The pages of one video's cache, oldest first."""

    def __init__(self, pool: PagePool, pages: list[int]) -> None:
        self.pool = pool
        self.pages = pages
        self._released = False

    def __len__(self) -> int:
        return len(self.pages)

    def fork(self) -> PageTable:
        """A second table over the same pages."""
        self._check()
        self.pool.retain(self.pages)
        return PageTable(self.pool, list(self.pages))

    def extend(self, pages: Sequence[int]) -> None:
        """Append freshly allocated pages; the table takes over their reference."""
        self._check()
        self.pages.extend(pages)

    def drop(self, start: int, stop: int) -> None:
        """Forget columns [start, stop): how a window slides past old frames."""
        self._check()
        self.pool.release(self.pages[start:stop])
        del self.pages[start:stop]

    def release(self) -> None:
        """Give all pages back; the table cannot be used afterwards."""
        self._check()
        self._released = True
        self.pool.release(self.pages)
        self.pages = []

    def _check(self) -> None:
        if self._released:
            raise ValueError("this page table was released; fork or create another one")
