"""The page pool: reference counts, forks, copy on write, windows, regular views, plans, and what it refuses.

test_paging_properties.py walks through all of it at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from arcopo_kernels import PagePool, PagePoolExhausted, PageTable
from arcopo_kernels.paging import GroupPlan, PageRun, Reservation, plan_group
from support.pages import DIM, HEADS, LAYERS, TOKENS, append, make, overwrite, read
from torch import Tensor


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
    before = child.pages
    with pytest.raises(PagePoolExhausted):
        pool.prepare_write([child], 0, 2)
    assert child.pages == before and pool.pages_in_use == 3


def test_misuse_is_refused() -> None:
    pool = make(4)
    table = pool.table()
    append(pool, [table], 1)
    runs = pool.prepare_write([table], 0, 1)
    key = torch.randn(1, TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="value: tensors that carry gradient"):
        pool.write(0, runs, key, key.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"key has shape \[1, 2, 2, 4\], which the prepared pages do not fit; expected \[1, 3, 2, 4\]"):
        pool.write(0, runs, key[:, 1:], key[:, 1:])
    with pytest.raises(ValueError, match="value is torch.float64 on cpu, the pages are torch.float32 on cpu"):
        pool.write(0, runs, key, key.double())
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


def prepared(pool: PagePool, tables: list[PageTable]) -> tuple[list[PageRun], Callable[[], None]]:
    """A plan to write all columns, and a write by it."""
    runs = pool.prepare_write(tables, 0, len(tables[0]))
    key, value = torch.randn(2, len(tables), len(tables[0]) * TOKENS, HEADS, DIM)
    return runs, lambda: pool.write(1, runs, key, value)


def test_a_plan_from_before_a_fork_may_not_write() -> None:
    """Not even once only the fork is left: the pages are its own by then."""
    pool = make(8)
    table = pool.table()
    append(pool, [table], 2)
    runs, write = prepared(pool, [table])
    write()
    child = table.fork()
    before = read(pool, [child]).clone()
    with pytest.raises(ValueError, match="may not be written.*forked"):
        write()
    pool.read(0, runs[0])
    table.release()
    with pytest.raises(ValueError, match="may not be written"):
        write()
    torch.testing.assert_close(read(pool, [child]), before, rtol=0, atol=0)


def test_a_plan_over_pages_that_became_anothers_is_refused() -> None:
    pool = make(3)
    table = pool.table()
    append(pool, [table], 3)
    runs, write = prepared(pool, [table])
    table.drop(0, 3)
    other = pool.table()
    append(pool, [other], 3)
    before = read(pool, [other]).clone()
    with pytest.raises(ValueError, match="stale"):
        pool.read(0, runs[0])
    with pytest.raises(ValueError, match="may not be written"):
        write()
    torch.testing.assert_close(read(pool, [other]), before, rtol=0, atol=0)


def test_a_plan_does_not_read_what_another_table_writes() -> None:
    """The parent moves to a copy and leaves its page to the child: an old plan of the parent must not see the child's frames."""
    pool = make(2)
    parent = pool.table()
    append(pool, [parent], 1)
    (run,) = pool.runs([parent])
    child = parent.fork()
    before = pool.read(0, run)[0].clone()
    overwrite(pool, [parent], 0, 1)
    assert torch.equal(pool.read(0, run)[0], before), "the page as it was planned is still there"
    overwrite(pool, [child], 0, 1)
    with pytest.raises(ValueError, match="stale"):
        pool.read(0, run)


