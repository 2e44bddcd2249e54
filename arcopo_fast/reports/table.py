"""Numbers as text, and Markdown tables: what every report prints them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reports are written without PyTorch
    from arcopo_fast.evaluation.compare import Interval


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, padded: bool = True) -> str:
    """Return a table; every line ends with a line feed.

    numbers: align all columns but the first to the right. padded: give the cells of a column one width, to be read as text too.
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]
    right = [numbers and place > 0 for place in range(len(head))]
    ruler = ["-" * (width - 1) + ":" if aligned else "-" * (width or 3) for width, aligned in zip(widths, right)]
    lines.insert(1, ruler)
    return "".join(
        f"| {' | '.join(cell.rjust(width) if aligned else cell.ljust(width) for cell, width, aligned in zip(line, widths, right))} |\n"
        for line in lines
    )


def plain(value: float) -> str:
    """Return three digits, with a true minus; a dash for what is not known."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "–"


def signed(value: float, digits: int = 3) -> str:
    """Return a number with its sign, a true minus, and no sign for what rounds to zero; a dash for what is not known."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def plus_minus(error: float, digits: int = 3) -> str:
    """Return what follows a number with an error; nothing where that is not known."""
    return f" ± {error:.{digits}f}" if math.isfinite(error) else ""


def brackets(interval: Interval, shown: Callable[[float], str] = plain) -> str:
    """Return the bounds of an interval in brackets; nothing where they are not known."""
    return f"[{shown(interval.low)}, {shown(interval.high)}]" if math.isfinite(interval.low) else ""


def interval_change(interval: Interval) -> str:
    """Return a change with its interval, and a mark where none was shown."""
    if not math.isfinite(interval.low):
        return f"{signed(interval.mean)} (one prompt: no interval)"
    shown = partial(signed, digits=change_digits(interval))
    return f"{shown(interval.mean)} {brackets(interval, shown)}{'' if interval.direction else ' ≈'}"


def change_digits(interval: Interval) -> int:
    """Return as many digits as tell an interval from 0: three, or more where all of it is smaller than that shows."""
    largest = max(abs(interval.low), abs(interval.high))
    return min(9, max(3, 1 - math.floor(math.log10(largest)))) if 0 < largest < math.inf else 3
