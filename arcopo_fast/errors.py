"""The one exception that a command turns into one line and exit status 2, and the words that its messages are made of.

Raise it where a person gave something that cannot be used. The message says what was given, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class UserError(ValueError):
    """Input that cannot be used: a recipe, an override, a checkpoint, a directory."""


class RankLost(UserError):
    """Another rank has ended, or does not answer. Its own error is the cause."""


def shorten(text: str, length: int = 80) -> str:
    """Return at most `length` characters of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Return the first names of many, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def misfit(given: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> str:
    """Return what keeps tensors from being loaded, by names and shapes of those given and of one's own; nothing where they fit."""
    kinds = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {list(shape)} instead of {list(own[name])}"
            for name, shape in given.items()
            if name in own and list(shape) != list(own[name])
        ],
    }
    return "; ".join(f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names)


def first_line(error: BaseException, length: int = 200) -> str:
    """Return the first line of what another library says; the name of the exception where that is empty or longer than `length`."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and len(lines[0]) <= length else type(error).__name__
