"""The page pool against a naive model, for thousands of random steps: nothing is shared in the model but a label that says what should be.

In the model a video is a list of columns with contents of their own, plain Python numbers. A label stands for the page that columns of
forked videos are meant to share. Reference counts, pages in use and what may still be read or written by an old plan are found from the
labels anew after every step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from arcopo_kernels.paging import PagePool, PagePoolExhausted, PageRun, PageTable, plan_group

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.seeds import seed_of

LAYERS, PAGES, TOKENS, HEADS, DIM = 2, 14, 2, 2, 1
VIDEOS, PLANS = 6, 6  # kept at most
EXAMPLES, STEPS = 180, 100  # an example may end early; 10,000 steps have to come together
WALKS = 5  # at most: another walk where the first went too seldom

EVENTS = (
    "copied pages",
    "copies that did not fit",
    "pages that did not fit",
    "groups that did not fit",
    "irregular runs",
    "old plans read",
    "old plans written",
    "stale plans not read",
    "stale plans not written",
    "misuses",
    "uses after release",
)
"""What has to happen often for the walk to mean something."""

INDEX = st.integers(0, 63)
FEW = st.integers(1, 3)


@dataclass(eq=False)
class Label:
    version: int = 0  # how often the page was prepared for a write
    writer: Plan | None = None


@dataclass(eq=False)
class Column:
    label: Label
    data: list[Any]  # for each layer keys, values [tokens][heads][dim]


@dataclass(eq=False)
class Video:
    table: PageTable
    columns: list[Column] = field(default_factory=list)


@dataclass(eq=False)
class Plan:
    rows: list[list[Column]]  # the columns planned, of each video
    prepared: bool
    runs: list[PageRun] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def labels(self) -> list[Label]:
        return [column.label for row in self.rows for column in row]


class PoolMachine(RuleBasedStateMachine):
    seen: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(layers=LAYERS, pages=PAGES, tokens_per_page=TOKENS, heads=HEADS, head_dim=DIM)
        self.videos: list[Video] = []
        self.released: list[PageTable] = []
        self.unclaimed: list[int] = []
        self.plans: list[Plan] = []
        self.peak = 0
        self.seen["steps"] -= 1  # the invariant is also checked once before the first step

    # What the model knows

    def holders(self) -> Counter[Label]:
        return Counter(column.label for video in self.videos for column in video.columns)

    def in_use(self) -> int:
        return len(self.holders()) + len(self.unclaimed)

    def free(self) -> int:
        return PAGES - self.in_use()

    def batch(self, at: int, rows: int) -> list[Video]:
        """Up to `rows` videos as long as one of them."""
        first = self.videos[at % len(self.videos)]
        others = [video for video in self.videos if video is not first and len(video.columns) == len(first.columns)]
        return [first, *others[: rows - 1]]

    def takes(self, count: int) -> None:
        self.peak = max(self.peak, self.in_use() + count)

    # Reading and writing

    def contents(self, rows: int, runs: list[PageRun]) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in range(rows)]
        for run in runs:
            stores = [
                store.expand(rows, -1, -1, -1).unflatten(1, (run.length, TOKENS)).tolist()
                for layer in range(LAYERS)
                for store in self.pool.read(layer, run)
            ]
            for row, pages in enumerate(found):
                pages += [[store[row][column] for store in stores] for column in range(run.length)]
        return found

    def write(self, plan: Plan) -> None:
        columns = len(plan.rows[0])
        data = torch.randn(LAYERS, 2, len(plan.rows), columns * TOKENS, HEADS, DIM)
        for layer in range(LAYERS):
            self.pool.write(layer, plan.runs, *data[layer])
        written = data.flatten(0, 1).unflatten(2, (columns, TOKENS)).movedim(0, 2).tolist()
        for row, pages in zip(plan.rows, written):
            for column, page in zip(row, pages):
                column.data = page

    def prepare(self, videos: list[Video], start: int, stop: int) -> Plan | None:
        """A write, prepared; None if the copies did not fit."""
        tables, holders = [video.table for video in videos], self.holders()
        shared = [(video, i) for video in videos for i in range(start, stop) if holders[video.columns[i].label] > 1]
        if len(shared) > self.free():
            with pytest.raises(PagePoolExhausted, match=f"{len(shared)} pages asked for, {self.free()} of {PAGES} are free"):
                self.pool.prepare_write(tables, start, stop)
            self.seen["copies that did not fit"] += 1
            return None
        runs = self.pool.prepare_write(tables, start, stop)
        self.takes(len(shared))
        self.seen["copied pages"] += len(shared)
        for video, i in shared:
            video.columns[i] = Column(Label(), video.columns[i].data)
        plan = Plan([video.columns[start:stop] for video in videos], True, runs)
        for label in plan.labels:
            label.version += 1
            label.writer = plan
        plan.versions = [label.version for label in plan.labels]
        return plan

    def extend(self, videos: list[Video], pages: list[int]) -> None:
        """Append the pages, as many to each video, and write them."""
        frames = len(pages) // len(videos)
        for row, video in enumerate(videos):
            video.table.extend(pages[row * frames : (row + 1) * frames])
            video.columns += [Column(Label(), None) for _ in range(frames)]
        plan = self.prepare(videos, len(videos[0].columns) - frames, len(videos[0].columns))
        assert plan is not None
        self.write(plan)

    # Steps

    @initialize(frames=FEW)
    def a_first_video(self, frames: int) -> None:
        self.begin()
        self.append(0, 1, frames)

    @precondition(lambda self: len(self.videos) < 2)
    @rule()
    def begin(self) -> None:
        self.videos.append(Video(self.pool.table()))

    @precondition(lambda self: self.videos)
    @rule(at=INDEX, rows=FEW, frames=FEW)
    def append(self, at: int, rows: int, frames: int) -> None:
        videos = self.batch(at, rows)
        count = frames * len(videos)
        if count > self.free():
            with pytest.raises(PagePoolExhausted, match=f"{count} pages asked for, {self.free()} of {PAGES} are free"):
                self.pool.allocate(count)
            self.seen["pages that did not fit"] += 1
        else:
            self.takes(count)
            self.extend(videos, self.pool.allocate(count))

    @precondition(lambda self: 0 < len(self.videos) < VIDEOS)
    @rule(at=INDEX)
    def fork(self, at: int) -> None:
        parent = self.videos[at % len(self.videos)]
        self.videos.append(Video(parent.table.fork(), [Column(column.label, column.data) for column in parent.columns]))
        for column in parent.columns:
            column.label.writer = None

    @precondition(lambda self: any(video.columns for video in self.videos))
    @rule(at=INDEX, rows=FEW, start=INDEX, length=FEW, later=st.booleans())
    def overwrite(self, at: int, rows: int, start: int, length: int, later: bool) -> None:
        """Prepare a write, and write at once or keep the plan."""
        videos = self.batch(at, rows)
        columns = len(videos[0].columns)
        if columns:
            start %= columns
            plan = self.prepare(videos, start, min(columns, start + length))
            if plan and later:
                self.plans.append(plan)
            elif plan:
                self.write(plan)

    @precondition(lambda self: self.videos)
    @rule(at=INDEX, rows=FEW, start=INDEX)
    def plan_read(self, at: int, rows: int, start: int) -> None:
        videos = self.batch(at, rows)
        start %= len(videos[0].columns) + 1
        plan = Plan([video.columns[start:] for video in videos], False, self.pool.runs([video.table for video in videos], start))
        plan.versions = [label.version for label in plan.labels]
        if plan.labels:
            self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule(at=INDEX)
    def read_by_an_old_plan(self, at: int) -> None:
        plan, holders = self.plans[at % len(self.plans)], self.holders()
        if all(label in holders and label.version == version for label, version in zip(plan.labels, plan.versions)):
            assert self.contents(len(plan.rows), plan.runs) == [[column.data for column in row] for row in plan.rows]
            self.seen["old plans read"] += 1
        else:
            with pytest.raises(ValueError, match="stale"):
                self.contents(len(plan.rows), plan.runs)
            self.seen["stale plans not read"] += 1

    @precondition(lambda self: self.plans)
    @rule(at=INDEX, stale=st.booleans())
    def write_by_an_old_plan(self, at: int, stale: bool) -> None:
        holders = self.holders()
        valid = [plan for plan in self.plans if plan.prepared and all(label in holders and label.writer is plan for label in plan.labels)]
        plans = self.plans if stale or not valid else valid  # few can still be written
        plan = plans[at % len(plans)]
        if plan in valid:
            self.write(plan)
            self.seen["old plans written"] += 1
        else:
            with pytest.raises(ValueError, match="may not be written"):
                self.write(plan)
            self.seen["stale plans not written"] += 1

    @precondition(lambda self: self.plans)
    @rule(at=INDEX)
    def forget_a_plan(self, at: int) -> None:
        self.plans.pop(at % len(self.plans))

    @precondition(lambda self: any(video.columns for video in self.videos))
    @rule(at=INDEX, start=INDEX, length=FEW)
    def drop(self, at: int, start: int, length: int) -> None:
        video = self.videos[at % len(self.videos)]
        start %= len(video.columns) + 1
        stop = min(len(video.columns), start + length)
        video.table.drop(start, stop)
        del video.columns[start:stop]

    @precondition(lambda self: len(self.videos) > 2)
    @rule(at=INDEX)
    def release(self, at: int) -> None:
        video = self.videos.pop(at % len(self.videos))
        video.table.release()
        self.released.append(video.table)

    @precondition(lambda self: not self.unclaimed)
    @rule(prefix=st.integers(0, 4), tail=st.integers(0, 3), branches=FEW)
    def reserve(self, prefix: int, tail: int, branches: int) -> None:
        plan = plan_group([prefix], [tail], branches)
        assert plan.pages == prefix + branches * tail
        if plan.pages > self.free():
            with pytest.raises(PagePoolExhausted, match=f"are {plan.pages} pages .* {self.free()} of {PAGES} are free"):
                self.pool.reserve(plan)
            self.seen["groups that did not fit"] += 1
        else:
            self.takes(plan.pages)
            reserved = self.pool.reserve(plan)
            assert [len(reserved.prefix), *map(len, reserved.tails)] == [prefix, *[tail] * branches]
            self.unclaimed += [*reserved.prefix, *(page for pages in reserved.tails for page in pages)]

    @precondition(lambda self: self.unclaimed)
    @rule()
    def give_back(self) -> None:
        self.pool.release(self.unclaimed)
        self.unclaimed.clear()

    @precondition(lambda self: self.unclaimed and self.videos)
    @rule(at=INDEX, count=FEW)
    def use_reserved(self, at: int, count: int) -> None:
        pages = self.unclaimed[:count]
        del self.unclaimed[:count]
        self.extend([self.videos[at % len(self.videos)]], pages)

    @precondition(lambda self: self.videos)
    @rule(at=INDEX)
    def misuse(self, at: int) -> None:
        """Each of these is refused, and the invariant finds nothing changed."""
        pool, video = self.pool, self.videos[at % len(self.videos)]
        table, held = video.table, video.table.pages
        misuses = [
            lambda: pool.prepare_write([table, table], 0, len(held)),
            lambda: pool.runs([table], 0, len(held) + 1),
            lambda: table.drop(len(held), len(held) + 1),
            lambda: pool.allocate(-1),
            lambda: pool.release([PAGES]),
            lambda: table.extend([-1]),
        ]
        if held:
            misuses += [lambda: pool.release(held[:1]), lambda: table.extend(held[-1:]), lambda: table.drop(1, 0)]
        if self.unclaimed:
            misuses += [lambda: pool.release(self.unclaimed[:1] * 2), lambda: table.extend([self.unclaimed[0], *held, PAGES])]
        if self.free():
            free = next(page for page in range(PAGES) if not pool.references(page))
            misuses += [lambda: pool.release([*self.unclaimed, free]), lambda: table.extend([free])]
        with pytest.raises(ValueError):
            misuses[at % len(misuses)]()
        self.seen["misuses"] += 1

    @precondition(lambda self: self.released)
    @rule(at=INDEX)
    def use_after_release(self, at: int) -> None:
        table = self.released[at % len(self.released)]
        uses = [
            table.release,
            table.fork,
            lambda: len(table),
            lambda: table.pages,
            lambda: table.drop(0, 0),
            lambda: table.extend(self.unclaimed),
            lambda: self.pool.runs([table]),
            lambda: self.pool.prepare_write([table], 0, 0),
        ]
        with pytest.raises(ValueError, match="was released"):
            uses[at % len(uses)]()
        self.seen["uses after release"] += 1

    # What holds after every step

    @invariant()
    def the_pool_is_what_the_model_is(self) -> None:
        self.seen["steps"] += 1
        holders = self.holders()
        pages: dict[Label, int] = {}
        for video in self.videos:
            assert len(video.table) == len(video.columns)
            for page, column in zip(video.table.pages, video.columns):
                assert pages.setdefault(column.label, page) == page, "columns that share a page hold the same one"
        expected = {page: holders[label] for label, page in pages.items()} | dict.fromkeys(self.unclaimed, 1)
        assert len(expected) == len(pages) + len(self.unclaimed), "pages of different columns are different"
        assert [self.pool.references(page) for page in range(PAGES)] == [expected.get(page, 0) for page in range(PAGES)]
        self.peak = max(self.peak, self.in_use())
        assert (self.pool.pages_in_use, self.pool.pages_free, self.pool.peak_in_use) == (self.in_use(), self.free(), self.peak)
        for length in {len(video.columns) for video in self.videos}:
            batch = [video for video in self.videos if len(video.columns) == length]
            runs = self.pool.runs([video.table for video in batch])
            self.seen["irregular runs"] += sum(run.index is not None for run in runs)
            assert self.contents(len(batch), runs) == [[column.data for column in video.columns] for video in batch]
        del self.plans[:-PLANS], self.released[:-PLANS]


def test_the_pool_against_a_naive_model() -> None:
    seen = PoolMachine.seen
    seen.clear()
    for walk in range(WALKS):
        run_state_machine_as_test(
            seed(seed_of(f"walk {walk}"))(PoolMachine),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        rare = {name: seen[name] for name in EVENTS if seen[name] < 20}
        if not rare and seen["steps"] >= 10_000:
            break
    print(dict(seen))
    assert seen["steps"] >= 10_000
    assert not rare, f"the walk hardly went there: {rare}"