def test_writing_needs_runs_that_were_prepared_here() -> None:
    pool, other = make(4), make(4)
    tables = [pool.table(), other.table()]
    for owner, table in zip((pool, other), tables):
        append(owner, [table], 2)
    key = torch.randn(1, 2 * TOKENS, HEADS, DIM)
    pool.prepare_write(tables[:1], 0, 2)
    with pytest.raises(ValueError, match="did not come from prepare_write"):
        pool.write(0, pool.runs(tables[:1]), key, key)
    with pytest.raises(ValueError, match="another pool"):
        pool.write(0, other.prepare_write(tables[1:], 0, 2), key, key)
    with pytest.raises(ValueError, match="another pool"):
        pool.read(0, other.runs(tables[1:])[0])
    with pytest.raises(ValueError, match="another pool"):
        pool.runs(tables[1:])
    with pytest.raises(ValueError, match="one table twice"):
        pool.prepare_write(tables[:1] * 2, 0, 1)
    with pytest.raises(ValueError, match="do not fit"):
        pool.write(0, [], key, key)


def test_a_page_belongs_to_one_table_until_it_is_forked() -> None:
    pool = make(4)
    tables = [pool.table(), pool.table()]
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="name one page twice"):
        tables[0].extend(pages[:1] * 2)
    tables[0].extend(pages)
    with pytest.raises(ValueError, match="page 0 is held by 1 tables"):
        tables[1].extend(pages)
    with pytest.raises(ValueError, match="page 1 is held by 1 tables"):
        pool.release([pages[1]])
    with pytest.raises(ValueError, match="page 3 is already free"):
        tables[1].extend([3])
    with pytest.raises(ValueError, match=r"columns \[1, 3\) are not within a table of 2 pages"):
        tables[0].drop(1, 3)
    assert (len(tables[0]), len(tables[1]), pool.pages_in_use) == (2, 0, 2)


def test_a_released_table_refuses_everything() -> None:
    """An empty cache would be an answer, and a wrong one."""
    pool = make(4)
    table = pool.table()
    append(pool, [table], 2)
    table.release()
    plans = (lambda: pool.runs([table]), lambda: pool.prepare_write([table], 0, 1))
    for use in (lambda: len(table), lambda: table.pages, table.fork, table.release, *plans):
        with pytest.raises(ValueError, match="was released"):
            use()


def test_layers_pay_for_the_check_once() -> None:
    """As long as the pool is unchanged, reading and writing look at no page."""

    class Forbidden(tuple):
        def __iter__(self) -> object:
            raise AssertionError("looked at the pages again")

    pool = make(8)
    table = pool.table()
    append(pool, [table], 3)
    plans = [pool.runs([table], 0, 2)[0], pool.prepare_write([table], 2, 3)[0]]
    pool.table()
    pool.read(0, plans[0])
    for run in plans:
        run.pages = Forbidden(run.pages)
    key = torch.randn(1, TOKENS, HEADS, DIM)
    for layer in range(LAYERS):
        pool.read(layer, plans[0])
        pool.write(layer, plans[1:], key, key)
    table.fork()
    with pytest.raises(AssertionError, match="again"):
        pool.read(0, plans[0])


def test_a_page_pool_of_bad_sizes_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="positive sizes"):
        make(0)
    with pytest.raises(ValueError, match="dtype is torch.int64"):
        make(4, dtype=torch.int64)


# Plans for a group


def slide(pool: PagePool, tables: list[PageTable], chunks: list[int], reserved: list[list[int]], window: int | None, sink: int) -> None:
    """Append chunks as a cache does: drop what leaves the window, then take reserved pages, then others."""
    for chunk in chunks:
        excess = 0 if window is None else max(0, len(tables[0]) + chunk - window)
        for table in tables if excess else ():
            table.drop(sink, sink + excess)
        missing = max(0, chunk - len(reserved[0]))
        pages = pool.allocate(missing * len(tables))
        for row, (table, own) in enumerate(zip(tables, reserved)):
            own += pages[row * missing : (row + 1) * missing]
            table.extend(own[:chunk])
            del own[:chunk]


def consecutive(reserved: Reservation) -> bool:
    """The prefix is one stretch of pages, and the tails, one after the other, are another."""
    parts = (reserved.prefix, [page for tail in reserved.tails for page in tail])
    return all(part == list(range(part[0], part[0] + len(part))) for part in parts if part)


