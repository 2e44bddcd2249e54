"""Fixtures that several tests of commands share, made once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.evaluations import whole, write_adapters

from arcopo_fast import evaluate
from arcopo_fast.cli import run_command


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different rank, alpha and layers; `zero` adds nothing, and `thin` is of another generator."""
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def evaluated(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model and three adapters, one at two scales, undisturbed; batches of 4, the second of which is short."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert run_command(evaluate.main, [*whole(adapters), "--out", str(out)]) == 0
    return out
