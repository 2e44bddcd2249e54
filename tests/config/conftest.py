"""The tests of settings stand in a folder with a small recipe, base.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipes import BASE


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
