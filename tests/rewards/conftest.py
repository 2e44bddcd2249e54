"""What tests of published judges share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place where published files are looked for, and nowhere else."""
    from support.judges import published_files  # transformers and peft, which most tests here do without

    return published_files(tmp_path, monkeypatch)
