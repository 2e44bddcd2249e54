"""Has a run stopped learning?

Where the old policy is fixed (groups from a buffer), each visit moves the policy further from it, until the clip lets no gradient through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from arcopo_fast.reports.results import Record
from arcopo_fast.storage.metrics import number

PATIENCE = 10
"""Iterations in a row that make a stall: single ones may lack variance."""
LIVE = 0.01
"""Share of live ratios below which an iteration teaches nothing to speak of: what is left of the gradient is that of a few ratios."""


def stalled_since(records: Sequence[Record]) -> int | None:
    """Return the first iteration of the stall in which the records end; None if they end in none.

    A stall is `PATIENCE` or more iterations in a row that took no optimizer step, or in which less than `LIVE` of the ratios were live.
    """
    start, length = None, 0
    for record in reversed(records):
        if not _teaches_nothing(record):
            break
        start, length = record.get("step"), length + 1
    return start if length >= PATIENCE and isinstance(start, int) else None


def notice(since: int) -> str:
    """Return what to tell the user of a stall that began at iteration `since`."""
    return (
        f"the run has learned nothing since iteration {since}: the clip lets less than {LIVE:.0%} of the ratios through, or no step was "
        "taken. More iterations will not help: stop here, raise objective.clip, lower optimizer.lr, or train on a new buffer"
    )


def _teaches_nothing(record: Record) -> bool:
    live = [number(value) for name, value in record.items() if name.startswith("update") and name.endswith("/live")]
    return record.get("steps") == 0 or (bool(live) and math.fsum(live) / len(live) < LIVE)
