"""The contents of folders."""

from __future__ import annotations

from pathlib import Path


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def tree(folder: Path) -> dict[str, str]:
    """Return every file below a folder, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
