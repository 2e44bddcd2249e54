"""Versions of installed packages, for what is printed and kept beside results."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str) -> str | None:
    """None for one that is not installed, as this one is not where it lies on PYTHONPATH."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
