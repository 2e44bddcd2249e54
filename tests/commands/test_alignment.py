"""The promise of `make train`, in full: for three seeds the default recipe raises the reward by a standard deviation. Prints the minutes.

Slow: run by `make test-alignment`, not by `make test`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from arcopo_fast.train import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_recipe_aligns(seed: int, tmp_path: Path) -> None:
    started = time.monotonic()
    main(["toy", f"seed={seed}", f"run.directory={tmp_path}"])
    minutes = (time.monotonic() - started) / 60
    evaluation = json.loads((tmp_path / "toy" / "evaluation.json").read_text())
    before, after = evaluation["before"]["reward"], evaluation["after"]["reward"]
    rise = (after["mean"] - before["mean"]) / before["std"]
    print(f"seed {seed}: {before['mean']:.3f} -> {after['mean']:.3f}, {rise:+.2f} standard deviations in {minutes:.1f} minutes")
    assert rise >= 1.0
