"""The number of pages that a group of videos takes: arithmetic on the host, before there is a pool or a page is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupPlan:
    """A group as its page pool sees it: a prefix that all branches share, and a tail of its own for each branch.

    Attributes:
        prefix: most pages that the prefix holds at any time.
        tail: most pages that one branch holds besides it.
        branches: how many run at once.
    """

    prefix: int
    tail: int
    branches: int

    @property
    def pages(self) -> int:
        """Pages that the group needs."""
        return self.prefix + self.branches * self.tail

    def branches_within(self, pages: int) -> int:
        """Return how many of the branches can run at once with so many pages; 0 if the prefix alone takes too many."""
        if pages < self.prefix:
            return 0
        return min(self.branches, (pages - self.prefix) // self.tail) if self.tail else self.branches

    def __str__(self) -> str:
        return f"a prefix of {self.prefix} pages and {self.branches} tails of {self.tail}"


def plan_group(
    prefix: Sequence[int],
    tail: Sequence[int],
    branches: int,
    *,
    window: int | None = None,
    sink: int = 0,
    replaced: Mapping[int, int] | None = None,
) -> GroupPlan:
    """Plan a group whose videos append chunks of pages and, with a window, drop the oldest ones to make room for each.

    Args:
        prefix, tail: pages of each chunk that is cached before and after the fork, in order.
        branches: G, or as many as run at once.
        window: pages that a video holds at most, the chunk being appended included (None: all).
        sink: first pages that a window never drops.
        replaced: {number: pages}: before that chunk of the tail, or after the last one, each branch replaces all pages that it sees by
            pages of its own, but for so many first ones.

    Raises:
        ValueError: a negative size, or a chunk that does not fit the window beside the sink.
    """
    if branches < 0 or sink < 0 or min((*prefix, *tail), default=0) < 0:
        raise ValueError(f"sizes must not be negative; got prefix {list(prefix)}, tail {list(tail)}, branches {branches}, sink {sink}")
    prefix_pages, shared = _slide(0, prefix, window, sink, {})
    tail_pages, _ = _slide(shared, tail, window, sink, replaced or {})
    return GroupPlan(prefix_pages, tail_pages, branches)


def _slide(shared: int, chunks: Sequence[int], window: int | None, sink: int, replaced: Mapping[int, int]) -> tuple[int, int]:
    """Return the pages of its own that a table, which starts with `shared` ones and appends `chunks`, holds at most and in the end."""
    held = peak = 0
    for number in range(len(chunks) + 1):
        if number in replaced:
            still_shared = min(shared, replaced[number])
            shared, held = still_shared, shared + held - still_shared
            peak = max(peak, held)
        if number == len(chunks):
            break
        chunk = chunks[number]
        excess = 0 if window is None else max(0, shared + held + chunk - window)
        if excess > max(0, shared + held - sink):
            raise ValueError(f"a chunk of {chunk} pages does not fit a window of {window} with a sink of {sink}")
        # The oldest go first: those of the prefix that are not in the sink.
        from_shared = min(excess, max(0, shared - sink))
        shared -= from_shared
        held += chunk - (excess - from_shared)
        peak = max(peak, held)
    return peak, held
