"""The page pool: reference counts, forks, copy on write, windows, regular views, and what it refuses."""

from __future__ import annotations

import random

import pytest
import torch
from arcopo_kernels import PagePool, PagePoolExhausted, PageTable
from torch import Tensor

LAYERS, TOKENS, HEADS, DIM = 2, 3, 2, 4


def make(pages: int) -> PagePool:
    return PagePool(layers=LAYERS, pages=pages, tokens_per_page=TOKENS, heads=HEADS, head_dim=DIM)


def append(pool: PagePool, tables: list[PageTable], frames: int) -> tuple[Tensor, Tensor]:
    """Append random frames to every table; what was written, [layers, B, frames * tokens, heads, dim]."""
    pages = pool.allocate(frames * len(tables))
    for row, table in enumerate(tables):
        table.extend(pages[row * frames : (row + 1) * frames])
    return overwrite(pool, tables, len(tables[0]) - frames, len(tables[0]))


def overwrite(pool: PagePool, tables: list[PageTable], start: int, stop: int) -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, LAYERS, len(tables), (stop - start) * TOKENS, HEADS, DIM)
    runs = pool.prepare_write(tables, start, stop)
    for layer in range(LAYERS):
        pool.write(layer, runs, key[layer], value[layer])
    return key, value


def read(pool: PagePool, tables: list[PageTable]) -> Tensor:
    """Keys and values as a batch reads them, [2, layers, B, tokens, heads, dim]."""
    runs, batch = pool.runs(tables), len(tables)
    parts = [[pool.read(layer, run) for run in runs] for layer in range(LAYERS)]
    return torch.stack(
        [torch.stack([torch.cat([p[i].expand(batch, -1, -1, -1) for p in layer], dim=1) for layer in parts]) for i in (0, 1)]
    )


def test_what_is_written_is_read() -> None:
    pool = make(8)
    table = pool.table()
    first, second = append(pool, [table], 3), append(pool, [table], 2)
    torch.testing.assert_close(read(pool, [table]), torch.stack([torch.cat([first[i], second[i]], dim=2) for i in (0, 1)]))
    assert len(pool.runs([table])) == 1, "a video written in a row is one contiguous run"


def test_a_fork_shares_pages_and_its_tail_is_one_strided_view() -> None:
    pool = make(3 + 4 * 2)
    parent = pool.table()
    append(pool, [parent], 3)
    before = read(pool, [parent]).clone()
    branches = [parent.fork() for _ in range(4)]
    assert pool.pages_in_use == 3 and pool.references(parent.pages[0]) == 5
    tail = append(pool, branches, 2)
    assert pool.pages_in_use == 3 + 4 * 2
    shared, own = pool.runs(branches)
    assert (shared.rows, shared.length, own.rows, own.length) == (1, 3, 4, 2)
    key, _ = pool.read(0, own)
    assert key.untyped_storage().data_ptr() == pool.keys.untyped_storage().data_ptr(), "reading copies nothing"
    torch.testing.assert_close(read(pool, branches)[:, :, :, 3 * TOKENS :], torch.stack(tail))
    torch.testing.assert_close(read(pool, [parent]), before)
    for table in (*branches, parent):
        table.release()
    assert pool.pages_in_use == 0


def test_writing_to_a_shared_page_copies_it_first() -> None:
    pool = make(8)
    parent = pool.table()
    append(pool, [parent], 3)
    before = read(pool, [parent]).clone()
    child = parent.fork()
    key, value = overwrite(pool, [child], 1, 2)
    assert pool.pages_in_use == 4
    torch.testing.assert_close(read(pool, [parent]), before, rtol=0, atol=0)
    expected = before.clone()
    expected[:, :, :, TOKENS : 2 * TOKENS] = torch.stack([key, value])
    torch.testing.assert_close(read(pool, [child]), expected, rtol=0, atol=0)


def test_a_window_drops_pages_without_moving_any() -> None:
    pool = make(6)
    table = pool.table()
    append(pool, [table], 5)
    before = read(pool, [table])
    table.drop(1, 3)
    kept = [0, 3, 4]
    torch.testing.assert_close(read(pool, [table]), before.unflatten(3, (5, TOKENS))[:, :, :, kept].flatten(3, 4), rtol=0, atol=0)
    assert pool.pages_in_use == 3


def test_running_out_changes_nothing() -> None:
    pool = make(4)
    table = pool.table()
    append(pool, [table], 3)
    with pytest.raises(PagePoolExhausted, match="2 pages asked for, 1 of 4 are free"):
        pool.allocate(2)
    child = table.fork()
    before = list(child.pages)
    with pytest.raises(PagePoolExhausted):
        pool.prepare_write([child], 0, 2)
    assert child.pages == before and pool.pages_in_use == 3


def test_misuse_is_refused() -> None:
    pool = make(4)
    table = pool.table()
    append(pool, [table], 1)
    runs = pool.prepare_write([table], 0, 1)
    key = torch.randn(1, TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="carry gradient"):
        pool.write(0, runs, key.clone().requires_grad_(), key)
    with pytest.raises(ValueError, match="do not fit"):
        pool.write(0, runs, key[:, 1:], key[:, 1:])
    page = table.pages[0]
    table.release()
    with pytest.raises(ValueError, match="released"):
        table.fork()
    with pytest.raises(ValueError, match="already free"):
        pool.release([page])


def test_random_walk_against_plain_copies() -> None:
    """Fork, append, overwrite, slide and release at random; every table must always read what a private copy of its frames holds."""
    choose = random.Random(torch.initial_seed())
    pool = make(40)
    videos: list[tuple[PageTable, Tensor]] = [(pool.table(), torch.zeros(2, LAYERS, 0, HEADS, DIM))]
    for _ in range(600):
        table, copy = videos[choose.randrange(len(videos))]
        action = choose.choice(["fork", "append", "overwrite", "drop", "release"])
        at = next(i for i, (t, _) in enumerate(videos) if t is table)
        try:
            if action == "fork" and len(videos) < 8:
                videos.append((table.fork(), copy.clone()))
            elif action == "append":
                written = append(pool, [table], choose.randint(1, 3))
                videos[at] = (table, torch.cat([copy, torch.stack(written)[:, :, 0]], dim=2))
            elif action == "overwrite" and len(table):
                start = choose.randrange(len(table))
                stop = choose.randint(start + 1, len(table))
                written = overwrite(pool, [table], start, stop)
                copy[:, :, start * TOKENS : stop * TOKENS] = torch.stack(written)[:, :, 0]
            elif action == "drop" and len(table) > 2:
                table.drop(1, 2)
                videos[at] = (table, torch.cat([copy[:, :, :TOKENS], copy[:, :, 2 * TOKENS :]], dim=2))
            elif action == "release" and len(videos) > 1:
                table.release()
                videos.pop(at)
        except PagePoolExhausted:
            longest = max(range(len(videos)), key=lambda i: len(videos[i][0]))
            videos[longest][0].release()
            videos[longest] = (pool.table(), torch.zeros(2, LAYERS, 0, HEADS, DIM))
        assert pool.pages_in_use == len({page for t, _ in videos for page in t.pages})
        same_length = [(t, c) for t, c in videos if len(t) == len(videos[0][0]) > 0]
        if same_length:
            expected = torch.stack([c for _, c in same_length], dim=2)
            torch.testing.assert_close(read(pool, [t for t, _ in same_length]), expected, rtol=0, atol=0)
