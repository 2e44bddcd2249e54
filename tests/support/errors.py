"""Errors that a user sees are one line."""

from __future__ import annotations

import pytest

from arcopo_fast.errors import UserError


def one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    """Hold an error to one line of bearable length in which all parts stand."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"