def test_a_group_needs_the_pages_that_were_planned() -> None:
    """Whatever the chunks, window and sink: the group runs in a pool of just these pages, and a pool that is larger sees as many in use."""
    choose = random.Random(torch.initial_seed())
    windows = 0
    for _ in range(200):
        size = choose.randint(1, 3)
        chunks = [choose.choice([1, size]), *[size] * choose.randint(0, 6)]
        pivot, branches, sink = choose.randint(0, len(chunks)), choose.randint(1, 4), choose.randint(0, 3)
        window = choose.choice([None, sink + size + choose.randint(0, 8)])
        plan = plan_group(chunks[:pivot], chunks[pivot:], branches, window=window, sink=sink)
        windows += plan.pages < sum(chunks[:pivot]) + branches * sum(chunks[pivot:])
        for pool, reserve in ((make(max(1, plan.pages)), True), (make(2 * sum(chunks) * branches), False)):
            reserved = pool.reserve(plan if reserve else GroupPlan(0, 0, branches))
            assert consecutive(reserved)
            prefix = pool.table()
            slide(pool, [prefix], chunks[:pivot], [reserved.prefix], window, sink)
            tails = [prefix.fork() for _ in range(branches)]
            slide(pool, tails, chunks[pivot:], reserved.tails, window, sink)
            assert pool.peak_in_use == plan.pages
            for table in (prefix, *tails):
                table.release()
            reserved.release()
            assert pool.pages_in_use == 0
    assert windows > 10, "some windows matter"


def test_a_plan_says_what_fits() -> None:
    plan = plan_group([3, 3], [3, 3], 12)
    assert (plan.prefix, plan.tail, plan.branches, plan.pages) == (6, 6, 12, 78)
    assert [plan.branches_within(pages) for pages in (5, 6, 11, 12, 30, 78, 100)] == [0, 0, 0, 1, 4, 12, 12]
    assert plan_group([3], [], 12).branches_within(3) == 12
    assert plan_group([], [3] * 5, 2, window=9, sink=3) == GroupPlan(0, 9, 2)
    with pytest.raises(ValueError, match="a chunk of 3 pages does not fit a window of 5 with a sink of 3"):
        plan_group([3], [3], 2, window=5, sink=3)
    with pytest.raises(ValueError, match="must not be negative"):
        plan_group([3], [-3], 2)


def test_a_group_that_does_not_fit_takes_nothing() -> None:
    pool = make(20)
    page = 2 * LAYERS * TOKENS * HEADS * DIM * 4
    assert pool.page_bytes == page
    message = rf"a prefix of 6 pages and 4 tails of 4 are 22 pages \({22 * page / 2**30:.3g} GiB\), 20 of 20 are free; at most 3 branches"
    with pytest.raises(PagePoolExhausted, match=message):
        pool.reserve(plan_group([6], [4], 4))
    assert pool.pages_in_use == 0 and pool.peak_in_use == 0
    reserved = pool.reserve(plan_group([6], [4], 3))
    assert reserved.prefix == list(range(12, 18)) and [pages[0] for pages in reserved.tails] == [0, 4, 8]
    table = pool.table()
    table.extend(reserved.tails[1])
    reserved.tails[1].clear()
    reserved.release()
    assert pool.pages_in_use == 4
    table.release()
    reserved.release()
    assert pool.pages_in_use == 0


def test_a_group_finds_the_stretches_that_hold_it() -> None:
    """Free: 4 pages, then 7. The tails have to take the second stretch, whichever part is asked for first."""
    pool = make(12)
    pages = pool.allocate(12)
    pool.release(pages[:4] + pages[5:])
    reserved = pool.reserve(GroupPlan(4, 3, 2))
    assert consecutive(reserved) and (reserved.prefix, reserved.tails) == ([0, 1, 2, 3], [[5, 6, 7], [8, 9, 10]])
    reserved.release()
    reserved = pool.reserve(GroupPlan(5, 3, 2))
    assert not consecutive(reserved) and pool.pages_free == 0
    reserved.release()
    assert pool.allocate(3) == [0, 1, 2], "the shortest stretch that holds them"
